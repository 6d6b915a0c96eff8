"""What the frozen part of a backbone makes of pictures and texts: computed once for each, in memory or on disk.

Rows are found by a digest of what they were made of, so that fifty questions about one picture share its row, another
split or a later run takes what is there, and a picture that was changed is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.stages import Source
from vla_jax.errors import UserError

PART = 4096
"""Rows computed and kept at a time: what an interruption can cost."""


class StreamStore:
    """Rows of one shape and dtype by digest.

    On disk a part is two files, ``NAME.rows.npy`` and, written last, ``NAME.keys.npy``; rows are mapped, not read, so
    that there may be more of them than memory.
    """

    def __init__(self, folder: Path | None):
        """Opens a store.

        Args:
            folder: where parts lie, made if missing; None keeps rows in memory.

        Raises:
            UserError: if a part cannot be read.
        """
        self._folder = folder
        self._parts: list[np.ndarray] = []
        self._places: dict[bytes, tuple[int, int]] = {}  # part, and row of it
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("*.keys.npy")):
                self._open(file)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def fill(
        self, keys: Sequence[bytes], compute: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], part: int = PART
    ) -> None:
        """Computes the rows that are not there yet, and keeps them.

        Args:
            keys: digests of examples, in any order and with repetitions.
            compute: ``places -> (found places, rows)``: of examples with one of each missing digest, ascending, those
                that can be read, and ``[found, ...]`` rows.
            part: rows computed at a time.
        """
        first = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self._places}
        missing = np.array(sorted(first.values()), np.int64)
        for start in range(0, len(missing), part):
            found, rows = compute(missing[start : start + part])
            self._add([keys[place] for place in found], rows)

    def rows(self, keys: Sequence[bytes]) -> Rows:
        """The rows of examples with these digests, which must be there."""
        places = np.array([self._places[key] for key in keys], np.int64).reshape(-1, 2)
        return Rows(self._parts, places)

    def _add(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        if not len(keys):
            return
        if self._folder is None:
            self._remember([*keys], rows)
            return
        name = uuid.uuid4().hex
        _save(self._folder / f"{name}.rows.npy", np.asarray(rows))
        _save(self._folder / f"{name}.keys.npy", np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1))
        self._open(self._folder / f"{name}.keys.npy")

    def _open(self, file: Path) -> None:
        rows_file = file.with_name(file.name.replace(".keys.", ".rows."))
        try:
            keys, rows = np.load(file), np.load(rows_file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(
                f"the stored streams {rows_file} cannot be read: {error}; delete {file} and they are computed anew"
            ) from error
        if len(keys) != len(rows):
            raise UserError(f"{rows_file} has {len(rows)} rows and {file} {len(keys)} keys; delete both files")
        self._remember([key.tobytes() for key in keys], rows)

    def _remember(self, keys: list[bytes], rows: np.ndarray) -> None:
        self._places |= {key: (len(self._parts), row) for row, key in enumerate(keys)}
        self._parts.append(rows)


class Rows:
    """Rows of a store as one array of examples: it has a length, and gives a row for an index."""

    def __init__(self, parts: Sequence[np.ndarray], places: np.ndarray):
        """Takes parts, and for each example its part and the row of it, int ``[examples, 2]``."""
        self._parts, self._places = parts, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> np.ndarray:
        part, row = self._places[index]
        return np.asarray(self._parts[part][row])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, ``[examples, ...]``, in memory."""
        del copy  # it always is one
        return np.stack([self[index] for index in range(len(self))]).astype(dtype, copy=False)


def _save(file: Path, array: np.ndarray) -> None:
    """Writes an array under another name first: a file of this name is whole."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.save(stream, array)
    partial.replace(file)


def digests(source: Source, fields: Sequence[str]) -> list[bytes]:
    """What of each raw example these fields hold, as SHA-256.

    Raises:
        UserError: if an example has no such field.
    """
    return [_digest(source[index], fields) for index in range(len(source))]


def _digest(example: Mapping[str, Any], fields: Sequence[str]) -> bytes:
    found = hashlib.sha256()
    for field in fields:
        if field not in example:
            raise UserError(f"an example has no field {field!r}; it has {', '.join(sorted(example))}")
        content = _content(example[field])
        found.update(len(content).to_bytes(8, "little") + content)
    return found.digest()


def _content(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    return pickle.dumps(value, protocol=5)


def digests_of_rows(*arrays: np.ndarray) -> list[bytes]:
    """The digest of each example's rows of some arrays, each ``[examples, ...]``."""
    return [hashlib.sha256(b"".join(row.tobytes() for row in rows)).digest() for rows in zip(*arrays, strict=True)]


def fingerprint(described: Mapping[str, Any], *values: Any) -> str:
    """The name of a store's folder: of what JSON can say, and of values that can be pickled, such as a transform.

    Two equal values may be pickled differently; then rows are computed again, never mistaken for others.
    """
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for value in values:
        found.update(pickle.dumps(value, protocol=5))
    return found.hexdigest()[:32]
