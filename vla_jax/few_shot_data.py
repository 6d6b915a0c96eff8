"""Data for the few-shot protocol: pictures of named classes, generated, of one's own, or a published set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from vla_jax.backbones.loading import Backbone
from vla_jax.data.cached import Chosen
from vla_jax.data.few_shot_sets import FEW_SHOT_SETS, TFDS_NAMES, few_shot_set
from vla_jax.data.few_shot_splits import opened_splits, three_splits
from vla_jax.data.scenes import SceneConfig, SceneSource, Shift
from vla_jax.data.scenes.vocabulary import COLORS, SHAPES
from vla_jax.data.sources import builder_names
from vla_jax.data.stages import Source
from vla_jax.data_sets import Data, find, splits_of
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation.few_shot import draw_shots
from vla_jax.task_kinds import Setup, annotation

OBJECTS = "shifted_objects"
"""The generated set by name: single objects of the shifted world, told apart by colour and shape."""

_OBJECTS = tuple((shape, color) for shape in SHAPES for color in COLORS[:4])

# Milder than the shift's default, in which the names say no more than chance to a backbone of the plain world.
_SHIFT = Shift(background=(200, 255), strokes=5, noise=8.0)

TEMPLATE = "a photo of a {}"
"""The sentence of sets that bring none of their own."""


ALL, BASE = "all_classes", "base_to_novel"
"""Folders of the runs that tell all classes apart, and of those that are trained on the base classes alone."""


@dataclasses.dataclass(frozen=True)
class Classes:
    """What is told apart, before any picture is read.

    Attributes:
        origin: where the pictures come from, for people.
        fingerprint: of the data; another one is other data.
        names: of the classes, in the order of labels.
        templates: sentences with ``{}`` where a name stands.
    """

    origin: str
    fingerprint: str
    names: tuple[str, ...]
    templates: tuple[str, ...]


def classes_of(data: Data, templates: Sequence[str] = ()) -> Classes:
    """The classes of a data set.

    Args:
        data: :data:`OBJECTS`, one of :data:`vla_jax.data.few_shot_sets.FEW_SHOT_SETS`, or a data set of pictures with
            labels, by name; or a file of one's own.
        templates: sentences with ``{}`` where a name stands; the set's own if empty.

    Raises:
        UserError: if there is no such data set, or data are missing or faulty, or are no pictures with labels.
    """
    data = resolved(data)
    if _prepared(data):
        return _prepared_classes(data, templates)
    if _generated(data):
        names = tuple(f"{color} {shape}" for shape, color in _OBJECTS)
        fingerprint = "_".join(map(str, [OBJECTS, *dataclasses.astuple(data.generated)]))
        return Classes("generated objects of a shifted world", fingerprint, names, tuple(templates) or (TEMPLATE,))
    found = find(data, "classification", Setup())
    published = FEW_SHOT_SETS.get(data.config) if data.name == "few_shot" and not data.path else None
    template = published.template if published else TEMPLATE
    names = tuple(name.replace("_", " ") for name in found.labels.names)
    return Classes(found.origin, found.fingerprint, names, tuple(templates) or (template,))


@dataclasses.dataclass(frozen=True)
class Pool:
    """All pictures that any draw of the protocol may take for training and validation, and all for testing.

    Attributes:
        labels: by split, int ``[examples]``, of the whole split.
        places: by split, which of its examples are here, in rising order.
        splits: by split, these.
    """

    labels: Mapping[str, np.ndarray]
    places: Mapping[str, np.ndarray]
    splits: Mapping[str, Source]

    def here(self, split: str, places: np.ndarray) -> np.ndarray:
        """Where examples at these places of a whole split stand in :attr:`splits`."""
        return np.searchsorted(self.places[split], places)


def pool(data: Data, classes: Classes, backbone: Backbone, most: Mapping[str, int], seeds: Sequence[int]) -> Pool:
    """The pictures for the protocol; the first use builds a data set.

    Args:
        data: which.
        classes: its :func:`classes_of`.
        backbone: says how large generated pictures are.
        most: by split, the most examples a class that are ever drawn; all are taken of other splits.
        seeds: of the draws.

    Raises:
        UserError: if data are missing or faulty, or a class has no example in one of the splits.
    """
    sources = sources_of(data, backbone)
    labels = {split: labels_of(source) for split, source in sources.items()}
    for split, found in labels.items():
        if missing := sorted(set(range(len(classes.names))) - set(found.tolist())):
            raise UserError(
                f"the {split} split has no picture of {len(missing)} of {len(classes.names)} classes, such as "
                f"{classes.names[missing[0]]!r}; the protocol needs some of each"
            )
    places = {
        split: np.unique(np.concatenate([draw_shots(found, most[split], seed) for seed in seeds]))
        if split in most
        else np.arange(len(found))
        for split, found in labels.items()
    }
    return Pool(labels, places, {split: Chosen(source, places[split]) for split, source in sources.items()})


def sources_of(data: Data, backbone: Backbone) -> dict[str, Source]:
    """All examples by split, with ``image`` and ``label``; the first use builds a data set.

    Raises:
        UserError: if data are missing or faulty.
    """
    data = resolved(data)
    if _prepared(data):
        return three_splits(data.name, data.splits, data.data_dir, _class_names(data))
    if not _generated(data):
        return splits_of(data, find(data, "classification", Setup()), backbone)
    each = {split: count // len(_OBJECTS) for split, count in dataclasses.asdict(data.generated).items()}
    return {split: _Objects(split, count, backbone.config.image_size) for split, count in each.items()}


def labels_of(source: Source) -> np.ndarray:
    """The labels of a source's examples, int64 ``[examples]``, without decoding their pictures."""
    return np.array([annotation(source, place)["label"] for place in range(len(source))], np.int64)


