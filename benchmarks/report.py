"""What benchmarks report with: the machine, spreads, records a line, sections of ``README.md``, the command line."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla_jax.errors import UserError

README = Path(__file__).with_name("README.md")

Record = dict[str, Any]


def machine() -> dict[str, Any]:
    """The machine, and how busy it was before the run: runnable tasks in the mean of the last minute."""
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def started(script: str) -> Record:
    """What all records of a run begin with: when, the command, the machine."""
    return {
        "run": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
        "machine": machine(),
    }


def machine_line(record: Record) -> str:
    """A record's machine and device, as a Markdown list's line."""
    own = record["machine"]
    return (
        f"- machine: {own['processor']}, {own['cores']} cores, {own['memory'] / 2**30:.0f} GiB, {own['system']}; "
        f"device {record['device']} ({record['device_name']}); load before the run {own['load']:.1f}"
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """A Markdown table whose first ``words`` columns are text and the others numbers."""
    rule = "|".join([" --- "] * words + [" ---: "] * (len(columns) - words))
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of any number of values."""
        values = list(values)
        low, median, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
        return cls(low, median, high)

    def text(self, digits: int) -> str:
        """``median [low, high]``."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def read_records(path: Path) -> list[Record]:
    """The records of a file, one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def append_record(path: Path, record: Record) -> None:
    """Adds a record to a file at once, so that a run that is cut off keeps what it has."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def terminal_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Table:
    """A table for the terminal whose first ``words`` columns are text and the others numbers."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if number < words else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def command_line(
    name: str,
    options: type,
    description: str | None,
    measure: Callable[[Any], list[Record]],
    show: Callable[[list[Record]], Table],
    section: Callable[[list[Record]], str],
    document: Path = README,
) -> None:
    """A benchmark from the shell.

    Args:
        name: of its section.
        options: dataclass of its settings, ``output`` and ``write_readme`` among them.
        description: for ``--help``.
        measure: runs it, keeps its records in ``output`` and returns them.
        show: the table to print of them.
        section: the section's text of all kept records.
        document: the file that has the section.
    """
    try:
        given = tyro.cli(options, description=description)
        records = measure(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    console = Console()
    # Not squeezed into the 80 columns that rich assumes of a file.
    console.width = console.width if console.is_terminal else 200
    console.print(show(records))
    if given.write_readme:
        fill_section(name, section(read_records(given.output)), document)


def fill_section(name: str, text: str, document: Path = README) -> None:
    """Replaces what stands between a benchmark's two markers in a document."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    whole = document.read_text(encoding="utf-8")
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{document} must have the lines {start} and {end} once each")
    before, _, rest = whole.partition(start)
    _, _, after = rest.partition(end)
    document.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")
