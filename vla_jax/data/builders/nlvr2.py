"""NLVR2 (Suhr et al. 2019): statements about a pair of photographs, true or false.

86,373 statements for training, 6,982 for validation, 6,967 of the public and 6,970 of the hidden test set (``hidden``).
A pair has one or two statements.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder, Unique, read_json_lines
from vla_jax.data.builders._manual import Annotations, ManualBuilder, Record

_SPLITS = {"train": "train", "validation": "dev", "test": "test1", "hidden": "test2"}


class Nlvr2(ManualBuilder):
    """NLVR2, one record a pair of pictures with its statements.

    A record: ``image_0`` (left), ``image_1`` (right), ``image_id`` (the pair, ``dev-850-0``), ``directory`` (of
    training pairs, else empty), and ``statements`` with ``text``, ``label`` (1 for true) and ``statement_id``
    (``dev-850-0-1``). To hold out training examples hold out directories: no set of pictures is in two of them.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://github.com/lil-lab/nlvr, the folder nlvr2/, into manual_dir (a clone is a manual_dir as it stands):
  nlvr2/data/train.json   nlvr2/data/dev.json   nlvr2/data/test1.json   nlvr2/data/test2.json
Pictures, by the form its README.md names, into manual_dir (or manual_dir/nlvr2), in subfolders or not:
  images/train/0/train-10108-0-img0.png ...   images/dev/dev-850-0-img0.png ...   images/test1/...   images/test2/...
  (train/, dev/, test1/ and test2/ without images/ will do)
The README's script for single pictures leaves gaps: links have died, and it saves a link that two pairs share once. A
statement without its pictures has to be taken out of its file.
Splits whose statements are not there are left out.
"""
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {
        split: f"nlvr2/data/{name}.json" for split, name in _SPLITS.items()
    }
    ANNOTATIONS = Annotations("statements")

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        text = tfds.features.Text()
        label = tfds.features.ClassLabel(names=["false", "true"])
        return {
            "image_0": tfds.features.Image(),
            "image_1": tfds.features.Image(),
            "image_id": text,
            "directory": text,
            "statements": tfds.features.Sequence({"text": text, "label": label, "statement_id": text}),
        }

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        return {split: _records(folder, name) for split, name in _SPLITS.items() if folder.find(f"data/{name}.json")}


def _records(folder: ManualFolder, name: str) -> list[Record]:
    pictures = folder.pictures(f"images/{name}", name)
    unique = Unique("identifier")
    by_pair: dict[str, tuple[dict[str, Path], str, list[dict[str, Any]]]] = {}
    for row in read_json_lines(folder.require(f"data/{name}.json")):
        identifier = row.text("identifier")
        unique.add(identifier, row)
        pair, separator, _ = identifier.rpartition("-")
        if not separator:
            raise row.error(f"the identifier {identifier!r} does not read split-set-pair-sentence")
        if pair not in by_pair:
            paths = {f"image_{side}": pictures.find(f"{pair}-img{side}.png", row) for side in (0, 1)}
            by_pair[pair] = (paths, row.text("directory", ""), [])
        by_pair[pair][2].append({"text": row.text("sentence"), "label": row.truth("label"), "statement_id": identifier})
    return [
        Record(paths, {"image_id": pair, "directory": directory, "statements": statements}, len(statements))
        for pair, (paths, directory, statements) in by_pair.items()
    ]
