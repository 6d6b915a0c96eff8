from __future__ import annotations

import numpy as np
import pytest

from vla_jax.adapters import Affine, Bottleneck, LoRA
from vla_jax.exchange.report import norm

GENERATOR = np.random.default_rng(0)
A, B, A0, B0 = (GENERATOR.standard_normal(shape) for shape in ((6, 2), (2, 5), (6, 2), (2, 5)))


@pytest.mark.parametrize(
    ("method", "leaves", "expected"),
    [
        (LoRA(rank=2, alpha=3.0), {"a": A, "b": B}, np.linalg.norm(1.5 * A @ B)),
        (LoRA(rank=2, alpha=3.0, rank_stabilised=True), {"a": A, "b": B}, np.linalg.norm(3 / 2**0.5 * A @ B)),
        (LoRA(rank=2, alpha=2.0), {"a": A, "b": 0 * B}, 0.0),
        (
            LoRA(rank=2, alpha=2.0, init="pissa"),
            {"a": A, "b": B, "frozen/a": A0, "frozen/b": B0},
            np.linalg.norm(A @ B - A0 @ B0),
        ),
        (LoRA(rank=2, alpha=2.0, decomposed=True), {"a": A, "b": B, "magnitude": np.ones(5)}, np.linalg.norm(A @ B)),
        (Affine(shift=True), {"scale": np.array([1.0, 4.0]), "shift": np.array([0.0, 4.0])}, 5.0),
        (
            Bottleneck(rank=1),
            {"down/kernel": np.full((2, 1), 2.0), "up/kernel": np.ones((1, 1)), "norm/scale": np.zeros(1)},
            3.0,
        ),
    ],
    ids=["lora", "rank_stabilised", "zero_b", "pissa", "decomposed", "affine", "bottleneck"],
)
def test_norms_by_hand(method, leaves, expected):
    assert norm(method, leaves) == pytest.approx(expected, rel=1e-12, abs=1e-12)
