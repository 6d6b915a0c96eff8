"""A source of small pictures that worker processes can import without JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Pictures:
    """Forty pictures of four numbers."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": np.random.default_rng(index).normal(size=4).astype(np.float32)}


def to_row(example: Mapping[str, Any], generator: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    """The picture with noise on it, as augmentation would do, and whether its sum is positive."""
    image = example["image"] + generator.normal(scale=0.1, size=4).astype(np.float32)
    return {"image": image, "label": np.asarray(image.sum() > 0, np.int32)}
