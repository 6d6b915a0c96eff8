"""What the files of a checkpoint were when it was saved, and whether they still are.

The sums of a run's checkpoint are written into it before it gets its name, so that none is ever without. Orbax goes on
writing its metadata meanwhile; of that file, what this package told it is summed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from vla_jax.foreign import MOST_JSON_BYTES, parse_json

_log = logging.getLogger(__name__)

FILE = "checksums.json"
METADATA = "_CHECKPOINT_METADATA"


def write(folder: epath.Path, told: Mapping[str, Any]) -> None:
    """Writes the size and SHA-256 of every file of a checkpoint into it.

    Args:
        folder: the checkpoint.
        told: what its metadata were told.
    """
    files = [file for file in _files(folder) if file.name != METADATA or file.parent != folder]
    sums = {str(file.relative_to(folder)): [file.stat().length, _digest(file)] for file in files}
    content = {"files": sums, "metadata": _digest_of(told)}
    (folder / FILE).write_text(json.dumps(content, indent=1))


def problem(folder: epath.Path, items: tuple[str, ...] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or None.

    Args:
        folder: the checkpoint.
        items: the items that are to be read, in whose folders files are looked at; all if None. The metadata are looked
            at always.

    Returns:
        The first file that is missing, has another size or another content than when it was saved. A checkpoint without
        sums, which an earlier version wrote, is logged as not checked.
    """
    # No name that stands in a file leads anywhere: it is looked for among those that are there.
    there = {str(file.relative_to(folder)): file for file in _files(folder)}
    for name, file in there.items():
        if not _is_regular(file):
            return f"{name} is no regular file"
    if FILE not in there:
        _log.warning("%s has no checksums: it is used as it is, unchecked", folder)
        return None
    try:
        content = read(folder / FILE)
        files: Mapping[str, Any] = content["files"]
        expected = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
        metadata = content["metadata"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{FILE} cannot be read ({error})"
    try:
        if _digest_of(read(folder / METADATA)["custom_metadata"]) != metadata:
            return f"{METADATA} has another content than when it was saved"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{METADATA} cannot be read ({error})"
    for name, (size, digest) in expected.items():
        if items is not None and name.split("/")[0] not in items:
            continue
        if name not in there:
            return f"{name[:1000]} is missing"
        if (now := there[name].stat().length) != size:
            return f"{name} has {now:,} bytes and had {size:,} when it was saved"
        if _digest(there[name]) != digest:
            return f"{name} has another content than when it was saved"
    return None


def read(file: epath.Path) -> Any:
    """The content of a JSON file of a checkpoint, a path or ``gs://`` address.

    Raises:
        ValueError: it is none, or has over :data:`vla_jax.foreign.MOST_JSON_BYTES`.
        OSError: it cannot be read.
    """
    if (length := file.stat().length) > MOST_JSON_BYTES:
        raise ValueError(f"{file} has {length:,} bytes, and {MOST_JSON_BYTES:,} are the most")
    return parse_json(file.read_bytes())


def size(folder: epath.Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().length for file in _files(folder))


def _files(folder: epath.Path) -> list[epath.Path]:
    found = []
    for entry in sorted(folder.iterdir()):
        # A link to a folder above would go round for ever.
        found += _files(entry) if entry.is_dir() and not os.path.islink(entry) else [entry]
    return found


def _is_regular(file: epath.Path) -> bool:
    """Whether it can be read to an end: a pipe has none. Where files are no files of this system, all can."""
    return "://" in str(file) or os.path.isfile(file)


def _digest(file: epath.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest_of(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
