"""What the figures share: colours and shapes of groups, headline, reference lines, and names set beside points."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox, ScaledTranslation, Transform

from vla_jax.reporting.table import MISSING, Row, interval, write_atomically

# Okabe and Ito's colours, told apart with any colour vision; shapes differ too, for prints in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "D", "s", "^", "v", "P", "X")
INK, SOFT, FAINT = "#1F2328", "#636C76", "#E4E7EB"
DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (2, 4)))
DOTS_PER_INCH = 200  # twice what a page shows
WIDTH = 11.0  # inches


def name_points(
    axes: Axes, renderer: Any, points: Sequence[tuple[float, float, float, float]], names: Sequence[str]
) -> None:
    """Sets each name where it covers neither a point, nor a whisker, nor another name, as near as possible.

    Variants of one size stand above each other, so names are tried on growing rings and tied to far points by a line.
    """
    # Right, left, then further and further from the level.
    angles = [math.radians(side + lean) for lean in (0, 20, -20, 40, -40, 65, -65, 90, -90) for side in (0, 180)]
    unit = DOTS_PER_INCH / 72  # pixels a typographic point
    frame = axes.get_window_extent(renderer).padded(-3 * unit)
    taken = []
    for x, y, low, high in points:
        here = axes.transData.transform((x, y))
        ends = [axes.transData.transform((x, end))[1] for end in (low, high) if not math.isnan(end)] or [here[1]]
        taken.append(Bbox([[here[0] - 6 * unit, here[1] - 6 * unit], [here[0] + 6 * unit, here[1] + 6 * unit]]))
        taken.append(Bbox([[here[0] - 3 * unit, min(ends) - 3 * unit], [here[0] + 3 * unit, max(ends) + 3 * unit]]))
    for (x, y, *_), name in sorted(zip(points, names, strict=True), key=lambda pair: -pair[0][1]):
        text = axes.text(x, y, name, fontsize=9.5, color=INK, ha="center", va="center", zorder=5)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable across a line
        extent = text.get_window_extent(renderer)
        here = axes.transData.transform((x, y))
        best, best_cost = None, math.inf
        for ring in range(12):
            for angle in angles:
                reach = (9 + 11 * ring) * unit
                middle = (
                    here[0] + math.cos(angle) * (reach + extent.width / 2),
                    here[1] + math.sin(angle) * (reach + extent.height / 2),
                )
                box = Bbox.from_bounds(
                    middle[0] - extent.width / 2, middle[1] - extent.height / 2, extent.width, extent.height
                )
                overlap = sum(_area(Bbox.intersection(box, other)) for other in taken)
                outside = _area(box) - _area(Bbox.intersection(box, frame))
                cost = overlap + outside
                if cost < best_cost:
                    best, best_cost = (middle, box, ring), cost
            if best_cost == 0:
                break
        middle, box, ring = best
        taken.append(box.padded(1.5 * unit))
        text.set_position(axes.transData.inverted().transform(middle))
        if ring > 0:
            nearest = (min(max(here[0], box.x0), box.x1), min(max(here[1], box.y0), box.y1))
            end = axes.transData.inverted().transform(nearest)
            axes.plot([x, end[0]], [y, end[1]], color=SOFT, linewidth=0.7, zorder=2)


def group_styles(rows: Sequence[Row], group: str | None) -> dict[str, tuple[str, str]]:
    """Colour and shape of each group, in the order of the groups' first rows."""
    groups = dict.fromkeys(group_of(row, group) for row in rows)
    # The eighth group has the first colour again, in another shape.
    shapes = [MARKERS[(index + index // len(COLORS)) % len(MARKERS)] for index in range(len(groups))]
    return {name: (COLORS[index % len(COLORS)], shapes[index]) for index, name in enumerate(groups)}


def group_of(row: Row, group: str | None) -> str:
    """The row's group; without grouping all rows are in one."""
    return str(row.get(group, MISSING)) if group else ""


def reference_lines(name: str, chance: float | None, controls: Mapping[str, Row]) -> list[tuple[float, Any]]:
    """Where lines stand, in per cent, and how they are dashed."""
    lines = [] if chance is None else [(100 * chance, DASHES[0])]
    for index, row in enumerate(controls.values()):
        parts = interval(row.get(name))
        if parts:
            lines.append((100 * parts[0], _dashes(index)))
    return lines


def _dashes(control: int) -> Any:
    """Of a control's line; the first kind is chance's alone."""
    return DASHES[1 + control % (len(DASHES) - 1)]


def legend_handles(
    styles: Mapping[str, tuple[str, str]], group: str | None, controls: Mapping[str, Row], chance: bool
) -> list[Line2D]:
    """Handles for groups, chance and controls."""
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="none", markersize=6.5, label=name)
        for name, (color, marker) in styles.items()
        if group
    ]
    lines = [("chance", DASHES[0])] if chance else []
    lines += [(name, _dashes(index)) for index, name in enumerate(controls)]
    return handles + [Line2D([], [], color=SOFT, linewidth=1, linestyle=dashes, label=name) for name, dashes in lines]


def headline(figure: Figure, renderer: Any, title: str, legend: Sequence[Line2D]) -> float:
    """Sets title and legend at the top of a figure of any height; returns the inches they take."""
    down = 0.12
    if title:
        text = figure.text(0, 0, title, fontsize=13, fontweight="bold", color=INK, va="top")
        text.set_transform(_from_top(figure, 0.12, down))
        down += 0.34
    if legend:
        # Handle, gaps and the widest name; as many entries beside each other as there is room for.
        entry = 0.5 + text_width(figure, renderer, [str(handle.get_label()) for handle in legend], 9.5)
        total = sum(0.5 + text_width(figure, renderer, [str(handle.get_label())], 9.5) for handle in legend)
        beside = len(legend) if total < WIDTH - 0.24 else max(1, int((WIDTH - 0.24) / entry))
        figure.legend(
            handles=legend,
            loc="upper left",
            bbox_to_anchor=(0, 0),
            bbox_transform=_from_top(figure, 0.12, down),
            ncols=beside,
            frameon=False,
            fontsize=9.5,
            labelcolor=INK,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.8,
            handletextpad=0.5,
            columnspacing=1.5,
        )
        down += 0.06 + 0.22 * math.ceil(len(legend) / beside)
    return down + 0.06


def _from_top(figure: Figure, right: float, down: float) -> Transform:
    """The point some inches from the figure's upper left corner, wherever the figure's lower edge will be."""
    return ScaledTranslation(right, -down, figure.dpi_scale_trans) + ScaledTranslation(0, 1, figure.transFigure)


def new_figure() -> tuple[Figure, Any]:
    """An empty white figure, to be given its height, and the renderer that measures text."""
    figure = Figure(figsize=(WIDTH, 1), dpi=DOTS_PER_INCH, facecolor="white")
    return figure, FigureCanvasAgg(figure).get_renderer()


def save(figure: Figure, path: str | Path) -> Figure:
    """Writes a PNG in one step."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
    write_atomically(path, png.getvalue())
    return figure


def text_width(figure: Figure, renderer: Any, texts: Sequence[str], size: float) -> float:
    """Inches that the widest of some texts takes."""
    probes = [figure.text(0, 0, text, fontsize=size) for text in texts]
    width = max(probe.get_window_extent(renderer).width for probe in probes)
    for probe in probes:
        probe.remove()
    return width / DOTS_PER_INCH


def clean(axes: Axes) -> None:
    """Leaves the lower line of the frame, in grey, and no ticks."""
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color("#C8CDD3")
    axes.tick_params(which="both", length=0)
    axes.set_axisbelow(True)


def widened(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of some values with a share of it on both sides, two points wide at least."""
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    spare = max(share * (high - low), 1.0)
    return low - spare, high + spare


def short(count: float) -> str:
    """A round number as an axis shows it: 20000 as 20k."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:g}{suffix}"
    return f"{count:g}"


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else box.width * box.height
