"""Tables and figures of the adaptation to new domains, from results made by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from vla_jax.domain_results import DomainResults, Tried
from vla_jax.evaluation.forgetting import MEASURES, Kept
from vla_jax.evaluation.label_ratio import LabelRatio
from vla_jax.evaluation.statistics import Interval
from vla_jax.reporting import domain_report

METHODS = {"linear": "linear head alone", "lora": "LoRA", "full": "full fine-tuning"}
WOODS = Tried("woods", "the woods", 4, (1, 4, 16), Interval(0.3, 0.2, 0.4))
RATIO = LabelRatio(256, 0.8, 20.0, 12.8, 3.14159, 120.4, 1.0, False)


@pytest.fixture
def results():
    generator, found = np.random.default_rng(0), DomainResults(METHODS)
    for method, shares in {"linear": (0.3, 0.4, 0.5), "lora": (0.4, 0.7, 0.9), "full": (0.3, 0.5, 0.8)}.items():
        for labels, share in zip(WOODS.labels, shares, strict=True):
            found.add(WOODS, labels, method, generator.random((3, 80)) < share, {"trained": 7})
    return found


def test_the_table_has_a_row_for_each_number_of_labels_and_a_column_for_each_method(results):
    lines = domain_report.table(results.rows, METHODS, "tiny").markdown().splitlines()
    assert lines[0] == "**Accuracy on new domains, on tiny**"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == [
        "domain",
        "labels a class",
        *(f"{title} (%)" for title in METHODS.values()),
        "linear head alone, against full (points)",
        "LoRA, against full (points)",
    ]
    assert [row[:2] for row in cells[2:]] == [["the woods", str(labels)] for labels in WOODS.labels]
    assert cells[2][2].startswith(f"{100 * results.rows[0]['linear'].value:.1f} ±")


@pytest.mark.parametrize(
    ("found", "labels", "ratio"),
    [
        (RATIO, "20.0", "12.8x [3.14x, 120x]"),
        (dataclasses.replace(RATIO, low=0.0, reached=0.9), "20.0", "12.8x [not reached, 120x]"),
        (dataclasses.replace(RATIO, labels=1, ratio=256, at_least=True), "at most 1.00", "at least 256x [3.14x, 120x]"),
        (
            dataclasses.replace(RATIO, labels=np.inf, ratio=0.0, low=0.0, high=1.5, reached=0.2),
            "not reached",
            "not reached (at most 1.50x)",
        ),
        (
            dataclasses.replace(RATIO, labels=np.inf, ratio=0.0, low=0.0, high=0.0, reached=0.0),
            "not reached",
            "not reached",
        ),
    ],
)
def test_ratios_say_what_the_numbers_tried_leave_open(found, labels, ratio):
    table = domain_report.ratio_table([{"title": "the woods", "variant": "LoRA", "trained": 7, "found": found}], "tiny")
    row = table.rows[0]
    assert (row["labels_said"], row["ratio_said"].replace("\N{MULTIPLICATION SIGN}", "x")) == (labels, ratio)
    assert json.loads(table.jsonl())["labels"] == (None if np.isinf(found.labels) else found.labels)


def test_all_files_are_written_and_what_there_is_nothing_for_is_left_out(results, tmp_path):
    partial = DomainResults(METHODS)
    partial.add(WOODS, 1, "linear", np.ones((2, 4), bool), {})
    domain_report.write(partial, "tiny", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "results.csv", "results.jsonl", "curves.png"}

    right = {name: np.arange(30) % 3 > 0 for name in MEASURES}
    results.forget(WOODS, "lora", Kept(right), [Kept(right, right, exact=True)] * 3)
    domain_report.write(results, "tiny", tmp_path)
    names = {f"{stem}.{suffix}" for stem in ("results", "ratios", "forgetting") for suffix in ("md", "csv", "jsonl")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"curves.png", "forgetting.png"}
    forgotten = (tmp_path / "forgetting.md").read_text()
    assert "as before, bitwise" in forgotten
    assert forgotten.count("LoRA, after the woods") == 2
    rows = [json.loads(line) for line in (tmp_path / "ratios.jsonl").read_text().splitlines()]
    assert [(row["name"], row["reference_labels"]) for row in rows] == [
        (name, labels) for name in ("linear", "lora") for labels in (16, 4, 1)
    ]
