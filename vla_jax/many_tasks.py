"""Several tasks as one: their examples in one source, their heads over one set of towers, their results apart.

What comes out is an ordinary task with ordinary data, so that whatever trains one task trains several. A batch holds
rows of all tasks: ``task`` says whose a row is; ``route``, which adapters it goes through, is the same number unless
somebody sends it elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones.clip import CLIPOutput
from vla_jax.data.mixed_batches import Joined
from vla_jax.data.stages import Gap, Guarded, Row, Source, Transform
from vla_jax.errors import UserError
from vla_jax.model import Batch, Task, fixed_texts
from vla_jax.names import Tree
from vla_jax.variants import TaskData

SENT = "sent"
"""The field of an example that says which adapters it goes through, where those are not its task's own."""


@dataclasses.dataclass(frozen=True)
class ManyTasks:
    """The heads of several tasks, each for the rows of its own.

    Attributes:
        tasks: the tasks; ``batch["task"]`` counts them.
        name: the heads' name, ``heads/<name>/<task>/...``.
    """

    tasks: tuple[Task, ...]
    name: str = "tasks"

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise UserError(f"tasks that are put together need names of their own; got {', '.join(names) or 'none'}")
        if own := [task.name for task in self.tasks if fixed_texts(task) is not None]:
            raise UserError(
                f"{', '.join(own)} has texts of its own in place of the batch's, which other tasks need; give it a "
                "head on features instead"
            )

    def init(self, features: int) -> Tree:
        """New heads, by task."""
        return {task.name: task.init(features) for task in self.tasks}

    def loss(self, head: Tree, output: CLIPOutput, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean of the tasks' losses, each over its own rows, and every task's loss and accuracy.

        A task without a row in the batch adds nothing to the sum.
        """
        losses, metrics = [], {}
        for task, rows in self._rows(batch):
            loss, found = task.loss(head[task.name], output, rows)
            losses.append(loss)
            metrics[f"{task.name}_loss"] = loss
            metrics |= {f"{task.name}_{name}": value for name, value in found.items() if name == "accuracy"}
        return self._joined(losses, batch), metrics

    def predict(self, head: Tree, output: CLIPOutput, batch: Batch) -> dict[str, jax.Array]:
        """``task`` int32 ``[batch]``, and every task's results for all rows as ``<task>/<field>``."""
        found = {"task": batch["task"]}
        for task, rows in self._rows(batch):
            results = task.predict(head[task.name], output, rows)
            found |= {f"{task.name}/{name}": values for name, values in results.items()}
        return found

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Whether each example is right, by the rule of its own task; ``task`` and ``index`` as they were.

        What else a task tells of its examples is ``<task>/<field>``, zero for those of other tasks.
        """
        told = {name: found[name] for name in ("task", "index") if name in found}
        told["correct"] = np.zeros(len(found["task"]), bool)
        for number, task in enumerate(self.tasks):
            rows = found["task"] == number
            if not rows.any():
                continue
            own = {name: values[rows] for name, values in own_fields(task.name, found).items()}
            for name, values in task.finish(own).items():
                whole = np.zeros((len(rows), *values.shape[1:]), values.dtype)
                whole[rows] = values
                told[f"{task.name}/{name}"] = whole
            told["correct"] |= told[f"{task.name}/correct"]
        return told

    def _joined(self, losses: list[jax.Array], batch: Batch) -> jax.Array:
        """One loss of those of all tasks, scalars, of a batch."""
        del batch
        return jnp.stack(losses).mean()

    def _rows(self, batch: Batch) -> list[tuple[Task, dict[str, jax.Array]]]:
        """The batch as each task sees it: other tasks' rows do not count, and their labels mean nothing."""
        views = []
        for number, task in enumerate(self.tasks):
            own = batch["task"] == number
            valid = own & batch["valid"] if "valid" in batch else own
            # A label that the task has no class for would make a loss of NaN, which no mask takes back.
            views.append((task, dict(batch) | {"valid": valid, "label": jnp.where(own, batch["label"], 0)}))
        return views


@dataclasses.dataclass(frozen=True)
class MixedTasks(ManyTasks):
    """Several tasks that training shows with shares of their own: every row of a batch counts the same in the loss.

    A task's share of the loss is thereby its share of the examples, as where all are shuffled into batches and a batch
    has one mean (VL-Adapter; Sung et al. 2022).

    Attributes:
        shares: each task's share of the examples. What a batch holds decides the loss; they tell what was trained with
            one mixture from what was trained with another.
    """

    shares: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if len(self.shares) != len(self.tasks):
            raise UserError(f"{len(self.tasks)} tasks were given {len(self.shares)} shares; give one for each")

    def _joined(self, losses: list[jax.Array], batch: Batch) -> jax.Array:
        counts = jnp.stack([view["valid"].sum() for _, view in self._rows(batch)]).astype(jnp.float32)
        return (jnp.stack(losses) * counts).sum() / jnp.maximum(counts.sum(), 1)


@dataclasses.dataclass(frozen=True)
class _OwnTransform:
    """The transform of each example's own task; fields that only other tasks have are zero."""

    transforms: tuple[Transform, ...]
    blank: Mapping[str, np.ndarray]

    def __call__(self, example: Mapping[str, Any], generator: np.random.Generator | None = None) -> Row:
        task = example["route"]
        row = self.transforms[task](example, generator)
        route = example.get(SENT, task)
        return {**self.blank, **row, "task": np.asarray(task, np.int32), "route": np.asarray(route, np.int32)}


class Sent:
    """Examples of several tasks, sent through adapters that somebody chose.

    Args:
        source: examples that tell their task, as :func:`as_one` joins them.
        routes: int ``[examples]``, the adapters of each; -1 is the bare backbone.
    """

    def __init__(self, source: Source, routes: np.ndarray):
        if len(source) != len(routes):
            raise UserError(f"{len(routes)} routes were given for {len(source)} examples")
        if len(routes) and np.min(routes) < -1:
            raise UserError(f"a route is a task from 0 on, or -1 for the bare backbone; given {np.min(routes)}")
        self._source, self._routes = source, routes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._source[index]) | {SENT: int(self._routes[index])}


