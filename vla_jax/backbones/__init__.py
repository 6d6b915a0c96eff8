"""Frozen transformers that call a slot wherever an adapter may sit."""
