"""Data for one kind of task: of one's own, generated, or a data set by name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm.auto import tqdm

from vla_jax.backbones.loading import Backbone
from vla_jax.data.answers import normalise, texts
from vla_jax.data.builders._manual import ManualBuilder
from vla_jax.data.flattened import load_examples
from vla_jax.data.own import TASKS, Own, OwnData, Scan, load_own, task_of
from vla_jax.data.scenes.sampling import MAX_OBJECTS
from vla_jax.data.scenes.vocabulary import ANSWERS, SHAPES
from vla_jax.data.sources import load_source, make_builder, prepared_builder
from vla_jax.data.stages import Source
from vla_jax.errors import UserError, unknown
from vla_jax.task_data import Sizes, scenes
from vla_jax.task_kinds import Labels, Setup, annotation, answer_labels

SCENES: Mapping[str, str] = {
    "classification": "classes",
    "matching": "statements",
    "retrieval": "captions",
    "vqa": "questions",
    "grounding": "phrases",
}
"""By kind of task, the kind of generated scenes."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """How many scenes are generated.

    Attributes:
        train: for training.
        validation: for validation.
        test: for testing.
    """

    train: int = 16_000
    validation: int = 1_000
    test: int = 2_000


@dataclasses.dataclass(frozen=True)
class Data(OwnData):
    """Which data: a file of one's own with ``path``, else a data set by ``name``.

    Attributes:
        name: ``scenes``, or a data set of :mod:`vla_jax.data.builders`.
        config: the configuration of a data set by name; its default if empty.
        train_split: its split for training, or a slice of one, such as ``train[:10%]``.
        validation_split: its split for validation; ``train[90%:]`` where it has none.
        test_split: its split for testing.
        generated: how many scenes.
        data_dir: where data sets are built and kept.
        manual_dir: where the files lie that a data set is built from.
    """

    name: str = "scenes"
    config: str = ""
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    generated: Generated = dataclasses.field(default_factory=Generated)
    data_dir: str = "data"
    manual_dir: str = ""

    @property
    def own(self) -> OwnData:
        """The settings of a file of one's own alone."""
        return OwnData(**{field.name: getattr(self, field.name) for field in dataclasses.fields(OwnData)})

    @property
    def splits(self) -> dict[str, str]:
        """The splits of a data set by name."""
        return {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is to learn, before any picture is read.

    Attributes:
        kind: of the task.
        labels: what its head chooses from.
        fingerprint: of the data; another one is other data.
        origin: where they come from, for people.
    """

    kind: str
    labels: Labels
    fingerprint: str
    origin: str


class SceneBoxes:
    """Generated scenes whose examples have ``boxes`` float32 ``[objects, 4]`` too, those of all objects in pixels.

    Attributes:
        source: the examples, with what is known of each scene as JSON in ``scene``.
    """

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = self.source[index]
        objects = json.loads(texts([example["scene"]])[0])["objects"]
        return {**example, "boxes": np.array([thing["box"] for thing in objects], np.float32)}


def find(data: Data, task: str, setup: Setup) -> Found:
    """Looks at the data: what task they are for, and between what its head chooses.

    A file of one's own is checked; a data set by name is built if its answers are not known without that.

    Raises:
        UserError: if data are missing or faulty, or fit no task or several.
    """
    if data.path:
        own = own_data(data, task)
        return Found(own.task, _own_labels(data, own, setup), own.fingerprint, f"{data.path}: {_counts(own)}")
    if data.name == "scenes":
        if task and task not in SCENES:
            raise unknown("task", task, SCENES)
        kind = task or "matching"
        described = {"name": data.name, "kind": kind, **dataclasses.asdict(data.generated)}
        origin = f"generated scenes ({SCENES[kind]})"
        return Found(kind, _scene_labels(kind, setup), _fingerprint(described), origin)
    builder = make_builder(data.name, data.data_dir, data.config or None)
    _check_splits(data, builder)
    fields = _fields(builder.info.features)
    kind = task_of(fields, task)
    described = {"name": data.name, "kind": kind, "config": data.config, "splits": data.splits}
    labels = dataclasses.replace(_named_labels(data, kind, setup, builder), two_pictures="image_0" in fields)
    return Found(kind, labels, _fingerprint(described), data.name)


def _check_splits(data: Data, builder: tfds.core.DatasetBuilder) -> None:
    """Refuses splits that a data set never has, before it is built."""
    # Others, and those whose splits depend on the configuration, say so once they are built.
    known = builder.PUBLISHED_SPLITS if isinstance(builder, ManualBuilder) else {}
    if not known:
        return
    for wanted, split in data.splits.items():
        if (base := split.split("[")[0]) in known:
            continue
        advice = (
            f"give another {wanted}_split"
            if "train" in known
            else "it is made to test on: train on other data, and put it to the adapters that were saved, with "
            "python -m vla_jax.evaluation.probe"
        )
        raise UserError(f"{data.name} has no split {base!r}, only {', '.join(known)}; {advice}")


def splits_of(data: Data, found: Found, backbone: Backbone) -> dict[str, Source]:
    """Examples of ``train``, ``validation`` and ``test``; the first use builds a data set.

    Raises:
        UserError: if data are missing or faulty, or a split is empty.
    """
    if data.path:
        return dict(own_data(data, found.kind).splits)
    if data.name == "scenes":
        sizes = Sizes(**dataclasses.asdict(data.generated), data_dir=data.data_dir)
        sources = scenes(SCENES[found.kind], backbone, sizes)
        return {split: SceneBoxes(source) for split, source in sources.items()} if found.labels.boxes else sources
    # For retrieval a picture and all of its captions are one example: from itself it could not be told in a gallery.
    read = load_source if found.kind == "retrieval" else load_examples
    given = (data.config or None, data.manual_dir or None)
    splits = {split: read(data.name, named, data.data_dir, *given) for split, named in data.splits.items()}
    for split, source in splits.items():
        if len(source) == 0:
            raise UserError(
                f"the split {data.splits[split]!r} of {data.name} has no example; give another {split}_split"
            )
    return splits


def own_data(data: Data, task: str) -> Own:
    """Checked data of one's own; the check is made once as long as the files stay as they are."""
    stamps = []
    for path in data.files.values():
        file = Path(path).expanduser()
        stamps.append((file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None)
    return _own_data(data.own, task, tuple(stamps))


@functools.lru_cache(maxsize=2)
def _own_data(data: OwnData, task: str, stamps: tuple[Any, ...]) -> Own:
    del stamps
    with tqdm(total=Scan(data, task).size, desc=f"checking {data.path}", disable=None, leave=False) as bar:
        return load_own(data, task, lambda amount: bar.update(amount) and None)


def _own_labels(data: Data, own: Own, setup: Setup) -> Labels:
    if own.task == "grounding" and setup.grounding == "regions":
        if not own.has_boxes:
            raise UserError(
                f"grounding=regions chooses among candidate boxes, and {data.path} has no column of them; give each "
                "row a list of boxes in a column 'boxes' (or say its name with columns.boxes), or take grounding=box"
            )
        annotations = (source.annotation(index) for source in own.splits.values() for index in range(len(source)))
        return Labels(boxes=max(len(found["boxes"]) for found in annotations))
    if own.task == "vqa":
        answers = {
            split: [source.annotation(index)["answers"] for index in range(len(source))]
            for split, source in own.splits.items()
        }
        return answer_labels(answers, setup)
    return Labels(own.classes, two_pictures=own.two_pictures)


def _scene_labels(kind: str, setup: Setup) -> Labels:
    if kind == "vqa":
        return Labels(tuple(map(normalise, ANSWERS)), key="answer")
    if kind == "grounding" and setup.grounding == "regions":
        return Labels(boxes=MAX_OBJECTS)
    return Labels(tuple(SHAPES) if kind == "classification" else ())


def _named_labels(data: Data, kind: str, setup: Setup, builder: tfds.core.DatasetBuilder) -> Labels:
    features = builder.info.features
    if kind == "classification" and isinstance(features["label"], tfds.features.ClassLabel):
        return Labels(tuple(features["label"].names))
    if kind == "classification":  # its classes are known once it is built
        built = prepared_builder(data.name, data.data_dir, data.config or None, data.manual_dir or None)
        return Labels(tuple(built.class_names()))
    regions = kind == "grounding" and setup.grounding == "regions"
    if regions and "boxes" not in features:
        raise UserError(
            f"grounding=regions chooses among candidate boxes, and {data.name} has no field 'boxes'; take grounding=box"
        )
    if kind != "vqa" and not regions:
        return Labels()
    if kind == "vqa" and "answer_id" in features:
        return Labels(tuple(map(normalise, features["answer_id"].names)), key="answer")
    # Reading all examples of a large data set reads all of its pictures: what came of it is kept.
    described: dict[str, Any] = {"name": data.name, "config": data.config}
    if regions:
        described |= {"splits": data.splits, "what": "boxes"}
    elif setup.answers == "rank":
        described |= {"splits": data.splits, "least": setup.least_answers}
    else:
        described |= {"split": data.train_split, "least": setup.least_answers}
    kept = Path(data.data_dir).expanduser() / "vocabularies" / f"{data.name}_{_fingerprint(described)}.json"
    if not kept.is_file():
        labels = _read_labels(data, regions, setup)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(dataclasses.asdict(labels)))
    stored = json.loads(kept.read_text())
    return Labels(**stored | {"names": tuple(stored["names"])})


def _read_labels(data: Data, regions: bool, setup: Setup) -> Labels:
    """What only the examples of a data set by name say: their answers, or how many candidate boxes they have."""
    given = (data.config or None, data.manual_dir or None)
    if regions:  # a picture's boxes are all of its phrases'
        records = {split: load_source(data.name, named, data.data_dir, *given) for split, named in data.splits.items()}
        return Labels(boxes=max(len(found["boxes"]) for source in records.values() for found in _read(data, source)))
    read = data.splits if setup.answers == "rank" else {"train": data.train_split}
    sources = {split: load_examples(data.name, named, data.data_dir, *given) for split, named in read.items()}
    answers = {split: [texts(found["answers"]) for found in _read(data, source)] for split, source in sources.items()}
    return answer_labels(answers, setup)


def _read(data: Data, source: Source) -> Iterator[Mapping[str, Any]]:
    bar = tqdm(range(len(source)), desc=f"reading {data.name}", disable=None, leave=False)
    return (annotation(source, index) for index in bar)


def _fields(features: Mapping[str, Any]) -> set[str]:
    """The fields of an example, one an annotation, by the names that columns of one's own have."""
    found = {"image"}
    for name, feature in features.items():
        nested = getattr(feature, "feature", None)
        found |= {name} | (set(nested) if isinstance(nested, Mapping | tfds.features.FeaturesDict) else set())
    return found & (
        {"image_0"} | {"image"} | {column for groups in TASKS.values() for group in groups for column in group}
    )


def _counts(own: Own) -> str:
    return ", ".join(f"{len(source):,} {split}" for split, source in own.splits.items())


def _fingerprint(described: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
