"""Files of rows, read in order with their line numbers and at random by their place: JSON lines, CSV and Parquet.

In order, a file is never held in memory. At random, JSON lines and CSV are read row by row from the file; of a Parquet
file the needed columns are held, since its rows do not lie one after the other.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from vla_jax.errors import UserError
from vla_jax.foreign import parse_json

MOST_ROW_BYTES = 1 << 20
"""Of a line: texts and the path of a picture. A file without ends of lines would be one line."""

MOST_COLUMNS = 10_000
"""Of a file; every row of CSV has a cell for each."""

MOST_ROWS = 1 << 30
"""Of a Parquet file, which can say a thousand times that many in a few bytes."""

_BOM = b"\xef\xbb\xbf"
_LOOKED_AT = 1000  # rows whose keys are the columns of JSON lines
_PARQUET_ROWS = 1024  # read at a time
_reading = threading.Lock()


class Record(NamedTuple):
    """A row as it stands in the file.

    Attributes:
        line: its line, or row of a Parquet file, from 1.
        start: its place, in bytes or rows.
        length: how many of them it takes.
        values: by column; None where it cannot be read.
        problem: why not.
    """

    line: int
    start: int
    length: int
    values: dict[str, Any] | None
    problem: str = ""


class Table(Protocol):
    """A file of rows.

    Attributes:
        path: the file.
        unit: what rows are counted in, ``line`` or ``row``.
        columns: the columns there are.
        size: of the file, in what places are measured in.
    """

    path: Path
    unit: str
    columns: Sequence[str]
    size: int

    def records(self) -> Iterator[Record]:
        """All rows in order; blank lines are left out."""
        ...

    def read(self, start: int, length: int) -> dict[str, Any]:
        """The row at a place that :meth:`records` gave; from any thread or process."""
        ...


def open_table(path: str | Path) -> Table:
    """A file of rows by the ending of its name.

    Raises:
        UserError: if there is no such file, it is empty, or its kind is unknown.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no data file {path}")
    if path.stat().st_size == 0:
        raise UserError(f"the data file {path} is empty")
    kinds = {
        ".jsonl": JsonLines,
        ".ndjson": JsonLines,
        ".json": JsonLines,
        ".csv": Csv,
        ".tsv": Csv,
        ".parquet": Parquet,
        ".pq": Parquet,
    }
    if path.suffix.lower() not in kinds:
        raise UserError(
            f"the kind of the data file {path} is told from the end of its name, and {path.suffix or 'nothing'!r} is "
            f"unknown; allowed: {', '.join(kinds)}"
        )
    return kinds[path.suffix.lower()](path)


class _Bytes:
    """A file read at any place; threads share it, and every process opens its own."""

    unit = "line"

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        self._file = path.open("rb")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _file=state["path"].open("rb"))

    def _read(self, start: int, length: int) -> bytes:
        # Threads share the file; a read that says where leaves the file's own position out of it.
        return os.pread(self._file.fileno(), length, start)


class JsonLines(_Bytes):
    """One JSON object a line, in UTF-8."""

    def __init__(self, path: Path):
        super().__init__(path)
        with path.open("rb") as file:
            if file.read(64).removeprefix(_BOM).lstrip().startswith(b"["):
                raise UserError(f"{path} is one JSON array; write one object a line instead (JSON lines)")
        first = (record.values for record in itertools.islice(self.records(), _LOOKED_AT))
        self.columns = list(dict.fromkeys(name for values in first if values for name in values))
        _check_columns(self)

    def records(self) -> Iterator[Record]:
        start = 0
        with self.path.open("rb") as file:
            for line, (raw, length) in enumerate(_lines(file), start=1):
                if length > MOST_ROW_BYTES:
                    yield Record(line, start, 0, None, f"has {length:,} bytes, and {MOST_ROW_BYTES:,} are the most")
                elif raw.strip() not in (b"", _BOM):
                    values, problem = _parsed(raw.removeprefix(_BOM) if line == 1 else raw)
                    yield Record(line, start, length, values, problem)
                start += length

    def read(self, start: int, length: int) -> dict[str, Any]:
        return parse_json(self._read(start, length).removeprefix(_BOM))


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """The lines of a file and their lengths; of one that is too long, only the beginning is held."""
    while raw := file.readline(MOST_ROW_BYTES + 1):
        length, last = len(raw), raw
        while length > MOST_ROW_BYTES and not last.endswith(b"\n") and (last := file.readline(MOST_ROW_BYTES)):
            length += len(last)
        yield raw, length


