"""The stages of the input pipeline: numbering, transforming and batching examples, some of which cannot be read."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from grain.multiprocessing import SharedMemoryArray

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


class Numbered(grain.MapDataset):
    """A source whose examples know their position, with empty places up to ``length``.

    Grain's own data set of a source measures every example that it reads, which takes a tenth of the time of a small
    picture.
    """

    def __init__(self, source: Source, length: int):
        super().__init__()
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        place = index % self._length  # later epochs go on behind the last place
        return place, self._source[place] if place < len(self._source) else None


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
    """Stacks the rows of an evaluation batch, with ``filler`` marked as not valid in every gap.

    Attributes:
        filler: what stands in a gap.
        shared: as for :class:`Stacked`.
    """

    filler: Row
    shared: bool

    def __call__(self, rows: Sequence[Row | Gap]) -> dict[str, Any]:
        filler = self.filler | {"valid": np.asarray(False), "index": np.asarray(-1, np.int32)}
        return {
            "batch": stack([filler if isinstance(row, Gap) else row for row in rows], self.shared),
            "seen": sum(not isinstance(row, Gap) or row.name is not None for row in rows),
            "skipped": [row.name for row in rows if isinstance(row, Gap) and row.name is not None],
        }


# Grain's shuffle looks for the place of one of few examples among many more: 2.5 ms an example for 10 of them, 0.1 for
# 256, and 0.01 from about here on.
_FEW = 4096


def shuffled(examples: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Examples in an order that is drawn anew each epoch; an index beyond the last goes on into further epochs.

    Args:
        examples: seeded with ``seed``.
        seed: of the order.
    """
    return _FewShuffled(examples, seed) if len(examples) < _FEW else examples.shuffle()


