"""The tasks that are put on one backbone together, with their data: generated scenes and easy-VQA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vla_jax.backbones.loading import Backbone
from vla_jax.data.scenes.vocabulary import COLORS, SHAPES
from vla_jax.data.stages import Source
from vla_jax.data_sets import Data, Generated, find, splits_of
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
    """

    title: str
    kind: str
    data: str = "scenes"


TASKS: Mapping[str, Member] = {
    "classification": Member("classification", "classification"),
    "easy_vqa": Member("easy-VQA", "vqa", "easy_vqa"),
    "scene_vqa": Member("scene questions", "vqa"),
    "retrieval": Member("retrieval R@1", "retrieval"),
    "grounding": Member("grounding", "grounding"),
    "statements": Member("statements", "matching"),
}
"""The tasks by name. Classes are the 64 pairs of a colour and a shape; pictures look for their caption among 256; a
phrase is grounded where its box and the annotated one have an intersection over union of 0.5."""


class Kinds:
    """Single objects with a class for each pair of a colour and a shape; of eight shapes `tiny` knows every one.

    Args:
        source: scenes with ``label``, the shape, and ``color_label``.
    """

    names = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = dict(self._source[index])
        return example | {"label": int(example["color_label"]) * len(SHAPES) + int(example["label"])}


def member_data(
    name: str, sizes: Generated, text_length: int, data_dir: str, backbone: Backbone, *, read: bool = True
) -> TaskData:
    """A task of the set with its data, as a backbone takes them; the first use builds the data sets.

    Args:
        name: one of :data:`TASKS`.
        sizes: examples of each split.
        text_length: tokens a text.
        data_dir: where data sets are built and kept.
        backbone: the backbone.
        read: whether the data are read; without, the task comes without splits.

    Raises:
        UserError: if there is no such task, or too few examples.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    member = TASKS[name]
    slices = {f"{split}_split": f"{split}[:{size}]" for split, size in dataclasses.asdict(sizes).items()}
    data = Data(name=member.data, generated=sizes, data_dir=data_dir, **slices)
    setup, classes = Setup(text_length=text_length), member.kind == "classification"
    found = find(data, member.kind, setup)
    labels = Labels(Kinds.names) if classes else found.labels
    if not read:
        return TaskData(task_of_kind(member.kind, labels, setup, backbone), {}, None)
    splits = splits_of(data, found, backbone)
    splits = {split: Kinds(source) for split, source in splits.items()} if classes else splits
    return data_of_kind(member.kind, labels, setup, backbone, splits)
