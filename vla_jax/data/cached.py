"""Examples whose first part has been computed: what no trained weight touches is computed once, not once a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from vla_jax.data.batches import Batches
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.stages import Source
from vla_jax.distributed import is_first, on_host


class ArraySource:
    """Rows held in memory as a random-access source.

    Attributes:
        arrays: by field, ``[examples, ...]``.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()}


class Chosen:
    """Some examples of a source, in the order of their places.

    Attributes:
        source: all of them.
        places: int ``[chosen]``, where they stand in it.
    """

    def __init__(self, source: Source, places: np.ndarray):
        self.source, self.places = source, np.asarray(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[int(self.places[index])]


def as_rows(example: Mapping[str, Any], generator: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    """The transform of an :class:`ArraySource`: its examples are rows already."""
    del generator
    return dict(example)


def evaluate(
    pipeline: Pipeline,
    compute: Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    sharding: jax.sharding.Sharding,
    *,
    keep: tuple[str, ...] = (),
    description: str | None = None,
) -> dict[str, np.ndarray]:
    """Runs a function over one pass of a source and gathers its results in the source's order.

    Args:
        pipeline: an evaluation pipeline.
        compute: ``batch -> results``, arrays of which each has the batch as its first axis.
        sharding: of the batches.
        keep: fields of the batch to gather as well.
        description: of the progress bar; no bar without one.

    Returns:
        By name ``[examples, ...]``; ``index`` says which examples of the source they are, since those that cannot be
        read are missing.
    """
    batches = Batches(iter(pipeline), sharding)
    gathered: dict[str, np.ndarray] = {}
    count = 0
    try:
        hidden = None if description and is_first() else True
        for batch in tqdm(batches, total=len(pipeline), desc=description, disable=hidden):
            results = dict(compute(batch)) | {name: batch[name] for name in (*keep, "index")}
            valid = on_host(batch["valid"])
            for name, value in results.items():
                rows = on_host(value)[valid]
                if name not in gathered:
                    # In place from the start: results may fill most of the memory, and joining them would double them.
                    gathered[name] = np.empty((len(pipeline.source), *rows.shape[1:]), rows.dtype)
                gathered[name][count : count + len(rows)] = rows
            count += int(valid.sum())
    finally:
        batches.close()
    # Every process gives a share of each batch, so that only the order of the indices is that of the source.
    order = np.argsort(gathered["index"][:count], kind="stable") if gathered else []
    ordered = np.array_equal(order, np.arange(count))
    return {name: array[:count] if ordered else array[:count][order] for name, array in gathered.items()}
