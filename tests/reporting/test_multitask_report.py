"""What the multitask experiment says of its rows: the columns, the verdict in its cases, the files."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vla_jax.evaluation.statistics import Interval
from vla_jax.reporting import multitask_report
from vla_jax.reporting.table import read_rows

TITLES = {"easy_vqa": "easy-VQA", "statements": "statements"}


def row(name: str, group: str, mean: float, against_best: tuple[float, float, float] | None, **more) -> dict:
    return {
        "name": name,
        "variant": name.replace("_", " "),
        "group": group,
        "parameters_per_task": 1000.4,
        "share_per_task": 0.0123,
        "bytes_per_task": 2048.0,
        "easy_vqa": Interval(mean + 0.1, mean + 0.05, mean + 0.15),
        "statements": Interval(mean - 0.1, mean - 0.15, mean - 0.05),
        "mean": Interval(mean, mean - 0.02, mean + 0.02),
        "best": against_best is None,
        "against_best": None if against_best is None else Interval(*against_best),
        "step_seconds": 0.25,
    } | more


FLOOR = row("heads", "reference", 0.5, (-0.2, -0.22, -0.18))
BEST = row("half_down", "shared adapters", 0.7, None, against_each=Interval(0.02, 0.01, 0.03))
BEHIND = row("one", "shared adapters", 0.65, (-0.05, -0.07, -0.03))
LEVEL = row("each", "adapters of their own", 0.69, (-0.01, -0.03, 0.01))
ROUTED = row("routed", "adapters of their own", 0.6, (-0.1, -0.12, -0.08), step_seconds=None)


def test_the_table_has_every_task_the_mean_and_the_costs():
    told = multitask_report.table([BEST, ROUTED], TITLES, "tiny").markdown().splitlines()
    assert told[0] == "**2 tasks on tiny**"
    head, _, best, routed = ([cell.strip() for cell in line.strip("|").split("|")] for line in told[2:])
    assert dict(zip(head, best, strict=True)) == {
        "way of sharing": "half down",
        "trained a task": "1,000",
        "of backbone (%)": "1.23",
        "saved a task (KiB)": "2",
        "easy-VQA (%)": "80.0 ± 5.0",
        "statements (%)": "60.0 ± 5.0",
        "mean (%)": "70.0 ± 2.0",
        "against one each (points)": "**+2.0 [1.0, 3.0]**",
        "step (ms)": "250",
    }
    assert routed[-2:] == ["–", "–"]  # noqa: RUF001


@pytest.mark.parametrize(
    ("rows", "said", "unsaid"),
    [
        ([BEST, BEHIND], ["half down has the highest mean: 70.0 [68.0, 72.0] %", "ahead of one (−5.0", "It wins."], []),  # noqa: RUF001
        ([BEST, LEVEL, BEHIND], ["ahead of one (", "cannot be told from each (−1.0 [−3.0, 1.0])"], ["wins"]),  # noqa: RUF001
        ([BEST, LEVEL], ["cannot be told from each"], ["ahead", "wins"]),
        ([BEST, BEHIND, ROUTED], ["It wins."], ["routed"]),
        ([FLOOR, BEST], ["For reference, against it: heads (−20.0"], ["ahead", "wins", "cannot"]),  # noqa: RUF001
    ],
)
def test_the_verdict_names_the_winner_or_says_that_there_is_none(rows, said, unsaid):
    told = multitask_report.verdict(rows)
    for words in said:
        assert words in told
    for words in unsaid:
        assert words not in told


def test_nothing_is_said_where_nothing_shares_adapters():
    assert multitask_report.verdict([FLOOR]) == ""


def test_files_hold_tables_verdict_and_figures(tmp_path):
    routing = [
        {
            "task": "easy-VQA",
            "router": Interval(0.99, 0.98, 1.0),
            "given": Interval(0.8, 0.78, 0.82),
            "sent": Interval(0.79, 0.77, 0.81),
            "difference": Interval(-0.01, -0.015, -0.005),
            "strict": Interval(0.785, 0.77, 0.8),
        }
    ]
    won = multitask_report.write([FLOOR, BEST, LEVEL, ROUTED], routing, TITLES, "tiny", tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.endswith(f"|\n\n{won}\n")
    assert "99.0 ± 1.0" in (tmp_path / "routing.md").read_text()
    assert [stored["name"] for stored in read_rows(tmp_path / "results.jsonl")] == [
        "heads",
        "half_down",
        "each",
        "routed",
    ]
    assert json.loads((tmp_path / "routing.jsonl").read_text())["strict"]["value"] == 0.785
    for name in ("results.png", "parameters.png"):
        with Image.open(tmp_path / name) as png:
            assert png.size[0] == 2200


def test_without_a_router_there_is_no_table_of_it(tmp_path):
    multitask_report.write([FLOOR], [], TITLES, "tiny", tmp_path)
    assert not (tmp_path / "routing.md").exists()
    assert "highest" not in (tmp_path / "results.md").read_text()
