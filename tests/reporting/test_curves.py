"""Learning curves: every point, whisker, line and name is drawn where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vla_jax.errors import UserError
from vla_jax.evaluation.statistics import Interval
from vla_jax.reporting.curves import CurvePanel, learning_curves


def points(*values):
    return [(labels, Interval(v, v - 0.05, v + 0.04)) for labels, v in zip((1, 4, 300), values, strict=False)]


PANELS = [
    CurvePanel("textiles", {"LoRA": points(0.4, 0.6, 0.7), "full": points(0.35, 0.5)}, chance=1 / 3),
    CurvePanel("scenes", {"full": [(1, 0.2), (8, 0.9)]}, references={"zero-shot": Interval(0.3, 0.2, 0.4)}),
]


def is_level(line):
    """Whether a line runs across the whole panel."""
    return list(line.get_xdata()) == [0, 1]


def curves(axes):
    """The lines through a method's points."""
    return [line for line in axes.lines if not is_level(line) and np.ptp(np.asarray(line.get_xdata(), float)) > 0]


def test_curves_have_their_points_whiskers_lines_and_names(tmp_path):
    path = tmp_path / "plots" / "curves.png"
    drawn = learning_curves(PANELS, path, axis="labels a class", title="Few labels")
    with Image.open(path) as png:
        assert png.width == 2200
    assert [axes.get_title("left") for axes in drawn.axes] == ["textiles", "scenes"]
    assert "Few labels" in {text.get_text() for text in drawn.texts}
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["LoRA", "full", "chance", "zero-shot"]
    textiles, scenes = drawn.axes
    assert textiles.get_xscale() == "log"
    assert [tick.get_text() for tick in textiles.get_xticklabels()] == ["1", "4", "300"]
    lora, *_ = curves(textiles)
    np.testing.assert_allclose(lora.get_ydata(), [40, 60, 70])
    np.testing.assert_allclose(lora.get_xdata(), [1, 4, 300], rtol=0.1)
    whiskers = [line.get_ydata() for line in textiles.lines if line not in curves(textiles) and not is_level(line)]
    whiskers = [ends for ends in whiskers if len(ends) == 2]
    assert any(np.allclose(ends, [35, 44]) for ends in whiskers)
    assert len(whiskers) == 5
    # A method has one colour in all panels.
    assert curves(textiles)[1].get_color() == curves(scenes)[0].get_color() != lora.get_color()
    # Zero-shot, and no chance.
    assert [line.get_ydata()[0] for line in scenes.lines if line not in curves(scenes) and is_level(line)] == [30]
    for axes in drawn.axes:
        low, high = axes.get_ylim()
        for line in axes.lines:
            ends = np.asarray(line.get_ydata(), float)
            assert (ends[np.isfinite(ends)] >= low).all()
            assert (ends[np.isfinite(ends)] <= high).all()


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ([], "one to three panels, given 0"),
        ([CurvePanel("none", {"a": []})], "the curves of 'none' need points"),
        ([CurvePanel("zero", {"a": [(0, 0.5)]})], "must be positive"),
    ],
)
def test_what_cannot_be_drawn_is_refused(panels, message, tmp_path):
    with pytest.raises(UserError, match=message):
        learning_curves(panels, tmp_path / "curves.png", axis="labels")
