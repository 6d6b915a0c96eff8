"""Captions in the format of Karpathy and Fei-Fei (2015), whose splits captioning and retrieval report on.

{"images": [{"filename": "...", "filepath": "val2014", "cocoid": 391895, "imgid": 0, "split": "test",
             "sentids": [...], "sentences": [{"raw": "A man ...", "tokens": [...], "imgid": 0, "sentid": 770337}]}]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import tensorflow_datasets as tfds

from vla_jax.data.builders._files import Row, Unique, read_rows
from vla_jax.data.builders._manual import Record
from vla_jax.errors import unknown

# "restval" is what COCO's validation pictures are that the other two splits did not take; all train on them.
SPLITS: Mapping[str, str] = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def caption_features() -> dict[str, tfds.features.FeatureConnector]:
    """A record: ``image``, ``image_id``, and ``captions``, the list of all texts of the picture."""
    text = tfds.features.Text()
    return {"image": tfds.features.Image(), "image_id": text, "captions": tfds.features.Sequence(text)}


def read_captions(
    file: Path, picture: Callable[[Row], Path], image_id: Callable[[Row], str]
) -> dict[str, list[Record]]:
    """The records of all splits of a file.

    Args:
        file: in the format above.
        picture: finds the picture's file of one of its images.
        image_id: the name that results are reported under.

    Raises:
        UserError: for an unknown split, an id that stands twice, a picture without captions, or a malformed row.
    """
    images, sentences = Unique("picture"), Unique("sentid")
    records: dict[str, list[Record]] = {split: [] for split in SPLITS.values()}
    for row in read_rows(file, "images"):
        split, name = row.text("split"), image_id(row)
        if split not in SPLITS:
            raise row.error(str(unknown("split", split, SPLITS)))
        images.add(name, row)
        captions = []
        for values in row.items("sentences"):
            sentence = Row(values, file, row.number)
            if "sentid" in sentence.values:
                sentences.add(sentence.integer("sentid"), sentence)
            captions.append(sentence.text("raw"))
        if not captions:
            raise row.error(f"the picture {name} has no captions")
        fields = {"image_id": name, "captions": captions}
        records[SPLITS[split]].append(Record({"image": picture(row)}, fields, len(captions)))
    return records
