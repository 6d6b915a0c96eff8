"""Measuring: accuracy with its uncertainty, paired comparisons, and probes of what a model understood."""
