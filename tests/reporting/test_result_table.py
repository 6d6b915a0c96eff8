from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from vla_jax.errors import UserError
from vla_jax.evaluation.statistics import Interval
from vla_jax.reporting import table
from vla_jax.reporting.table import Column, Table

COLUMNS = (
    Column.text("variant", "variant"),
    Column.accuracy("accuracy", "accuracy"),
    Column.difference("difference", "against independent"),
    Column.number("parameters", "trained", format=",d"),
    Column.percent("share", "share", ".2f"),
)
ROWS = (
    {
        "variant": "independent",
        "accuracy": Interval(0.653, 0.632, 0.673),
        "parameters": np.int64(66048),
        "share": 1 / 26,
        "losses": [1.5, float("nan")],
    },
    {
        "variant": "fusion | gate [all]",
        "accuracy": {"value": 0.7, "low": 0.685, "high": 0.71},
        "difference": Interval(0.047, 0.0301, 0.0642),
        "parameters": 70144,
    },
)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        (Column.accuracy("a", "a"), Interval(0.653, 0.632, 0.674), "65.3 ± 2.1"),
        (Column.accuracy("a", "a"), Interval(0.99, 0.95, 1.0), "99.0 ± 4.0"),
        (Column.accuracy("a", "a", "range"), Interval(0.653, 0.631, 0.674), "65.3 [63.1, 67.4]"),
        (Column.accuracy("a", "a"), 0.653, "65.3"),
        (Column.accuracy("a", "a"), Interval(0.653, float("nan"), float("nan")), "65.3"),
        (Column.difference("a", "a"), Interval(0.02, -0.01, 0.05), "+2.0 [−1.0, 5.0]"),  # noqa: RUF001
        (Column.difference("a", "a"), Interval(-0.0001, -0.02, 0.02), "0.0 [−2.0, 2.0]"),  # noqa: RUF001
        (Column.number("a", "a", format=",d"), 1234567.0, "1,234,567"),
        (Column.number("a", "a"), -0.04, "0.0"),
        (Column.percent("a", "a", ".2f"), 0.0418, "4.18"),
        (Column.number("a", "a", "MiB", ".1f", 2**-20), 3 * 2**19, "1.5"),
        (Column.text("a", "a"), 3, "3"),
        (Column.text("a", "a"), None, "–"),  # noqa: RUF001
        (Column.number("a", "a"), float("nan"), "–"),  # noqa: RUF001
    ],
)
def test_values_are_shown(column, value, expected):
    assert column.show(value)[0] == expected


@pytest.mark.parametrize(("low", "high", "bold"), [(0.01, 0.03, True), (-0.03, -0.01, True), (-0.01, 0.03, False)])
def test_differences_that_exclude_zero_are_bold(low, high, bold):
    assert Column.difference("a", "a").show(Interval((low + high) / 2, low, high))[1] == bold
    assert not Column.accuracy("a", "a", "range").show(Interval((low + high) / 2, low, high))[1]


def test_markdown_is_aligned_and_escaped():
    lines = Table(COLUMNS, ROWS, "Ablation").markdown().splitlines()
    assert lines[:2] == ["**Ablation**", ""]
    assert lines[2:] == [
        "| variant              | accuracy (%) | against independent (points) | trained | share (%) |",
        "| -------------------- | -----------: | ---------------------------: | ------: | --------: |",
        "| independent          |   65.3 ± 2.1 |                            – |  66,048 |      3.85 |",  # noqa: RUF001
        "| fusion \\| gate [all] |   70.0 ± 1.5 |          **+4.7 [3.0, 6.4]** |  70,144 |         – |",  # noqa: RUF001
    ]
    assert len({len(line) for line in lines[2:]}) == 1


def test_terminal_shows_every_cell_and_takes_no_bracket_for_markup():
    console = Console(width=140, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(Table(COLUMNS, ROWS).terminal())
    shown = console.file.getvalue()
    for text in ("accuracy (%)", "fusion | gate [all]", "65.3 ± 2.1", "+4.7 [3.0, 6.4]", "66,048", "3.85"):
        assert text in shown
    console = Console(width=140, file=io.StringIO(), force_terminal=True)
    console.print(Table(COLUMNS, ROWS).terminal())
    assert "\x1b[1m+4.7 [3.0, 6.4]\x1b[0m" in console.file.getvalue()


def test_csv_keeps_full_precision():
    first, second = csv.DictReader(io.StringIO(Table(COLUMNS, ROWS).csv()))
    assert float(first["share"]) == 1 / 26
    assert (first["parameters"], first["difference"], first["difference_low"]) == ("66048", "", "")
    assert [float(second[f"difference{end}"]) for end in ("", "_low", "_high")] == [0.047, 0.0301, 0.0642]
    assert second["share"] == ""
    assert None not in first


def test_jsonl_keeps_all_fields_and_reads_back_as_the_same_table(tmp_path):
    paths = Table(COLUMNS, ROWS).write(tmp_path / "new" / "folder")
    rows = table.read_rows(paths["jsonl"])
    assert rows[0]["losses"] == [1.5, None]
    assert rows[0]["accuracy"] == {"value": 0.653, "low": 0.632, "high": 0.673}
    again = Table(COLUMNS, rows)
    assert again.markdown() == Table(COLUMNS, ROWS).markdown() == paths["md"].read_text()
    assert again.csv() == paths["csv"].read_text()
    assert sorted(path.name for path in paths["md"].parent.iterdir()) == ["table.csv", "table.jsonl", "table.md"]


def test_rows_may_be_dataclasses_with_numpy_inside():
    @dataclass(frozen=True)
    class Result:
        variant: str
        accuracy: Interval
        parameters: np.int32
        by_kind: dict

    row = Result("lora", Interval(0.5, 0.4, 0.6), np.int32(7), {"count": np.array([1.0, 2.0])})
    assert json.loads(Table(COLUMNS, [row]).jsonl()) == {
        "variant": "lora",
        "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6},
        "parameters": 7,
        "by_kind": {"count": [1.0, 2.0]},
    }


def test_no_file_yet_means_no_rows(tmp_path):
    assert table.read_rows(tmp_path / "table.jsonl") == []


@pytest.mark.parametrize("line", ['{"variant": "lo', "3"])
def test_damaged_rows_are_named_by_their_line(tmp_path, line):
    (tmp_path / "table.jsonl").write_text('{"variant": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        table.read_rows(tmp_path / "table.jsonl")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    table.write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(table.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        table.write_atomically(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Column("a", "a", "percentage"), "'percentage' is none of text, number"),
        (lambda: Column.number("a", "a", format=".1q"), "no format of a number"),
        (lambda: Column.number("a", "a").show("many"), "shows numbers, given 'many'"),
        (lambda: Column.accuracy("a", "a").show("many"), "shows an interval"),
        (lambda: Table([Column.text("a", "a")] * 2, []), "must differ"),
        (lambda: Table(COLUMNS, [("a", 1)]), "mapping or a dataclass, given tuple"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_an_empty_table_is_a_table():
    assert Table(COLUMNS, []).markdown().count("\n") == 2
    assert Table(COLUMNS, []).jsonl() == ""
