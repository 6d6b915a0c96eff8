"""Reading the annotation files and picture folders a user has, with messages that name the file and the row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_jax.errors import UserError
from vla_jax.foreign import MOST_ANNOTATION_BYTES, inside, parse_json, read_bytes, shown

MOST_LINE_BYTES = 1 << 24
"""Of a row of JSON lines; NLVR's, with all objects of three boxes, have a few thousand."""

_DIGITS = 18  # of whole numbers, which fit into 64 bits
_SHOWN = 3  # of many missing pictures, those that a message names


class Row:
    """One object of an annotation file, which knows its place.

    Attributes:
        values: the object as it was parsed.
        place: the file and row, for messages.
    """

    __slots__ = ("file", "number", "values")

    def __init__(self, values: Any, file: Path, number: int | str):
        """Takes an object with its file and its number there: a position from 1 on, or a line, or an id."""
        self.file, self.number = file, number
        if not isinstance(values, Mapping):
            raise self.error(f"expected an object with named fields; found {shown(values)}")
        self.values = values

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"

    def error(self, message: str) -> UserError:
        """The error for this row, for the caller to raise."""
        return UserError(f"{self.place}: {message}")

    def get(self, key: str) -> Any:
        """A field's value as it is.

        Raises:
            UserError: if the row has no such field.
        """
        if key not in self.values:
            raise self.error(f"the field {key!r} is missing; it has {', '.join(map(str, self.values))}")
        return self.values[key]

    def text(self, key: str, default: str | None = None) -> str:
        """A field as text; a number becomes its digits. ``default`` stands for a field that is missing or null."""
        value = self.values.get(key) if default is not None else self.get(key)
        return default if value is None and default is not None else self.as_text(value, key)

    def as_text(self, value: Any, name: str) -> str:
        """A value of this row as text: annotators who answer "2" are sometimes stored as the number."""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(f"{name!r} must be a text (or a number, which becomes one); found {shown(value)}")
        return value if isinstance(value, str) else str(value)

    def integer(self, key: str) -> int:
        """A field that counts or names something: an integer, or its digits as text."""
        value = self.get(key)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < _DIGITS:
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 10**_DIGITS:
            raise self.error(f"{key!r} must be a whole number; found {shown(value)}")
        return value

    def truth(self, key: str) -> int:
        """A label of a statement: 1 for true, 0 for false, in whichever of the published spellings."""
        value = self.get(key)
        spelled = value.lower() if isinstance(value, str) else value
        if isinstance(spelled, bool | int | str):
            for label, spellings in enumerate(((0, "false", "0"), (1, "true", "1"))):
                if spelled in spellings:
                    return label
        raise self.error(f"{key!r} must be true or false (or 1 or 0); found {shown(value)}")

    def items(self, key: str) -> list[Any]:
        """A field that is a list."""
        value = self.get(key)
        if not isinstance(value, list):
            raise self.error(f"{key!r} must be a list; found {shown(value)}")
        return value


class Unique:
    """Refuses an id that occurs a second time, and says where it stood first."""

    def __init__(self, kind: str):
        self._kind = kind
        self._first: dict[Any, int | str] = {}

    def add(self, key: Any, row: Row) -> None:
        """Notes an id.

        Raises:
            UserError: if it has been noted before.
        """
        if key in self._first:
            raise row.error(f"the {self._kind} {key!r} stands twice; the first is in row {self._first[key]}")
        self._first[key] = row.number


def read_json(path: Path, *, unique_keys: bool = False) -> Any:
    """A JSON file.

    Args:
        path: the file.
        unique_keys: refuse objects in which a key stands twice, of which JSON would silently keep the last.

    Raises:
        UserError: if it is no JSON, with the line, or a key stands twice.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for position, key in enumerate(keys) if key in keys[:position])
            raise UserError(f"{path}: the id {twice!r} stands twice; every id may stand once")
        return found

    content = read_bytes(path, MOST_ANNOTATION_BYTES)
    return _parsed(content, str(path), object_pairs_hook=distinct if unique_keys else None)


def read_rows(path: Path, key: str) -> list[Row]:
    """The rows of the list that a JSON file holds under ``key``, numbered from 1.

    Raises:
        UserError: if it is no JSON, or holds no such list.
    """
    content = read_json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get(key), list):
        raise UserError(f"{path}: expected an object with a list {key!r}; this is not the published file")
    return as_rows(content[key], path)


def as_rows(values: Sequence[Any], path: Path) -> list[Row]:
    """Objects of a file as its rows, numbered from 1."""
    return [Row(value, path, number) for number, value in enumerate(values, 1)]


def read_json_lines(path: Path) -> Iterator[Row]:
    """The rows of a file with one JSON object a line; empty lines are passed over.

    Raises:
        UserError: if a line is no JSON.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise UserError(f"{path}, row {number}: it has over {MOST_LINE_BYTES:,} bytes; is this the file?")
            if line.strip():
                yield Row(_parsed(line, f"{path}, row {number}"), path, number)


