"""The stages of the input pipeline: numbering, transforming and batching examples, some of which cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from vla_jax.data.image import UnreadablePicture

Row = dict[str, np.ndarray]


class Source(Protocol):
    """Examples by position: a TFDS data source, a list, or any object with these two methods that can be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


Transform = Callable[[Mapping[str, Any], np.random.Generator | None], Row]


@dataclass(frozen=True)
class Gap:
    """A row that is not there: the example cannot be read (and has a name), or lies behind the end."""

    name: str | None


@dataclass(frozen=True)
class Numbered:
    """A source whose examples know their position, with empty places up to ``length``."""

    source: Source
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, Mapping[str, Any] | None]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return index, self.source[index] if index < len(self.source) else None


@dataclass(frozen=True)
class Guarded:
    """The transformation of a numbered example, giving a gap where there is no picture."""

    transform: Transform

    def __call__(
        self, numbered: tuple[int, Mapping[str, Any] | None], generator: np.random.Generator | None = None
    ) -> Row | Gap:
        index, example = numbered
        if example is None:
            return Gap(None)
        try:
            row = self.transform(example, generator)
        except UnreadablePicture as error:
            return Gap(f"example {index} of the source: its picture {error}")
        return row | {"valid": np.asarray(True), "index": np.asarray(index, np.int32)}


@dataclass(frozen=True)
class FillBatch:
    """Stacks the rows of an evaluation batch, with ``filler`` marked as not valid in every gap."""

    filler: Row

    def __call__(self, rows: Sequence[Row | Gap]) -> dict[str, Any]:
        filler = self.filler | {"valid": np.asarray(False), "index": np.asarray(-1, np.int32)}
        return {
            "batch": stack([filler if isinstance(row, Gap) else row for row in rows]),
            "seen": sum(not isinstance(row, Gap) or row.name is not None for row in rows),
            "skipped": [row.name for row in rows if isinstance(row, Gap) and row.name is not None],
        }


class FullBatches(grain.IterDataset):
    """Batches of ``size`` readable rows, with the names of those passed over on the way."""

    def __init__(self, parent: grain.IterDataset, size: int, most_skipped: int):
        super().__init__(parent)
        self._size = size
        self._most_skipped = most_skipped

    def __iter__(self) -> grain.DatasetIterator:
        return _FullBatchesIterator(iter(self._parent), self._size, self._most_skipped)


class _FullBatchesIterator(grain.DatasetIterator):
    # Between two calls nothing is held back, so the parent's state says all.

    def __init__(self, parent: grain.DatasetIterator, size: int, most_skipped: int):
        super().__init__(parent)
        self._size = size
        self._most_skipped = most_skipped

    def __next__(self) -> dict[str, Any]:
        rows: list[Row] = []
        skipped: list[str] = []
        # Where nothing can be read, an empty batch lets the reader judge instead of searching for ever.
        while len(rows) < self._size and len(skipped) < self._most_skipped:
            row = next(self._parent)
            if isinstance(row, Gap):
                skipped.append(row.name)
            else:
                rows.append(row)
        full = len(rows) == self._size
        return {"batch": stack(rows) if full else {}, "seen": len(rows) + len(skipped), "skipped": skipped}

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


class Share(grain.MapDataset):
    """Of each global batch in turn, the rows of one process.

    A process has a block of the batch's rows, so that the blocks one after another are the batch of a process that is
    alone, row by row: what depends on a row's place, such as dropout, is the same however many processes share it.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, index: int, count: int, start: int = 0):
        """Args:
        parent: the rows of all batches.
        batch_size: rows of a global batch, a multiple of ``count``.
        index: which process this is.
        count: how many there are.
        start: the global batch to begin with.
        """
        super().__init__(parent)
        self._batch, self._size = batch_size, batch_size // count
        self._offset = start * batch_size + index * self._size
        self._rows = (len(parent) - start * batch_size) // count

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._size)
        return self._parent[self._offset + batch * self._batch + row]


def stack(rows: Sequence[Row]) -> Row:
    """Rows as one batch: each array gets a first axis."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
