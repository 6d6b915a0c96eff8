"""What the page makes of a work directory's files."""

from __future__ import annotations

import pytest
from page_folders import COLUMNS, rows, write_run, write_work_directory

from vla_jax.errors import UserError
from vla_jax.reporting.page.tables import read_tables
from vla_jax.reporting.page.workdir import flattened, read_work_directory
from vla_jax.reporting.table import MISSING, Column, Table


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return read_work_directory(write_work_directory(tmp_path_factory.mktemp("work")))


def test_everything_that_is_there_is_found(work):
    assert work.title == "Some methods on tiny"
    assert work.groups == ("statements", "easy_vqa")  # as the configuration names them
    assert [path.name for path in work.figures] == ["results.png"]
    assert work.versions["jax"] == "0.10.2"
    runs = work.of_group("statements")
    assert list(runs) == ["plain", "lora", "full"]  # as the table has them
    assert [(run.rate, run.seed, run.tested, run.last_step) for run in runs["plain"]] == [
        ("0.1", 0, True, 4),
        ("0.1", 1, True, 4),
        ("0.2", 0, False, 1),
    ]
    assert work.called("lora") == "LoRA"
    assert work.called("dora") == "DoRA"  # a method of the catalogue
    assert work.called("best_early") == "best early"


def test_what_is_unfinished_is_said_and_nothing_else(work):
    assert work.missing() == [
        "LoRA (statements) has been tested with 1 of 2 seeds.",
        "full (statements) has not been tested; it was last seen at step 2 of 4.",
    ]


def test_a_run_that_has_just_begun_lacks_the_rest(tmp_path):
    write_run(tmp_path / "runs/lora/learning_rate_0.1/seed_0", [1.0], tested=False)
    work = read_work_directory(tmp_path)
    assert work.missing() == [
        "config.json is missing.",
        "versions.json is missing.",
        "There is no result table yet.",
        "LoRA has not been tested; it was last seen at step 1 of 4.",
    ]
    assert (work.groups, work.title) == (("",), tmp_path.name)


def test_runs_that_belong_to_no_comparison_are_found_and_owe_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_run(tmp_path / "stages/words", [1.0], tested=False)
    write_run(tmp_path / "runs", [1.0], tested=False)
    work = read_work_directory(tmp_path)
    assert [(run.group, run.variant, run.rate) for run in work.runs] == [("", "runs", ""), ("stages", "words", "")]
    assert not any("words" in sentence or "runs" in sentence for sentence in work.missing())


def test_settings_are_shown_by_their_path():
    config = {"budget": {"steps": 4, "optimizer": {"b1": 0.9}}, "tasks": ["a", "b"], "none": [], "mesh": None}
    assert list(flattened(config)) == [
        ("budget.steps", "4"),
        ("budget.optimizer.b1", "0.9"),
        ("tasks", "a, b"),
        ("none", "none"),
        ("mesh", "None"),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no work directory: it has none of config.json, results.jsonl, runs; give the --workdir"),
        ({"config.json": "{"}, "config.json is damaged: .*; mend or delete it"),
        ({"config.json": "{}", "versions.json": b"\xff"}, "versions.json is damaged"),
        ({"results.jsonl": "{}\nnonsense\n"}, "results.jsonl, line 2: not JSON"),
        ({"config.json": "{}", "runs/a/metrics.jsonl": 'no\n{"step": 1}\n'}, "metrics.jsonl is damaged"),
    ],
)
def test_other_folders_and_damaged_files_are_refused(tmp_path, files, message):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_work_directory(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*none; give the --workdir of an experiment"):
        read_work_directory(tmp_path / "none")


def test_tables_show_what_markdown_shows_with_the_numbers_of_csv(work):
    (table,) = work.tables
    assert table.headings == ("variant", "trained", "easy-VQA (%)", "against plain (points)")
    assert table.numeric == (False, True, True, True)
    plain, lora, full = table.rows
    assert plain[0].text == "plain | <b>one</b>"
    assert (lora[1].text, lora[1].value, lora[1].low) == ("29,185", 29_185, None)
    assert lora[2].text == "93.3 ± 1.2"
    assert (lora[2].value, lora[2].low, lora[2].high) == pytest.approx((93.3, 92.1, 94.4))
    assert (lora[3].text, lora[3].bold) == ("+8.1 [6.8, 9.3]", True)
    assert full[3].low == pytest.approx(-8.8)
    assert (full[2].text, full[2].value) == (MISSING, None)
    assert table.measures == [2, 3]


def test_without_the_csv_of_the_same_table_numbers_are_those_shown(tmp_path):
    Table(COLUMNS, rows(), title="a").write(tmp_path, "results")
    (tmp_path / "results.csv").write_text("variant,trained\nx,1\n")
    (tmp_path / "notes.md").write_text("no table, but a line with | in it\n")
    (table,) = read_tables(tmp_path)
    assert [row[3].value for row in table.rows] == [None, 8.1, -7.0]
    assert [row[1].value for row in table.rows] == [513, 29_185, 1_498_754]
    assert table.measures == []


def test_results_stand_first_and_rows_of_one_name_are_told_apart(tmp_path):
    columns = [Column.text("swap", "swapped"), Column.number("objects", "objects", format=",d")]
    several = [{"swap": "color", "objects": 2}, {"swap": "color", "objects": 3}, {"swap": "size", "objects": 2}]
    Table(columns, several).write(tmp_path, "difficulty")
    Table(COLUMNS, rows()).write(tmp_path, "results")
    results, difficulty = read_tables(tmp_path)
    assert (results.stem, difficulty.stem, difficulty.title) == ("results", "difficulty", "")
    assert [difficulty.label(row) for row in difficulty.rows] == ["color, 2", "color, 3", "size"]


def test_a_line_that_was_cut_off_is_no_row(tmp_path):
    Table(COLUMNS, rows()).write(tmp_path, "results")
    path = tmp_path / "results.md"
    path.write_text(path.read_text().rstrip("\n")[:-30])
    (table,) = read_tables(tmp_path)
    assert [row[2].value for row in table.rows] == [61.8, 93.3]
