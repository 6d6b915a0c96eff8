"""Winoground (Thrush et al. 2022): 400 quadruples of two captions of the same words and two pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder
from vla_jax.data.builders._manual import ManualBuilder, Record
from vla_jax.evaluation import winoground

_TAGS = ("tag", "secondary_tag", "collapsed_tag")


class Winoground(ManualBuilder):
    """Winoground, one record an example, as :class:`vla_jax.evaluation.winoground.Winoground` reads them.

    A record: ``id``, ``image_0``, ``image_1``, ``caption_0``, ``caption_1``, ``tag``, ``secondary_tag`` (a comma list,
    often empty), ``collapsed_tag``, ``num_main_preds``. The authors ask that nothing be trained on it.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://huggingface.co/datasets/facebook/winoground, whose terms must be accepted, into manual_dir (or
manual_dir/winoground):
  examples.jsonl   images/ex_0_img_0.png ...   (the content of data/, with images.zip unpacked)
"""
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {"test": "examples.jsonl"}

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        text, image = tfds.features.Text(), tfds.features.Image()
        texts = dict.fromkeys(("id", "caption_0", "caption_1", *_TAGS), text)
        return texts | {"image_0": image, "image_1": image, "num_main_preds": tfds.features.Scalar(np.int32)}

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        file = folder.find("examples.jsonl")
        if file is None:
            return {}
        records = []
        for example in winoground.Winoground(file.parent).examples:
            numbered = {f"caption_{number}": caption for number, caption in enumerate(example.captions)}
            fields = {name: getattr(example, name) for name in (*_TAGS, "num_main_preds")}
            pictures = {f"image_{number}": path for number, path in enumerate(example.images)}
            records.append(Record(pictures, {"id": example.identifier} | numbered | fields))
        return {"test": records}
