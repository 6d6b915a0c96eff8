"""What the page draws: dots with intervals, and learning curves; places in per cent of a frame that has no size yet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from vla_jax.reporting.page.tables import PageTable
from vla_jax.reporting.page.workdir import Run, WorkDirectory

STYLES = 8
"""Colours that the style sheet has; further lines have them again, dashed."""

_MOST_POINTS = 240


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in per cent, and what stands there."""

    place: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A row of a dot chart: its name, what is shown, and value, low and high in per cent of the axis."""

    label: str
    text: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class DotChart:
    """One column of a table, drawn.

    Attributes:
        title: the column's heading.
        marks: one a row that has a value.
        ticks: of the axis.
        zero: where nought lies, for differences; None for other quantities.
    """

    title: str
    marks: tuple[Mark, ...]
    ticks: tuple[Tick, ...]
    zero: float | None


@dataclass(frozen=True)
class Line:
    """One run's curve.

    Attributes:
        variant: whose it is, for the legend.
        label: the same, with learning rate and seed where these tell it from others.
        style: number of its colour.
        dashes: how often colours were used up before it.
        points: ``x,y`` in per cent of the frame, as SVG writes them.
    """

    variant: str
    label: str
    style: int
    dashes: int
    points: str


@dataclass(frozen=True)
class CurveChart:
    """Everything that one quantity did while a group's variants were trained.

    Attributes:
        title: the quantity.
        lines: the curves.
        across: ticks of steps.
        up: ticks of the quantity.
        steps: first and last step of the frame.
        values: lower and upper end of the frame.
    """

    title: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    steps: tuple[float, float]
    values: tuple[float, float]

    @property
    def legend(self) -> list[Line]:
        """A curve of each variant."""
        return list({line.variant: line for line in reversed(self.lines)}.values())[::-1]


def dot_charts(table: PageTable) -> list[DotChart]:
    """A chart for each column with intervals."""
    charts = []
    for column in table.measures:
        rows = [(table.label(row), row[column]) for row in table.rows if row[column].value is not None]
        ends = [end for _, cell in rows for end in (cell.value, cell.low, cell.high) if end is not None]
        difference = table.headings[column].endswith("(points)")
        low, high = _widened([*ends, 0.0] if difference else ends)
        place = _placer(low, high)
        marks = tuple(
            Mark(
                label,
                cell.text,
                place(cell.value),
                None if cell.low is None else place(cell.low),
                None if cell.high is None else place(cell.high),
            )
            for label, cell in rows
        )
        charts.append(DotChart(table.headings[column], marks, _ticks(low, high, 4), place(0.0) if difference else None))
    return charts


def curve_charts(work: WorkDirectory, group: str) -> list[CurveChart]:
    """A chart for each quantity that the runs of a group logged, the loss first.

    Of variants that were tested, the tested runs are drawn: the learning rates that were not chosen ended early.
    """
    lines = _labelled(work, group)
    quantities = {name for _, run in lines for record in run.records for name in record if "/" in name}
    charts = []
    for name in sorted(quantities, key=lambda name: ("learning_rate" in name, not name.endswith("/loss"), name)):
        drawn = [(line, series) for line, run in lines if len(series := _series(run.records, name))]
        if drawn:
            charts.append(_curve_chart(_titled(name), drawn))
    return charts


def _labelled(work: WorkDirectory, group: str) -> list[tuple[Line, Run]]:
    """Every run of a group that is drawn, with its curve but for the points; a variant's curves have one style."""
    found = []
    for number, (variant, runs) in enumerate(work.of_group(group).items()):
        shown = [run for run in runs if run.tested] or runs
        several_rates, several_seeds = (len({getattr(run, field) for run in shown}) > 1 for field in ("rate", "seed"))
        for run in shown:
            title = work.called(variant)
            label = title + (f", learning rate {run.rate}" if several_rates else "")
            label += f", seed {run.seed}" if several_seeds else ""
            found.append((Line(title, label, number % STYLES, number // STYLES, ""), run))
    return found


def _curve_chart(title: str, drawn: Sequence[tuple[Line, np.ndarray]]) -> CurveChart:
    points = np.concatenate([series for _, series in drawn])
    first, last = float(points[:, 0].min()), float(points[:, 0].max())
    if first == last:
        first, last = first - 1, last + 1
    low, high = _widened(points[:, 1])
    across, up = _placer(first, last), _placer(low, high)
    lines = []
    for line, series in drawn:
        places = " ".join(f"{across(step):.2f},{100 - up(value):.2f}" for step, value in series)
        lines.append(dataclasses.replace(line, points=places))
    return CurveChart(title, tuple(lines), _ticks(first, last, 5), _ticks(low, high, 5), (first, last), (low, high))


def _series(records: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    """Steps and values, float64 ``[points, 2]``, the means of equal parts where there are too many to draw."""
    pairs = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
    series = np.array([pair for pair in pairs if math.isfinite(pair[1])], np.float64).reshape(-1, 2)
    if len(series) <= _MOST_POINTS:
        return series
    return np.array([part.mean(0) for part in np.array_split(series, _MOST_POINTS)])


def _titled(name: str) -> str:
    """A logged name as people read it: ``train/learning_rate/head`` as ``learning rate, head``."""
    return ", ".join(name.removeprefix("train/").replace("_", " ").split("/"))


def _widened(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The range of some values with a little room on both sides."""
    low, high = float(min(values)), float(max(values))
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _placer(low: float, high: float) -> Any:
    return lambda value: round(100 * (float(value) - low) / (high - low), 2)


def _ticks(low: float, high: float, most: int) -> tuple[Tick, ...]:
    values = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    inside = [float(value) for value in values if low <= value <= high]
    decimals = next(digits for digits in range(9) if digits == 8 or np.allclose(np.round(inside, digits), inside, 1e-9))
    place = _placer(low, high)
    return tuple(Tick(place(value), f"{value + 0.0:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")) for value in inside)
