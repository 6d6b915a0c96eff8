"""Result tables: ordered rows and typed columns, for the terminal, Markdown, CSV and JSONL.

Files for people (terminal, Markdown) show formatted values; files for programs (CSV, JSONL) keep full precision. Every
file is replaced as a whole, so an experiment that ends early leaves a valid table of what was finished, and
:func:`read_rows` gives those rows back to the run that continues it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich.table
from rich.cells import cell_len
from rich.markup import escape

from vla_jax.distributed import is_first
from vla_jax.errors import UserError
from vla_jax.foreign import parse_json

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
Kind = Literal["text", "number", "spread", "range", "difference"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """How one field of the rows is shown.

    Attributes:
        name: of the field; also the heading in CSV.
        title: the heading for people.
        kind: ``text``; ``number``; or of an interval (anything with value, low and high) ``spread`` (65.3 ± 2.1, the
            larger half where the halves differ), ``range`` (65.3 [63.1, 67.4]), or ``difference`` (+2.1 [0.3, 3.9],
            bold where the interval excludes zero). A bare number is shown alone.
        unit: set in brackets behind the title.
        format: Python format of the number, such as ``.1f`` or ``,d``.
        scale: what the number is multiplied by before it is shown, such as 100 for per cent.
    """

    name: str
    title: str
    kind: Kind = "text"
    unit: str = ""
    format: str = ".1f"
    scale: float = 1

    def __post_init__(self) -> None:
        if self.kind not in Kind.__args__:
            raise UserError(f"column {self.name!r}: kind {self.kind!r} is none of {', '.join(Kind.__args__)}")
        try:
            format(1, self.format)
        except ValueError as error:
            raise UserError(f"column {self.name!r}: {self.format!r} is no format of a number ({error})") from error

    @classmethod
    def text(cls, name: str, title: str) -> Column:
        """Words, on the left."""
        return cls(name, title)

    @classmethod
    def number(cls, name: str, title: str, unit: str = "", format: str = ",.1f", scale: float = 1) -> Column:
        """A number, such as parameters (``,d``) or milliseconds."""
        return cls(name, title, "number", unit, format, scale)

    @classmethod
    def percent(cls, name: str, title: str, format: str = ".1f") -> Column:
        """A fraction, shown in per cent."""
        return cls(name, title, "number", "%", format, 100)

    @classmethod
    def accuracy(cls, name: str, title: str, kind: Literal["spread", "range"] = "spread") -> Column:
        """A fraction with its interval, shown in per cent."""
        return cls(name, title, kind, "%", ".1f", 100)

    @classmethod
    def difference(cls, name: str, title: str) -> Column:
        """A difference of fractions with its interval, shown in percentage points."""
        return cls(name, title, "difference", "points", ".1f", 100)

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def show(self, value: Any) -> tuple[str, bool]:
        """The cell's text for people, and whether it is bold."""
        if _is_missing(value):
            return MISSING, False
        if self.kind == "text":
            return str(value), False
        if self.kind == "number":
            if not isinstance(value, (int, float)):
                raise UserError(f"column {self.name!r} shows numbers, given {value!r}; use Column.text for words")
            return self._number(value), False
        parts = interval(value)
        if parts is None:
            raise UserError(f"column {self.name!r} shows an interval (value, low, high) or a number, given {value!r}")
        middle, low, high = parts
        sign = "+" if self.kind == "difference" else ""
        if math.isnan(low):
            return self._number(middle, sign), False
        if self.kind == "spread":
            return f"{self._number(middle)} ± {self._number(max(high - middle, middle - low))}", False
        shown = f"{self._number(middle, sign)} [{self._number(low)}, {self._number(high)}]"
        return shown, self.kind == "difference" and (low > 0 or high < 0)

    def _number(self, value: float, sign: str = "") -> str:
        scaled = value * self.scale
        if self.format.endswith("d"):
            scaled = round(scaled)
        shown = format(scaled, self.format)
        if not any(digit in shown for digit in "123456789"):
            return shown.lstrip("-")  # what rounds to zero has no sign
        return (f"{sign}{shown}" if scaled > 0 else shown).replace("-", MINUS)


