"""COCO captions (Chen et al. 2015) in Karpathy's splits: five or more captions of each picture.

113,287 pictures for training (the 82,783 of COCO's training set and 30,504 of its validation set, ``restval``), 5,000
each for validation and testing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder, Pictures, Row, coco_folders
from vla_jax.data.builders._karpathy import caption_features, read_captions
from vla_jax.data.builders._manual import Annotations, ManualBuilder, Record
from vla_jax.foreign import plain_name, shown


class CocoCaptions(ManualBuilder):
    """COCO captions in Karpathy's splits, one record a picture.

    A record: ``image``, ``image_id`` (COCO's number) and ``captions``.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip, into manual_dir:
  dataset_coco.json
From https://cocodataset.org/#download, unpacked into manual_dir (or its folder images/):
  train2014/COCO_train2014_000000000009.jpg ...    val2014/COCO_val2014_000000000042.jpg ...
"""
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="karpathy", description="Karpathy's splits; restval is part of training.")
    ]
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = dict.fromkeys(("train", "validation", "test"), "dataset_coco.json")
    ANNOTATIONS = Annotations("captions", name="caption")

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        return caption_features()

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        file = folder.require("dataset_coco.json")
        subsets: dict[str, Pictures] = {}

        def picture(row: Row) -> Path:
            subset = row.text("filepath")
            if not plain_name(subset):
                raise row.error(f"'filepath' names no folder of COCO but {shown(subset)}")
            if subset not in subsets:
                subsets[subset] = folder.pictures(*coco_folders(subset))
            return subsets[subset].find(row.text("filename"), row)

        return read_captions(file, picture, lambda row: str(row.integer("cocoid")))
