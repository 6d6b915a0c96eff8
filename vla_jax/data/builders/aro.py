"""ARO (Yuksekgonul et al. 2023): what a box of a Visual Genome picture shows, with relation or attributes exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vla_jax.data.builders import _caption_pairs
from vla_jax.data.builders._files import ManualFolder
from vla_jax.data.builders._manual import ManualBuilder, Record
from vla_jax.evaluation import aro


class Aro(ManualBuilder):
    """ARO, one record a picture, as :class:`vla_jax.evaluation.aro.Aro` reads its examples; a configuration a part.

    A record: ``image`` (whole, not cut), ``image_id`` (the file's name), and ``pairs`` with ``id``, ``caption``,
    ``negative_caption``, ``kind`` (the relation, or both attributes joined with ``_``) and ``box``, float32 x0, y0, x1,
    y1 in pixels: what the captions speak of, to which the authors cut the picture.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
The authors' code (https://github.com/mertyg/vision-language-models-are-bows) downloads it: VG_Relation and
VG_Attribution with download=True. Into manual_dir (or manual_dir/aro):
  visual_genome_relation.json   visual_genome_attribution.json   images/...
"""
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="relation", description="Two things and their relation, exchanged."),
        tfds.core.BuilderConfig(name="attribution", description="Two things with an attribute each, exchanged."),
    ]
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {
        "test": "visual_genome_relation.json (or visual_genome_attribution.json)"
    }
    ANNOTATIONS = _caption_pairs.ANNOTATIONS

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        return _caption_pairs.features(box=tfds.features.Tensor(shape=(4,), dtype=np.float32))

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        part = self.builder_config.name
        file = folder.find(f"visual_genome_{part}.json")
        if file is None:
            return {}
        pairs = (
            (
                example.image,
                example.image.name,
                {
                    "id": example.identifier,
                    "caption": example.captions[aro.RIGHT],
                    "negative_caption": example.captions[1 - aro.RIGHT],
                    "kind": example.kind,
                    "box": np.array(example.box, np.float32),
                },
            )
            for example in aro.Aro(file.parent, part).check_boxes().examples
        )
        return {"test": _caption_pairs.records(pairs)}
