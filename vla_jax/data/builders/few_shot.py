"""Ten of the eleven few-shot data sets in the splits that CoOp's authors fixed (Zhou et al. 2022).

Every few-shot figure of CoOp and its successors is on these splits. ImageNet has no list: everybody trains on its
training pictures and tests on its validation pictures; see :func:`vla_jax.data.few_shot_sets.load_tfds_few_shot`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder, Row, Unique, read_json, read_lines
from vla_jax.data.builders._manual import ManualBuilder, Record
from vla_jax.data.few_shot_sets import FEW_SHOT_SETS, FewShotSet
from vla_jax.errors import UserError
from vla_jax.foreign import shown

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class FewShot(ManualBuilder):
    """Few-shot data sets as CoOp's DATASETS.md lays them out, one record a picture; one configuration a data set.

    A record: ``image``, ``image_id`` (its path, without ending), ``label`` and ``class_name`` (in words, for prompts).
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
As https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md says, into manual_dir:
  caltech-101/split_zhou_Caltech101.json           caltech-101/101_ObjectCategories/airplanes/image_0001.jpg ...
  oxford_pets/split_zhou_OxfordPets.json           oxford_pets/images/...
  stanford_cars/split_zhou_StanfordCars.json       stanford_cars/cars_train/...   stanford_cars/cars_test/...
  oxford_flowers/split_zhou_OxfordFlowers.json     oxford_flowers/jpg/...
  food-101/split_zhou_Food101.json                 food-101/images/...
  fgvc_aircraft/variants.txt, images_variant_train.txt, images_variant_val.txt, images_variant_test.txt, images/...
  sun397/split_zhou_SUN397.json                    sun397/SUN397/a/abbey/...
  dtd/split_zhou_DescribableTextures.json          dtd/images/banded/...
  eurosat/split_zhou_EuroSAT.json                  eurosat/2750/AnnualCrop/...
  ucf101/split_zhou_UCF101.json                    ucf101/UCF-101-midframes/...
"""
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name=name, description=of.name) for name, of in FEW_SHOT_SETS.items() if of.folder
    ]

    def class_names(self) -> list[str]:
        """The classes of the built data set, by label."""
        return json.loads(self._classes_file.read_text())

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        text = tfds.features.Text()
        return {
            "image": tfds.features.Image(),
            "image_id": text,
            "label": tfds.features.Scalar(np.int32),
            "class_name": text,
        }

    @property
    def _classes_file(self) -> Path:
        return Path(self.data_path) / "classes.json"

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        of = FEW_SHOT_SETS[self.builder_config.name]
        lists = _aircraft(folder, of) if of.name == "FGVCAircraft" else _published(folder, of)
        pictures = folder.pictures("/".join(filter(None, (of.folder, of.pictures))))
        classes, unique = _classes(lists), Unique("picture")
        records: dict[str, list[Record]] = {}
        for split, rows in lists.items():
            records[split] = []
            for row in rows:
                name = row.text("picture")
                unique.add(name, row)
                fields = {"image_id": str(Path(name).with_suffix("")), "label": row.integer("label")}
                fields["class_name"] = classes[fields["label"]]
                records[split].append(Record({"image": pictures.find(name, row)}, fields))
        self._classes_file.write_text(json.dumps(classes))
        return records


def _published(folder: ManualFolder, of: FewShotSet) -> dict[str, list[Row]]:
    """A file ``{"train": [["path.jpg", 0, "class name"], ...], "val": ..., "test": ...}``."""
    file = folder.require(f"{of.folder}/split_zhou_{of.name}.json")
    content = read_json(file)
    if not isinstance(content, Mapping) or not all(isinstance(content.get(name), list) for name in _SPLITS.values()):
        raise UserError(f"{file}: expected an object with lists train, val and test; this is not the published file")

    def row(values: Any, number: str) -> Row:
        if not isinstance(values, list) or len(values) != 3:
            found = shown(values)
            raise UserError(f"{file}, row {number}: expected a picture, a label and a class name; found {found}")
        return Row(dict(zip(("picture", "label", "class_name"), values, strict=True)), file, number)

    return {
        split: [row(values, f"{number} of {name!r}") for number, values in enumerate(content[name], 1)]
        for split, name in _SPLITS.items()
    }


def _aircraft(folder: ManualFolder, of: FewShotSet) -> dict[str, list[Row]]:
    """Lists with a picture's number and its variant a line; a label is a variant's place in ``variants.txt``."""
    labels = {
        variant.strip(): label for label, variant in enumerate(read_lines(folder.require(f"{of.folder}/variants.txt")))
    }
    rows: dict[str, list[Row]] = {}
    for split, name in _SPLITS.items():
        file = folder.require(f"{of.folder}/images_variant_{name}.txt")
        rows[split] = []
        for number, line in enumerate(read_lines(file), 1):
            picture, _, variant = line.strip().partition(" ")
            if variant not in labels:
                raise UserError(f"{file}, row {number}: the variant {variant!r} is not in variants.txt")
            values = {"picture": f"{picture}.jpg", "label": labels[variant], "class_name": variant}
            rows[split].append(Row(values, file, number))
    return rows


def _classes(lists: Mapping[str, list[Row]]) -> list[str]:
    """Class names in words by label.

    Raises:
        UserError: if a label has two names, or labels do not count from 0, or one has no training picture.
    """
    found: dict[int, str] = {}
    for split, rows in lists.items():
        for row in rows:
            label, name = row.integer("label"), row.text("class_name").replace("_", " ")
            if split == "train":
                found.setdefault(label, name)
            if label not in found:
                raise row.error(f"the label {label} ({name}) is outside the {len(found)} classes of training pictures")
            if found[label] != name:
                raise row.error(f"the label {label} is {name!r} here and {found[label]!r} elsewhere")
    if sorted(found) != list(range(len(found))):
        raise UserError(f"labels must count from 0 without gaps; found {sorted(found)[:5]} ... {max(found)}")
    return [found[label] for label in range(len(found))]
