"""Several updates of one kernel into one, element by element: TIES, DARE and trimmed sums.

Every function takes the updates as they shall count, each already multiplied with its weight. A weight thus means the
same as an adapter scaled by it, which leaves what is trimmed as it was and lets the elected sign follow the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray


def trim(update: Float[np.ndarray, "*shape"], density: float) -> Float[np.ndarray, "*shape"]:
    """Keeps the ``int(density * size)`` entries of largest magnitude, and those as large as the smallest of them."""
    kept = int(density * update.size)
    if not kept:
        return np.zeros_like(update)
    magnitude = np.abs(update)
    smallest = np.partition(magnitude, update.size - kept, axis=None)[update.size - kept]
    return np.where(magnitude >= smallest, update, 0.0)


def drop(update: Float[np.ndarray, "*shape"], density: float, key: PRNGKeyArray) -> Float[np.ndarray, "*shape"]:
    """DARE (Yu et al. 2024, equations 2 and 3): drops entries with probability ``1 - density``, rescales the rest."""
    return np.where(np.asarray(jax.random.bernoulli(key, density, update.shape)), update / density, 0.0)


def elect(updates: Sequence[Float[np.ndarray, "*shape"]]) -> Float[np.ndarray, "*shape"]:
    """Steps 2 and 3 of TIES (Yadav et al. 2023, section 4.1): the sign of larger total mass, and the disjoint mean.

    The mean of an entry is over the updates that have the elected sign there; entries of zero have no sign.
    """
    stacked = np.stack(updates)
    sign = np.where(np.sum(stacked, 0) >= 0, 1.0, -1.0)
    agree = np.sign(stacked) == sign
    return np.sum(np.where(agree, stacked, 0.0), 0) / np.maximum(np.sum(agree, 0), 1)
