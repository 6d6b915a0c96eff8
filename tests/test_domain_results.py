"""Rows of accuracies, label ratios and forgetting from outcomes drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vla_jax.domain_results import DomainResults, Tried
from vla_jax.evaluation.forgetting import MEASURES, Kept
from vla_jax.evaluation.statistics import Interval

TRIED = Tried("woods", "the woods", 4, (1, 4, 16), Interval(0.3, 0.2, 0.4))
METHODS = {"lora": "LoRA", "full": "full fine-tuning"}


def correct(share: float) -> np.ndarray:
    """Two seeds of a hundred examples."""
    right = np.arange(100) < 100 * share
    return np.stack([right, right[::-1]])


@pytest.fixture
def results():
    found = DomainResults(METHODS)
    for labels, share in zip(TRIED.labels, (0.4, 0.6, 0.8), strict=True):
        found.add(TRIED, labels, "lora", correct(share), {"trained": 10, "learning_rate": 1e-3})
    return found


def test_there_is_a_row_for_each_number_of_labels_with_every_method_that_is_done(results):
    assert [(row["domain"], row["labels"], row["chance"]) for row in results.rows] == [
        ("woods", labels, 0.25) for labels in TRIED.labels
    ]
    assert [row["lora"].value for row in results.rows] == pytest.approx([0.4, 0.6, 0.8])
    assert results.rows[1]["lora_by_seed"] == pytest.approx([0.6, 0.6])
    assert (results.rows[0]["lora_trained"], results.rows[0]["zero_shot"].value) == (10, 0.3)
    assert "lora_difference" not in results.rows[0]
    assert results.ratios == []

    results.add(TRIED, 1, "full", correct(0.3), {"trained": 99})
    assert results.rows[0]["lora_difference"].value == pytest.approx(0.1)
    assert "lora_difference" not in results.rows[1]
    assert results.ratios == []  # the curve of what they are compared with is not whole


def test_ratios_are_those_of_whole_curves_most_labels_first(results):
    for labels, share in zip(TRIED.labels, (0.3, 0.4, 0.7), strict=True):
        results.add(TRIED, labels, "full", correct(share), {})
    assert [row["found"].reference_labels for row in results.ratios] == [16, 4, 1]
    assert {(row["name"], row["variant"], row["trained"]) for row in results.ratios} == {("lora", "LoRA", 10)}
    # 0.7 lies halfway between 4 and 16 labels of LoRA.
    assert results.ratios[0]["found"].labels == pytest.approx(8)
    assert results.ratios[0]["found"].ratio == pytest.approx(2)


def test_a_second_domain_leaves_the_first_as_it_is(results):
    for labels in TRIED.labels:
        results.add(TRIED, labels, "full", correct(0.3), {})
    before = list(results.ratios)
    sea = Tried("sea", "the sea", 2, (1, 2))
    for method in METHODS:
        for labels in sea.labels:
            results.add(sea, labels, method, correct(0.5), {})
    assert results.ratios[:3] == before
    assert [row["domain"] for row in results.ratios] == ["woods"] * 3 + ["sea"] * 2
    assert [row["labels"] for row in results.rows] == [1, 4, 16, 1, 2]


def test_what_is_left_is_told_with_adapters_and_without(results):
    def right(share):
        return {name: np.arange(50) < 50 * share for name in MEASURES}

    before = Kept(right(1.0))
    results.forget(TRIED, "lora", before, [Kept(right(0.5), right(1.0), exact=True)] * 2)
    results.forget(TRIED, "full", before, [Kept(right(0.4))] * 2)
    assert [(row["variant"], row["state"]) for row in results.forgotten] == [
        ("backbone", None),
        ("LoRA, after the woods", "on"),
        ("LoRA, after the woods", "off"),
        ("full fine-tuning, after the woods", None),
    ]
    backbone, on, off, full = results.forgotten
    for name in MEASURES:
        assert (backbone[name].value, on[name].value, off[name].value, full[name].value) == (1, 0.5, 1, 0.4)
        assert (on[f"{name}_change"].value, off[f"{name}_change"].value) == (-0.5, 0)
    assert [row["after"] for row in results.forgotten] == ["untouched", *["the woods"] * 3]
    assert off["features"] == "as before, bitwise"
    # One seed whose weights moved is enough.
    results.forget(TRIED, "lora", before, [Kept(right(0.5), right(1.0), exact) for exact in (True, False)])
    assert results.forgotten[-1]["features"] == "changed"
