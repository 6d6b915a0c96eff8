"""The table and the figures of the comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax.reporting.figure import Panel, accuracy_against_parameters, dot_plot
from vla_jax.reporting.table import Column, Table

TITLES: Mapping[str, str] = {"statements": "statements", "easy_vqa": "easy-VQA", "retrieval": "retrieval R@1"}


def table(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], backbone: str) -> Table:
    """The table of these rows, one a method.

    Args:
        rows: as the experiment collects them.
        tasks: which tasks have columns; the first one's cost is shown.
        backbone: for the title.
    """
    columns = [
        Column.text("variant", "method"),
        Column.number("trained", "trained", format=",d"),
        Column.percent("share", "of backbone", ".2f"),
    ]
    for task in tasks:
        columns += [Column.accuracy(task, TITLES[task]), Column.difference(f"{task}_difference", "against full")]
    first = tasks[0]
    columns += [
        Column.difference(f"{task}_forgotten", f"kept after {TITLES[task]}") for task in tasks if task != "retrieval"
    ]
    columns += [
        Column.number(f"{first}_step_seconds", "step", "ms", ",.0f", 1e3),
        Column.number(f"{first}_step_mebibytes", "step memory", "MiB", ",.0f"),
        Column.number(f"{first}_stored_blocks", "blocks stored", "", ",d"),
        Column.percent("forward_overhead", "forward", "+.0f"),
        Column.percent("merged_overhead", "merged", "+.0f"),
        Column.number(f"{first}_adapter_bytes", "saved", "KiB", ",.0f", 2**-10),
    ]
    return Table(columns, rows, title=f"Methods on {backbone}")


def write(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], backbone: str, workdir: Path) -> None:
    """Writes ``results.{md,csv,jsonl,png}``, ``parameters.png``, ``memory.png`` anew; arguments as of :func:`table`."""
    table(rows, tasks, backbone).write(workdir, "results")
    first = tasks[0]
    shown = [row for row in rows if any(task in row for task in tasks)]
    panels = [Panel(task, TITLES[task], 0.5 if task == "statements" else None) for task in tasks]
    if any(f"{first}_kept" in row for row in shown):
        panels.append(Panel(f"{first}_kept", "zero-shot R@1 kept"))
    dot_plot(
        shown,
        panels,
        workdir / "results.png",
        group="group",
        note=lambda row: f"{100 * row['share']:.2f} %",
        note_title="trained",
        title="What each method reaches",
    )
    measured = [row for row in shown if first in row and row["trained"]]
    costs = {
        "parameters": ("trained", "trained parameters"),
        "memory": (f"{first}_step_mebibytes", "memory of a training step (MiB)"),
    }
    for name, (field, axis) in costs.items():
        accuracy_against_parameters(
            measured,
            workdir / f"{name}.png",
            value=first,
            parameters=field,
            axis=axis,
            group="group",
            title=f"Accuracy on {TITLES[first]} against {axis}",
        )