def resolved(data: Data) -> Data:
    """The same data, where one of the eleven few-shot sets is named: as the data set that its pictures are read from.

    With ``manual_dir``, and where TFDS has no pictures of the set, these are CoOp's published files and splits, the
    data set ``few_shot``. Without, they are what TFDS has prepared below ``data_dir``, in TFDS's splits. ImageNet has
    no published splits and is always that; ``manual_dir`` says where the names of its classes lie.

    Raises:
        UserError: if there is no such data set, or it has a configuration that does not exist.
    """
    if data.path or data.name in (OBJECTS, *builder_names()):
        return data
    name = TFDS_NAMES.get(data.name, data.name)
    if name not in FEW_SHOT_SETS:
        raise unknown("data set", data.name, [OBJECTS, *FEW_SHOT_SETS, *builder_names()])
    if data.config:
        raise UserError(f"{name} has no configurations; leave data.config out, which was {data.config!r}")
    of = FEW_SHOT_SETS[name]
    if of.folder and (data.manual_dir or of.tfds is None):
        return dataclasses.replace(data, name="few_shot", config=name)
    return dataclasses.replace(data, name=name)


def _generated(data: Data) -> bool:
    return data.name == OBJECTS and not data.path


def _prepared(data: Data) -> bool:
    """Whether resolved data are what TFDS has prepared."""
    return data.name in FEW_SHOT_SETS and not data.path


def _prepared_classes(data: Data, templates: Sequence[str]) -> Classes:
    of = few_shot_set(data.name)
    opened = opened_splits(data.name, data.splits, data.data_dir, _class_names(data))
    names, (tfds_name, *_, version) = opened["train"].class_names, opened["train"].origin.split("/")
    held_out = [split for split in data.splits if split not in opened]
    divided = f", {' and '.join(held_out)} held out of train" if held_out else ""
    # Slices make other data, and their brackets no good name of a folder.
    sliced = [quote(f"{split}={text}", safe="=") for split, text in data.splits.items() if text != split]
    fingerprint = "_".join([data.name, "tfds", version, *sliced])
    return Classes(
        f"{of.name} as in TFDS ({tfds_name} {version}{divided})", fingerprint, names, tuple(templates) or (of.template,)
    )


def _class_names(data: Data) -> Path | None:
    """The file with the names of classes that TFDS has as numbers alone; None where it has names."""
    if few_shot_set(data.name).class_name is not None:
        return None
    if not data.manual_dir:
        raise UserError(
            f"TFDS has the classes of {data.name} as numbers alone; give with data.manual_dir the folder in which "
            f"{data.name}/classnames.txt lies, CoOp's list of their names "
            "(https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md)"
        )
    return Path(data.manual_dir).expanduser() / data.name / "classnames.txt"


class _Objects:
    """The generated set: as many pictures of each class, class by class."""

    def __init__(self, split: str, each: int, size: int):
        # A seed a class: else the first of all classes would stand in one place.
        self._classes = [
            SceneSource(
                split,
                "classes",
                SceneConfig(seed, image_size=size, shapes=(s,), colors=(c,), shift=_SHIFT),
                max(each, 1),
            )
            for seed, (s, c) in enumerate(_OBJECTS)
        ]
        self._each = each

    def __len__(self) -> int:
        return self._each * len(self._classes)

    def annotation(self, index: int) -> dict[str, Any]:
        """What is said of a picture."""
        return {"label": index // self._each}

    def __getitem__(self, index: int) -> dict[str, Any]:
        label, place = divmod(int(index), self._each)
        return {"image": self._classes[label][place]["image"], "label": label}
