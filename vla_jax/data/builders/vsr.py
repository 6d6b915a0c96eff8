"""VSR (Liu et al. 2023): statements on how two objects of a COCO picture lie to each other, true or false.

``random``: 7,680 statements for training, 1,097 for validation, 2,195 for testing. ``zeroshot``: 3,489, 340 and 1,222,
with no concept in two splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder, Pictures, Unique, read_json_lines
from vla_jax.data.builders._manual import Annotations, ManualBuilder, Record

_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


class Vsr(ManualBuilder):
    """VSR, one record a picture with the statements about it; configurations ``random`` and ``zeroshot``.

    A record: ``image``, ``image_id`` (COCO's number, as in the file's name), and ``statements`` with ``text``,
    ``label`` (1 for true) and ``statement_kind`` (the relation, such as "in front of").
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://github.com/cambridgeltl/visual-spatial-reasoning, the content of data/, into manual_dir (or
manual_dir/vsr):
  splits/random/train.jsonl   splits/random/dev.jsonl   splits/random/test.jsonl   and the same of splits/zeroshot/
Pictures of COCO 2017, as its data/README.md says, into images/ (or trainval2017/):
  images/000000050403.jpg ...
Splits whose statements are not there are left out.
"""
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="random", description="Statements are divided at random."),
        tfds.core.BuilderConfig(name="zeroshot", description="No concept is in two splits."),
    ]
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {
        split: f"splits/random/{name}.jsonl (or splits/zeroshot/{name}.jsonl)" for split, name in _SPLITS.items()
    }
    ANNOTATIONS = Annotations("statements")

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        text = tfds.features.Text()
        label = tfds.features.ClassLabel(names=["false", "true"])
        return {
            "image": tfds.features.Image(),
            "image_id": text,
            "statements": tfds.features.Sequence({"text": text, "label": label, "statement_kind": text}),
        }

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        part = self.builder_config.name
        files = {split: folder.find(f"splits/{part}/{name}.jsonl") for split, name in _SPLITS.items()}
        files = {split: file for split, file in files.items() if file}
        if not files:
            return {}
        pictures = folder.pictures("images", "trainval2017")
        return {split: _records(file, pictures) for split, file in files.items()}


def _records(file: Path, pictures: Pictures) -> list[Record]:
    unique = Unique("statement of a picture")
    by_picture: dict[str, tuple[Path, list[dict[str, Any]]]] = {}
    for row in read_json_lines(file):
        name, text = row.text("image"), row.text("caption")
        unique.add((name, text), row)
        if name not in by_picture:
            by_picture[name] = (pictures.find(name, row), [])
        by_picture[name][1].append({"text": text, "label": row.truth("label"), "statement_kind": row.text("relation")})
    return [
        Record({"image": path}, {"image_id": Path(name).stem, "statements": statements}, len(statements))
        for name, (path, statements) in by_picture.items()
    ]
