from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from vla_jax.errors import UserError
from vla_jax.evaluation.statistics import Interval
from vla_jax.reporting import figure
from vla_jax.reporting.figure import Panel


def results(count):
    return [
        {
            "variant": f"variant {index}",
            "family": ("independent", "fusion", "LoRA")[index % 3],
            "trainable_parameters": 1000 * (1 + index // 2),
            "share": 0.01 * (index + 1),
            "accuracy": Interval(0.6 + 0.01 * index, 0.58 + 0.01 * index, 0.63 + 0.01 * index),
            "binding": 0.5 + 0.02 * index,
        }
        for index in range(count)
    ]


CONTROLS = {"text only": {"accuracy": Interval(0.52, 0.5, 0.54)}, "image only": {"accuracy": 0.49, "binding": 0.51}}
PANELS = [Panel("accuracy", "all statements", 0.5), Panel("binding", "binding")]


def texts(drawn):
    """All that is written in the axes, their titles, the legend and the figure."""
    inside = [text for axes in drawn.axes for text in axes.texts]
    legends = [text for legend in drawn.legends for text in legend.get_texts()]
    titles = {axes.get_title("left") for axes in drawn.axes}
    return titles | {text.get_text() for text in (*inside, *legends, *drawn.texts)}


def picture(path):
    with Image.open(path) as png:
        assert png.format == "PNG"
        return np.asarray(png.convert("RGB"))


@pytest.mark.parametrize("count", [1, 4, 23])
def test_dot_plot_has_every_label_number_and_line(tmp_path, count):
    path = tmp_path / "plots" / "dots.png"
    rows = results(count)
    drawn = figure.dot_plot(
        rows,
        PANELS,
        path,
        group="family",
        note=lambda row: f"{row['share']:.0%}",
        note_title="trained",
        controls=CONTROLS,
        title="Ablation",
    )
    pixels = picture(path)
    assert pixels.shape[1] == 2200
    assert pixels.shape[0] == round(drawn.get_figheight() * 200)
    assert pixels.shape[0] > 0.34 * 200 * count
    assert pixels.std() > 5
    assert (pixels[:4] == 255).all()
    expected = {"Ablation", "all statements", "binding", "chance", "text only", "image only", "trained", "independent"}
    expected |= {row["variant"] for row in rows} | {f"{row['share']:.0%}" for row in rows}
    expected |= {f"{100 * row['accuracy'].value:.1f}" for row in rows} | {f"{100 * row['binding']:.1f}" for row in rows}
    assert expected <= texts(drawn)
    vertical = [{line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"} for axes in drawn.axes]
    assert vertical == [{50.0, 52.0, 49.0}, {51.0}]


def test_dots_stand_at_their_values_top_to_bottom(tmp_path):
    drawn = figure.dot_plot(results(3), PANELS[:1], tmp_path / "dots.png")
    (axes,) = drawn.axes
    dots = [line.get_xydata()[0] for line in axes.lines if line.get_marker() not in ("None", "")]
    np.testing.assert_allclose(dots, [[60, 0], [61, 1], [62, 2]])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    whiskers = [line.get_xdata() for line in axes.lines if line.get_linewidth() > 5]
    np.testing.assert_allclose(whiskers, [[58, 63], [59, 64], [60, 65]])


def test_nothing_is_cut_off_and_no_panel_covers_another(tmp_path):
    rows = results(5)
    rows[2]["variant"] = "a variant with a name that is rather longer than those of its neighbours"
    panels = [Panel("accuracy", f"panel {index}") for index in range(7)]
    drawn = figure.dot_plot(rows, panels, tmp_path / "dots.png", group="family", note=lambda _: "12.3 %", title="T")
    renderer = drawn.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in drawn.axes]
    assert len(boxes) == 7
    boxes += [artist.get_window_extent(renderer) for artist in (*drawn.texts, *drawn.legends)]
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= 2200
        assert 0 <= box.y0 < box.y1 <= drawn.get_figheight() * 200
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_a_missing_value_is_an_en_dash(tmp_path):
    rows = results(2)
    rows[1]["accuracy"] = None
    del rows[0]["binding"]
    drawn = figure.dot_plot(rows, PANELS, tmp_path / "dots.png")
    assert "–" in texts(drawn)  # noqa: RUF001
    assert [sum(line.get_marker() == "o" for line in axes.lines) for axes in drawn.axes] == [1, 1]


def test_accuracy_against_parameters_names_every_point_once_and_apart(tmp_path):
    """Two rows share each number of parameters, so their names compete for one place."""
    path = tmp_path / "parameters.png"
    rows = [*results(14), {"variant": "zero-shot", "accuracy": 0.5, "trainable_parameters": 0, "family": "none"}]
    drawn = figure.accuracy_against_parameters(
        rows, path, group="family", chance=0.5, controls=CONTROLS, title="Accuracy against trained parameters"
    )
    assert picture(path).shape[1] == 2200
    (axes,) = drawn.axes
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts].count("variant 3") == 1
    assert {text.get_text() for text in axes.texts} == {f"variant {index}" for index in range(14)}
    assert {"independent", "fusion", "LoRA", "chance", "text only", "image only"} <= texts(drawn)
    renderer = drawn.canvas.get_renderer()
    names = [text.get_window_extent(renderer) for text in axes.texts]
    dots = [line for line in axes.lines if line.get_marker() not in ("None", "")]
    places = [axes.transData.transform(line.get_xydata()[0]) for line in dots]
    assert len(places) == 14
    frame = axes.get_window_extent(renderer)
    for box in names:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not any(box.contains(*place) for place in places)
    for one, other in itertools.combinations(names, 2):
        assert not one.overlaps(other)


def test_figures_of_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="given 0 and 2"):
        figure.dot_plot([], PANELS, tmp_path / "a.png")
    with pytest.raises(UserError, match="given 1 and 0"):
        figure.dot_plot(results(1), [], tmp_path / "a.png")
    with pytest.raises(UserError, match="nothing to draw"):
        figure.accuracy_against_parameters([{"accuracy": 0.5}], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
