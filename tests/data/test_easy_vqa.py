"""easy-VQA: the published counts, kinds of questions, and a validation split that shares no picture."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vla_jax.data.builders.easy_vqa import QUESTION_KINDS, question_kind
from vla_jax.data.sources import load_source, make_builder
from vla_jax.errors import UserError

easy_vqa = pytest.importorskip("easy_vqa")

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The examples of each split as the builder generates them, before they are written."""
    builder = make_builder("easy_vqa", tmp_path_factory.mktemp("unbuilt"))
    return {name: [value for _, value in rows] for name, rows in builder._split_generators(None).items()}


def test_counts_are_the_published_ones(generated):
    assert len(generated["train"]) + len(generated["validation"]) == 38_575
    assert len(generated["test"]) == 9_673
    answers = {row["answer"] for rows in generated.values() for row in rows}
    assert len(answers) == 13
    # Counts of yes/no questions from the package's own description.
    yes_no = {name: sum(row["answer"] in ("yes", "no") for row in rows) for name, rows in generated.items()}
    assert yes_no["train"] + yes_no["validation"] == 28_407
    assert yes_no["test"] == 7_136


def test_no_picture_is_in_two_splits(generated):
    pictures = {name: {row["image"] for row in rows} for name, rows in generated.items()}
    assert {name: len(found) for name, found in pictures.items()} == {"train": 3600, "validation": 400, "test": 1000}
    assert not pictures["train"] & pictures["validation"]
    assert not (pictures["train"] | pictures["validation"]) & pictures["test"]


def test_validation_answers_are_spread_as_those_of_training(generated):
    shares = []
    for name in ("train", "validation"):
        counts = Counter(row["answer"] for row in generated[name])
        shares.append({answer: count / len(generated[name]) for answer, count in counts.items()})
    assert shares[0].keys() == shares[1].keys()
    for answer, share in shares[0].items():
        deviation = (share * (1 - share) / len(generated["validation"])) ** 0.5
        assert abs(shares[1][answer] - share) < 4 * deviation


def test_kinds_agree_with_the_answers(generated):
    # The kind is read from the question alone; each kind's answers are an independent check of it.
    colors = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
    expected = {"shape": {"circle", "rectangle", "triangle"}, "color": colors}
    found = {kind: set() for kind in QUESTION_KINDS}
    for rows in generated.values():
        for row in rows:
            found[row["question_kind"]].add(row["answer"])
            if row["question_kind"].startswith("is_"):
                # Questions without "what" name a colour or a shape, never both.
                named = set(re.findall(r"\w+", row["question"])) & (colors | expected["shape"])
                assert len(named) == 1
                assert named <= (colors if row["question_kind"].endswith("color") else expected["shape"])
    assert found == {kind: expected.get(kind, {"yes", "no"}) for kind in QUESTION_KINDS}


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what is the blue shape?", "shape"),
        ("what shape does the image contain?", "shape"),
        ("what is the color of the shape?", "color"),
        ("what color is the circle?", "color"),
        ("is a teal shape present?", "is_color"),
        ("does the image contain a rectangle?", "is_shape"),
        ("does the image not contain a gray shape?", "is_not_color"),
        ("is no circle present?", "is_not_shape"),
    ],
)
def test_kinds_of_published_wordings(question, kind):
    assert question_kind(question) == kind


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(UserError, match="pip install easy-vqa"):
        load_source("easy_vqa", "train", tmp_path)


@pytest.mark.slow
def test_the_built_data_set_is_the_package(generated, tmp_path):
    sources = {name: load_source("easy_vqa", name, tmp_path) for name in SPLITS}
    assert {name: len(source) for name, source in sources.items()} == {n: len(rows) for n, rows in generated.items()}
    info = make_builder("easy_vqa", tmp_path).info
    assert info.features["answer_id"].names == easy_vqa.get_answers()
    paths = easy_vqa.get_test_image_paths()
    questions = Counter(zip(*easy_vqa.get_test_questions(), strict=True))
    for index in range(0, len(sources["test"]), 97):
        row = sources["test"][index]
        assert questions[(row["question"].decode(), row["answer"].decode(), int(row["image_id"]))] > 0
        assert info.features["answer_id"].names[row["answer_id"]] == row["answer"].decode()
        kind = info.features["question_kind"].names[row["question_kind"]]
        assert kind == question_kind(row["question"].decode())
        decoded = Image.open(io.BytesIO(row["image"]))
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(Image.open(paths[int(row["image_id"])])))
