"""RefCOCO, RefCOCO+ (Yu et al. 2016) and RefCOCOg (Mao et al. 2016): phrases for single objects of COCO pictures.

Configurations are data set and division: ``refcoco_unc`` (142,210 phrases; ``testA`` has people, ``testB`` other
objects), ``refcoco_google``, ``refcocoplus_unc`` (141,564; no words of place), ``refcocog_google`` and
``refcocog_umd`` (95,010; no picture in two splits).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vla_jax.data.builders._files import (
    ManualFolder,
    Pictures,
    Row,
    Unique,
    as_rows,
    coco_folders,
    read_json,
)
from vla_jax.data.builders._manual import Annotations, ManualBuilder, Record
from vla_jax.data.builders._plain_pickle import read_plain_pickle
from vla_jax.data.image import UnreadablePicture, opened
from vla_jax.errors import UserError, unknown
from vla_jax.foreign import shown

# Corners are sums of numbers that were rounded, so a box at the picture's edge may stand out by a little.
_ROUNDING = 1.0
_LARGEST = 1e9  # a coordinate in pixels
_SPLITS = {"train": "train", "val": "validation", "test": "test", "testA": "testA", "testB": "testB"}


@dataclasses.dataclass
class RefcocoConfig(tfds.core.BuilderConfig):
    """A data set and a division of it.

    Attributes:
        folder: the data set's folder.
        division: who divided it: ``refs(<division>).p``.
    """

    folder: str = "refcoco"
    division: str = "unc"

    @property
    def references(self) -> str:
        """The file of phrases."""
        return f"{self.folder}/refs({self.division}).p"


class Refcoco(ManualBuilder):
    """RefCOCO, RefCOCO+ or RefCOCOg, one record a picture with its phrases.

    A record: ``image``, ``image_id``, ``width``, ``height``; ``boxes`` float32 ``[n, 4]``, those of all objects that
    are annotated in the picture and have an area (candidates to choose from, the phrases' own among them); and
    ``phrases`` with ``phrase``, ``phrase_id``, ``object_id`` (the annotation in COCO; phrases for one object share it),
    ``class_name`` and ``box`` float32 ``[4]``. Boxes are x0, y0, x1, y1 in pixels; COCO's x, y, width, height become
    them. The same picture may be in several splits with other objects, except in ``refcocog_umd``.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
By https://github.com/lichengunc/refer, unpacked into manual_dir:
  refcoco/instances.json     refcoco/refs(unc).p     refcoco/refs(google).p
  refcoco+/instances.json    refcoco+/refs(unc).p
  refcocog/instances.json    refcocog/refs(google).p    refcocog/refs(umd).p
From https://cocodataset.org/#download, unpacked into manual_dir (or its folder images/, or images/mscoco/images/):
  train2014/COCO_train2014_000000000009.jpg ...
"""
    BUILDER_CONFIGS: ClassVar[list[RefcocoConfig]] = [
        RefcocoConfig(
            name=f"{folder.replace('+', 'plus')}_{division}",
            description=f"{folder}, divided by {division}.",
            folder=folder,
            division=division,
        )
        for folder, division in (
            ("refcoco", "unc"),
            ("refcoco", "google"),
            ("refcoco+", "unc"),
            ("refcocog", "google"),
            ("refcocog", "umd"),
        )
    ]
    ANNOTATIONS = Annotations("phrases")

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        text, size = tfds.features.Text(), tfds.features.Scalar(np.int32)
        box = tfds.features.Tensor(shape=(4,), dtype=np.float32)
        return {
            "image": tfds.features.Image(),
            "image_id": text,
            "width": size,
            "height": size,
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            "phrases": tfds.features.Sequence(
                {"phrase": text, "phrase_id": text, "object_id": text, "class_name": text, "box": box}
            ),
        }

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        config = self.builder_config
        references = folder.require(config.references)
        instances = _Instances(folder.require(f"{config.folder}/instances.json"))
        pictures = folder.pictures(*coco_folders("train2014"))
        phrases = _phrases(references, instances)
        # A damaged file of annotations is found before 20,000 pictures are opened.
        found = {
            split: [instances.picture(image_id, pictures, row) for image_id, (row, _) in of_split.items()]
            for split, of_split in phrases.items()
        }
        folder.check_pictures()
        checked: set[str] = set()
        for split, of_split in phrases.items():
            for (path, fields), (row, _) in zip(found[split], of_split.values(), strict=True):
                if fields["image_id"] not in checked:
                    checked.add(fields["image_id"])
                    _check_size(path, fields, row)
        return {
            split: [
                Record({"image": path}, fields | {"phrases": of_picture}, len(of_picture))
                for (path, fields), (_, of_picture) in zip(found[split], of_split.values(), strict=True)
            ]
            for split, of_split in phrases.items()
        }


class _Instances:
    """Pictures, objects and classes of an ``instances.json``."""

    def __init__(self, file: Path):
        content = Row(read_json(file), file, 1)
        self.file = file
        self.pictures = _by_id(content, "images")
        self.objects = _by_id(content, "annotations")
        self.classes = {number: row.text("name") for number, row in _by_id(content, "categories").items()}
        self.boxes: dict[int, list[np.ndarray]] = {}
        self.box_of: dict[int, np.ndarray] = {}
        for number, row in self.objects.items():
            box = self._box(row)
            # Nothing can be found in a box without an area, and none overlaps with it.
            if box[2] > box[0] and box[3] > box[1]:
                self.box_of[number] = box
                self.boxes.setdefault(row.integer("image_id"), []).append(box)

    def picture(self, image_id: int, pictures: Pictures, row: Row) -> tuple[Path, dict[str, Any]]:
        """A picture's file and the fields that do not depend on a phrase."""
        image = self.pictures[image_id]
        fields = {
            "image_id": str(image_id),
            "width": image.integer("width"),
            "height": image.integer("height"),
            "boxes": np.stack(self.boxes[image_id]),
        }
        return pictures.find(image.text("file_name"), row), fields

    def _box(self, row: Row) -> np.ndarray:
        """An object's box as x0, y0, x1, y1."""
        numbers = row.items("bbox")
        if len(numbers) != 4 or not all(isinstance(number, int | float) for number in numbers):
            raise row.error(f"'bbox' must be x, y, width, height; found {shown(numbers)}")
        image_id = row.integer("image_id")
        if image_id not in self.pictures:
            raise row.error(f"the object {row.integer('id')} is in a picture {image_id} that is not among the images")
        image = self.pictures[image_id]
        size = np.array([image.integer("width"), image.integer("height")] * 2, np.float64)
        x, y, width, height = numbers
        if not all(abs(number) < _LARGEST for number in numbers):  # nor NaN
            raise row.error(f"the box {shown(numbers)} (x, y, width, height) has a negative or no size")
        box = np.array([x, y, x + width, y + height], np.float64)
        if not (np.isfinite(box).all() and width >= 0 and height >= 0):
            raise row.error(f"the box {numbers} (x, y, width, height) has a negative or no size")
        if (box < -_ROUNDING).any() or (box > size + _ROUNDING).any():
            raise row.error(
                f"the box {numbers} (x, y, width, height) of the object {row.integer('id')} lies outside its picture "
                f"{image_id}, which is {size[0]:.0f} x {size[1]:.0f}"
            )
        return np.clip(box, 0, size).astype(np.float32)


def _by_id(content: Row, key: str) -> dict[int, Row]:
    unique, found = Unique(f"id among {key!r}"), {}
    for row in as_rows(content.items(key), content.file):
        number = row.integer("id")
        unique.add(number, row)
        found[number] = row
    return found


def _phrases(file: Path, instances: _Instances) -> dict[str, dict[int, tuple[Row, list[dict[str, Any]]]]]:
    """By split and picture: the first row that speaks of it, and its phrases."""
    references = read_plain_pickle(file)
    if not isinstance(references, list) or not references:
        raise UserError(f"{file}: expected a list of references; this is not the published file")
    unique_references, unique_phrases = Unique("ref_id"), Unique("sent_id")
    found: dict[str, dict[int, tuple[Row, list[dict[str, Any]]]]] = {}
    for row in as_rows(references, file):
        unique_references.add(row.integer("ref_id"), row)
        split, number, image_id = row.text("split"), row.integer("ann_id"), row.integer("image_id")
        if split not in _SPLITS:
            raise row.error(str(unknown("split", split, _SPLITS)))
        if number not in instances.objects or instances.objects[number].integer("image_id") != image_id:
            raise row.error(f"no object {number} of the picture {image_id} is in {instances.file}")
        if number not in instances.box_of:
            raise row.error(f"the object {number} has a box without an area in {instances.file}")
        category = row.integer("category_id")
        if category not in instances.classes:
            raise row.error(f"no category {category} is in {instances.file}")
        phrases = found.setdefault(_SPLITS[split], {}).setdefault(image_id, (row, []))[1]
        sentences = row.items("sentences")
        if not sentences:
            raise row.error(f"the reference {row.integer('ref_id')} has no phrases")
        for values in sentences:
            sentence = Row(values, file, row.number)
            unique_phrases.add(sentence.integer("sent_id"), sentence)
            phrases.append(
                {
                    "phrase": sentence.text("sent"),
                    "phrase_id": str(sentence.integer("sent_id")),
                    "object_id": str(number),
                    "class_name": instances.classes[category],
                    "box": instances.box_of[number],
                }
            )
    return {split: found[split] for split in _SPLITS.values() if split in found}


def _check_size(path: Path, fields: Mapping[str, Any], row: Row) -> None:
    """Boxes are in pixels of the published picture; one that was resized would silently put them elsewhere."""
    try:
        with opened(path) as image:
            size = image.size
    except UnreadablePicture as error:
        raise row.error(f"the picture {path} cannot be opened: {error}") from error
    if size != (fields["width"], fields["height"]):
        raise row.error(
            f"the picture {path} is {size[0]} x {size[1]} and its boxes are for {fields['width']} x "
            f"{fields['height']}; use the published pictures, not resized ones"
        )
