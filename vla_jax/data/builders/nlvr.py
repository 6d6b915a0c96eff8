"""NLVR (Suhr et al. 2017): statements about three boxes of simple shapes, true or false.

12,409 statements for training, 989 of the development set (``validation``), 990 of the public and 988 of the hidden
test set (``hidden``); six pictures each, which show the boxes in all orders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder, Unique, read_json_lines
from vla_jax.data.builders._manual import ManualBuilder, Record

_SPLITS = {"train": "train", "validation": "dev", "test": "test", "hidden": "hidden"}
_ORDERS = 6


class Nlvr(ManualBuilder):
    """NLVR, one record a picture; the six pictures of a statement follow each other.

    A record: ``image``, ``image_id`` (``dev-1373-0-5``), ``text``, ``label`` (1 for true), ``statement_id``
    (``1373-0``), ``order`` (0 to 5, which of its pictures this is), ``structure`` (the boxes' objects, as JSON) and
    ``directory``. To hold out training examples hold out directories: no presentation is in two of them, whereas other
    directories' pictures may differ in the order of their boxes alone. The hidden set names none.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://github.com/lil-lab/nlvr, the folder nlvr/, into manual_dir (a clone is a manual_dir as it stands):
  nlvr/train/train.json     nlvr/train/images/0/train-1020-0-0.png ...
  nlvr/dev/dev.json         nlvr/dev/images/...
  nlvr/test/test.json       nlvr/test/images/...
  nlvr/hidden/hidden.json   nlvr/hidden/images/...
Splits whose statements are not there are left out.
"""
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {
        split: f"nlvr/{name}/{name}.json" for split, name in _SPLITS.items()
    }

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        text = tfds.features.Text()
        return {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["false", "true"]),
            "order": tfds.features.Scalar(np.int32),
        } | dict.fromkeys(("image_id", "text", "statement_id", "structure", "directory"), text)

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        return {split: _records(folder, name) for split, name in _SPLITS.items() if folder.find(f"{name}/{name}.json")}


def _records(folder: ManualFolder, name: str) -> list[Record]:
    pictures = folder.pictures(f"{name}/images")
    unique = Unique("identifier")
    records = []
    for row in read_json_lines(folder.require(f"{name}/{name}.json")):
        identifier = row.text("identifier")
        unique.add(identifier, row)
        fields = {
            "text": row.text("sentence"),
            "label": row.truth("label"),
            "statement_id": identifier,
            "structure": json.dumps(row.items("structured_rep")),
            "directory": row.text("directory", ""),
        }
        for order in range(_ORDERS):
            image_id = f"{name}-{identifier}-{order}"
            path = pictures.find(f"{image_id}.png", row)
            records.append(Record({"image": path}, fields | {"image_id": image_id, "order": order}))
    return records
