"""Several tasks in one stream of training batches, each with a share of its own.

    parts = [Part("statements", source_a, transform_a), Part("easy_vqa", source_b, transform_b, batch_size=128)]
    batches = Batches(iter(TaskBatches(parts, Mixing(by="temperature", temperature=2.0), batch_size=64)), sharding)

Two kinds of batch:

- :class:`TaskBatches`: every batch is of one task, and says which. Tasks have batch sizes, fields and heads of their
  own; since the name is static, one jitted step compiles to one program a task.
- :class:`~vla_jax.data.mixed_batches.MixedBatches`: every batch holds examples of all tasks, which ``route`` and
  ``classes`` tell apart, for adapters and heads that are picked by example. All tasks' rows have the same fields and
  shapes.

Which task comes next is a function of the position alone, and shares are quotas, not chances: over any number of whole
epochs a task's count differs from its share by less than the number of tasks. Evaluation has no mixture: each task has
its own :class:`~vla_jax.data.pipeline.Pipeline`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vla_jax.data.mixing import Interleaving, Mixing
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.stages import Source, Transform
from vla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """One task of a mixture.

    Attributes:
        name: of the task.
        source: its training examples.
        transform: makes a row of one.
        batch_size: rows of its batches on all processes together, where batches are of one task; the mixture's if None.
        classes: how many classes it has, which rows of mixed batches then carry.
    """

    name: str
    source: Source
    transform: Transform
    batch_size: int | None = None
    classes: int | None = None


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What both kinds of mixture have in common.

    Attributes:
        parts: the tasks.
        mixing: their shares.
        batch_size: rows of a batch on all processes together, of tasks that have no other.
        seed: of orders and augmentation.
        workers: as for :class:`~vla_jax.data.pipeline.Pipeline`, as are the next two.
        process_index: which share of the stream this is; None asks JAX.
        process_count: how many share the stream; None asks JAX.
    """

    parts: Sequence[Part]
    mixing: Mixing
    batch_size: int
    seed: int = 0
    workers: int = 0
    process_index: int | None = None
    process_count: int | None = None

    def __post_init__(self):
        if not self.parts:
            raise UserError("a mixture needs at least one task")
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise UserError(f"a mixture names a task twice: {', '.join(names)}")
        for part in self.parts:
            if len(part.source) == 0:
                raise UserError(f"the task {part.name!r} of the mixture has no example")
        self.mixing.shares(self._sizes)

    @property
    def shares(self) -> dict[str, float]:
        """Each task's share of the examples."""
        shares = self.mixing.shares(self._sizes)
        return {part.name: float(share) for part, share in zip(self.parts, shares, strict=True)}

    def report(self) -> list[dict[str, Any]]:
        """A row for each task: ``task``, ``examples``, ``share`` of the examples drawn, ``batch_size``,
        ``share_of_batches``, and ``passes``, how often its examples are seen while as many examples are drawn as all
        tasks have.
        """
        total = sum(self._sizes)
        batches = np.array([self.shares[part.name] / self.size_of(part) for part in self.parts])
        return [
            {
                "task": part.name,
                "examples": len(part.source),
                "share": self.shares[part.name],
                "batch_size": self.size_of(part),
                "share_of_batches": float(of_batches),
                "passes": self.shares[part.name] * total / len(part.source),
            }
            for part, of_batches in zip(self.parts, batches / batches.sum(), strict=True)
        ]

    def size_of(self, part: Part) -> int:
        """Rows of a task's batches."""
        return part.batch_size or self.batch_size

    @property
    def _sizes(self) -> list[int]:
        return [len(part.source) for part in self.parts]

    def setup(self) -> dict[str, Any]:
        """What must be the same for a stream to go on."""
        return {"tasks": [part.name for part in self.parts], "examples": self._sizes} | {
            "shares": [round(share, 12) for share in self.shares.values()],
            "batch_sizes": [self.size_of(part) for part in self.parts],
            "seed": self.seed,
        }


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["task"])
@dataclasses.dataclass(frozen=True)
class TaskBatch(Mapping[str, Any]):
    """A batch of one task; reads like the batch itself.

    Attributes:
        task: the task's name, static: a jitted function of a batch is compiled once for each task.
        rows: the arrays.
    """

    task: str
    rows: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class TaskBatches(Mixture):
    """Training batches of one task each; iterate over it.

    An epoch has as many batches as all tasks have examples for, and the tasks' batches are shuffled in it anew.
    """

    def __iter__(self) -> TaskBatchIterator:
        return TaskBatchIterator(self)

    @functools.cached_property
    def epoch(self) -> int:
        """Batches of an epoch."""
        return max(1, round(sum(len(part.source) / self.size_of(part) for part in self.parts)))

    def task_at(self, step: int) -> int:
        """Which task the batch of a step is of, counted from 0."""
        epoch, place = divmod(step, self.epoch)
        shuffled = self._order(epoch)[place]
        return self._interleaving(epoch * self.epoch + int(shuffled))[0]

    def pipelines(self) -> list[Pipeline]:
        """The stream of each task."""
        settings = {"workers": self.workers, "process_index": self.process_index, "process_count": self.process_count}
        return [
            # Tasks with the same number of examples would be shuffled alike under one seed.
            Pipeline(part.source, part.transform, self.size_of(part), True, (self.seed + number) % 2**32, **settings)
            for number, part in enumerate(self.parts)
        ]

    @functools.cached_property
    def _interleaving(self) -> Interleaving:
        return Interleaving.of([self.shares[part.name] / self.size_of(part) for part in self.parts])

    def _order(self, epoch: int) -> np.ndarray:
        return _permutation(self.seed, epoch, self.epoch)


