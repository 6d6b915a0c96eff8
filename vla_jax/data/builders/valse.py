"""VALSE (Parcalabescu et al. 2022): captions against foils that differ in one linguistic phenomenon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import tensorflow_datasets as tfds

from vla_jax.data.builders import _caption_pairs
from vla_jax.data.builders._files import ManualFolder
from vla_jax.data.builders._manual import ManualBuilder, Record
from vla_jax.evaluation import valse


class Valse(ManualBuilder):
    """VALSE's valid examples, one record a picture, as :class:`vla_jax.evaluation.valse.Valse` reads them.

    A record: ``image``, ``image_id`` (its data set and file), and ``pairs`` with ``id``, ``caption``,
    ``negative_caption`` (the foil) and ``kind`` (the instrument).
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://github.com/Heidelberg-NLP/VALSE, into manual_dir (or manual_dir/valse):
  data/existence.json   and the ten others
Beside it a folder for each data set that the pictures come from:
  SWiG/           SWiG's images_512
  VisDial_v1.0/   COCO's train2014 and val2014 with VisDial's val2018, all files in one folder
  visual7w/       Visual7W's images
  FOIL dataset/   COCO's val2014
  coco2017/ and coco_2017/   COCO's val2017
"""
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {"test": "data/existence.json"}
    ANNOTATIONS = _caption_pairs.ANNOTATIONS

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        return _caption_pairs.features()

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        file = folder.find("data/existence.json")
        if file is None:
            return {}
        root = file.parents[1]
        pairs = (
            (
                example.image,
                example.image.relative_to(root).as_posix(),
                {
                    "id": example.identifier,
                    "caption": example.captions[0],
                    "negative_caption": example.captions[1],
                    "kind": example.instrument,
                },
            )
            for example in valse.Valse(file.parent, root).examples
        )
        return {"test": _caption_pairs.records(pairs)}
