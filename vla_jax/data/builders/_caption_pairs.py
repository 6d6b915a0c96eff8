"""What builders of probes share that set a true caption of a picture against a false one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from vla_jax.data.builders._manual import Annotations, Record

ANNOTATIONS = Annotations("pairs")


def features(**more: tfds.features.FeatureConnector) -> dict[str, tfds.features.FeatureConnector]:
    """The features of a record: ``image``, ``image_id`` and its ``pairs``, with further fields of a pair."""
    text = tfds.features.Text()
    pair = dict.fromkeys(("id", "caption", "negative_caption", "kind"), text) | more
    return {"image": tfds.features.Image(), "image_id": text, "pairs": tfds.features.Sequence(pair)}


def records(pairs: Iterable[tuple[Path, str, dict[str, Any]]]) -> list[Record]:
    """One record a picture, in the order in which pictures come first.

    Args:
        pairs: of each, the picture's file, what the picture is called, and the pair's fields.
    """
    found: dict[Path, tuple[str, list[dict[str, Any]]]] = {}
    for path, name, fields in pairs:
        found.setdefault(path, (name, []))[1].append(fields)
    return [Record({"image": path}, {"image_id": name, "pairs": own}, len(own)) for path, (name, own) in found.items()]
