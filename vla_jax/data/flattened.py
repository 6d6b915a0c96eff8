"""One example an annotation, of records that hold a picture once with everything that is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.builders._manual import Annotations, ManualBuilder
from vla_jax.data.sources import load_source, prepared_builder, split_name, split_range
from vla_jax.data.stages import Source
from vla_jax.errors import UserError


class Flattened:
    """A source with one example for each annotation, in the order of records and, within a record, of annotations.

    An example has the record's other fields and the annotation's, by name; reading it reads its whole record. Nothing
    is read before: how many annotations each record has is written when a data set is built.
    """

    def __init__(
        self,
        source: Source,
        annotations: Annotations,
        counts: np.ndarray,
        start: int = 0,
        stop: int | None = None,
    ):
        """Takes a source of records.

        Args:
            source: the records.
            annotations: how they hold their annotations.
            counts: int ``[records]``, how many annotations each record has.
            start: the first annotation of the view.
            stop: the first annotation behind it; None is their number.

        Raises:
            UserError: if there are not as many counts as records.
        """
        if len(counts) != len(source):
            raise UserError(
                f"{len(counts)} records are counted and {len(source)} are there; delete the data set and build it anew"
            )
        self._source = source
        self._annotations = annotations
        self._ends = np.cumsum(counts, dtype=np.int64)  # [records], the first annotation behind each record's
        total = int(self._ends[-1]) if len(self._ends) else 0
        self._start, self._stop = start, total if stop is None else min(stop, total)

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example of one annotation.

        Raises:
            IndexError: if there is none at ``index``.
        """
        index = index.__index__()
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._start + index
        place = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[place - 1]) if place else 0
        return one_annotation(self._source[place], self._annotations, number - first)


def one_annotation(record: dict[str, Any], annotations: Annotations, position: int) -> dict[str, Any]:
    """The example that is one of a record's annotations.

    Args:
        record: with all of its annotations.
        annotations: how it holds them.
        position: which of them.
    """
    example = {name: value for name, value in record.items() if name not in (annotations.field, *annotations.lists)}
    held = record[annotations.field]
    if annotations.name is not None:
        return example | {annotations.name: held[position]}
    counted = {name: np.cumsum(held[f"{name}_count"]) for name in annotations.lists}
    example |= {name: values[position] for name, values in held.items() if name.removesuffix("_count") not in counted}
    for name, ends in counted.items():
        example[name] = record[name][ends[position - 1] if position else 0 : ends[position]]
    return example


def load_examples(
    name: str, split: str, data_dir: str | Path, config: Any = None, manual_dir: str | Path | None = None
) -> Source:
    """A split of a data set with one example an annotation; the first use builds the data set.

    Data sets whose records are single examples come as :func:`vla_jax.data.sources.load_source` gives them.

    Args:
        name: a name from :func:`vla_jax.data.sources.builder_names`.
        split: a split's name, or a slice of it such as ``train[:10%]`` or ``train[:500]``, counted in annotations.
        data_dir: the folder under which prepared data sets lie.
        config: the builder's configuration, by name or instance; None is its default.
        manual_dir: the folder in which files lie that are not downloaded by themselves.

    Raises:
        UserError: if the data set, configuration or split does not exist, or cannot be built.
    """
    builder = prepared_builder(name, data_dir, config, manual_dir)
    if not isinstance(builder, ManualBuilder) or builder.ANNOTATIONS is None:
        return load_source(name, split, data_dir, config)
    base = split_name(builder, split)
    counts = builder.annotation_counts(base)
    taken = split_range(split, int(counts.sum()))
    return Flattened(load_source(name, base, data_dir, config), builder.ANNOTATIONS, counts, *taken)
