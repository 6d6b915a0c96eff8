"""What a row says, in the field names that all data sets share, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_jax.data.boxes import check_boxes
from vla_jax.data.own.settings import SPLIT_NAMES, TASKS, OwnData
from vla_jax.errors import UserError
from vla_jax.foreign import MOST_PATH, parse_json, printable, shown

MOST_NAME = 1000
"""Characters of a label or an id. Labels are all remembered, and stand in messages and tables."""

MOST_TEXT = 1 << 16
"""Characters of a text, of which a tower reads a few hundred."""

MOST_BOXES = 1000
"""Candidate boxes of a row. Every row of a batch has room for as many as the row that has most."""

Kind = Literal[
    "row",
    "column",
    "path",
    "missing picture",
    "unreadable picture",
    "text",
    "answer",
    "label",
    "box",
    "split",
    "duplicate id",
    "empty split",
]
"""Kinds of problems."""

TRUTH = {"0": 0, "false": 0, "no": 0, "1": 1, "true": 1, "yes": 1}


class Flaw(Exception):
    """Something wrong with a row.

    Attributes:
        kind: one of :data:`Kind`.
        message: what, and what is allowed.
    """

    def __init__(self, kind: Kind, message: str):
        super().__init__(message)
        self.kind, self.message = kind, message


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Reads rows of one task.

    Attributes:
        task: the task.
        columns: the columns there are, ours by name and the file's.
        data: the file's settings.
        folder: what paths of pictures are relative to.
    """

    task: str
    columns: Mapping[str, str]
    data: OwnData
    folder: Path

    @property
    def needed(self) -> dict[str, str]:
        """The columns that are read, ours by name and the file's."""
        used = ["image", "split", "id", *(self.column(group) for group in TASKS[self.task])]
        if self.task == "classification":
            used.append("text")
        if self.two_pictures:
            used.append("image_1")
        used += {"grounding": ["boxes"], "vqa": ["question_kind"]}.get(self.task, [])
        return {name: self.columns[name] for name in used if name in self.columns}

    @property
    def two_pictures(self) -> bool:
        """Whether texts are about two pictures."""
        return self.task == "matching" and "image_1" in self.columns

    def column(self, group: tuple[str, ...]) -> str:
        """Which of alternative columns the task takes."""
        return next(name for name in group if name in self.columns)

    def read(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Flaw]]:
        """The fields of a row, and its flaws; with flaws the fields are not complete.

        Args:
            values: by column of the file.

        Returns:
            ``image_id``, the picture's path in the folder, and ``image_id_1``, a second one's; ``class_name`` (whose
            number only the classes say), ``text`` and ``label`` 0 or 1, ``captions``, ``question``, ``answers`` and
            ``question_kind``, ``phrase``, ``box`` and ``boxes``, by the task; ``split`` and ``id`` where there are any.
        """
        fields: dict[str, Any] = {}
        flaws: list[Flaw] = []
        readers = [lambda values: {"image_id": self._picture(values, "image")}, *getattr(self, f"_{self.task}")()]
        if "split" in self.columns:
            readers.append(self._split)
        if "id" in self.columns:
            readers.append(self._id)
        for read in readers:
            try:
                fields |= read(values)
            except Flaw as flaw:
                flaws.append(flaw)
        return fields, flaws

    def check_box(self, boxes: list[list[float]], width: int, height: int) -> Iterator[Flaw]:
        """What is wrong with boxes in a picture of this size."""
        try:
            check_boxes(np.array(boxes), width, height, "the row")
        except UserError as error:
            yield Flaw("box", str(error))

    def _classification(self) -> Iterator[Any]:
        yield self._class
        if "text" in self.columns:
            yield lambda values: {"text": self._text(values, "text")}

    def _matching(self) -> Iterator[Any]:
        if self.two_pictures:
            yield lambda values: {"image_id_1": self._picture(values, "image_1")}
        yield lambda values: {"text": self._text(values, "text")}
        yield self._truth

    def _retrieval(self) -> Iterator[Any]:
        column = self.column(TASKS["retrieval"][0])
        if column == "captions":
            yield lambda values: {"captions": self._texts(values, column, "text")}
        else:
            yield lambda values: {"captions": [self._text(values, column)]}

    def _vqa(self) -> Iterator[Any]:
        column = self.column(TASKS["vqa"][1])
        yield lambda values: {"question": self._text(values, "question")}
        yield lambda values: {"answers": self._texts(values, column, "answer")}
        if "question_kind" in self.columns:
            yield lambda values: {"question_kind": self._text(values, "question_kind")}

    def _grounding(self) -> Iterator[Any]:
        yield lambda values: {"phrase": self._text(values, "phrase")}
        yield lambda values: {"box": self._corners(self._value(values, "box"))}
        if "boxes" in self.columns:
            yield self._boxes

    def _value(self, values: Mapping[str, Any], name: str) -> Any:
        """A value that has to be there."""
        column = self.columns[name]
        value = values.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise Flaw("column", f"there is nothing in the column {column!r}")
        return value

    def _text(self, values: Mapping[str, Any], name: str) -> str:
        value = self._value(values, name)
        if not isinstance(value, str):
            raise Flaw("text", f"the column {self.columns[name]!r} is to hold a text; got {shown(value)}")
        if not value.strip():
            raise Flaw("text", f"the text in the column {self.columns[name]!r} is empty")
        self._check_length(value, name, "text")
        return value

    def _check_length(self, text: str, name: str, kind: Literal["text", "answer"]) -> None:
        if len(text) > MOST_TEXT:
            raise Flaw(kind, f"a text in the column {self.columns[name]!r} has over {MOST_TEXT:,} characters")

    def _texts(self, values: Mapping[str, Any], name: str, kind: Literal["text", "answer"]) -> list[str]:
        """A list of texts; a text that is no list is the only one. Answers that are numbers are written out."""
        value = self._value(values, name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = parse_json(value)
            except ValueError:
                raise Flaw(kind, f"the list in the column {self.columns[name]!r} is not JSON: {shown(value)}") from None
        items = value if isinstance(value, list) else [value]
        if kind == "answer":
            items = [_written(item) for item in items]
        if not items:
            raise Flaw(kind, f"the list in the column {self.columns[name]!r} is empty; at least one {kind}")
        for item in items:
            if not isinstance(item, str) or not item.strip():
                what = "is empty" if isinstance(item, str) else f"is {shown(item)}"
                raise Flaw(kind, f"an entry of the column {self.columns[name]!r} {what}; each is to be a text")
            self._check_length(item, name, kind)
        return items

    def _class(self, values: Mapping[str, Any]) -> dict[str, str]:
        value = self._value(values, "label")
        name = _written(value)
        if isinstance(value, bool) or not isinstance(name, str) or not name.strip():
            raise Flaw("label", f"a label is the name or the number of a class; got {shown(value)}")
        name = name.strip()
        _check_name("label", "label", name)
        if self.data.classes and name not in self.data.classes:
            raise Flaw("label", f"the label {name!r} is none of the classes {', '.join(self.data.classes)}")
        return {"class_name": name}

    def _truth(self, values: Mapping[str, Any]) -> dict[str, int]:
        value = self._value(values, "label")
        written = "" if isinstance(value, list | dict) else str(_written(value))
        truth = TRUTH.get(written.strip().lower())
        if truth is None:
            raise Flaw(
                "label",
                f"the label of a text is 0 or 1, false or true, no or yes; got {shown(value)}. If it is a class, say "
                "task=classification",
            )
        return {"label": truth}

    def _boxes(self, values: Mapping[str, Any]) -> dict[str, list[list[float]]]:
        value = self._value(values, "boxes")
        try:
            boxes = parse_json(value) if isinstance(value, str) else value
        except ValueError:
            boxes = None
        if not isinstance(boxes, list) or not boxes or not all(isinstance(box, list) for box in boxes):
            raise Flaw("box", f"candidate boxes are a list of at least one box of four numbers; got {shown(value)}")
        if len(boxes) > MOST_BOXES:
            raise Flaw("box", f"there are {len(boxes):,} candidate boxes; at most {MOST_BOXES:,}")
        return {"boxes": [self._corners(box) for box in boxes]}

    def _corners(self, value: Any) -> list[float]:
        """A box as left, top, right and bottom."""
        try:
            numbers = value if isinstance(value, list) else value.strip("[]() ").replace(",", " ").split()
            left, top, a, b = (float(number) for number in numbers)
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise Flaw("box", f"a box is four numbers; got {shown(value)}") from None
        if self.data.box_format == "xywh":
            a, b = left + a, top + b
        box = [left, top, a, b]
        if not all(map(math.isfinite, box)):
            raise Flaw("box", f"a box is four finite numbers; got {shown(value)}")
        if not (left < a and top < b):
            other = {"xyxy": "xywh", "xywh": "xyxy"}[self.data.box_format]
            message = f"the box {shown(value)} holds nothing, read as {self.data.box_format}; is box_format {other}?"
            raise Flaw("box", message)
        return box

    def _split(self, values: Mapping[str, Any]) -> dict[str, str]:
        value = self._value(values, "split")
        split = SPLIT_NAMES.get("" if isinstance(value, list | dict) else str(value).strip().lower())
        if split is None:
            raise Flaw("split", f"a split is train, validation or test; got {shown(value)}")
        return {"split": split}

    def _id(self, values: Mapping[str, Any]) -> dict[str, str]:
        value = _written(self._value(values, "id"))
        if not isinstance(value, str) or not value.strip():
            raise Flaw("column", f"an id is a text or a number; got {shown(value)}")
        _check_name("id", "column", value)
        return {"id": value}

    def _picture(self, values: Mapping[str, Any], name: str) -> str:
        """A picture's path in the folder; it must not leave it."""
        path = self._value(values, name)
        if not isinstance(path, str) or not path.strip() or len(path) > MOST_PATH or not printable(path):
            raise Flaw("path", f"the path of a picture is a text without control characters; got {shown(path)}")
        if "://" in path:
            raise Flaw("path", f"{path!r} is an address on the net; fetch the picture and give the path of its file")
        if os.path.isabs(path):
            if not self.data.images:
                raise Flaw("path", f"the path {path!r} is absolute; give it relative to the file, or name its folder")
            path = os.path.relpath(path, os.path.abspath(self.folder))
        # The text alone counts: a link inside the folder, set by whoever owns it, may lead anywhere.
        path = os.path.normpath(path)
        if path == os.pardir or path.startswith(os.pardir + os.sep):
            raise Flaw("path", f"the path {values[self.columns[name]]!r} leaves the folder {self.folder}")
        return path


def _check_name(what: str, kind: Kind, name: str) -> None:
    if len(name) > MOST_NAME or not printable(name, lines=True):
        raise Flaw(kind, f"a {what} has at most {MOST_NAME:,} characters, none a control character; got {shown(name)}")


def _written(value: Any) -> Any:
    """Numbers and truth values as they are written in a table; 3.0 is what is left of 3 beside missing values."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | float) else value