@dataclass(frozen=True)
class Table:
    """Rows in their order, as columns show them.

    Attributes:
        columns: in their order; names must differ.
        rows: mappings or dataclasses. A field without a column is kept in JSONL alone, a field that is absent, None or
            NaN is shown as an en dash.
        title: over the table, for people.
    """

    columns: Sequence[Column]
    rows: Sequence[Any]
    title: str = ""

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise UserError(f"column names must differ, given {', '.join(names)}")
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(as_row(row) for row in self.rows))

    def terminal(self) -> rich.table.Table:
        """For ``rich.print``."""
        shown = rich.table.Table(title=self.title or None, header_style="bold", box=rich.box.SIMPLE_HEAD)
        for column in self.columns:
            shown.add_column(escape(column.heading), justify="left" if column.kind == "text" else "right")
        for row in self.rows:
            cells = (column.show(row.get(column.name)) for column in self.columns)
            # A bracket that opens a word would be read as markup.
            shown.add_row(*(f"[bold]{escape(text)}[/bold]" if bold else escape(text) for text, bold in cells))
        return shown

    def markdown(self) -> str:
        """GitHub's Markdown, aligned to be read as plain text too."""
        lines = [[column.heading.replace("|", "\\|") for column in self.columns]]
        for row in self.rows:
            cells = (column.show(row.get(column.name)) for column in self.columns)
            escaped = ((" ".join(text.split()).replace("|", "\\|"), bold) for text, bold in cells)
            lines.append([f"**{text}**" if bold else text for text, bold in escaped])
        widths = [max(3, *(cell_len(line[index]) for line in lines)) for index in range(len(self.columns))]
        left = [column.kind == "text" for column in self.columns]
        rule = ("-" * width if words else "-" * (width - 1) + ":" for width, words in zip(widths, left, strict=True))
        lines.insert(1, list(rule))
        padded = ([_pad(*cell) for cell in zip(line, widths, left, strict=True)] for line in lines)
        table = "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"
        return f"**{self.title}**\n\n{table}" if self.title else table

    def csv(self) -> str:
        """Comma-separated, full precision, unscaled; an interval takes three columns, ``x``, ``x_low``, ``x_high``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        spans = [column.kind in ("spread", "range", "difference") for column in self.columns]
        head: list[str] = []
        for column, span in zip(self.columns, spans, strict=True):
            head += [column.name, f"{column.name}_low", f"{column.name}_high"] if span else [column.name]
        writer.writerow(head)
        for row in self.rows:
            cells: list[Any] = []
            for column, span in zip(self.columns, spans, strict=True):
                value = row.get(column.name)
                parts = interval(value) if span else None
                if parts:
                    cells += ["" if math.isnan(part) else part for part in parts]
                else:
                    cells += ["" if _is_missing(value) else value] + [""] * (2 * span)
            writer.writerow(cells)
        return text.getvalue()

    def jsonl(self) -> str:
        """One JSON object a row with all its fields; NaN and infinity, which JSON lacks, become null."""
        return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.rows)

    def write(self, folder: str | Path, stem: str = "table") -> dict[str, Path]:
        """Writes ``stem.md``, ``stem.csv`` and ``stem.jsonl`` into a folder, each replaced as a whole.

        Returns:
            The paths by suffix.
        """
        folder = Path(folder)
        paths = {suffix: folder / f"{stem}.{suffix}" for suffix in ("md", "csv", "jsonl")}
        write_atomically(paths["jsonl"], self.jsonl())  # first: it is what a continued run reads
        write_atomically(paths["csv"], self.csv())
        write_atomically(paths["md"], self.markdown())
        return paths


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none if there is no file yet.

    Raises:
        UserError: a line is no JSON object, with its number.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); mend or delete the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a row is a JSON object, given {line[:80].decode()!r}")
        rows.append(row)
    return rows


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replaces a file in one step; whoever reads it sees the old content or the new. Folders are made.

    Of several processes the first alone writes; :func:`vla_jax.distributed.read` gives its file to the others.
    """
    if not is_first():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # the same folder: renaming stays one step
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def as_row(row: Any) -> dict[str, Any]:
    """A mapping or dataclass as a dict that JSON can hold, NumPy's numbers as Python's."""
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        row = dataclasses.asdict(row)
    if not isinstance(row, Mapping):
        raise UserError(f"a row is a mapping or a dataclass, given {type(row).__name__}")
    return {str(key): _plain(value) for key, value in row.items()}


def interval(value: Any) -> tuple[float, float, float] | None:
    """Value, low and high of an interval (mapping or object), or None where there is none.

    A bare number is its own value, and the ends are NaN; so they are where one of them is missing.
    """
    if isinstance(value, Mapping):
        middle, *ends = (value.get(key) for key in ("value", "low", "high"))
    elif isinstance(value, (int, float)):
        middle, ends = value, []
    else:
        middle, *ends = (getattr(value, key, None) for key in ("value", "low", "high"))
    if _is_missing(middle):
        return None
    low, high = (math.nan, math.nan) if not ends or any(map(_is_missing, ends)) else ends
    return float(middle), float(low), float(high)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else str(value)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _pad(text: str, width: int, left: bool) -> str:
    space = " " * (width - cell_len(text))
    return text + space if left else space + text
