"""The tables and the figures of the compositionality experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax.evaluation import winoground
from vla_jax.evaluation.scene_probe import SWAPS
from vla_jax.reporting.figure import Panel, dot_plot
from vla_jax.reporting.table import Column, Table

Row = Mapping[str, Any]


def table(rows: Sequence[Row], backbone: str) -> Table:
    """The table of these rows, one a model and kind of negatives, as the experiment collects them."""
    columns = [
        Column.text("variant", "model"),
        Column.text("negatives", "negatives"),
        Column.percent("share", "of backbone", ".2f"),
        Column.accuracy("pairs", "pairs"),
        *(Column.accuracy(f"{part}_score", part) for part in winoground.CHANCE),
        Column.difference("against_plain", "group, against plain full"),
        Column.difference("against_independent", "group, against independent"),
        *(Column.accuracy(f"group_{swap}", f"group, {swap}") for swap in SWAPS),
        *(Column.percent(f"{part}_ties", f"{part}, ties") for part in winoground.CHANCE),
    ]
    return Table(columns, rows, title=f"What binds words to objects, on {backbone}")


def by_difficulty(rows: Sequence[Row], backbone: str) -> Table:
    """Group scores by kind of swap and number of objects, one row a cell and one column a model."""
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for number, row in enumerate(rows):
        for cell in row["difficulty"]:
            place = cells.setdefault(
                (cell["swap"], cell["objects"]), {"swap": cell["swap"], "objects": cell["objects"]}
            )
            place[f"model_{number}"] = cell["group"]
    columns = [Column.text("swap", "swapped"), Column.number("objects", "objects", format=",d")]
    columns += [
        Column.accuracy(f"model_{number}", f"{row['variant']}, {row['negatives']}") for number, row in enumerate(rows)
    ]
    return Table(columns, list(cells.values()), title=f"Group score by swap and number of objects, on {backbone}")


def write(rows: Sequence[Row], backbone: str, workdir: Path) -> None:
    """Writes ``results.{md,csv,jsonl,png}`` and ``difficulty.{md,csv,jsonl}`` anew; arguments as of :func:`table`."""
    table(rows, backbone).write(workdir, "results")
    by_difficulty([row for row in rows if "difficulty" in row], backbone).write(workdir, "difficulty")
    panels = [Panel("group_score", "group", winoground.CHANCE["group"])]
    panels += [Panel(f"group_{swap}", f"group, {swap}", winoground.CHANCE["group"]) for swap in SWAPS]
    shown = [dict(row) | {"variant": f"{row['variant']}, {row['negatives']}"} for row in rows]
    dot_plot(
        shown,
        panels,
        workdir / "results.png",
        group="group",
        note=lambda row: f"{100 * row['share']:.2f} %",
        note_title="trained",
        title="What binds words to objects",
    )
