"""Winoground: two captions of the same words, two pictures, and which belongs to which (Thrush et al. 2022).

With s(c, i) the score of caption c with picture i, section 4.1 of the paper asks of every example

    text:   s(0,0) > s(1,0)  and  s(1,1) > s(0,1)      each picture prefers its caption
    image:  s(0,0) > s(0,1)  and  s(1,1) > s(1,0)      each caption prefers its picture
    group:  both

Strictly greater: a tie fails, so a scorer that gives one constant gets 0. Random scores get 25, 25 and 16.67 %.

Published on the 400 examples, in per cent (text, image, group): human 89.50, 88.50, 85.50; CLIP ViT-B/32 30.75, 10.50,
8.00; FLAVA ITM 32.25, 20.50, 14.25. One example is 0.25 points, and at a group score of 8 the interval is about
5 points wide: compare two models by :func:`compare`, on the same examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_jax.errors import UserError
from vla_jax.evaluation import statistics
from vla_jax.evaluation.statistics import Interval, PairedDifference
from vla_jax.reporting.table import write_atomically

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
_LABEL = re.compile(r"(?P<identifier>.+)_c(?P<caption>[01])_i(?P<image>[01])")
_DOWNLOAD = (
    "Winoground is given out under its own terms: accept them at https://huggingface.co/datasets/facebook/winoground, "
    "download data/examples.jsonl and data/images.zip, and unpack them so that {directory}/examples.jsonl and "
    "{directory}/images/ex_0_img_0.png exist."
)


@dataclass(frozen=True)
class Outcomes:
    """What is right in each example; every array is bool [..., examples].

    Attributes:
        text: each picture strictly prefers its caption.
        image: each caption strictly prefers its picture.
        group: both.
        text_ties: not right, but right if ties counted as right.
        image_ties: likewise.
        group_ties: likewise.
    """

    text: np.ndarray
    image: np.ndarray
    group: np.ndarray
    text_ties: np.ndarray
    image_ties: np.ndarray
    group_ties: np.ndarray


@dataclass(frozen=True)
class Scores:
    """The three scores as fractions with their intervals, the share of ties apart, and the number of examples."""

    text: Interval
    image: Interval
    group: Interval
    text_ties: float
    image_ties: float
    group_ties: float
    examples: int


def outcomes(scores: np.ndarray) -> Outcomes:
    """Judges every example.

    Args:
        scores: float [..., examples, 2 captions, 2 images].

    Raises:
        UserError: another shape, or a score that is NaN.
    """
    scores = np.asarray(scores)
    if scores.ndim < 3 or scores.shape[-2:] != (2, 2) or scores.size == 0:
        raise UserError(f"scores are [examples, 2 captions, 2 images], given {scores.shape}")
    if np.isnan(scores).any():
        raise UserError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN; NaN cannot be compared")
    right0, right1 = scores[..., 0, 0], scores[..., 1, 1]
    caption0_image1, caption1_image0 = scores[..., 0, 1], scores[..., 1, 0]
    text = (right0 > caption1_image0) & (right1 > caption0_image1)
    image = (right0 > caption0_image1) & (right1 > caption1_image0)
    loose_text = (right0 >= caption1_image0) & (right1 >= caption0_image1)
    loose_image = (right0 >= caption0_image1) & (right1 >= caption1_image0)
    group = text & image
    return Outcomes(text, image, group, loose_text & ~text, loose_image & ~image, loose_text & loose_image & ~group)


def evaluate(scores: np.ndarray) -> Scores:
    """Text, image and group score with 95 % intervals.

    Args:
        scores: float [examples, 2 captions, 2 images] or [seeds, examples, 2, 2].
    """
    judged = outcomes(scores)
    return Scores(
        text=statistics.accuracy(judged.text),
        image=statistics.accuracy(judged.image),
        group=statistics.accuracy(judged.group),
        text_ties=float(judged.text_ties.mean()),
        image_ties=float(judged.image_ties.mean()),
        group_ties=float(judged.group_ties.mean()),
        examples=judged.text.shape[-1],
    )


def evaluate_groups(scores: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, Scores]:
    """:func:`evaluate` on parts of the examples, such as :func:`groups_of_examples` or :func:`group_by`.

    Args:
        scores: as for :func:`evaluate`.
        groups: for each name the positions of its examples; groups may overlap.
    """
    scores = np.asarray(scores)
    return {name: evaluate(scores[..., positions, :, :]) for name, positions in groups.items()}


def compare(scores_a: np.ndarray, scores_b: np.ndarray) -> dict[str, PairedDifference]:
    """Model a minus model b on the same examples, for text, image and group.

    Args:
        scores_a: float [examples, 2, 2] or [seeds, examples, 2, 2].
        scores_b: the same shape, the same examples in the same order.
    """
    a, b = outcomes(scores_a), outcomes(scores_b)
    return {name: statistics.paired_difference(getattr(a, name), getattr(b, name)) for name in CHANCE}


def group_by(labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Positions by label, labels in the order of their first appearance."""
    labels = [str(label) for label in labels]
    return {label: np.flatnonzero(np.asarray(labels) == label) for label in dict.fromkeys(labels)}


