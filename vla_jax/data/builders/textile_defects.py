"""Textile defects (Megahed et al. 2025, arXiv:2501.12596): simulated weaves of 250 by 250 pixels in three classes.

2,000 pictures from the pip package ``conformal-clip-data``: 1,000 nominal ones, 500 with a local defect and 500 with a
global one. The package has no splits. Every class is cut in order of its files' numbers: of each ten in a row the first
six are for training, the next for validation and the last three for testing, so that all splits have the classes in the
proportions of the whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from vla_jax.errors import UserError

CLASSES = ("nominal", "local", "global")

SPLITS = {"train": range(0, 6), "validation": range(6, 7), "test": range(7, 10)}
"""By split, which of each ten pictures of a class it has."""


class TextileDefects(tfds.core.GeneratorBasedBuilder):
    """Builds the three classes with ``image``, ``image_id``, ``label`` and ``class_name``."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            homepage="https://github.com/fmegahed/conformal-clip-data",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(250, 250, 3), encoding_format="jpeg"),
                    "image_id": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "class_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        root = _root()
        return {split: self._generate_examples(root, places) for split, places in SPLITS.items()}

    def _generate_examples(self, root: Path, places: range) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in CLASSES:
            files = sorted((root / name).glob("*.jpg"))
            if not files:
                raise UserError(f"the package conformal-clip-data has no pictures in {name!r}; install it again")
            for position, path in enumerate(files):
                if position % 10 in places:
                    key = f"{name}/{path.stem}"
                    yield key, {"image": str(path), "image_id": key, "label": name, "class_name": name}


def _root() -> Path:
    try:
        package = importlib.import_module("conformal_clip_data")
    except ModuleNotFoundError as error:
        raise UserError(
            "the data set 'textile_defects' comes with a package that is missing; pip install conformal-clip-data"
        ) from error
    return package.textile_simulated_root()
