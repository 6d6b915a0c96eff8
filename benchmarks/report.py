"""What benchmarks report with: the machine, spreads, records a line, and sections of ``README.md``."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def fill_readme(name: str, text: str) -> None:
    """Replaces what stands between a benchmark's two markers in ``README.md``."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    whole = README.read_text(encoding="utf-8")
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{README} must have the lines {start} and {end} once each")
    before, _, rest = whole.partition(start)
    _, _, after = rest.partition(end)
    README.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")
