"""Algebra of trained adapters: merged into weights, combined with each other, extracted from weights.

Everything takes and gives an :class:`Adapter`, a plan and its parameters.
"""

from vla_jax.algebra.checks import HOWS
from vla_jax.algebra.combine import add, average, combine, interpolate, negate, scale
from vla_jax.algebra.extract import Extracted, extract
from vla_jax.algebra.merge import Merged, Rounding, merge, unmerge
from vla_jax.algebra.places import Adapter, select_task

__all__ = [
    "HOWS",
    "Adapter",
    "Extracted",
    "Merged",
    "Rounding",
    "add",
    "average",
    "combine",
    "extract",
    "interpolate",
    "merge",
    "negate",
    "scale",
    "select_task",
    "unmerge",
]
