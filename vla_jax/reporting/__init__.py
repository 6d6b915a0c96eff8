"""Telling: result tables and figures, written whole or not at all."""
