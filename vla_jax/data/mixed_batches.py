"""Training batches with examples of several tasks in each; :mod:`vla_jax.data.mixture` has what is around it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from vla_jax.data.mixing import Interleaving
from vla_jax.data.mixture import Mixture, check_setup
from vla_jax.data.pipeline import BatchIterator, Pipeline
from vla_jax.data.stages import Guarded, Numbered, Row, Source, Transform, shuffled
from vla_jax.errors import UserError


class Joined:
    """All tasks' examples one after the other; each says which task it is of, in ``route``.

    Args:
        sources: the tasks' examples.
    """

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self.ends = np.cumsum([len(source) for source in sources]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        route = int(np.searchsorted(self.ends, index, side="right"))
        start = self.ends[route] - len(self._sources[route])
        return dict(self._sources[route][int(index) - start]) | {"route": route}

    def drawn(self, rows: int, seed: int) -> list[int]:
        """How many examples of each task training takes, where all are shuffled as one; none is read.

        Args:
            rows: examples of all tasks that are taken, from the first one on.
            seed: of the training :class:`~vla_jax.data.pipeline.Pipeline`. Its order is meant without data workers, and
                with every picture readable.
        """
        passes, rest = divmod(rows, len(self))
        places = range(len(self))
        order = shuffled(Numbered(places, len(places)).seed(seed), seed).repeat()
        taken = [order[passes * len(self) + row][0] for row in range(rest)]
        begun = np.bincount(np.searchsorted(self.ends, taken, side="right"), minlength=len(self._sources))
        return [passes * len(source) + int(count) for source, count in zip(self._sources, begun, strict=True)]


@dataclasses.dataclass(frozen=True)
class _RoutedTransform:
    """The transform of the task that an example is of; ``route`` is the task's place in the mixture."""

    parts: tuple[tuple[Transform, int | None], ...]

    def __call__(self, example: Mapping[str, Any], generator: np.random.Generator | None = None) -> Row:
        transform, classes = self.parts[example["route"]]
        row = transform(example, generator) | {"route": np.asarray(example["route"], np.int32)}
        return row if classes is None else row | {"classes": np.asarray(classes, np.int32)}


@dataclasses.dataclass(frozen=True)
class _Stream(Pipeline):
    """A pipeline whose training order is the mixture's."""

    interleaving: Interleaving | None = None
    ends: tuple[int, ...] = ()

    def _ordered(self, examples: grain.MapDataset) -> grain.MapDataset:
        if self.interleaving is None:
            return super()._ordered(examples)
        starts = (0, *self.ends[:-1])
        seeds = [(self.seed + number) % 2**32 for number in range(len(starts))]
        tasks = [
            shuffled(examples[start:end].seed(seed), seed).repeat()
            for seed, start, end in zip(seeds, starts, self.ends, strict=True)
        ]
        return _Interleaved(tasks, self.interleaving).seed(self.seed)


class _Interleaved(grain.MapDataset):
    """Endless data sets, interleaved."""

    def __init__(self, parents: Sequence[grain.MapDataset], interleaving: Interleaving):
        super().__init__(parents)
        self._interleaving = interleaving

    def __len__(self) -> int:
        return min(map(len, self._parents))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        task, place = self._interleaving(index)
        return self._parents[task][place]


class MixedBatches(Mixture):
    """Training batches with examples of all tasks; iterate over it.

    ``route`` is the place of an example's task among the parts, ``index`` its place in :attr:`source`. By size, an
    epoch is all examples in one shuffled order; otherwise each task is shuffled for itself, and its examples come
    evenly spaced.
    """

    def __post_init__(self):
        super().__post_init__()
        if own := [part.name for part in self.parts if part.batch_size not in (None, self.batch_size)]:
            raise UserError(f"batches hold all tasks, so {', '.join(own)} cannot have a batch size of its own")
        if len({part.classes is None for part in self.parts}) > 1:
            raise UserError("either all tasks of mixed batches say how many classes they have, or none")
        self._check_fields()

    @functools.cached_property
    def source(self) -> Joined:
        """All tasks' examples."""
        return Joined([part.source for part in self.parts])

    def __iter__(self) -> MixedBatchIterator:
        return MixedBatchIterator(self)

    def pipeline(self) -> Pipeline:
        """The stream of all tasks."""
        by_size = self.mixing.by == "size"
        return _Stream(
            self.source,
            self._transform,
            self.batch_size,
            True,
            self.seed,
            self.workers,
            process_index=self.process_index,
            process_count=self.process_count,
            interleaving=None if by_size else Interleaving.of(list(self.shares.values())),
            ends=tuple(self.source.ends),
        )

    @property
    def _transform(self) -> _RoutedTransform:
        return _RoutedTransform(tuple((part.transform, part.classes) for part in self.parts))

    def _check_fields(self) -> None:
        """Rows that cannot be stacked are found before training, not in its midst."""
        first = None
        for part, end in zip(self.parts, self.source.ends, strict=True):
            row = Guarded(self._transform)((0, self.source[end - len(part.source)]))
            if not isinstance(row, dict):
                continue  # an unreadable picture says nothing of the others
            fields = {name: (array.dtype, array.shape) for name, array in row.items()}
            if first is None:
                first = (part.name, fields)
            elif differ := sorted(dict(first[1].items() ^ fields.items())):
                raise UserError(
                    f"mixed batches need rows of the same fields and shapes; those of {first[0]} and {part.name} "
                    f"differ in {', '.join(differ)}. Give transforms the same lengths, or use batches of one task"
                )


class MixedBatchIterator(BatchIterator):
    """The batches of :class:`MixedBatches` on this process, as numpy arrays, with a state that can be saved."""

    def __init__(self, mixture: MixedBatches):
        """Starts at the beginning of the stream."""
        super().__init__(mixture.pipeline())
        self._mixture = mixture
        self._drawn = np.zeros(len(mixture.parts), np.int64)

    def __next__(self) -> Row:
        """The next batch; see :meth:`BatchIterator.__next__`."""
        batch = super().__next__()
        self._drawn += np.bincount(batch["route"], minlength=len(self._drawn))
        return batch

    @property
    def drawn(self) -> dict[str, int]:
        """This process's examples of each task so far."""
        return dict(zip((part.name for part in self._mixture.parts), self._drawn.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """See :meth:`BatchIterator.state`."""
        # Each process counts what it has drawn itself, so that another number of them cannot go on from here.
        own = {"mixture": self._mixture.setup(), "drawn": self._drawn.tolist(), "position": None}
        return super().state() | own

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :meth:`BatchIterator.restore`.

        Raises:
            UserError: if the state is of another mixture.
        """
        check_setup(self._mixture, state["mixture"])
        super().restore(state)
        self._drawn = np.asarray(state["drawn"], np.int64)
