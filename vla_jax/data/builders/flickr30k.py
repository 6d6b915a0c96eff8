"""Flickr30k (Young et al. 2014): 31,783 pictures with five captions each, in one of two sets of splits.

Karpathy's have 29,000 pictures for training, 1,014 for validation and 1,000 for testing; those of Flickr30k Entities
(Plummer et al. 2015) 29,783, 1,000 and 1,000, with the captions as the authors published them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder, Pictures, Row, Unique, read_lines
from vla_jax.data.builders._karpathy import caption_features, read_captions
from vla_jax.data.builders._manual import Annotations, ManualBuilder, Record

_TOKENS = "results_20130124.token"
_LISTS: Mapping[str, str] = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}


class Flickr30k(ManualBuilder):
    """Flickr30k, one record a picture; its configurations are its splits.

    A record: ``image``, ``image_id`` (the file's name without its ending) and ``captions``.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
By the form on https://shannon.cs.illinois.edu/DenotationGraph/, unpacked into manual_dir:
  flickr30k-images/1000092795.jpg ...
For the configuration karpathy, from https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip:
  dataset_flickr30k.json
For entities, results_20130124.token of the same form, and from https://github.com/BryanPlummer/flickr30k_entities:
  train.txt val.txt test.txt
"""
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="karpathy", description="Karpathy's splits."),
        tfds.core.BuilderConfig(name="entities", description="The splits of Flickr30k Entities."),
    ]
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {
        split: f"dataset_flickr30k.json, or {file}" for split, file in _LISTS.items()
    }
    ANNOTATIONS = Annotations("captions", name="caption")

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        return caption_features()

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        entities = self.builder_config.name == "entities"
        file = folder.require(_TOKENS if entities else "dataset_flickr30k.json")
        pictures = folder.pictures("flickr30k-images", "flickr30k_images")
        if entities:
            lists = {split: found for split, name in _LISTS.items() if (found := folder.find(name))}
            return _read_lists(lists, _read_tokens(file), pictures, file)
        return read_captions(
            file,
            lambda row: pictures.find(row.text("filename"), row),
            lambda row: Path(row.text("filename")).stem,
        )


def _read_tokens(file: Path) -> dict[str, list[str]]:
    """Captions by picture, of lines ``1000092795.jpg#0<TAB>Two young guys ...``."""
    found: dict[str, list[str]] = {}
    lines = Unique("caption")
    for number, line in enumerate(read_lines(file), 1):
        place, tab, caption = line.partition("\t")
        name, mark, turn = place.rpartition("#")
        row = Row({}, file, number)
        if not (tab and mark and turn.isdecimal() and caption.strip()):
            raise row.error(f"a line is a picture's name, '#', a number, a tab and a caption; got {line[:80]!r}")
        lines.add(place, row)
        found.setdefault(name, []).append(caption)
    return found


def _read_lists(
    lists: Mapping[str, Path], captions: Mapping[str, list[str]], pictures: Pictures, tokens: Path
) -> dict[str, list[Record]]:
    """The records of the splits whose lists of pictures, one a line without its ending, are there."""
    unique = Unique("picture")
    records: dict[str, list[Record]] = {split: [] for split in lists}
    for split, file in lists.items():
        for number, line in enumerate(read_lines(file), 1):
            if not (name := line.strip()):
                continue
            row = Row({}, file, number)
            unique.add(name, row)
            if f"{name}.jpg" not in captions:
                raise row.error(f"the picture {name!r} has no caption in {tokens}")
            own = captions[f"{name}.jpg"]
            fields = {"image_id": name, "captions": own}
            records[split].append(Record({"image": pictures.find(f"{name}.jpg", row)}, fields, len(own)))
    return records
