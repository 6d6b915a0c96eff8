"""Reading published annotation files: what is missing or damaged is named, with its place and what to download."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vla_jax.errors import UserError
from vla_jax.foreign import MOST_ANNOTATION_BYTES, inside, is_file, parse_json, read_bytes, shown


def read_json(path: str | Path, download: str) -> Any:
    """The content of a JSON file; an object that has a key twice is refused, since one of the two would be lost.

    Args:
        path: of the file.
        download: where it comes from and where it goes, for the error where it is absent.

    Raises:
        UserError: the file is not there, no UTF-8, no JSON, or has a key twice.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"file {str(path)!r} is not there. {download}")

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UserError(f"{path}: the key {key!r} stands twice in one object; delete one of the two")
            found[key] = value
        return found

    try:
        return parse_json(read_bytes(path, MOST_ANNOTATION_BYTES), object_pairs_hook=without_doubles)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); download it again") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); download it again") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; download it again") from error


def read_json_lines(path: str | Path, download: str = "") -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with one a line, each with its line's number; blank lines are skipped.

    Raises:
        UserError: the file is not there or no UTF-8, or a line is no JSON object, with its number.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"file {str(path)!r} is not there. {download}".rstrip())
    try:
        text = read_bytes(path, MOST_ANNOTATION_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}: a JSON object is expected, given {line.strip()[:80]!r}")
        entries.append((number, entry))
    return entries


def fields(entry: Any, kinds: Mapping[str, type | tuple[type, ...]], where: str) -> list[Any]:
    """The values of named fields of an entry.

    Args:
        entry: should be a JSON object.
        kinds: by name, what the value must be; texts must not be empty, and truth values are no numbers.
        where: the entry's place, for the error.

    Raises:
        UserError: the entry is no object, or a field is missing or of another kind.
    """
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: a JSON object is expected, given {shown(entry)}")
    if missing := sorted(kinds.keys() - entry.keys()):
        raise UserError(f"{where}: fields {', '.join(missing)} are missing")
    for name, kind in kinds.items():
        value = entry[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{where}: field {name} is {shown(value)}, not {names}")
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{where}: field {name} is empty")
    return [entry[name] for name in kinds]


def picture_below(folder: Path, name: str, where: str) -> Path:
    """The file of a picture by the name that an entry has for it; :class:`UserError` if that leads elsewhere."""
    try:
        return inside(folder, name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_pictures(named: Iterable[tuple[str, Path]], download: str) -> None:
    """Checks that pictures are there, before anything is computed.

    Args:
        named: the place of an entry, for the error, with the path of its picture.
        download: where pictures come from and where they go.

    Raises:
        UserError: some are not, with their number, the first of them and the entry that needs it.
    """
    absent: dict[Path, str] = {}
    present: set[Path] = set()
    for where, path in named:
        if path in present or path in absent:
            continue
        if is_file(path):
            present.add(path)
        else:
            absent[path] = where
    if absent:
        path, where = next(iter(absent.items()))
        count = f"{len(absent)} of {len(absent) + len(present)}"
        raise UserError(f"{count} pictures are missing, first {str(path)!r} ({where}). {download}")
