"""What ``train_step.py`` measured, as a table to print and as a section of ``README.md``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.report import Record, Spread, machine_line, markdown

COLUMNS = (
    "model",
    "method",
    "framework",
    "step [quartiles], s",
    "step, ours / peer",
    "forward, s",
    "adapter overhead [quartiles], %",
    "peak (after import), GiB",
    "peak, ours / peer",
    "compile, s",
    "first step, s",
    "share of product, %",
)
# The most that a forward with adapters may take above one without, in per cent.
OVERHEAD_TARGET = 3.0


@dataclass(frozen=True)
class Summary:
    """All rounds of one framework, model and method."""

    records: tuple[Record, ...]

    def __getitem__(self, name: str) -> Any:
        return self.records[0][name]

    def pooled(self, name: str) -> list[float]:
        """A list of times, of all rounds together."""
        return [value for record in self.records for value in record[name]]

    def median(self, name: str) -> float:
        """The median of one number a round."""
        return statistics.median(record[name] for record in self.records)

    @property
    def step(self) -> Spread:
        """Seconds of a training step."""
        return Spread.of(self.pooled("step_seconds"))

    @property
    def forward(self) -> float:
        """Median seconds of a forward, with adapters where the method has any."""
        return statistics.median(self.pooled("adapted_seconds"))

    @property
    def overhead(self) -> Spread:
        """By how much a forward with adapters takes longer than its pair without, in per cent."""
        pairs = zip(self.pooled("adapted_seconds"), self.pooled("bare_seconds"), strict=True)
        return Spread.of(100 * (adapted / bare - 1) for adapted, bare in pairs)

    @property
    def peak(self) -> float:
        """Peak memory of training in GiB, the largest of the rounds."""
        return max(record["peak_bytes"] for record in self.records) / 2**30


def compare(records: Sequence[Record]) -> list[tuple[Summary, Summary]]:
    """Ours and the peer's of each model and method, from the newest run that has them in all its rounds."""
    cases: dict[tuple[str, str], dict[str, dict[str, list[Record]]]] = {}
    for record in records:
        runs = cases.setdefault((record["model"], record["method"]), {})
        runs.setdefault(record["run"], {}).setdefault(record["framework"], []).append(record)
    pairs = []
    for runs in cases.values():
        whole = [run for run in runs.values() if len(run.get("pytorch", ())) == len(run.get("vla_jax", ())) > 0]
        if whole:
            ours, peer = (Summary(tuple(whole[-1][framework])) for framework in ("vla_jax", "pytorch"))
            pairs.append((ours, peer))
    return pairs


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a framework under :data:`COLUMNS`."""
    found = []
    for ours, peer in compare(records):
        product = max(ours.median("product_flops"), peer.median("product_flops"))
        for summary in (ours, peer):
            mine = summary is ours
            found.append(
                [
                    summary["model"],
                    summary["method"],
                    f"vla_jax, remat {summary['remat']}" if mine else "PyTorch",
                    summary.step.text(3),
                    f"{ours.step.median / peer.step.median:.2f}" if mine else "",
                    f"{summary.forward:.3f}",
                    "" if summary["method"] == "full" else summary.overhead.text(1),
                    f"{summary.peak:.2f} ({summary.median('after_import_bytes') / 2**30:.2f})",
                    f"{ours.peak / peer.peak:.2f}" if mine else "",
                    f"{summary.median('compile_seconds'):.1f}" if mine else "",
                    f"{summary.median('first_step_seconds'):.1f}",
                    f"{100 * summary['step_flop'] / summary.step.median / product:.0f}",
                ]
            )
    return found


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    table = Table(title="Training step and forward", show_lines=False)
    for number, column in enumerate(COLUMNS):
        table.add_column(escape(column), justify="left" if number < 3 else "right")
    for row in rows(records):
        table.add_row(*map(escape, row), end_section=row[2] == "PyTorch")
    return table


def targets(records: Sequence[Record]) -> list[str]:
    """A Markdown line for each model and method: which targets are met, and by how much the others are missed."""
    lines = []
    for ours, peer in compare(records):
        slower = 100 * (ours.step.median / peer.step.median - 1)
        forward = 100 * (
            statistics.median(ours.pooled("adapted_seconds")) / statistics.median(peer.pooled("adapted_seconds")) - 1
        )
        memory = 100 * (ours.peak / peer.peak - 1)
        judged = [
            ("step no slower than the peer's", slower, slower <= 0),
            ("forward no slower than the peer's", forward, forward <= 0),
            ("less memory than the peer", memory, memory < 0),
        ]
        if ours["method"] != "full":
            overhead = ours.overhead.median
            judged.append((f"adapter overhead at most {OVERHEAD_TARGET:g} %", overhead, overhead <= OVERHEAD_TARGET))
        verdicts = [f"{what}: {'met' if met else '**missed**'} ({value:+.1f} %)" for what, value, met in judged]
        lines.append(f"- {ours['model']}, {ours['method']}: {'; '.join(verdicts)}.")
    return lines


def section(records: Sequence[Record]) -> str:
    """The results section: how each run was made, the table and the targets."""
    runs: dict[str, list[Record]] = {}
    for pair in compare(records):
        for summary in pair:
            for record in summary.records:
                runs.setdefault(record["run"], []).append(record)
    lines = []
    for run, members in runs.items():
        first = members[0]
        versions = {name: value for member in members for name, value in member["versions"].items()}
        threads = sorted({f"{member['framework']} {member['threads']}" for member in members})
        lines += [
            f"Run of {run}, batch {first['batch']}, {first['dtype']}:",
            "",
            f"    {first['command']}",
            "",
            machine_line(first),
            f"- threads: {', '.join(threads)}; Python {first['machine']['python']}, "
            + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
            "",
        ]
    return "\n".join([*lines, markdown(COLUMNS, rows(records), words=3), "", "Targets:", "", *targets(records)])