class TaskBatchIterator(Iterator[TaskBatch]):
    """The batches of :class:`TaskBatches` on this process, as numpy arrays, with a state that can be saved."""

    def __init__(self, mixture: TaskBatches):
        """Starts at the beginning of the stream."""
        self._mixture, self._step = mixture, 0
        self._iterators = [iter(pipeline) for pipeline in mixture.pipelines()]
        self._states = [iterator.state() for iterator in self._iterators]
        self._drawn = [0] * len(self._iterators)

    def __next__(self) -> TaskBatch:
        """The next batch."""
        task = self._mixture.task_at(self._step)
        rows = next(self._iterators[task])
        self._states[task] = self._iterators[task].state()
        self._drawn[task] += 1
        self._step += 1
        return TaskBatch(self._mixture.parts[task].name, rows)

    @property
    def drawn(self) -> dict[str, int]:
        """Batches of each task so far."""
        return dict(zip((part.name for part in self._mixture.parts), self._drawn, strict=True))

    def state(self) -> dict[str, Any]:
        """Where the iterator stands, after the last batch it gave: JSON-able, one for each process."""
        return {
            "step": self._step,
            "drawn": list(self._drawn),
            "tasks": list(self._states),
            "setup": self._mixture.setup(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where ``state`` was taken: the next batch is the one that followed it.

        Raises:
            UserError: if the state is of another mixture.
        """
        check_setup(self._mixture, state["setup"])
        for iterator, own in zip(self._iterators, state["tasks"], strict=True):
            iterator.restore(own)
        self._step, self._drawn, self._states = int(state["step"]), list(state["drawn"]), list(state["tasks"])

    def close(self) -> None:
        """Ends threads and worker processes; the iterator cannot be used any more."""
        for iterator in self._iterators:
            iterator.close()


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def check_setup(mixture: Mixture, theirs: Mapping[str, Any]) -> None:
    """Refuses the state of another mixture."""
    mine = mixture.setup()
    if changed := [name for name in mine if theirs.get(name) != mine[name]]:
        shown = ", ".join(f"{name} was {theirs.get(name)!r} and is now {mine[name]!r}" for name in changed)
        raise UserError(f"the mixture cannot go on from where it stopped: {shown}. Resume with the old value(s)")
