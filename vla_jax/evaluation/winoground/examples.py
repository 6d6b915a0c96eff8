"""The published data: ``examples.jsonl``, the pictures, and a later relabelling of the examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.image import read_picture
from vla_jax.errors import UserError
from vla_jax.evaluation.annotations import check_pictures, fields, picture_below, read_json, read_json_lines
from vla_jax.evaluation.winoground.judging import group_by
from vla_jax.foreign import shown

NO_TAG = "no tag"
_DOWNLOAD = (
    "Winoground is given out under its own terms: accept them at https://huggingface.co/datasets/facebook/winoground, "
    "download data/examples.jsonl and data/images.zip, and unpack them so that {directory}/examples.jsonl and "
    "{directory}/images/ex_0_img_0.png exist."
)
_RELABELLING = (
    "It is new_tag_assignments.json of https://github.com/ajd12342/why-winoground-hard: an object that has the list of "
    "tags of each example by its id."
)
_LONGEST_ID = 1000
_FIELDS = {"caption_0": str, "caption_1": str, "image_0": str, "image_1": str, "tag": str}


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


def read_examples(path: str | Path) -> list[Example]:
    """The examples of ``examples.jsonl``; the pictures beside it are named and not looked at.

    Raises:
        UserError: the file is not there, with what to download; a line is damaged, or its id stands twice.
    """
    path = Path(path)
    examples: list[Example] = []
    lines: dict[str, int] = {}
    for number, entry in read_json_lines(path, _DOWNLOAD.format(directory=path.parent)):
        example = _example(entry, path.parent / "images", f"{path}, line {number}")
        if example.identifier in lines:
            before = lines[example.identifier]
            raise UserError(
                f"{path}, line {number}: example {example.identifier!r} stands there twice, first in line {before}"
            )
        lines[example.identifier] = number
        examples.append(example)
    if not examples:
        raise UserError(f"{path} holds no example")
    return examples


def _example(entry: dict[str, Any], images: Path, where: str) -> Example:
    (identifier, *_) = fields(entry, {"id": (int, str)} | _FIELDS, where)
    if len(str(identifier)) > _LONGEST_ID:
        raise UserError(f"{where}: an id has at most {_LONGEST_ID} characters")
    for key in ("secondary_tag", "collapsed_tag"):
        if not isinstance(entry.get(key), str | None):
            raise UserError(f"{where}: field {key} is {shown(entry[key])}, not a text")
    predicates = entry.get("num_main_preds", 1)
    if not isinstance(predicates, int) or predicates < 1:
        raise UserError(f"{where}: num_main_preds is {shown(predicates)}, not a whole number from 1 on")
    names = [entry[key] for key in ("image_0", "image_1")]
    return Example(
        identifier=str(entry["id"]),
        captions=(entry["caption_0"], entry["caption_1"]),
        images=tuple(picture_below(images, name if Path(name).suffix else f"{name}.png", where) for name in names),
        tag=entry["tag"],
        secondary_tag=str(entry.get("secondary_tag") or ""),
        num_main_preds=predicates,
        collapsed_tag=str(entry.get("collapsed_tag") or ""),
    )


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


def read_relabelling(path: str | Path, examples: Sequence[Example]) -> dict[str, tuple[str, ...]]:
    """The tags that Diwan et al. 2022 (Why is Winoground hard?, section 3) gave the examples, by identifier.

    In the published file 78 of the 400 examples need complex reasoning, 56 have an unusual image, 50 an unusual text,
    46 are ambiguously correct, 38 visually difficult, 30 non-minimal (no test of composition), and 172 have no tag.

    Args:
        path: ``new_tag_assignments.json`` as published.
        examples: what the ids must name, each once.

    Raises:
        UserError: the file is not there or damaged, or its ids are not those of the examples.
    """
    content = read_json(path, _RELABELLING)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object of tags by id. {_RELABELLING}")
    known = {example.identifier for example in examples}
    if strange := [key for key in content if key not in known]:
        raise UserError(f"{path}: {len(strange)} ids name no example, first {strange[0]!r}")
    if absent := [example.identifier for example in examples if example.identifier not in content]:
        raise UserError(f"{path}: {len(absent)} of {len(known)} examples are missing, first {absent[0]!r}")
    for key, tags in content.items():
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
            raise UserError(f"{path}: the tags of {shown(key)} are {shown(tags)}, not a list of texts")
        if twice := [tag for tag, count in Counter(tags).items() if count > 1]:
            raise UserError(f"{path}: example {key!r} has the tag {twice[0]!r} twice")
    return {key: tuple(tags) for key, tags in content.items()}


def relabelled_groups(examples: Sequence[Example], tags: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Positions by tag of :func:`read_relabelling`, named ``relabelled: tag``; examples without one are ``no tag``."""
    given = [tags[example.identifier] for example in examples]
    names = sorted({tag for found in given for tag in found})
    groups = {f"relabelled: {name}": np.flatnonzero([name in found for found in given]) for name in names}
    untagged = np.flatnonzero([not found for found in given])
    return groups | ({f"relabelled: {NO_TAG}": untagged} if untagged.size else {})


class Winoground:
    """The quadruples of a data directory by position, pictures as the bytes of their files, read when asked for.

    ``source[i]`` has the fields of generated quadruples (:class:`vla_jax.data.scenes.SceneSource`): ``id``,
    ``caption_0``, ``caption_1``, ``image_0``, ``image_1`` and the tags. ``examples`` has everything but the pictures.

    Args:
        directory: holds ``examples.jsonl`` and ``images/``.

    Raises:
        UserError: a file is not there, with what to download, or a line is damaged, with its number.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / "examples.jsonl"
        self.examples = read_examples(path)
        needed = [(f"example {e.identifier!r} of {path}", image) for e in self.examples for image in e.images]
        check_pictures(needed, _DOWNLOAD.format(directory=self.directory))

    @property
    def identifiers(self) -> list[str]:
        """The examples' identifiers, in order."""
        return [example.identifier for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self.examples[position]
        found: dict[str, Any] = {"id": example.identifier}
        for number, (caption, image) in enumerate(zip(example.captions, example.images, strict=True)):
            found |= {f"caption_{number}": caption, f"image_{number}": read_picture(image)}
        names = ("tag", "secondary_tag", "num_main_preds", "collapsed_tag")
        return found | {name: getattr(example, name) for name in names}
