"""The table and the figures of the fusion ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax.data.scenes.vocabulary import STATEMENT_KINDS
from vla_jax.evaluation import winoground
from vla_jax.reporting.figure import Panel, accuracy_against_parameters, dot_plot
from vla_jax.reporting.table import Column, Table


def table(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], backbone: str) -> Table:
    """The table of these rows, one a variant.

    Args:
        rows: as the experiment collects them.
        tasks: which tasks have columns; the first one's cost is shown.
        backbone: for the title.
    """
    columns = [
        Column.text("variant", "variant"),
        Column.number("trained", "trained", format=",d"),
        Column.percent("share", "of backbone", ".2f"),
    ]
    if "statements" in tasks:
        columns += [
            Column.accuracy("statements", "statements"),
            Column.difference("statements_difference", "against indep."),
        ]
        columns += [Column.accuracy(f"statements_{kind}", kind) for kind in STATEMENT_KINDS]
        columns += [Column.accuracy(f"quadruples_{name}", f"quad. {name}") for name in winoground.CHANCE]
    if "easy_vqa" in tasks:
        columns += [Column.accuracy("easy_vqa", "easy-VQA"), Column.difference("easy_vqa_difference", "against indep.")]
    first = tasks[0]
    columns += [
        Column.number(f"{first}_step_seconds", "step", "ms", ",.0f", 1e3),
        Column.number(f"{first}_step_bytes", "step memory", "MiB", ",.0f", 2**-20),
        Column.number(f"{first}_adapter_bytes", "saved", "KiB", ",.0f", 2**-10),
    ]
    return Table(columns, rows, title=f"Fusion ablation on {backbone}")


def write(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], backbone: str, workdir: Path) -> None:
    """Writes ``results.{md,csv,jsonl,png}`` and ``parameters.png`` anew; arguments as of :func:`table`."""
    table(rows, tasks, backbone).write(workdir, "results")
    panels = []
    if "statements" in tasks:
        panels += [Panel("statements", "statements", 0.5)]
        panels += [Panel(f"statements_{kind}", kind, 0.5) for kind in STATEMENT_KINDS]
    if "easy_vqa" in tasks:
        panels.append(Panel("easy_vqa", "easy-VQA"))
    controls = {row["variant"]: row for row in rows if row["group"] == "control"}
    shown = [row for row in rows if row["group"] != "control"]
    if shown:
        dot_plot(
            shown,
            panels,
            workdir / "results.png",
            group="group",
            note=lambda row: f"{100 * row['share']:.2f} %",
            note_title="trained",
            controls=controls,
            title="What fusing inside the adapter buys",
        )
        accuracy_against_parameters(
            [row for row in shown if tasks[0] in row],
            workdir / "parameters.png",
            value=tasks[0],
            parameters="trained",
            group="group",
            title=f"Accuracy on {tasks[0]} against trained parameters",
        )
