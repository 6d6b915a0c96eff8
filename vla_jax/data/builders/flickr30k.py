"""Flickr30k (Young et al. 2014) in Karpathy's splits: 31,014 pictures with five captions each.

29,000 pictures for training, 1,014 for validation, 1,000 for testing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder
from vla_jax.data.builders._karpathy import caption_features, read_captions
from vla_jax.data.builders._manual import Annotations, ManualBuilder, Record


class Flickr30k(ManualBuilder):
    """Flickr30k in Karpathy's splits, one record a picture.

    A record: ``image``, ``image_id`` (the file's name without its ending) and ``captions``.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip, into manual_dir:
  dataset_flickr30k.json
By the form on https://shannon.cs.illinois.edu/DenotationGraph/, unpacked into manual_dir:
  flickr30k-images/1000092795.jpg ...
"""
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="karpathy", description="Karpathy's splits.")
    ]
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("train", "validation", "test"), "dataset_flickr30k.json"
    )
    ANNOTATIONS = Annotations("captions", name="caption")

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        return caption_features()

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        file = folder.require("dataset_flickr30k.json")
        pictures = folder.pictures("flickr30k-images", "flickr30k_images")
        return read_captions(
            file,
            lambda row: pictures.find(row.text("filename"), row),
            lambda row: Path(row.text("filename")).stem,
        )