@dataclass(frozen=True)
class Example:
    """One line of ``examples.jsonl``; ``images`` are paths and ``secondary_tag`` a comma list, often empty."""

    identifier: str
    captions: tuple[str, str]
    images: tuple[Path, Path]
    tag: str
    secondary_tag: str
    num_main_preds: int
    collapsed_tag: str


def groups_of_examples(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Positions by tag, collapsed tag, number of main predicates and secondary tag, by name ``field: value``.

    ``secondary_tag`` is a comma list, while the authors' statistics compare the whole string. Both are there:
    ``secondary_tag contains: Symbolic`` (41 examples) and ``secondary_tag is: Symbolic`` (28).
    """
    groups: dict[str, np.ndarray] = {}
    for field in ("collapsed_tag", "tag", "num_main_preds"):
        values = group_by([str(getattr(example, field)) for example in examples])
        groups |= {f"{field}: {value}": positions for value, positions in sorted(values.items())}
    listed = [[part.strip() for part in example.secondary_tag.split(",")] for example in examples]
    for value in sorted({part for parts in listed for part in parts if part}):
        groups[f"secondary_tag contains: {value}"] = np.flatnonzero([value in parts for parts in listed])
        whole = np.flatnonzero([example.secondary_tag.strip() == value for example in examples])
        if whole.size:
            groups[f"secondary_tag is: {value}"] = whole
    return groups


class Winoground:
    """The examples of a data directory by position, pictures decoded when asked for.

    ``source[i]`` is ``{"id": str, "captions": (str, str), "images": (uint8 [height, width, 3], same)}``; ``examples``
    has everything but the pixels.

    Args:
        directory: holds ``examples.jsonl`` and ``images/``.

    Raises:
        UserError: a file is not there, with what to download, or a line is damaged, with its number.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        download = _DOWNLOAD.format(directory=self.directory)
        lines = self.directory / "examples.jsonl"
        if not lines.is_file():
            raise UserError(f"no Winoground in {str(self.directory)!r}: examples.jsonl is not there. {download}")
        self.examples = [
            _example(entry, self.directory / "images", f"{lines}, line {number}") for number, entry in _entries(lines)
        ]
        identifiers = self.identifiers
        if len(set(identifiers)) < len(identifiers):
            twice = next(identifier for identifier in identifiers if identifiers.count(identifier) > 1)
            raise UserError(f"{lines}: example {twice!r} stands there twice")
        missing = [path for example in self.examples for path in example.images if not path.is_file()]
        if missing:
            raise UserError(f"{len(missing)} Winoground pictures are missing, first {str(missing[0])!r}. {download}")

    @property
    def identifiers(self) -> list[str]:
        """The examples' identifiers, in order."""
        return [example.identifier for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self.examples[position]
        return {"id": example.identifier, "captions": example.captions, "images": tuple(map(_pixels, example.images))}


def write_scores(path: str | Path, identifiers: Sequence[str | int], scores: np.ndarray) -> None:
    """Writes scores as one JSON a line, ``{"label": "<id>_c<caption>_i<image>", "score": x}``, at full precision.

    Args:
        path: of the file, replaced as a whole.
        identifiers: of the examples.
        scores: float [examples, 2 captions, 2 images], finite.
    """
    scores = np.asarray(scores, np.float64)
    if scores.shape != (len(identifiers), 2, 2) or not np.isfinite(scores).all():
        raise UserError(f"scores are finite and [{len(identifiers)} examples, 2, 2], given {scores.shape}")
    lines = [
        json.dumps({"label": f"{identifier}_c{caption}_i{image}", "score": float(scores[position, caption, image])})
        for position, identifier in enumerate(identifiers)
        for caption in (0, 1)
        for image in (0, 1)
    ]
    write_atomically(path, "\n".join(lines) + "\n")


def read_scores(path: str | Path, identifiers: Sequence[str | int]) -> np.ndarray:
    """Reads a scores file, lines in any order, and insists on exactly the expected labels.

    Args:
        path: of the file, as :func:`write_scores` writes it.
        identifiers: of the examples, in the order wanted.

    Returns:
        float64 [examples, 2 captions, 2 images].

    Raises:
        UserError: a label is malformed, unknown, given twice or missing, or a score is no finite number.
    """
    position = {str(identifier): index for index, identifier in enumerate(identifiers)}
    scores = np.full((len(position), 2, 2), np.nan)
    lines: dict[tuple[int, int, int], int] = {}
    for number, entry in _entries(Path(path)):
        where = f"{path}, line {number}"
        label, score = entry.get("label"), entry.get("score")
        match = _LABEL.fullmatch(label) if isinstance(label, str) else None
        if match is None:
            raise UserError(f"{where}: label {label!r} is not of the form <id>_c<0 or 1>_i<0 or 1>")
        if match["identifier"] not in position:
            raise UserError(f"{where}: label {label!r} names no example; there are {len(position)} examples")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not np.isfinite(score):
            raise UserError(f"{where}: the score of {label!r} is {score!r}, not a finite number")
        place = (position[match["identifier"]], int(match["caption"]), int(match["image"]))
        if place in lines:
            raise UserError(f"{where}: label {label!r} stands already in line {lines[place]}")
        lines[place] = number
        scores[place] = score
    absent = [
        f"{identifier}_c{caption}_i{image}"
        for identifier, index in position.items()
        for caption in (0, 1)
        for image in (0, 1)
        if (index, caption, image) not in lines
    ]
    if absent:
        raise UserError(f"{path}: {len(absent)} of {scores.size} labels are missing, first {absent[0]!r}")
    return scores


def _entries(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with their line numbers, blank lines skipped."""
    if not path.is_file():
        raise UserError(f"file {str(path)!r} is not there")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}: a JSON object is expected, given {line.strip()[:80]!r}")
        entries.append((number, entry))
    return entries


def _example(entry: dict[str, Any], images: Path, where: str) -> Example:
    missing = {"id", "image_0", "image_1", "caption_0", "caption_1", "tag"} - entry.keys()
    if missing:
        raise UserError(f"{where}: fields {', '.join(sorted(missing))} are missing")
    names = [str(entry[key]) for key in ("image_0", "image_1")]
    return Example(
        identifier=str(entry["id"]),
        captions=(entry["caption_0"], entry["caption_1"]),
        images=tuple(images / (name if Path(name).suffix else f"{name}.png") for name in names),
        tag=entry["tag"],
        secondary_tag=entry.get("secondary_tag") or "",
        num_main_preds=int(entry.get("num_main_preds", 1)),
        collapsed_tag=entry.get("collapsed_tag") or "",
    )


def _pixels(path: Path) -> np.ndarray:
    """A picture as uint8 [height, width, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
