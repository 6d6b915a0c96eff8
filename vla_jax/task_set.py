"""The tasks that are put on one backbone together, with their data: scenes, easy-VQA and textile defects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from vla_jax.backbones.loading import Backbone
from vla_jax.data.cached import Chosen
from vla_jax.data_sets import Data, Found, Generated, find, splits_of
from vla_jax.errors import unknown
from vla_jax.task_kinds import Labels, Setup, data_of_kind, task_of_kind
from vla_jax.variants import TaskData


@dataclasses.dataclass(frozen=True)
class Member:
    """A task of the set.

    Attributes:
        title: in tables and figures.
        kind: of the task, of :mod:`vla_jax.task_kinds`.
        data: ``scenes``, or a data set by name.
        there: how many examples there are, where they may be fewer than are asked for.
    """

    title: str
    kind: str
    data: str = "scenes"
    there: Generated | None = None


TASKS: Mapping[str, Member] = {
    "defects": Member("textile defects", "classification", "textile_defects", Generated(1_200, 200, 600)),
    "easy_vqa": Member("easy-VQA", "vqa", "easy_vqa"),
    "scene_shapes": Member("scene shapes", "classification"),
    "scene_vqa": Member("scene questions", "vqa"),
    "retrieval": Member("retrieval R@1", "retrieval"),
    "grounding": Member("grounding", "grounding"),
    "statements": Member("statements", "matching"),
}
"""The tasks by name. Defects are of three classes, and shapes of eight, those of a scene's only object; pictures look
for their caption among 256; a phrase is grounded where its box and the annotated one have an intersection over union of
0.5."""


def member_data(
    name: str, sizes: Generated, text_length: int, data_dir: str, backbone: Backbone, *, read: bool = True
) -> TaskData:
    """A task of the set with its data, as a backbone takes them; the first use builds the data sets.

    Args:
        name: one of :data:`TASKS`.
        sizes: examples of each split. Where there are fewer, those for training are repeated, so that tasks trained
            together are seen equally often, and the others are as many as there are.
        text_length: tokens a text.
        data_dir: where data sets are built and kept.
        backbone: the backbone.
        read: whether the data are read; without, the task comes without splits.

    Raises:
        UserError: if there is no such task, or too few examples.
    """
    data, found, setup = _find(name, sizes, text_length, data_dir)
    if not read:
        return TaskData(task_of_kind(found.kind, found.labels, setup, backbone), {}, None)
    splits = splits_of(data, found, backbone)
    if len(splits["train"]) < sizes.train:
        splits["train"] = Chosen(splits["train"], np.arange(sizes.train) % len(splits["train"]))
    return data_of_kind(found.kind, found.labels, setup, backbone, splits)


def member_examples(name: str, sizes: Generated) -> int:
    """How many different training examples a task of the set has where these are asked for."""
    there = TASKS[name].there
    return sizes.train if there is None else min(sizes.train, there.train)


def member_labels(name: str, sizes: Generated, text_length: int, data_dir: str) -> Labels:
    """What the head of a task of the set chooses from; for the arguments see :func:`member_data`."""
    return _find(name, sizes, text_length, data_dir)[1].labels


def _find(name: str, sizes: Generated, text_length: int, data_dir: str) -> tuple[Data, Found, Setup]:
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    member = TASKS[name]
    asked, there = dataclasses.asdict(sizes), dataclasses.asdict(member.there or sizes)
    slices = {f"{split}_split": f"{split}[:{min(size, there[split])}]" for split, size in asked.items()}
    data = Data(name=member.data, generated=sizes, data_dir=data_dir, **slices)
    setup = Setup(text_length=text_length)
    return data, find(data, member.kind, setup), setup
