"""McNemar's exact test: do two trained models differ on the examples that both were asked?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from vla_jax.errors import UserError


@dataclass(frozen=True)
class McNemar:
    """Two trained models on the same examples, counted.

    Attributes:
        both: examples that both have right.
        only_a: examples that model a alone has right.
        only_b: examples that model b alone has right.
        neither: examples that neither has right.
        p_value: how often a fair coin would divide the examples on which they differ at least as unequally.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """The exact, two-sided form of McNemar's test (McNemar 1947, with the binomial for the chi-squared distribution).

    It speaks of two trained models. :func:`vla_jax.evaluation.statistics.paired_difference` says by how much methods
    differ, and has this p value where there is one seed.

    Args:
        correct_a: bool [examples], of model a.
        correct_b: bool [examples], of model b; the same examples in the same order.

    Raises:
        UserError: shapes that differ, several seeds, no examples, or values that are not True or False.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise UserError(
            f"McNemar's test compares two models on the same [examples], given {list(a.shape)} and {list(b.shape)}; "
            "for several seeds use paired_difference()"
        )
    if a.dtype != bool or b.dtype != bool:
        raise UserError(f"outcomes are True or False, given {a.dtype} and {b.dtype}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_a + only_b
    p_value = float(stats.binomtest(only_a, differing).pvalue) if differing else 1.0
    return McNemar(int((a & b).sum()), only_a, only_b, int((~a & ~b).sum()), p_value)
