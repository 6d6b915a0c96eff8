"""ARO (Yuksekgonul et al. 2023): relations and attributes of Visual Genome with their two things exchanged.

Published layout (https://github.com/mertyg/vision-language-models-are-bows): ``visual_genome_relation.json`` and
``visual_genome_attribution.json``, lists of examples with ``image_path``, ``bbox_x``, ``bbox_y``, ``bbox_w``,
``bbox_h`` (pixels), ``true_caption``, ``false_caption`` and ``relation_name`` or ``attributes`` (two); pictures in
``images/``. The model sees the picture cropped to the box. Captions are ``[false, true]``. The metric is the mean over
relations, or over pairs of attributes with 25 examples or more, of the share whose true caption scores higher. For the
published mean over relations the authors' notebook leaves out relations whose exchange changes little, and rare ones;
give those names to :func:`evaluate_relations`.

The order sets, which need no annotation but captions, are in :mod:`vla_jax.evaluation.aro_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_jax.data.image import UnreadablePicture, opened
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation import choices, statistics
from vla_jax.evaluation.annotations import check_pictures, fields, picture_below, read_json
from vla_jax.evaluation.choices import Accuracy
from vla_jax.evaluation.statistics import Interval
from vla_jax.foreign import shown

Part = Literal["relation", "attribution"]
PARTS: tuple[Part, ...] = ("relation", "attribution")
RIGHT = 1
FEWEST_OF_ATTRIBUTES = 25
_LARGEST = 8192  # pixels of a box, which is filled up with black where it leaves its picture
_DOWNLOAD = (
    "Let the authors' code (https://github.com/mertyg/vision-language-models-are-bows) download it: VG_Relation and "
    "VG_Attribution with download=True put visual_genome_relation.json, visual_genome_attribution.json and images/ "
    "into {directory}."
)


@dataclass(frozen=True)
class Example:
    """A false and a true caption of what a box of a picture shows.

    Attributes:
        identifier: the place in the file.
        image: path of the picture.
        box: x0, y0, x1, y1 in pixels.
        captions: the false one, then the true one.
        kind: the relation, or both attributes joined with ``_``.
    """

    identifier: str
    image: Path
    box: tuple[int, int, int, int]
    captions: tuple[str, str]
    kind: str


class Aro:
    """One part by position: ``id``, ``image`` (uint8 [height, width, 3], cropped), ``image_id``, ``captions``.

    ``kind`` is the relation, or both attributes.

    Args:
        directory: holds the annotations and ``images/``.
        part: ``relation`` or ``attribution``.

    Raises:
        UserError: an unknown part; a file or picture is not there, with what to download; an example is damaged.
    """

    def __init__(self, directory: str | Path, part: Part):
        if part not in PARTS:
            raise unknown("part of ARO", part, PARTS)
        directory = Path(directory)
        download = _DOWNLOAD.format(directory=directory)
        path = directory / f"visual_genome_{part}.json"
        content = read_json(path, download)
        if not isinstance(content, list) or not content:
            raise UserError(f"{path}: not a list of examples. {download}")
        self.examples = [
            _example(entry, part, directory / "images", number, f"{path}, example {number}")
            for number, entry in enumerate(content)
        ]
        check_pictures(((f"example {e.identifier} of {path}", e.image) for e in self.examples), download)

    def check_boxes(self) -> Aro:
        """Reads the size of every picture, and refuses boxes that lie outside; returns the part itself."""
        for example in self.examples:
            _check_inside(example, _read(example, lambda picture: picture.size))
        return self

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self.examples[position]
        return {
            "id": example.identifier,
            "image": _cropped(example),
            "image_id": example.image.name,
            "captions": example.captions,
            "kind": example.kind,
        }


def _example(entry: Any, part: Part, images: Path, number: int, where: str) -> Example:
    texts = {"image_path": str, "true_caption": str, "false_caption": str}
    image, true, false = fields(entry, texts, where)
    box = {f"bbox_{side}": (int, float) for side in "xywh"}
    x, y, width, height = fields(entry, box, where)
    if not all(abs(number) < _LARGEST for number in (x, y, width, height)) or min(width, height) < 1 or min(x, y) < 0:
        at = [shown(number) for number in (x, y, width, height)]
        raise UserError(f"{where}: the box at {at[0]}, {at[1]} of {at[2]} x {at[3]} pixels cannot be cut out")
    if part == "relation":
        (kind,) = fields(entry, {"relation_name": str}, where)
    else:
        (attributes,) = fields(entry, {"attributes": list}, where)
        if len(attributes) != 2 or not all(isinstance(name, str) and name for name in attributes):
            raise UserError(f"{where}: attributes are two texts, given {shown(attributes)}")
        kind = "_".join(attributes)
    corners = (int(x), int(y), int(x + width), int(y + height))
    return Example(str(number), picture_below(images, image, where), corners, (false, true), kind)


def _cropped(example: Example) -> np.ndarray:
    size, whole = _read(example, lambda picture: (picture.size, picture.convert("RGB")))
    _check_inside(example, size)
    # A box that reaches beyond the picture is padded with black, as by the authors.
    return np.asarray(whole.crop(example.box))


def _read(example: Example, what: Callable[[Any], Any]) -> Any:
    try:
        with opened(example.image) as picture:
            return what(picture)
    except (UnreadablePicture, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"example {example.identifier}: the picture {str(example.image)!r}: {error}") from error


def _check_inside(example: Example, size: tuple[int, int]) -> None:
    if example.box[0] >= size[0] or example.box[1] >= size[1]:
        raise UserError(
            f"example {example.identifier}: the box {example.box} lies outside of {str(example.image)!r}, "
            f"{size[0]} x {size[1]} pixels; download the annotations or the picture again"
        )


@dataclass(frozen=True)
class ClassMean:
    """One part's result.

    Attributes:
        mean: the published metric: the mean over the classes that count, with its interval (one model alone).
        ties: share of all examples that are not right, but would be if ties counted as right.
        kinds: by relation or pair of attributes, those that count.
    """

    mean: Interval
    ties: float
    kinds: Mapping[str, Accuracy]


def evaluate_relations(examples: Sequence[Example], scores: np.ndarray, without: Collection[str] = ()) -> ClassMean:
    """The mean over relations.

    Args:
        examples: of :class:`Aro`.
        scores: float [examples, 2 captions], the false caption first.
        without: relations that do not count; names that do not occur are of no account.

    Raises:
        UserError: no relation is left.
    """
    counted = [example.kind not in without for example in examples]
    return _class_mean(examples, scores, np.asarray(counted), 1)


def evaluate_attributes(examples: Sequence[Example], scores: np.ndarray) -> ClassMean:
    """The mean over pairs of attributes with at least 25 examples.

    Args:
        examples: of :class:`Aro`.
        scores: float [examples, 2 captions], the false caption first.

    Raises:
        UserError: no pair has as many.
    """
    return _class_mean(examples, scores, np.ones(len(examples), bool), FEWEST_OF_ATTRIBUTES)


def _class_mean(examples: Sequence[Example], scores: np.ndarray, counted: np.ndarray, least: int) -> ClassMean:
    kinds = np.array([example.kind for example in examples])
    scores = np.asarray(scores)
    correct, tied = choices.judge(scores, RIGHT)
    if not counted.any():
        raise UserError("no relation is left to take the mean over")
    mean = statistics.class_mean(correct[counted], kinds[counted], least)
    groups = {str(name): np.flatnonzero(kinds == name) for name in np.unique(kinds[counted])}
    groups = {name: at for name, at in groups.items() if at.size >= least}
    return ClassMean(mean, float(tied.mean()), choices.evaluate_groups(scores, RIGHT, groups))
