"""Data: builders and sources, pictures and text, the input pipeline and batches on the mesh."""
