"""The tables and the figures of the adaptation to new domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax.domain_results import DomainResults
from vla_jax.evaluation.forgetting import MEASURES
from vla_jax.evaluation.label_ratio import LabelRatio
from vla_jax.reporting.curves import CurvePanel, learning_curves
from vla_jax.reporting.figure import Panel, dot_plot
from vla_jax.reporting.table import Column, Table

Row = Mapping[str, Any]
NOT_REACHED = "not reached"


def table(rows: Sequence[Row], methods: Mapping[str, str], backbone: str) -> Table:
    """Accuracy by labels and method.

    Args:
        rows: one a domain and number of labels, as the experiment collects them.
        methods: titles by name.
        backbone: for the title.
    """
    columns = [Column.text("title", "domain"), Column.number("labels", "labels a class", format=",d")]
    columns += [Column.accuracy(name, title) for name, title in methods.items()]
    columns += [
        Column.difference(f"{name}_difference", f"{title}, against full")
        for name, title in methods.items()
        if name != "full"
    ]
    return Table(columns, rows, title=f"Accuracy on new domains, on {backbone}")


def ratio_table(ratios: Sequence[Row], backbone: str) -> Table:
    """How many labels a method needs for what full fine-tuning reaches.

    Args:
        ratios: a domain's ``title``, a method's ``variant``, what it trains, and ``found``, a :class:`LabelRatio`.
        backbone: for the title.
    """
    rows = [
        {name: value for name, value in row.items() if name != "found"} | vars(row["found"]) | _said(row["found"])
        for row in ratios
    ]
    columns = [
        Column.text("title", "domain"),
        Column.text("variant", "method"),
        Column.number("trained", "trained", format=",d"),
        Column.number("reference_labels", "full, labels a class", format=",d"),
        Column.percent("accuracy", "its accuracy"),
        Column.text("labels_said", "labels a class for that"),
        Column.text("ratio_said", "times fewer"),
        Column.percent("reached", "reached in draws of seeds", ".0f"),
    ]
    return Table(columns, rows, title=f"Labels for the accuracy of full fine-tuning, on {backbone}")


def _said(found: LabelRatio) -> dict[str, str]:
    """Labels and ratio in words, with what the numbers tried leave open."""
    if math.isinf(found.labels):
        # No number of times; the interval's upper end says how many it may be after all.
        high = f" (at most {_times(found.high)})" if found.high else ""
        return {"labels_said": NOT_REACHED, "ratio_said": f"{NOT_REACHED}{high}"}
    most, least = ("at most ", "at least ") if found.at_least else ("", "")
    low = _times(found.low) if found.low else NOT_REACHED
    return {
        "labels_said": f"{most}{_rounded(found.labels)}",
        "ratio_said": f"{least}{_times(found.ratio)} [{low}, {_times(found.high)}]",
    }


def _times(ratio: float) -> str:
    return f"{_rounded(ratio)}\N{MULTIPLICATION SIGN}"


def _rounded(number: float) -> str:
    """Two digits after the point for small numbers, none for large ones."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def forgetting_table(rows: Sequence[Row], backbone: str) -> Table:
    """What is left of what the backbone could do on its own domain.

    Args:
        rows: a model a row: before, and adapted with adapters on and off, as the experiment collects them.
        backbone: for the title.
    """
    columns = [Column.text("variant", "model"), Column.text("state", "adapters"), Column.text("features", "features")]
    for name, title in MEASURES.items():
        columns += [Column.accuracy(name, title), Column.difference(f"{name}_change", "change")]
    return Table(columns, rows, title=f"What is left on plain scenes, on {backbone}")


def tables(results: DomainResults, backbone: str) -> dict[str, Table]:
    """The tables that there is something for, by the names of their files."""
    found = {"results": table(results.rows, results.methods, backbone)}
    if results.ratios:
        found["ratios"] = ratio_table(results.ratios, backbone)
    if results.forgotten:
        found["forgetting"] = forgetting_table(results.forgotten, backbone)
    return found


def write(results: DomainResults, backbone: str, workdir: Path) -> None:
    """Writes what has come out so far, anew.

    ``results``, ``ratios`` and ``forgetting`` as ``.md``, ``.csv`` and ``.jsonl``; ``curves.png``, the learning curves;
    and ``forgetting.png``, what is left on plain scenes.

    Args:
        results: all of it.
        backbone: for the titles.
        workdir: the folder.
    """
    for name, found in tables(results, backbone).items():
        found.write(workdir, name)
    learning_curves(
        _panels(results), workdir / "curves.png", axis="labels a class", title="A new domain from few labels"
    )
    if results.forgotten:
        dot_plot(
            [row for row in results.forgotten if row["state"] != "off"],
            [Panel(name, title) for name, title in MEASURES.items()],
            workdir / "forgetting.png",
            group="after",
            title="What is left on plain scenes",
        )


def _panels(results: DomainResults) -> list[CurvePanel]:
    """A panel a domain, with the methods of which there is a point."""
    panels = []
    for title in dict.fromkeys(row["title"] for row in results.rows):
        rows = [row for row in results.rows if row["title"] == title]
        curves = {
            shown: points
            for name, shown in results.methods.items()
            if (points := [(row["labels"], row[name]) for row in rows if name in row])
        }
        zero_shot = rows[0]["zero_shot"]
        panels.append(CurvePanel(title, curves, rows[0]["chance"], {"zero-shot": zero_shot} if zero_shot else {}))
    return panels
