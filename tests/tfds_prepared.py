"""Few-shot data sets prepared by TFDS's own builders, with a few pictures in place of those they would download."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vla_jax.data.few_shot_sets import FEW_SHOT_SETS


def png(level, seed=None):
    """A picture of one grey, or one with something of its own on it."""
    pixels = np.full((64, 64, 3), level, np.uint8)
    if seed is not None:
        pixels[8:] = np.random.default_rng(seed).integers(0, 256, (56, 64, 3))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


def prepare(name, data_dir, monkeypatch, labels: Sequence[int] = (1, 0, 2), distinct=False):
    """Has TFDS's own builder prepare a picture for each of these labels, in each of its splits.

    The first rows of a picture are ten times its label grey. All pictures differ if they are to be distinct.
    """
    of = FEW_SHOT_SETS[name]
    builder = tfds.builder(of.tfds, data_dir=str(data_dir), file_format="array_record")
    plain = {tfds.features.Text: "", tfds.features.BBoxFeature: tfds.features.BBox(0.0, 0.0, 1.0, 1.0)}
    splits = list(dict.fromkeys(of.splits.values()))

    def examples(split):
        for number, label in enumerate(labels):
            example = {
                key: plain[type(feature)] for key, feature in builder.info.features.items() if type(feature) in plain
            }
            for key, feature in builder.info.features.items():
                if isinstance(feature, tfds.features.Image):
                    seed = len(labels) * splits.index(split) + number
                    example[key] = png(10 * label % 256, seed if distinct else None)
                elif isinstance(feature, tfds.features.ClassLabel):
                    example[key] = min(label, feature.num_classes - 1)
            yield number, example

    monkeypatch.setattr(builder, "_split_generators", lambda manager: {split: examples(split) for split in splits})
    builder.download_and_prepare()