def _parsed(content: bytes, place: str, **settings: Any) -> Any:
    try:
        return parse_json(content.decode("utf-8-sig"), **settings)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: no valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: no UTF-8 text at byte {error.start}; is the file unpacked and complete?") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{place}: {error}; this is not the published file") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text in UTF-8.

    Raises:
        UserError: if it is none, or too large.
    """
    try:
        return read_bytes(path, MOST_ANNOTATION_BYTES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text at byte {error.start}; is the file unpacked and complete?") from error


@dataclass
class ManualFolder:
    """The folder a user has, in which a data set's files lie.

    A file is looked for in the subfolder that has the data set's name, then in the folder itself; so one folder may
    serve one data set or many.

    Attributes:
        root: the folder.
        name: the data set's name.
        instructions: what to download and where it goes, for messages.
    """

    root: Path
    name: str
    instructions: str
    _missing: list[tuple[Path, str]] = field(default_factory=list)

    def find(self, *alternatives: str) -> Path | None:
        """The first of the relative paths that exists, or None; none may leave the folder."""
        for folder in (self.root / self.name, self.root):
            for alternative in alternatives:
                if inside(folder, alternative).exists():
                    return folder / alternative
        return None

    def require(self, *alternatives: str) -> Path:
        """The first of the relative paths that exists.

        Raises:
            UserError: if there is none.
        """
        found = self.find(*alternatives)
        if found is None:
            places = " or ".join(dict.fromkeys(alternatives))
            raise self.error(f"the data set {self.name!r} needs {places}, which is not there")
        return found

    def pictures(self, *alternatives: str) -> Pictures:
        """The pictures below the first of the relative paths that is there.

        Raises:
            UserError: if there is none.
        """
        return Pictures(self.require(*alternatives), self._missing)

    def check_pictures(self) -> None:
        """Raises:
        UserError: if any picture that was asked for is missing, with the first few and who asked.
        """
        if self._missing:
            shown = "; ".join(f"{path} ({place})" for path, place in self._missing[:_SHOWN])
            raise self.error(
                f"{len(self._missing)} picture(s) that annotations of {self.name!r} speak of are missing, first: "
                f"{shown}. Add them, or take their annotations (or, for a whole split, its file) out"
            )

    def error(self, message: str) -> UserError:
        """The error for something that is missing, with what to download."""
        return UserError(f"{message}; looked in {self.root} (manual_dir).\n{self.instructions.strip()}")


class Pictures:
    """The files below a folder, listed once and not asked for one by one.

    A picture is named by its path below the folder; or by the file's name alone, in whichever subfolder it is.
    """

    def __init__(self, folder: Path, missing: list[tuple[Path, str]]):
        """Lists a folder; pictures that are asked for and not there are appended to ``missing``."""
        self.folder = folder
        self._missing = missing
        self._paths: set[str] = set()
        self._folders: dict[str, str] = {}  # by file name, the first folder that has it
        seen: set[str] = set()
        for where, folders, names in os.walk(folder, followlinks=True):
            folders.sort()
            if os.path.realpath(where) in seen:  # a link to a folder above would go round for ever
                folders.clear()
                continue
            seen.add(os.path.realpath(where))
            below = Path(where).relative_to(folder)
            for name in names:
                self._paths.add((below / name).as_posix())
                self._folders.setdefault(name, where)

    def find(self, name: str, row: Row) -> Path:
        """A picture's file; one that is missing is noted together with the row that speaks of it."""
        if name in self._paths:
            return self.folder / name
        if name in self._folders:
            return Path(self._folders[name]) / name
        try:
            place = inside(self.folder, name)
        except UserError as error:
            raise row.error(str(error)) from None
        self._missing.append((place, row.place))
        return place


def coco_folders(subset: str) -> tuple[str, ...]:
    """Where a subset of COCO's pictures such as ``train2014`` may lie: as unpacked, and as published tools want it."""
    return (subset, f"images/{subset}", f"Images/mscoco/{subset}", f"images/mscoco/images/{subset}", f"coco/{subset}")
