"""Data of one's own: a file of rows (JSON lines, CSV, Parquet) that name pictures, checked and read at random."""

from vla_jax.data.own.scan import Problem, Scan, Summary
from vla_jax.data.own.settings import TASKS, Columns, OwnData, task_of
from vla_jax.data.own.source import Own, OwnSource, load_own

__all__ = ["TASKS", "Columns", "Own", "OwnData", "OwnSource", "Problem", "Scan", "Summary", "load_own", "task_of"]
