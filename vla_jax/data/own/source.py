"""Rows of one's own files as random-access examples, checked before the first is read."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.image import read_picture
from vla_jax.data.own.rows import RowReader
from vla_jax.data.own.scan import Problem, Progress, Scan, Summary
from vla_jax.data.own.settings import SPLITS, Columns, OwnData
from vla_jax.data.own.tables import Table
from vla_jax.errors import UserError

_SHOWN = 20


class OwnSource:
    """Examples of one split, with the field names that all data sets share.

    A row is an example, except for retrieval: there a picture is one, with the captions of all of its rows, since a
    picture that stood in a gallery twice could not be told from itself.

    Args:
        tables: the files.
        readers: what reads a row of each.
        rows: ``file``, ``line``, ``start``, ``length`` and ``picture`` of each row.
        classes: class names in the order of their numbers, for classification.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        readers: Sequence[RowReader],
        rows: Mapping[str, np.ndarray],
        classes: Sequence[str] = (),
    ):
        self._tables, self._readers, self._rows = list(tables), list(readers), dict(rows)
        self._numbers = {name: number for number, name in enumerate(classes)}
        self._ends = np.arange(1, len(rows["line"]) + 1)
        if readers[0].task == "retrieval":
            self._rows, self._ends = _by_picture(self._rows)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example: :meth:`annotation` and ``image``, the bytes of the picture's file; or ``image_0``, ``image_1``.

        Raises:
            UserError: if the picture or the row has gone or changed since it was checked.
        """
        example = self.annotation(index)
        if "image_id_1" not in example:
            return example | {"image": self._picture(index, example["image_id"])}
        first, second = (self._picture(index, example[name]) for name in ("image_id", "image_id_1"))
        return example | {"image_0": first, "image_1": second}

    def _picture(self, index: int, name: str) -> bytes:
        path = self._readers[self._rows["file"][self._first(index)]].folder / name
        try:
            return read_picture(path)
        except (OSError, UserError) as error:
            raise UserError(f"{self.place(index)}: the picture {path} cannot be read: {error}") from error

    def annotation(self, index: int) -> dict[str, Any]:
        """What the row says, or the rows of a picture say, without the picture; ``label`` is the class's number."""
        first = self._first(index)
        fields = self._row(first)
        for further in range(first + 1, int(self._ends[index])):
            fields["captions"] = fields["captions"] + self._row(further)["captions"]
        fields.pop("split", None)
        for name in ("box", "boxes"):
            if name in fields:
                fields[name] = np.asarray(fields[name], np.float32)
        if "class_name" in fields:
            fields["label"] = self._numbers[fields["class_name"]]
        if "question" in fields and "id" in fields:
            fields["question_id"] = fields["id"]
        return fields

    @property
    def two_pictures(self) -> bool:
        """Whether examples have two pictures."""
        return self._readers[0].two_pictures

    @property
    def has_boxes(self) -> bool:
        """Whether examples of grounding have candidate boxes."""
        return all("boxes" in reader.needed for reader in self._readers)

    def place(self, index: int) -> str:
        """The file and line of an example."""
        return self._place(self._first(index))

    def _first(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(self._ends[index - 1]) if index else 0

    def _place(self, row: int) -> str:
        return f"{self._tables[self._rows['file'][row]].path}:{self._rows['line'][row]}"

    def _row(self, row: int) -> dict[str, Any]:
        at = {name: int(self._rows[name][row]) for name in ("file", "start", "length")}
        try:
            fields, flaws = self._readers[at["file"]].read(self._tables[at["file"]].read(at["start"], at["length"]))
        except ValueError as error:
            raise UserError(f"{self._place(row)} cannot be read any more; the file has changed: {error}") from error
        if flaws:
            raise UserError(f"{self._place(row)} has changed since it was checked: {flaws[0]}")
        return fields


def _by_picture(rows: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of one picture beside each other, pictures in the order of their first rows; and where each picture ends."""
    _, first, which = np.unique(rows["picture"], return_index=True, return_inverse=True)
    rank = first[which]  # [rows], the first row of the same picture
    order = np.argsort(rank, kind="stable")
    return {name: column[order] for name, column in rows.items()}, np.cumsum(np.bincount(which)[np.argsort(first)])


@dataclasses.dataclass(frozen=True)
class Own:
    """Checked data of one's own.

    Attributes:
        task: what it is for.
        splits: examples of ``train``, ``validation`` and ``test``.
        summary: what the check found.
        fingerprint: of the files and of everything that says how they are read; another one is other data.
    """

    task: str
    splits: Mapping[str, OwnSource]
    summary: Summary
    fingerprint: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers; empty but for classification."""
        return self.summary.classes

    @property
    def two_pictures(self) -> bool:
        """Whether texts are about two pictures."""
        return self.splits["train"].two_pictures

    @property
    def has_boxes(self) -> bool:
        """Whether examples of grounding have candidate boxes."""
        return self.splits["train"].has_boxes


def load_own(data: OwnData, task: str = "", progress: Progress | None = None) -> Own:
    """Checks files of one's own, all but the decoding of pictures, and makes them readable at random.

    Args:
        data: the files and how they are read.
        task: what for; from the columns if empty.
        progress: is told how far the check is.

    Raises:
        UserError: with the first problems, if there is any; or as :class:`Scan`.
    """
    scan = Scan(data, task, decode=False)
    found = scan.problems(progress)
    first: list[Problem] = list(itertools.islice(found, _SHOWN))
    if first:
        more = sum(1 for _ in found)
        shown = "\n".join(f"  {problem}" for problem in first) + (f"\n  and {more:,} more" if more else "")
        raise UserError(
            f"the data cannot be trained on:\n{shown}\n`vla-data check {data.path}` lists all, undecodable pictures too"
        )
    summary = scan.summary()
    tables, readers = list(scan.tables.values()), list(scan.readers.values())
    splits = {split: OwnSource(tables, readers, scan.rows(split), summary.classes) for split in SPLITS}
    return Own(scan.task, splits, summary, _fingerprint(data, scan.task))


def _fingerprint(data: OwnData, task: str) -> str:
    read: dict[str, Any] = {field.name: getattr(data, field.name) for field in dataclasses.fields(OwnData)}
    read |= {"task": task, "columns": dataclasses.asdict(data.columns)}
    del read["images"]
    if data.columns.boxes == Columns.boxes:
        del read["columns"]["boxes"]  # the file says whether it has one; runs from before there was this setting go on
    for split, path in data.files.items():
        # What a file says, not where it lies.
        with Path(path).expanduser().open("rb") as file:
            read[f"{split}_path" if split != "train" else "path"] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]
