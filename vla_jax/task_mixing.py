"""How often each of several tasks is seen in training, where they are trained as one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from vla_jax.data.cached import Chosen
from vla_jax.data.mixing import Interleaving, Mixing
from vla_jax.errors import UserError
from vla_jax.reporting.table import Column, Table
from vla_jax.variants import TaskData

LONGEST = 2**24
"""The most examples of a pass over all tasks; where a task's share of it is less than it has, some are left out."""


def mixed(parts: Mapping[str, TaskData], there: Mapping[str, int], mixing: Mixing) -> dict[str, TaskData]:
    """The tasks with as many training examples as their shares say.

    Put together (:func:`vla_jax.many_tasks.as_one`) and shuffled by the pass, they are seen with these shares, and an
    interrupted run goes on with the same ones. A pass is at least as long as it was, and so long that it has every
    example of every task; tasks that must have more examples than there are repeat all of theirs.

    Args:
        parts: the tasks with their data.
        there: how many different training examples each has, the first ones of its source.
        mixing: the shares.

    Raises:
        UserError: if there is not one weight a task, or a share so small that a task would have no example.
    """
    given = shares(there, mixing)
    total = sum(len(part.splits["train"]) for part in parts.values())
    # A hair less than a whole number is that number.
    needed = max(math.ceil(there[name] / share - 1e-9) for name, share in given.items())
    total = max(total, min(needed, LONGEST))
    counts = Interleaving.of(list(given.values())).counts(total)
    found = {}
    for (name, part), count in zip(parts.items(), counts, strict=True):
        if not count:
            raise UserError(f"{name} has no share of {total:,} examples by {mixing}; give it more, or leave it out")
        train, size = part.splits["train"], there[name]
        if needed <= total:
            count = max(count, size)  # where whole numbers are a hair less than shares
        places = np.arange(count) % size
        if count < size:
            places = np.sort(np.random.default_rng(0).permutation(size)[:count])
        found[name] = dataclasses.replace(part, splits={**part.splits, "train": Chosen(train, places)})
    return found


def shares(there: Mapping[str, int], mixing: Mixing) -> dict[str, float]:
    """Each task's share of the training examples, of sum one.

    Raises:
        UserError: if there is not one weight a task.
    """
    return dict(zip(there, mixing.shares(list(there.values())).tolist(), strict=True))


def report(there: Mapping[str, int], mixing: Mixing, drawn: Mapping[str, Mapping[str, int]]) -> Table:
    """A row for each task: how many examples it has, its share, and what of it was drawn.

    Args:
        there: different training examples of each task.
        mixing: the shares.
        drawn: by way of training them together, how many examples of each task a run of it takes. Columns are the
            first way's, its share of what was drawn and how often it saw each example; rows have all ways'.
    """
    first = next(iter(drawn.values()))
    columns = (
        Column.text("task", "task"),
        Column.number("examples", "examples", format=",d"),
        Column.percent("share", "share", ".2f"),
        Column.number("drawn", "drawn", format=",d"),
        Column.percent("drawn_share", "share of the drawn", ".2f"),
        Column.number("passes", "times each", format=",.2f"),
    )
    rows = [
        {
            "task": name,
            "examples": there[name],
            "share": share,
            "drawn": first[name],
            "drawn_share": first[name] / sum(first.values()),
            "passes": first[name] / there[name],
            "drawn_by_way": {way: counts[name] for way, counts in drawn.items()},
        }
        for name, share in shares(there, mixing).items()
    ]
    return Table(columns, rows, title="Training examples of a run")
