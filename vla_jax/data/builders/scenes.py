"""TFDS builder of the generated `scenes`: the examples of :class:`SceneSource`, written to array_record files.

    builder = Scenes(config="captions", data_dir=folder)
    builder.download_and_prepare()
    source = builder.as_data_source(split="train")

Each kind of example is a builder config; pictures are stored as PNG and annotations (``scene``) as JSON. Nothing here
needs TensorFlow.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vla_jax.data.scenes import KINDS, SceneConfig, SceneSource
from vla_jax.data.scenes.vocabulary import COLORS, SHAPES
from vla_jax.errors import UserError, unknown


@dataclasses.dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """One kind of example, what its scenes look like, and how many there are.

    Attributes:
        kind: one of :data:`vla_jax.data.scenes.KINDS`.
        scene: what scenes look like and what is said about them; without ``patch_grid``, which is cheap to compute.
        train: number of training examples.
        validation: number of validation examples.
        test: number of test examples.
    """

    kind: str = "captions"
    scene: SceneConfig = dataclasses.field(default_factory=SceneConfig)
    train: int = 20_000
    validation: int = 2_000
    test: int = 2_000

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of example", self.kind, KINDS)
        if self.scene.patch_grid:
            raise UserError(f"patch_grid {self.scene.patch_grid} is not stored; use 0, or read from SceneSource")


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Generated pictures of one to five simple objects with exact annotations, and texts about them."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012
        ScenesConfig(name=kind, description=f"Examples of the kind {kind!r}.", kind=kind) for kind in KINDS
    ]

    def __init__(self, *, file_format: str = "array_record", **arguments: Any):
        """As any TFDS builder; array_record is the format that gives random access without TensorFlow."""
        super().__init__(file_format=file_format, **arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(self._features()))

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        size = self.builder_config.scene.image_size
        image = tfds.features.Image(shape=(size, size, 3), encoding_format="png")
        text, integer = tfds.features.Text(), tfds.features.Scalar(np.int32)
        tags = dict.fromkeys(("tag", "secondary_tag", "collapsed_tag"), text) | {"num_main_preds": integer}
        if self.builder_config.kind == "quadruples":
            numbered = {"image": image, "scene": text, "caption": text}
            features = {f"{name}_{n}": feature for name, feature in numbered.items() for n in (0, 1)}
            return features | tags | {"id": integer}
        texts = tfds.features.Sequence(text)
        classes = {
            "label": tfds.features.ClassLabel(names=list(SHAPES)),
            "class_name": text,
            "color_label": tfds.features.ClassLabel(names=list(COLORS)),
            "color_name": text,
        }
        of_kind: dict[str, dict[str, tfds.features.FeatureConnector]] = {
            "captions": {"caption": text, "caption_kind": text},
            "twins": {"caption": text, "twin_image": image, "twin_scene": text, "twin_caption": text, "swapped": text},
            "statements": {
                "text": text,
                "label": tfds.features.ClassLabel(names=["false", "true"]),
                "statement_kind": text,
            },
            "questions": {"question": text, "answer": text, "answer_id": integer, "question_kind": text},
            "phrases": {"phrase": text, "box": tfds.features.Tensor(shape=(4,), dtype=np.int32)},
            "classes": classes,
            "complete": dict.fromkeys(("captions", "questions", "answers", "question_kinds"), texts)
            | dict.fromkeys(("statements", "statement_kinds", "phrases"), texts)
            | {"answer_ids": tfds.features.Sequence(integer)}
            | {"statement_labels": tfds.features.Sequence(tfds.features.ClassLabel(names=["false", "true"]))}
            | {"boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.int32)}
            | {"image_1": image, "scene_1": text, "caption_0": text, "caption_1": text}
            | classes
            | tags,
        }
        return {"image": image, "scene": text} | of_kind[self.builder_config.kind]

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        config = self.builder_config
        lengths = {"train": config.train, "validation": config.validation, "test": config.test}
        return {
            split: self._generate_examples(SceneSource(split, config.kind, config.scene, length))
            for split, length in lengths.items()
        }

    def _generate_examples(self, source: SceneSource) -> Iterator[tuple[int, Any]]:
        for index in range(len(source)):
            yield index, {name: _encoded(value) for name, value in source[index].items()}


def _encoded(value: Any) -> Any:
    """A value as TFDS stores it: pictures as PNG, annotations as JSON."""
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        Image.fromarray(value).save(file, format="PNG")
        file.seek(0)
        return file
    return json.dumps(value) if isinstance(value, dict) else value
