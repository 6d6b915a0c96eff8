"""TFDS builders of the data sets, one file each."""