def _parsed(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        values = parse_json(raw)
    except UnicodeDecodeError:
        return None, "is not UTF-8"
    except ValueError as error:
        return None, f"is not JSON: {error}"
    if not isinstance(values, dict):
        return None, f"is not a JSON object but {type(values).__name__}"
    return values, ""


class Csv(_Bytes):
    """Comma- or tab-separated values in UTF-8 with a header; an empty cell is no value, and a cell may hold a list."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        header = next(self._rows(), None)
        self.columns = [name.strip() for name in header[3]] if header else []
        _check_columns(self)
        if len(set(self.columns)) < len(self.columns):
            raise UserError(f"the header of {path} names a column twice: {', '.join(self.columns)}")
        if len(self.columns) == 1 and ";" in self.columns[0]:
            raise UserError(f"the columns of {path} are separated by semicolons; save it with commas, or as .tsv")

    def records(self) -> Iterator[Record]:
        for line, start, length, cells, problem in itertools.islice(self._rows(), 1, None):
            if problem or any(cells):
                if not problem and len(cells) != len(self.columns):
                    problem = f"has {len(cells)} cells, and the header {len(self.columns)}"
                yield Record(line, start, length, None if problem else self._named(cells), problem)

    def read(self, start: int, length: int) -> dict[str, Any]:
        text = self._read(start, length).removeprefix(_BOM).decode()
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter), [])
        except csv.Error as error:
            raise ValueError(str(error)) from None
        return self._named(cells)

    def _named(self, cells: list[str]) -> dict[str, Any]:
        return {name: cell for name, cell in zip(self.columns, cells, strict=True) if cell.strip()}

    def _rows(self) -> Iterator[tuple[int, int, int, list[str], str]]:
        """Line, place and cells of every row, the header first; a row may take several lines."""
        position, broken, too_long = 0, False, False

        def lines() -> Iterator[str]:
            nonlocal position, broken, too_long
            for raw, length in _lines(file):
                position += length
                too_long = too_long or length > MOST_ROW_BYTES
                try:
                    yield raw.removeprefix(_BOM if position == length else b"").decode()
                except UnicodeDecodeError:
                    broken = True
                    yield raw.decode(errors="replace")

        with self.path.open("rb") as file:
            reader = csv.reader(lines(), delimiter=self._delimiter, strict=True)
            while True:
                line, start, broken, too_long = reader.line_num + 1, position, False, False
                try:
                    cells, problem = next(reader), ""
                except StopIteration:
                    return
                except csv.Error as error:
                    cells, problem = [], f"is not CSV: {error}; is a quotation mark left open?"
                if too_long or position - start > MOST_ROW_BYTES:
                    yield line, start, 0, [], f"has over {MOST_ROW_BYTES:,} bytes"
                else:
                    yield line, start, position - start, cells, "is not UTF-8" if broken else problem


class Parquet:
    """A Parquet file; rows are counted from 1."""

    unit = "row"

    def __init__(self, path: Path):
        import pyarrow
        import pyarrow.parquet

        self.path = path
        with self._read_whole(), pyarrow.parquet.ParquetFile(path) as file:
            self.columns = list(file.schema_arrow.names)
            self.size = file.metadata.num_rows
        if not 0 <= self.size <= MOST_ROWS:
            raise UserError(f"{path} says that it has {self.size:,} rows, and {MOST_ROWS:,} are the most")
        _check_columns(self)
        self._kept: list[str] | None = None
        self._table = None

    @contextlib.contextmanager
    def _read_whole(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a damaged file ends in errors of many kinds, of memory among them
            raise UserError(f"{self.path} cannot be read as Parquet: {error}") from None

    def keep(self, columns: Sequence[str]) -> None:
        """Reads no other columns from here on."""
        self._kept = list(columns)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def records(self) -> Iterator[Record]:
        import pyarrow.parquet

        with self._read_whole():
            file = pyarrow.parquet.ParquetFile(self.path)
        with file:
            batches, index = file.iter_batches(_PARQUET_ROWS, columns=self._kept), 0
            while True:
                with self._read_whole():
                    batch = next(batches, None)
                    rows = [] if batch is None else batch.to_pylist()
                if batch is None:
                    return
                for values in rows:
                    index += 1
                    yield Record(index, index - 1, 1, values)

    def read(self, start: int, length: int) -> dict[str, Any]:
        import pyarrow.parquet

        with _reading:  # of the threads that need it first, one reads it
            if self._table is None:
                with self._read_whole():
                    self._table = pyarrow.parquet.read_table(self.path, columns=self._kept)
        return self._table.slice(start, length).to_pylist()[0]


def _check_columns(table: Table) -> None:
    if len(table.columns) > MOST_COLUMNS:
        raise UserError(f"{table.path} has {len(table.columns):,} columns, and {MOST_COLUMNS:,} are the most")
