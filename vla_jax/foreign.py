"""What others wrote, read within bounds: the size of a file before it is in memory, JSON, names of files, arrays.

A limit lies far above everything that is published, and far below what would stop the machine.
"""

from __future__ import annotations

import io
import json
import os
import re
import reprlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from vla_jax.errors import UserError

MOST_JSON_BYTES = 1 << 26
"""Of a configuration, an index or metadata; the index of a model of 400 billion parameters has one million."""

MOST_ANNOTATION_BYTES = 1 << 33
"""Of a published file of annotations, which is parsed as a whole; a part of GQA's questions has a billion."""

MOST_HEADER_BYTES = 1 << 24
"""Of a safetensors header, which says a tensor in some hundred bytes. The format itself allows six times as many, which
become gigabytes once they are read."""

MOST_NESTED = 100
"""Lists and objects within each other; Python's own recursion ends at about a thousand, with another error."""

MOST_ARRAY_BYTES = 1 << 32
"""Of an archive of arrays, unpacked: predictions of 32 numbers for each of 30 million examples."""

MOST_PATH = 4096
"""Characters of a path, Linux's own limit."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_CONTROL_IN_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class _Short(reprlib.Repr):
    """Python's notation, cut short without the whole of it being made."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxtuple = 3, 6, 6, 6
        self.maxstring, self.maxother, self.maxlong = 60, 60, 40


def shown(value: Any) -> str:
    """A value for a message, in few characters whatever it is."""
    try:
        text = _Short().repr(value)
    except (ValueError, RecursionError):  # whole numbers of more than 4,300 digits have no notation
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a file.

    Args:
        path: the file; pipes and devices, which may have no end, are refused.
        most: bytes that it may have.

    Raises:
        UserError: it has more, or is no regular file.
        OSError: it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise UserError(f"{path} is no regular file")
    if size > most:
        raise UserError(f"{path} has {size:,} bytes, and at most {most:,} are read of such a file")
    with path.open("rb") as file:
        return file.read(size)  # not ``most``, which it would take memory for


def parse_json(content: str | bytes, *, finite: bool = False, **settings: Any) -> Any:
    """What JSON says; whatever is wrong with it is a :class:`ValueError`.

    Beyond what is no JSON this refuses nesting that would end in a recursion error wherever the value is looked at, and
    halves of surrogate pairs, which cannot be written or hashed.

    Args:
        content: the text, or its bytes in UTF-8.
        finite: refuses NaN and infinities, which are no JSON and which Python reads.
        **settings: of :func:`json.loads`.
    """
    text = content.decode() if isinstance(content, bytes) else content
    if finite:
        settings["parse_constant"] = _refuse
    try:
        found = json.loads(text, **settings)
    except RecursionError:
        raise ValueError(f"lists and objects are nested more than {MOST_NESTED} deep") from None
    _check_nesting(found)
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair, which is no character") from None
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _check_nesting(value: Any) -> None:
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MOST_NESTED):
        if not level:
            return
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
    raise ValueError(f"lists and objects are nested more than {MOST_NESTED} deep")


def printable(text: str, *, lines: bool = False) -> bool:
    """Whether a text has no control character, with which it could steer the terminal that it is printed to.

    Args:
        text: the text.
        lines: whether it may have tabs and ends of lines.
    """
    return (_CONTROL_IN_TEXT if lines else _CONTROL).search(text) is None


def plain_name(name: Any) -> bool:
    """Whether this is the name of a file and no path: what an index may say of the files beside it."""
    if not isinstance(name, str) or name in ("", os.curdir, os.pardir) or len(name) > 255 or not printable(name):
        return False
    return not any(separator in name for separator in ("/", "\\", ":"))


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """A file below a folder, by what others call it.

    The text alone counts: a link in the folder, set by whoever owns it, may lead anywhere.

    Raises:
        UserError: the name leads out of the folder, or cannot be one.
    """
    normal = os.path.normpath(name)
    if not name or len(name) > MOST_PATH or not printable(name):
        raise UserError(f"{shown(name)} is no path of a file")
    if os.path.isabs(name) or normal == os.pardir or normal.startswith(os.pardir + os.sep):
        raise UserError(f"the path {shown(name)} leaves the folder {os.fspath(folder)}")
    return Path(folder) / name


def is_file(path: Path) -> bool:
    """Whether there is a regular file; a path that the system cannot even look up is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def open_safetensors(path: Path) -> Any:
    """A safetensors file, its header read and checked against its size; of no tensor anything is read.

    Raises:
        UserError: its header is too large.
        OSError: it cannot be read.
        SafetensorError: it is another kind of file, or not the whole of it.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    # Of a file that is none at all the first bytes are any number, and the library says what is wrong.
    if MOST_HEADER_BYTES < size <= path.stat().st_size:
        raise UserError(f"the header of {path} has {size:,} bytes, and at most {MOST_HEADER_BYTES:,} are read")
    return safe_open(path, framework="numpy")


def load_arrays(file: Path | bytes, most: int = MOST_ARRAY_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, by name.

    Args:
        file: the file, or its content.
        most: bytes that it may come to, unpacked.

    Raises:
        UserError: it is none, is damaged, holds objects (which are pickled), or unpacks to more.
    """
    where = "the stored arrays" if isinstance(file, bytes) else str(file)
    try:
        with zipfile.ZipFile(io.BytesIO(file) if isinstance(file, bytes) else file) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > most:
            raise UserError(f"{where} unpacks to {size:,} bytes, and at most {most:,} are read")
        with np.load(io.BytesIO(file) if isinstance(file, bytes) else file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except UserError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise UserError(f"{where} cannot be read as arrays: {error}; delete it and make it again") from error
