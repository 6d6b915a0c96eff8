"""Result tables of a work directory: what people read from Markdown, what numbers stand behind it from CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_jax.errors import UserError
from vla_jax.foreign import read_bytes

MOST_TABLE_BYTES = 1 << 24
"""Of a table that people read, and of the numbers behind it."""

_CELLS = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as it is shown.
        bold: whether it stands out.
        value: its number in the unit it is shown in, None where there is none.
        low: the lower end of its interval, None where there is none.
        high: the upper end.
    """

    text: str
    bold: bool = False
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class PageTable:
    """A table.

    Attributes:
        stem: the name of its files.
        title: over the table, may be empty.
        headings: of the columns.
        numeric: which columns hold numbers, and stand on the right.
        rows: of cells.
    """

    stem: str
    title: str
    headings: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def measures(self) -> list[int]:
        """The columns that have intervals."""
        return [column for column in range(len(self.headings)) if any(row[column].low is not None for row in self.rows)]

    def label(self, row: Sequence[Cell]) -> str:
        """What a row is called: its leading words, and the first number where words name several rows."""
        words = 0
        while words < len(self.numeric) and not self.numeric[words]:
            words += 1
        names = [", ".join(cell.text for cell in line[:words]) for line in self.rows]
        name = ", ".join(cell.text for cell in row[:words])
        if names.count(name) > 1 and words < len(row):
            return f"{name}, {row[words].text}"
        return name


def read_tables(folder: Path) -> Iterator[PageTable]:
    """The tables of a folder, ``results`` first; Markdown files without a table are passed over."""
    for path in sorted(folder.glob("*.md"), key=results_first):
        table = _read(path)
        if table is not None:
            yield table


def results_first(path: Path) -> tuple[bool, str]:
    """The order in which files are shown."""
    return path.stem != "results", path.name


def _read(path: Path) -> PageTable | None:
    lines = _text(path).splitlines()
    rule = next((place for place, line in enumerate(lines) if _RULE.fullmatch(line.strip())), 0)
    if rule == 0:
        return None
    title = next((line.strip("* ") for line in lines[: rule - 1] if line.startswith("**")), "")
    headings = _cells(lines[rule - 1])
    numeric = tuple(cell.endswith(":") for cell in _cells(lines[rule]))
    if len(numeric) != len(headings):
        return None
    body = [_cells(line) for line in lines[rule + 1 :] if line.lstrip().startswith("|")]
    body = [cells for cells in body if len(cells) == len(headings)]
    behind = _numbers(path.with_suffix(".csv"), len(body), len(headings))
    rows = []
    for place, cells in enumerate(body):
        row = []
        for column, shown in enumerate(cells):
            bold = len(shown) > 4 and shown.startswith("**") and shown.endswith("**")
            text = shown[2:-2] if bold else shown
            if not numeric[column]:
                row.append(Cell(text, bold))
            elif behind is None:
                row.append(Cell(text, bold, _leading(text)))
            else:
                scale = 100 if headings[column].endswith(("(%)", "(points)")) else 1
                row.append(Cell(text, bold, *(None if n is None else n * scale for n in behind[place][column])))
        rows.append(tuple(row))
    return PageTable(path.stem, title, tuple(headings), numeric, tuple(rows))


def _cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    inner = line.strip()[1:-1]
    return [cell.strip().replace("\\|", "|") for cell in _CELLS.split(inner)]


def _numbers(path: Path, rows: int, columns: int) -> list[list[tuple[float | None, float | None, float | None]]] | None:
    """Value, low and high of every cell; None if the file is not there, or is not that of the same table."""
    if not path.is_file():
        return None
    try:
        head, *body = list(csv.reader(io.StringIO(_text(path), newline=""))) or [[]]
    except csv.Error as error:
        raise UserError(f"{path} is damaged: {error}; mend or delete it") from error
    starts, place = [], 0
    while place < len(head):
        span = head[place + 1 : place + 3] == [f"{head[place]}_low", f"{head[place]}_high"]
        starts.append((place, span))
        place += 3 if span else 1
    if len(starts) != columns or len(body) != rows or any(len(line) != len(head) for line in body):
        return None
    return [
        [
            (_float(line[start]), *(map(_float, line[start + 1 : start + 3]) if span else (None, None)))
            for start, span in starts
        ]
        for line in body
    ]


def _text(path: Path) -> str:
    try:
        return read_bytes(path, MOST_TABLE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}; mend or delete it") from error


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _leading(text: str) -> float | None:
    """The number that a shown cell begins with."""
    found = _NUMBER.match(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))
    return float(found.group()) if found else None
