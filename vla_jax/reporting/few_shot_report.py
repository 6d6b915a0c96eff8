"""The tables and figures of the few-shot protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax.evaluation.few_shot import BaseToNovel, Spread
from vla_jax.reporting.curves import CurvePanel, learning_curves
from vla_jax.reporting.figure import Panel, dot_plot
from vla_jax.reporting.table import Column, Table

HALVES = {"base": "base classes", "novel": "novel classes", "harmonic": "harmonic mean"}
"""By field, what base to novel measures."""

_COSTS = (Column.number("trained", "trained", format=",d"), Column.percent("share", "of backbone", ".2f"))


def mean_of(spread: Spread) -> Any:
    """A spread as tables show it: the mean with its interval over seeds, or alone where nothing is to be spread."""
    return spread.interval if len(set(spread.values)) > 1 else spread.mean


def row(found: Mapping[int, Spread]) -> dict[str, Any]:
    """A method's accuracies by shots."""
    shown = {f"shots_{shots}": mean_of(spread) for shots, spread in found.items()}
    return shown | {f"shots_{shots}_by_seed": list(spread.values) for shots, spread in found.items()}


def base_to_novel_row(found: BaseToNovel) -> dict[str, Any]:
    """A method's accuracies on both halves of the classes."""
    halves = {name: getattr(found, name) for name in HALVES}
    shown = {name: mean_of(spread) for name, spread in halves.items()}
    return shown | {f"{name}_by_seed": list(spread.values) for name, spread in halves.items()}


def table(rows: Sequence[Mapping[str, Any]], shots: Sequence[int], title: str) -> Table:
    """Accuracy by method and shots."""
    accuracies = [Column.accuracy(f"shots_{n}", f"{n} shot{'s' if n > 1 else ''}") for n in shots]
    return Table([Column.text("variant", "method"), *_COSTS, *accuracies], rows, title=title)


def base_to_novel_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Accuracy on the classes that were trained and on those that were not."""
    accuracies = [Column.accuracy(name, shown) for name, shown in HALVES.items()]
    return Table([Column.text("variant", "method"), *_COSTS, *accuracies], rows, title=title)


def write(
    rows: Sequence[Mapping[str, Any]],
    halves: Sequence[Mapping[str, Any]],
    *,
    shots: Sequence[int],
    classes: int,
    title: str,
    workdir: Path,
) -> dict[str, Table]:
    """Writes what has come out so far, anew, and returns the tables.

    ``results`` and, where there is something for it, ``base_to_novel``, as ``.md``, ``.csv`` and ``.jsonl``;
    ``curves.png`` and ``base_to_novel.png``.

    Args:
        rows: one a method, by shots; the first is the backbone without training.
        halves: one a method, base to novel.
        shots: numbers of examples a class.
        classes: how many there are.
        title: over all of it.
        workdir: the folder.
    """
    tables = {"results": table(rows, shots, f"{title}: few shots")}
    if halves:
        tables["base_to_novel"] = base_to_novel_table(halves, f"{title}: base to novel classes")
        panels = [Panel(name, shown) for name, shown in HALVES.items()]
        dot_plot(list(halves), panels, workdir / "base_to_novel.png", title=f"{title}: base to novel classes")
    for name, found in tables.items():
        found.write(workdir, name)
    first, *others = rows
    if curves := {other["variant"]: [(n, other[f"shots_{n}"]) for n in shots] for other in others}:
        zero_shot = {first["variant"]: first[f"shots_{shots[0]}"]}
        panel = CurvePanel("", curves, 1 / classes, zero_shot)
        learning_curves([panel], workdir / "curves.png", axis="examples a class", title=title)
    return tables