def as_one(parts: Mapping[str, TaskData], shares: Mapping[str, float] | None = None) -> TaskData:
    """Several tasks with their data as one.

    Examples of a split stand one task after the other, in the order of ``parts``.

    Args:
        parts: the tasks by the names that they get here; without splits the task alone comes out.
        shares: the tasks' shares of the training examples, by which they then count in the loss; all count the same if
            None.

    Raises:
        UserError: if tasks have different splits, or rows whose common fields differ in shape or dtype.
    """
    splits = [tuple(part.splits) for part in parts.values()]
    if len(set(splits)) > 1:
        raise UserError(f"tasks that are put together have the same splits; got {', '.join(map(str, splits))}")
    tasks = tuple(dataclasses.replace(part.task, name=name) for name, part in parts.items())
    transform = _OwnTransform(tuple(part.transform for part in parts.values()), _blank(parts))
    joined = {split: Joined([part.splits[split] for part in parts.values()]) for split in splits[0]}
    # Rounded, so that what a machine's last bit makes of a share is no other mixture.
    many = ManyTasks(tasks) if shares is None else MixedTasks(tasks, shares=tuple(round(shares[n], 12) for n in parts))
    return TaskData(many, joined, transform)


def apart(parts: Mapping[str, TaskData], found: Mapping[str, np.ndarray], split: str) -> dict[str, dict[str, Any]]:
    """Predictions of several tasks together, by task.

    Args:
        parts: as they were put together.
        found: predictions as :meth:`ManyTasks.finish` makes them, each ``[seeds, examples, ...]``.
        split: which they are of.

    Returns:
        The task's own fields by task, with ``index`` the examples' places in the task's own source.
    """
    start, told = 0, {}
    for number, (name, part) in enumerate(parts.items()):
        own = found["task"][0] == number
        fields = {field: found[field] for field in ("index", "correct")} | own_fields(name, found)
        rows = {field: values[:, own] for field, values in fields.items()}
        told[name] = rows | {"index": rows["index"] - start}
        start += len(part.splits[split])
    return told


def own_fields(task: str, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is told of the examples of one of several tasks, by the task's own names of fields."""
    return {name.removeprefix(f"{task}/"): values for name, values in found.items() if name.startswith(f"{task}/")}


def _blank(parts: Mapping[str, TaskData]) -> Row:
    """Zeros for every field that some task's rows have; rows that cannot be stacked are found here."""
    first: dict[str, tuple[str, np.ndarray]] = {}
    for name, part in parts.items():
        for field, value in _readable_row(name, part).items() if part.splits else ():
            other, known = first.setdefault(field, (name, value))
            if (known.shape, known.dtype) != (value.shape, value.dtype):
                raise UserError(
                    f"rows of {other} and {name} differ in {field}: {known.dtype} {list(known.shape)} and "
                    f"{value.dtype} {list(value.shape)}; give both the same text length and picture size"
                )
    return {field: np.zeros_like(value) for field, (_, value) in first.items()}


def _readable_row(name: str, part: TaskData) -> Row:
    source = next(iter(part.splits.values()))
    for index in range(len(source)):
        row = Guarded(part.transform)((index, source[index]))
        if not isinstance(row, Gap):
            return {field: value for field, value in row.items() if field not in ("valid", "index")}
    raise UserError(f"none of the pictures of {name} can be decoded")
