"""VALSE (Parcalabescu et al. 2022): a caption against a foil that differs in one linguistic phenomenon.

Published layout (https://github.com/Heidelberg-NLP/VALSE): ``data/<instrument>.json``, each an object of examples by
name with ``dataset``, ``image_file``, ``caption``, ``foil`` and the annotators' votes ``mturk``. Only examples that two
of three annotators judged valid count, ``mturk.caption >= 2``. The pictures are those of five other data sets.

The metric for all models is the pairwise accuracy: the caption strictly above its foil. Models that judge a pair by
itself (matching heads) also have the share of captions they take for true, of foils they take for false, the mean of
the two, and the smaller one, which a model that always answers the same cannot raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.image import read_picture
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation import choices, statistics
from vla_jax.evaluation.annotations import check_pictures, fields, picture_below, read_json
from vla_jax.evaluation.choices import Accuracy
from vla_jax.evaluation.statistics import Interval
from vla_jax.foreign import shown

INSTRUMENTS = (
    "existence",
    "plurals",
    "counting-hard",
    "counting-small-quant",
    "counting-adversarial",
    "relations",
    "action-replacement",
    "actant-swap",
    "coreference-standard",
    "coreference-hard",
    "foil-it",
)
RIGHT = 0
VOTES = 2
_SOURCES = {
    "SWiG": "SWiG's images_512",
    "VisDial_v1.0": "COCO's train2014 and val2014 with VisDial's val2018, all files in one folder",
    "visual7w": "Visual7W's images",
    "FOIL dataset": "COCO's val2014",
    "coco2017": "COCO's val2017",
    "coco_2017": "COCO's val2017",
}
_DOWNLOAD = "Clone https://github.com/Heidelberg-NLP/VALSE for {annotations}/<instrument>.json."


@dataclass(frozen=True)
class Example:
    """A caption and its foil, about a picture of another data set; ``votes`` of annotators for the caption alone."""

    identifier: str
    instrument: str
    image: Path
    captions: tuple[str, str]
    votes: int


class Valse:
    """The valid examples, by instrument: ``id``, ``image`` (bytes), ``image_id``, ``captions``.

    ``kind`` is the instrument. The right caption stands first.

    Args:
        annotations: the folder of the JSON files.
        images: holds a folder for each data set, named as the annotations name it (``SWiG``, ``VisDial_v1.0``,
            ``visual7w``, ``FOIL dataset``, ``coco2017``, ``coco_2017``).
        folders: by data set, folders that lie elsewhere.
        instruments: which to read, of :data:`INSTRUMENTS`.

    Raises:
        UserError: an unknown instrument or data set; a file or picture is not there, with what to download; an example
            is damaged, or has no votes.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        folders: Mapping[str, str | Path] | None = None,
        instruments: Sequence[str] = INSTRUMENTS,
    ):
        where = {name: Path(images) / name for name in _SOURCES}
        for name, folder in (folders or {}).items():
            if name not in where:
                raise unknown("data set of VALSE", name, where)
            where[name] = Path(folder)
        found: list[Example] = []
        for instrument in instruments:
            if instrument not in INSTRUMENTS:
                raise unknown("instrument of VALSE", instrument, INSTRUMENTS)
            found += _read(Path(annotations) / f"{instrument}.json", instrument, where)
        self.examples = [example for example in found if example.votes >= VOTES]
        if not self.examples:
            raise UserError(f"VALSE has no valid example in {', '.join(instruments) or 'no instrument'}")
        needed = "; ".join(f"in {where[name]} {source}" for name, source in _SOURCES.items())
        download = f"Download the data sets that VALSE took its pictures from: {needed}."
        check_pictures(((f"example {e.identifier}", e.image) for e in self.examples), download)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self.examples[position]
        return {
            "id": example.identifier,
            "image": read_picture(example.image),
            "image_id": str(example.image),
            "captions": example.captions,
            "kind": example.instrument,
        }


def _read(path: Path, instrument: str, folders: Mapping[str, Path]) -> list[Example]:
    download = _DOWNLOAD.format(annotations=path.parent)
    content = read_json(path, download)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: not an object of examples by name. {download}")
    examples = []
    for key, entry in content.items():
        place = f"{path}, example {shown(key)}"
        names = {"dataset": str, "image_file": str, "caption": str, "foil": str, "mturk": dict}
        dataset, file, caption, foil, mturk = fields(entry, names, place)
        if dataset not in folders:
            raise UserError(f"{place}: {unknown('data set', dataset, folders)}")
        (votes,) = fields(mturk, {"caption": int}, f"{place}, mturk")
        image = picture_below(Path(folders[dataset]), file, place)
        examples.append(Example(f"{instrument}/{key}", instrument, image, (caption, foil), votes))
    return examples


@dataclass(frozen=True)
class Judged:
    """How a model does that judges each caption by itself, true above a threshold.

    Attributes:
        caption: share of captions taken for true.
        foil: share of foils taken for false.
        mean: accuracy over both, which is their mean.
        least: the smaller of the two.
    """

    caption: Interval
    foil: Interval
    mean: float
    least: float


def evaluate(examples: Sequence[Example], scores: np.ndarray) -> dict[str, Accuracy]:
    """The pairwise accuracy of every instrument; intervals draw pictures.

    Args:
        examples: of :class:`Valse`.
        scores: float [examples, 2] or [seeds, examples, 2], caption before foil.
    """
    pictures = np.array([str(example.image) for example in examples])
    return choices.evaluate_groups(scores, RIGHT, _groups(examples), pictures)


def judge(examples: Sequence[Example], scores: np.ndarray, threshold: float = 0.0) -> dict[str, Judged]:
    """Captions and foils judged each by itself, by instrument.

    Args:
        examples: of :class:`Valse`.
        scores: float [examples, 2] or [seeds, examples, 2], caption before foil.
        threshold: true is what scores above it; 0 for the logit of a matching head.
    """
    scores = np.asarray(scores)
    pictures = np.array([str(example.image) for example in examples])
    choices.judge(scores, RIGHT)  # the same scores are refused
    found = {}
    for name, at in _groups(examples).items():
        caption = statistics.accuracy(scores[..., at, 0] > threshold, pictures[at])
        foil = statistics.accuracy(scores[..., at, 1] <= threshold, pictures[at])
        found[name] = Judged(caption, foil, (caption.value + foil.value) / 2, min(caption.value, foil.value))
    return found


def _groups(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    instruments = np.array([example.instrument for example in examples])
    groups = {name: np.flatnonzero(instruments == name) for name in INSTRUMENTS}
    return {name: at for name, at in groups.items() if at.size}
