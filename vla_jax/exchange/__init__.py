"""Trained adapters carried elsewhere: one file that needs nothing of this package, and peft's checkpoints."""
