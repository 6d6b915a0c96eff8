"""Experiments: each file answers one question; see its docstring for what, how long and what came out."""
