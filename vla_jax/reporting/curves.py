"""Learning curves: accuracy with its interval against labels on a logarithmic axis, a line a method, a panel a task.

Drawn as :mod:`vla_jax.reporting.figure` draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from vla_jax.errors import UserError
from vla_jax.reporting.drawing import (
    FAINT,
    INK,
    SOFT,
    WIDTH,
    clean,
    group_styles,
    headline,
    legend_handles,
    new_figure,
    reference_lines,
    save,
    short,
    widened,
)
from vla_jax.reporting.table import interval

_HEIGHT, _LEFT, _GAP, _FOOT, _TITLE = 4.2, 0.78, 0.62, 0.62, 0.3  # inches
_APART = 0.012  # of the axis, between the points of neighbouring curves, so that no whisker hides another


@dataclasses.dataclass(frozen=True)
class CurvePanel:
    """One task's curves.

    Attributes:
        title: over the panel.
        curves: by method, its points: what was spent, and the fraction with or without its interval. A method may lack
            points that others have.
        chance: what guessing reaches, as a fraction; None draws no line.
        references: by name, fractions drawn as horizontal lines.
    """

    title: str
    curves: Mapping[str, Sequence[tuple[float, Any]]]
    chance: float | None = None
    references: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def learning_curves(panels: Sequence[CurvePanel], path: str | Path, *, axis: str, title: str = "") -> Figure:
    """Draws the panels beside each other, methods in one colour in all of them.

    Args:
        panels: left to right, at most three.
        path: of the PNG, replaced as a whole; 2200 pixels wide.
        axis: what is spent.
        title: over everything.

    Returns:
        The figure as it was drawn.

    Raises:
        UserError: there are no panels or too many, or one of them has no point, or nothing was spent at one.
    """
    if not 1 <= len(panels) <= 3:
        raise UserError(f"learning curves take one to three panels, given {len(panels)}")
    for panel in panels:
        spent = [x for points in panel.curves.values() for x, _ in points]
        if not spent or min(spent) <= 0:
            raise UserError(f"the curves of {panel.title!r} need points, and what was spent must be positive")
    methods = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    references = list(dict.fromkeys(name for panel in panels for name in panel.references))
    styles = group_styles([{"method": name} for name in methods], "method")
    chance = any(panel.chance is not None for panel in panels)
    figure, renderer = new_figure()
    legend = legend_handles(styles, "method", {name: {} for name in references}, chance)
    top = headline(figure, renderer, title, legend) + _TITLE
    height = top + _HEIGHT + _FOOT
    figure.set_figheight(height)
    width = (WIDTH - _LEFT - 0.17 - _GAP * (len(panels) - 1)) / len(panels)
    for number, panel in enumerate(panels):
        left = _LEFT + number * (width + _GAP)
        axes = figure.add_axes((left / WIDTH, _FOOT / height, width / WIDTH, _HEIGHT / height))
        _draw(axes, panel, methods, references, styles)
        axes.set_xlabel(axis, color=SOFT, fontsize=10, labelpad=6)
        if number == 0:
            axes.set_ylabel("accuracy (%)", color=SOFT, fontsize=10, labelpad=6)
    return save(figure, path)


def _draw(
    axes: Axes,
    panel: CurvePanel,
    methods: Sequence[str],
    references: Sequence[str],
    styles: Mapping[str, tuple[str, str]],
) -> None:
    """One panel."""
    clean(axes)
    axes.spines["left"].set_visible(True)
    axes.grid(axis="both", color=FAINT, linewidth=0.8)
    axes.set_xscale("log")
    spent = sorted({float(x) for points in panel.curves.values() for x, _ in points})
    reach = math.log10(spent[-1] / spent[0]) or 1.0
    # A reference keeps its dashes in all panels, also where another one is missing.
    lines = reference_lines("value", panel.chance, {name: {"value": panel.references.get(name)} for name in references})
    heights = [line for line, _ in lines]
    for line, dashes in lines:
        axes.axhline(line, color=SOFT, linewidth=1, linestyle=dashes, zorder=1)
    for name, points in panel.curves.items():
        color, marker = styles[name]
        aside = 10 ** (_APART * reach * (methods.index(name) - (len(methods) - 1) / 2))
        shown = [(x * aside, *parts) for x, parts in sorted((x, interval(value)) for x, value in points) if parts]
        axes.plot([x for x, *_ in shown], [100 * y for _, y, *_ in shown], color=color, linewidth=1.6, zorder=3)
        for x, middle, low, high in shown:
            axes.plot([x, x], [100 * low, 100 * high], color=color, linewidth=1.8, alpha=0.5, zorder=3)
            axes.plot(x, 100 * middle, marker, color=color, markersize=6, markeredgecolor="white", zorder=4)
            heights += [100 * part for part in (middle, low, high) if not math.isnan(part)]
    axes.set_ylim(*widened(heights, 0.06))
    spare = 10 ** (0.06 * reach)
    axes.set_xlim(spent[0] / spare, spent[-1] * spare)
    axes.xaxis.set_major_locator(FixedLocator(spent))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short(count)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=9.5, colors=SOFT)
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=7)