class _FewShuffled(grain.MapDataset):
    """A shuffle that draws the order of a whole epoch at once."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._own_seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        return self.slice(index) if isinstance(index, slice) else self._parent[self._place(index)]

    def _getitems(self, indices: Sequence[int]) -> Sequence[Any]:
        return self._parent._getitems([self._place(index) for index in indices])

    def _place(self, index: int) -> int:
        length = len(self)
        epoch, place = divmod(index, length)
        return epoch * length + int(_order(self._own_seed, epoch, length)[place])


@functools.lru_cache(maxsize=64)  # threads read ahead into the next epoch, and mixtures have a stream for each task
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    # Zeros at the end of a seed count for nothing: without the one, the first epoch of seed 0 would be drawn from the
    # numbers of default_rng(0), which whoever made the examples may have used.
    return np.random.default_rng([seed, epoch, 1]).permutation(length)


class Groups(grain.MapDataset):
    """The rows of one process, several to an element.

    A process has a block of every global batch, so that the blocks one after another are the batch of a process that
    is alone, row by row: what depends on a row's place, such as dropout, is the same however many processes share it.

    Handing an element from a reading thread to the one that waits for it, and its statistics on the way, take longer
    than decoding a small picture. A group of rows pays for that once.
    """

    def __init__(self, parent: grain.MapDataset, size: int, batch_size: int, index: int, count: int, start: int):
        """Args:
        parent: the rows of all batches.
        size: rows of a group; those of the process's last batches that make no whole group are left out.
        batch_size: rows of a global batch, a multiple of ``count``.
        index: which process this is.
        count: how many there are.
        start: the global batch to begin with.
        """
        super().__init__(parent)
        self._size, self._batch, self._block = size, batch_size, batch_size // count
        self._offset = start * batch_size + index * self._block
        self._groups = (len(parent) - start * batch_size) // count // size

    def __len__(self) -> int:
        return self._groups

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        places = (divmod(row, self._block) for row in range(index * self._size, (index + 1) * self._size))
        return self._parent._getitems([self._offset + batch * self._batch + row for batch, row in places])


class FullBatches(grain.IterDataset):
    """Batches of ``size`` readable rows, with the names of those passed over on the way."""

    def __init__(self, parent: grain.IterDataset, group: int, size: int, most_skipped: int, shared: bool):
        """Args:
        parent: rows in groups.
        group: rows of a group.
        size: rows of a batch.
        most_skipped: rows passed over after which the batch is given up and left empty.
        shared: as for :class:`Stacked`.
        """
        super().__init__(parent)
        self._settings = (group, size, most_skipped, shared)

    def __iter__(self) -> grain.DatasetIterator:
        return _FullBatchesIterator(iter(self._parent), *self._settings)


class _FullBatchesIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, group: int, size: int, most_skipped: int, shared: bool):
        super().__init__(parent)
        self._group, self._size, self._most_skipped, self._shared = group, size, most_skipped, shared
        self._held: collections.deque[Row | Gap] = collections.deque()  # the rest of the group that is begun
        self._used = 0  # rows of the group to come that were handed out before

    def __next__(self) -> dict[str, Any]:
        batch = Stacked(self._size, self._shared)
        skipped: list[str] = []
        # Where nothing can be read, an empty batch lets the reader judge instead of searching for ever.
        while batch.count < self._size and len(skipped) < self._most_skipped:
            if not self._held:
                self._held.extend(next(self._parent)[self._used :])
                self._used = 0
            row = self._held.popleft()
            if isinstance(row, Gap):
                skipped.append(row.name)
            else:
                batch.add(row)
        return {"batch": batch.arrays(), "seen": batch.count + len(skipped), "skipped": skipped}

    # The position is in rows; a group that is begun is read again.

    def get_state(self) -> dict[str, Any]:
        groups = grain.experimental.get_next_index(self._parent)
        return {"next_index": groups * self._group - len(self._held) + self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        groups, self._used = divmod(state["next_index"], self._group)
        self._held.clear()
        grain.experimental.set_next_index(self._parent, groups)


LEAST_SHARED = 1 << 16
"""Bytes of an array for which memory that processes share is worth its making."""


class Stacked:
    """A batch that is filled row by row: each array of the rows gets a first axis.

    No more rows are held beside it than a group has; all of a large batch, to be stacked at its end, would take as much
    memory again.

    Attributes:
        count: rows so far.
    """

    def __init__(self, size: int, shared: bool):
        """Args:
        size: rows there will be.
        shared: puts large arrays into memory that other processes see, from which Grain need not copy them there.
        """
        self._size, self._shared = size, shared
        self._arrays: Row = {}
        self.count = 0

    def add(self, row: Row) -> None:
        """Puts a row behind the last one.

        Raises:
            ValueError: its fields, or their shapes or dtypes, are not those of the first row.
        """
        if not self._arrays:
            self._arrays = {name: self._empty(array) for name, array in row.items()}
        if row.keys() != self._arrays.keys():
            raise ValueError(f"the rows of a batch differ in {', '.join(sorted(row.keys() ^ self._arrays.keys()))}")
        for name, array in row.items():
            into = self._arrays[name]
            if array.shape != into.shape[1:] or array.dtype != into.dtype:
                raise ValueError(
                    f"the rows of a batch differ in {name!r}: {into.dtype} {list(into.shape[1:])}, then {array.dtype} "
                    f"{list(array.shape)}"
                )
            into[self.count] = array
        self.count += 1

    def arrays(self) -> Row:
        """The batch, or nothing of one that is not full."""
        if self.count == self._size:
            return self._arrays
        for array in self._arrays.values():
            if isinstance(array, SharedMemoryArray):
                array.unlink_on_del()  # nobody else will
        return {}

    def _empty(self, first: np.ndarray) -> np.ndarray:
        shape = (self._size, *first.shape)
        large = self._shared and self._size * first.nbytes >= LEAST_SHARED
        return SharedMemoryArray(shape, first.dtype) if large else np.empty(shape, first.dtype)


def stack(rows: Sequence[Row], shared: bool = False) -> Row:
    """Rows as one batch; see :class:`Stacked`."""
    batch = Stacked(len(rows), shared)
    for row in rows:
        batch.add(row)
    return batch.arrays()
