"""Products of thin factors: the best ones of a given rank, without ever forming what they multiply to.

Algebra runs on the host, in float64: it happens once, nothing has to be compiled for it, and what it gives is rounded a
single time.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def nearest_factors(
    matrix: Float[np.ndarray, "in out"], rank: int
) -> tuple[Float[np.ndarray, "in rank"], Float[np.ndarray, "rank out"]]:
    """The factors whose product comes nearest to a matrix (Eckart and Young 1936), the singular values split evenly."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def compress(
    a: Float[np.ndarray, "in wide"], b: Float[np.ndarray, "wide out"], rank: int
) -> tuple[Float[np.ndarray, "in rank"], Float[np.ndarray, "rank out"]]:
    """The factors of a given rank whose product comes nearest to ``a @ b``.

    Both factors' orthogonal parts are set aside first, so that only a matrix as small as the old rank is decomposed.
    """
    left, a = np.linalg.qr(a)
    right, b = np.linalg.qr(b.T)
    a, b = nearest_factors(a @ b.T, rank)
    return left @ a, b @ right.T
