"""The tables and the figures of the multitask experiment, and which way of sharing won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax.reporting.figure import Panel, accuracy_against_parameters, dot_plot
from vla_jax.reporting.table import Column, Table, interval, write_atomically

Row = Mapping[str, Any]


def table(rows: Sequence[Row], titles: Mapping[str, str], backbone: str) -> Table:
    """The table of these rows, one a way of sharing.

    Args:
        rows: as the experiment collects them.
        titles: of the tasks, by name, in the order of columns.
        backbone: for the title.
    """
    columns = [
        Column.text("variant", "way of sharing"),
        Column.number("parameters_per_task", "trained a task", format=",.0f"),
        Column.percent("share_per_task", "of backbone", ".2f"),
        Column.number("bytes_per_task", "saved a task", "KiB", ",.0f", 2**-10),
        *(Column.accuracy(task, title) for task, title in titles.items()),
        Column.accuracy("mean", "mean"),
        Column.difference("against_each", "against one each"),
        Column.number("step_seconds", "step", "ms", ",.0f", 1e3),
    ]
    return Table(columns, rows, title=f"{len(titles)} tasks on {backbone}")


def routing_table(rows: Sequence[Row]) -> Table:
    """What a router that is not told the task costs, one row a task.

    ``strict`` counts examples that it takes for another task's as wrong; before that column, each task's own head
    answers, whatever adapters the router picked.
    """
    columns = [
        Column.text("task", "task"),
        Column.accuracy("router", "task recognised"),
        Column.accuracy("given", "adapters by task"),
        Column.accuracy("sent", "adapters by router"),
        Column.difference("difference", "difference"),
        Column.accuracy("strict", "and recognised"),
    ]
    return Table(columns, rows, title="One adapter each, picked by a learned router")


def verdict(rows: Sequence[Row]) -> str:
    """Which way of sharing adapters has the highest mean, and which others cannot be told from it.

    Args:
        rows: as for :func:`table`; the best has a true ``best``, the others their difference to it, ``against_best``.

    Returns:
        A sentence or more; empty where nothing shares adapters.
    """
    best = next((row for row in rows if row["best"]), None)
    if best is None:
        return ""
    mean = Column.accuracy("mean", "mean", "range").show(best["mean"])[0]
    told = [f"Of the ways of sharing adapters, {best['variant']} has the highest mean: {mean} %."]
    others = [row for row in rows if row["group"] != "reference" and row["name"] not in (best["name"], "routed")]
    ahead = [row for row in others if interval(row["against_best"])[2] < 0]
    if ahead:
        told.append(f"It is ahead of {_listed(ahead)}.")
    if level := [row for row in others if row not in ahead]:
        told.append(f"It cannot be told from {_listed(level)}.")
    elif ahead:
        told.append("It wins.")
    if references := [row for row in rows if row["group"] == "reference"]:
        told.append(f"For reference, against it: {_listed(references)}.")
    return " ".join(told) + " Differences of the mean in points, with 95 % intervals."


def _listed(rows: Sequence[Row]) -> str:
    difference = Column.difference("against_best", "")
    return ", ".join(f"{row['variant']} ({difference.show(row['against_best'])[0]})" for row in rows)


def write(rows: Sequence[Row], routing: Sequence[Row], titles: Mapping[str, str], backbone: str, workdir: Path) -> str:
    """Writes ``results.{md,csv,jsonl,png}``, ``parameters.png`` and ``routing.{md,csv,jsonl}`` anew.

    Args:
        rows: as for :func:`table`.
        routing: as for :func:`routing_table`; nothing is written of none.
        titles: as for :func:`table`.
        backbone: as for :func:`table`.
        workdir: where.

    Returns:
        The verdict, which also stands below the table.
    """
    shown = table(rows, titles, backbone)
    shown.write(workdir, "results")
    won = verdict(rows)
    write_atomically(workdir / "results.md", f"{shown.markdown()}\n{won}\n" if won else shown.markdown())
    if routing:
        routing_table(routing).write(workdir, "routing")
    panels = [Panel(task, title, 0.5 if task == "statements" else None) for task, title in titles.items()]
    dot_plot(
        rows,
        [*panels, Panel("mean", "mean")],
        workdir / "results.png",
        group="group",
        note=lambda row: f"{100 * row['share_per_task']:.2f} %",
        note_title="trained a task",
        title="How several tasks share one backbone",
    )
    accuracy_against_parameters(
        rows,
        workdir / "parameters.png",
        value="mean",
        parameters="parameters_per_task",
        axis="trained parameters a task",
        group="group",
        title="Mean over tasks against trained parameters a task",
    )
    return won
