"""Inputs by the thousand, each read under guard, and a table of what became of them."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from hostile_guard import Forbidden, bounded_memory, guarded
from hostile_kind import Kind
from hostile_kinds import KINDS, write_outside
from rich.table import Table


@dataclasses.dataclass
class Result:
    """What became of the inputs of one kind."""

    kind: str
    inputs: int = 0
    accepted: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    slowest: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)


def shares(count: int) -> dict[type[Kind], int]:
    """How many inputs of each kind make so many in all."""
    whole = sum(kind.share for kind in KINDS)
    found = {kind: count * kind.share // whole for kind in KINDS}
    found[KINDS[0]] += count - sum(found.values())
    return found


def run(
    count: int,
    seed: int,
    failures: Path | None = None,
    *,
    kinds: Iterable[type[Kind]] = KINDS,
    patience: float = 30.0,
    told: Callable[[Kind, int], None] = lambda kind, index: None,
) -> list[Result]:
    """Reads mutated inputs.

    Args:
        count: how many in all.
        seed: of the mutations; an input follows from it, its kind and its number.
        failures: where inputs go that had an error of another kind than documented, or something done that none may.
        kinds: which kinds, of those in the full count.
        patience: seconds of waiting after which the process ends with a traceback.
        told: is told the kind and number before each input.
    """
    found, kinds = [], tuple(kinds)
    memory_folder = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(prefix="hostile_", dir=memory_folder if memory_folder.is_dir() else None) as made,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        scratch = Path(made)
        outside = write_outside(scratch)
        for make, inputs in shares(count).items():
            if make in kinds:
                kind = make(scratch)
                kind.write(kind.valid)
                kind.read()  # imports and compiles what it needs, and shows that the valid input is valid
                with bounded_memory():
                    found.append(_of_kind(kind, inputs, seed, outside, failures, patience, told))
    return found


def _of_kind(
    kind: Kind,
    inputs: int,
    seed: int,
    outside: Path,
    failures: Path | None,
    patience: float,
    told: Callable[[Kind, int], None],
) -> Result:
    result = Result(kind.name)
    for index in range(inputs):
        told(kind, index)
        files = kind.mutated(Random(f"{seed} {kind.name} {index}"))
        kind.write(files)
        error, seconds = guarded(kind.read, kind.folder, outside, patience)
        result.inputs += 1
        result.slowest = max(result.slowest, seconds)
        if error is None:
            result.accepted += 1
        elif isinstance(error, kind.errors) and not isinstance(error, Forbidden) and _told(error):
            result.refused[type(error).__name__] += 1
        else:
            result.failures.append(f"{kind.name} {index} of seed {seed}: {type(error).__name__}: {error}"[:500])
            if failures is not None:
                _keep(failures / f"{kind.name.replace(' ', '_')}-{seed}-{index}", files, error)
    return result


def _told(error: BaseException) -> bool:
    """Whether an error's message can be printed and does not steer the terminal."""
    text = str(error)
    return bool(text) and "\x1b" not in text and "hf_abcdefghijklmnop" not in text and text.isascii() | _encodes(text)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _keep(folder: Path, files: dict[str, bytes], error: BaseException) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    lines = traceback.format_exception(error)
    (folder / "traceback.txt").write_text("".join(lines), errors="backslashreplace")


def table(results: list[Result], count: int, seed: int) -> Table:
    """The results as they are printed."""
    made = Table("kind", title=f"{count:,} mutated inputs of seed {seed}")
    for column in ("inputs", "accepted", "refused", "slowest (s)", "failures"):
        made.add_column(column, justify="right")
    for one in results:
        refused = ", ".join(f"{number:,} {name}" for name, number in one.refused.most_common()) or "0"
        made.add_row(
            *(one.kind, f"{one.inputs:,}", f"{one.accepted:,}", refused, f"{one.slowest:.2f}", str(len(one.failures)))
        )
    failures = sum(len(one.failures) for one in results)
    inputs, accepted = (sum(getattr(one, name) for one in results) for name in ("inputs", "accepted"))
    slowest = max(one.slowest for one in results)
    made.add_section()
    made.add_row(
        "all", f"{inputs:,}", f"{accepted:,}", f"{inputs - accepted - failures:,}", f"{slowest:.2f}", str(failures)
    )
    return made
