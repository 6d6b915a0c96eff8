"""Where the page puts dots, whiskers and curves."""

from __future__ import annotations

import numpy as np
import pytest
from page_folders import write_run, write_work_directory

from vla_jax.reporting.page.charts import curve_charts, dot_charts
from vla_jax.reporting.page.tables import Cell, PageTable
from vla_jax.reporting.page.workdir import read_work_directory
from vla_jax.reporting.table import MINUS


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return read_work_directory(write_work_directory(tmp_path_factory.mktemp("work")))


def _points(line):
    return np.array([[float(part) for part in pair.split(",")] for pair in line.points.split(" ")])


def _values(chart, line):
    """What a reader takes from a curve: steps and values."""
    across, down = _points(line).T / 100
    steps = chart.steps[0] + across * (chart.steps[1] - chart.steps[0])
    return np.stack([steps, chart.values[1] - down * (chart.values[1] - chart.values[0])], axis=1)


def test_dots_and_whiskers_stand_where_the_axis_says(work):
    accuracy, difference = dot_charts(work.tables[0])
    assert (accuracy.title, difference.title) == ("easy-VQA (%)", "against plain (points)")
    assert [mark.label for mark in accuracy.marks] == ["plain | <b>one</b>", "LoRA"]  # the third has no value
    assert accuracy.zero is None
    # Ticks are on the line through any two of them, and so is every number.
    for chart, column in ((accuracy, 2), (difference, 3)):
        places = np.array([tick.place for tick in chart.ticks])
        shown = np.array([float(tick.text.replace(MINUS, "-")) for tick in chart.ticks])
        slope, start = np.polyfit(places, shown, 1)
        cells = [row[column] for row in work.tables[0].rows if row[column].value is not None]
        for mark, cell in zip(chart.marks, cells, strict=True):
            for place, number in ((mark.value, cell.value), (mark.low, cell.low), (mark.high, cell.high)):
                assert 0 <= place <= 100
                assert start + slope * place == pytest.approx(number, abs=0.01)
    assert difference.zero == pytest.approx(next(tick.place for tick in difference.ticks if tick.text == "0"), abs=0.02)


def test_a_chart_of_one_value_has_room_around_it():
    table = PageTable("a", "", ("x", "y (%)"), (False, True), ((Cell("a"), Cell("5.0 ± 0.0", False, 5.0, 5.0, 5.0)),))
    (chart,) = dot_charts(table)
    assert chart.marks[0].value == pytest.approx(50, abs=0.1)
    assert len(chart.ticks) >= 2


def test_curves_are_those_of_the_chosen_learning_rate_or_of_all_where_none_is_chosen(work):
    loss, rate = curve_charts(work, "statements")
    assert (loss.title, rate.title) == ("loss", "learning rate, head")
    assert [line.label for line in loss.lines] == [
        "plain | <b>one</b>, seed 0",
        "plain | <b>one</b>, seed 1",
        "LoRA",
        "full, learning rate 0.02",
        "full, learning rate 0.1",
    ]
    assert [line.variant for line in loss.legend] == ["plain | <b>one</b>", "LoRA", "full"]
    assert [line.style for line in loss.lines] == [0, 0, 1, 2, 2]  # a variant's curves have one colour
    expected = [[1.0, 0.75, 0.5, 0.25], [2.0, 0.75, 0.5, 0.25], [1.0, 0.9, 0.8, 0.7], [2.0], [2.0, 1.5]]
    for line, losses in zip(loss.lines, expected, strict=True):
        np.testing.assert_allclose(_values(loss, line), np.stack([range(1, len(losses) + 1), losses], 1), atol=2e-3)


def test_what_is_no_number_is_left_out_and_long_runs_are_thinned_to_their_means(tmp_path):
    generator = np.random.default_rng(0)
    losses = generator.uniform(1, 2, 1000).tolist()
    losses[10] = None
    losses[20] = float("inf")
    write_run(tmp_path / "runs/a/learning_rate_1/seed_0", losses)
    loss = curve_charts(read_work_directory(tmp_path), "")[0]
    points = _values(loss, loss.lines[0])
    assert len(points) == 240
    kept = [(step, value) for step, value in enumerate(losses, start=1) if value is not None and np.isfinite(value)]
    parts = [np.mean(part, axis=0) for part in np.array_split(np.array(kept), 240)]
    np.testing.assert_allclose(points, parts, rtol=1e-3, atol=0.06)


def test_colours_begin_again_dashed(tmp_path):
    for number in range(10):
        write_run(tmp_path / f"runs/v{number}/learning_rate_1/seed_0", [1.0, 2.0])
    lines = curve_charts(read_work_directory(tmp_path), "")[0].lines
    assert len({(line.style, line.dashes) for line in lines}) == 10
    assert (lines[8].style, lines[8].dashes) == (0, 1)
