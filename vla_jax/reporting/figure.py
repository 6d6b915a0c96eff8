"""Figures of a result table: dots with intervals by variant, and accuracy against trained parameters.

Drawn with Matplotlib's objects on the Agg canvas, without ``pyplot``: no display and no global state is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vla_jax.errors import UserError
from vla_jax.reporting.drawing import (
    FAINT,
    INK,
    SOFT,
    WIDTH,
    clean,
    group_of,
    group_styles,
    headline,
    legend_handles,
    name_points,
    new_figure,
    reference_lines,
    save,
    short,
    text_width,
    widened,
)
from vla_jax.reporting.table import MISSING, Row, as_row, interval

_ROW, _HEAD, _FOOT, _GAP = 0.34, 0.34, 0.42, 0.26  # inches
_PANELS_BESIDE = 5
_ABOVE = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "baseline", "annotation_clip": False}


@dataclass(frozen=True)
class Panel:
    """One quantity, a field of the rows that holds a fraction, with or without its interval.

    Attributes:
        name: of the field.
        title: over the panel.
        chance: what guessing reaches, as a fraction; None draws no line.
    """

    name: str
    title: str
    chance: float | None = None


def dot_plot(
    rows: Sequence[Any],
    panels: Sequence[Panel],
    path: str | Path,
    *,
    label: str = "variant",
    group: str | None = None,
    note: Callable[[Row], str] | None = None,
    note_title: str = "",
    controls: Mapping[str, Any] | None = None,
    title: str = "",
) -> Figure:
    """One line a row, one panel a quantity: a dot, its interval, the number; vertical lines at chance and controls.

    Args:
        rows: mappings or dataclasses, top to bottom. Where a quantity is missing, an en dash stands for it.
        panels: left to right, at most five beside each other.
        path: of the PNG, replaced as a whole; 2200 pixels wide.
        label: field with the row's name.
        group: field whose value gives colour and shape, explained above the panels.
        note: secondary text behind the row's name, such as the trainable share.
        note_title: over the secondary texts.
        controls: rows that every panel shows as a vertical line, by name.
        title: over everything.

    Returns:
        The figure as it was drawn.

    Raises:
        UserError: there are no rows or no panels.
    """
    rows = [as_row(row) for row in rows]
    if not rows or not panels:
        raise UserError(f"a figure needs rows and panels, given {len(rows)} and {len(panels)}")
    controls = {name: as_row(row) for name, row in (controls or {}).items()}
    styles = group_styles(rows, group)
    lines = math.ceil(len(panels) / _PANELS_BESIDE)
    beside = math.ceil(len(panels) / lines)
    body = _ROW * len(rows)
    legend = legend_handles(styles, group, controls, any(panel.chance is not None for panel in panels))
    figure, renderer = new_figure()
    top = headline(figure, renderer, title, legend)
    height = top + lines * (_HEAD + body + _FOOT)
    figure.set_figheight(height)
    names = [str(row.get(label, MISSING)) for row in rows]
    notes = [note(row) if note else "" for row in rows]
    name_width = text_width(figure, renderer, names, 10)
    note_width = text_width(figure, renderer, [*notes, note_title], 8.5)
    margin = 0.12 + name_width + (0.14 + note_width if note else 0) + 0.2
    panel_width = (WIDTH - margin - 0.1 - _GAP * (beside - 1)) / beside
    for index, panel in enumerate(panels):
        line, column = divmod(index, beside)
        bottom = height - top - line * (_HEAD + body + _FOOT) - _HEAD - body
        left = margin + column * (panel_width + _GAP)
        axes = figure.add_axes((left / WIDTH, bottom / height, panel_width / WIDTH, body / height))
        _draw_panel(axes, panel, rows, [styles[group_of(row, group)] for row in rows], controls, panel_width)
        if column == 0:
            start = (0.12 - margin) / panel_width  # in widths of the axes
            after = start + (name_width + 0.14) / panel_width
            for position, (name, extra) in enumerate(zip(names, notes, strict=True)):
                _write(axes, start, position, name, fontsize=10, color=INK)
                _write(axes, after, position, extra, fontsize=8.5, color=SOFT)
            axes.annotate(note_title, (after, 1), (0, 7), **_ABOVE, fontsize=8.5, color=SOFT)
    return save(figure, path)


def accuracy_against_parameters(
    rows: Sequence[Any],
    path: str | Path,
    *,
    value: str = "accuracy",
    parameters: str = "trainable_parameters",
    axis: str = "trained parameters",
    label: str = "variant",
    group: str | None = None,
    chance: float | None = None,
    controls: Mapping[str, Any] | None = None,
    title: str = "",
) -> Figure:
    """Accuracy with its interval against a cost, such as trained parameters, on a logarithmic axis, every point named.

    Args:
        rows: mappings or dataclasses; those without a value or without a cost have no place here.
        path: of the PNG, replaced as a whole; 2200 pixels wide.
        value: field with the fraction, with or without its interval.
        parameters: field with the cost, a positive number.
        axis: what the cost is.
        label: field with the row's name.
        group: field whose value gives colour and shape.
        chance: what guessing reaches, drawn as a horizontal line.
        controls: rows drawn as a horizontal line, by name.
        title: over everything.

    Returns:
        The figure as it was drawn.

    Raises:
        UserError: no row has both a value and a cost.
    """
    rows = [as_row(row) for row in rows]
    rows = [row for row in rows if interval(row.get(value)) and (row.get(parameters) or 0) > 0]
    if not rows:
        raise UserError(f"no row has both {value!r} and a positive {parameters!r}; there is nothing to draw")
    controls = {name: as_row(row) for name, row in (controls or {}).items()}
    styles = group_styles(rows, group)
    figure, renderer = new_figure()
    top = headline(figure, renderer, title, legend_handles(styles, group, controls, chance is not None)) + 0.08
    height = top + 4.6 + 0.62
    figure.set_figheight(height)
    axes = figure.add_axes((0.78 / WIDTH, 0.62 / height, (WIDTH - 0.95) / WIDTH, 4.6 / height))
    clean(axes)
    axes.spines["left"].set_visible(True)
    axes.grid(axis="both", color=FAINT, linewidth=0.8)
    axes.set_xscale("log")
    points = [(float(row[parameters]), *(100 * part for part in interval(row[value]))) for row in rows]
    references = reference_lines(value, chance, controls)
    for height_of_line, dashes in references:
        axes.axhline(height_of_line, color=SOFT, linewidth=1, linestyle=dashes, zorder=1)
    for row, (x, y, low, high) in zip(rows, points, strict=True):
        color, marker = styles[group_of(row, group)]
        axes.plot([x, x], [low, high], color=color, linewidth=1.8, alpha=0.55, solid_capstyle="butt", zorder=3)
        axes.plot(x, y, marker, color=color, markersize=7, markeredgecolor="white", markeredgewidth=0.8, zorder=4)
    heights = [part for point in points for part in point[1:] if not math.isnan(part)] + [y for y, _ in references]
    axes.set_ylim(*widened(heights, 0.1))
    low, high = math.log10(min(p[0] for p in points)), math.log10(max(p[0] for p in points))
    spare = max(0.35, 0.12 * (high - low))
    axes.set_xlim(10 ** (low - spare), 10 ** (high + spare))
    if high - low < 1:  # too few powers of ten to read from
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short(count)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(axis, color=SOFT, fontsize=10, labelpad=6)
    axes.set_ylabel("accuracy (%)", color=SOFT, fontsize=10, labelpad=6)
    axes.tick_params(labelsize=9.5, colors=SOFT)
    name_points(axes, renderer, points, [str(row.get(label, MISSING)) for row in rows])
    return save(figure, path)


def _draw_panel(
    axes: Axes,
    panel: Panel,
    rows: Sequence[Row],
    styles: Sequence[tuple[str, str]],
    controls: Mapping[str, Row],
    width: float,
) -> None:
    """One panel, with row 0 on top; the right end of the axes is kept free for the numbers."""
    clean(axes)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    room = 0.42 / width  # share of the axes that the numbers take
    for position in range(len(rows)):
        axes.axhline(position, xmax=1 - room, color=FAINT, linewidth=0.8, zorder=0)
    references = reference_lines(panel.name, panel.chance, controls)
    for place, dashes in references:
        axes.axvline(place, color=SOFT, linewidth=1, linestyle=dashes, zorder=1)
    seen = [place for place, _ in references]
    for position, (row, (color, marker)) in enumerate(zip(rows, styles, strict=True)):
        parts = interval(row.get(panel.name))
        if parts is None:
            _write(axes, 1, position, MISSING, ha="right", fontsize=9, color=INK)
            continue
        middle, low, high = (100 * part for part in parts)
        # A band higher than the dot: an interval narrower than the dot can still be seen.
        axes.plot([low, high], [position] * 2, color=color, linewidth=9, alpha=0.3, solid_capstyle="butt", zorder=3)
        axes.plot(middle, position, marker, color=color, markersize=4.5, markeredgewidth=0, zorder=4)
        _write(axes, 1, position, f"{middle:.1f}", ha="right", fontsize=9, color=INK)
        seen += [part for part in (middle, low, high) if not math.isnan(part)]
    start, end = widened(seen, 0.06)
    axes.set_xlim(start, start + (end - start) / (1 - room))
    locator = MaxNLocator(nbins=max(3, int((width - 0.42) / 0.34)), steps=[1, 2, 2.5, 5, 10], integer=True)
    ticks = locator.tick_values(start, end)
    axes.set_xticks([tick for tick in ticks if start <= tick <= end])
    axes.spines["bottom"].set_bounds(start, end)
    axes.tick_params(labelsize=9, colors=SOFT)
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=7)


def _write(axes: Axes, x: float, position: int, text: str, **style: Any) -> None:
    """Text on the level of a row, at a share of the axes' width."""
    axes.text(x, position, text, transform=axes.get_yaxis_transform(), va="center_baseline", **style)
