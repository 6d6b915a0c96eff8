"""SugarCrepe (Hsieh et al. 2023): captions of COCO pictures against ones with another object, attribute or relation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import tensorflow_datasets as tfds

from vla_jax.data.builders import _caption_pairs
from vla_jax.data.builders._files import ManualFolder, coco_folders
from vla_jax.data.builders._manual import ManualBuilder, Record
from vla_jax.evaluation import sugarcrepe


class Sugarcrepe(ManualBuilder):
    """SugarCrepe, one record a picture, as :class:`vla_jax.evaluation.sugarcrepe.SugarCrepe` reads its examples.

    A record: ``image``, ``image_id`` (the file's name), and ``pairs`` with ``id``, ``caption``, ``negative_caption``
    and ``kind`` (the category, such as ``swap_att``).
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://github.com/RAIVNLab/sugar-crepe, into manual_dir (or manual_dir/sugarcrepe):
  data/add_att.json   and the six others
Pictures of http://images.cocodataset.org/zips/val2017.zip, unpacked beside it:
  val2017/000000000139.jpg ...
"""
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {"test": "data/add_att.json"}
    ANNOTATIONS = _caption_pairs.ANNOTATIONS

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        return _caption_pairs.features()

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        file = folder.find("data/add_att.json", "add_att.json")
        if file is None:
            return {}
        source = sugarcrepe.SugarCrepe(file.parent, folder.require(*coco_folders("val2017")))
        pairs = (
            (
                source.images / example.filename,
                example.filename,
                {
                    "id": example.identifier,
                    "caption": example.captions[0],
                    "negative_caption": example.captions[1],
                    "kind": example.category,
                },
            )
            for example in source.examples
        )
        return {"test": _caption_pairs.records(pairs)}
