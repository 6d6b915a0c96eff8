"""The accuracy of answers against what the authors' script prints, and against its definition written as a loop."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vla_jax.data.answers import normalise, without_punctuation
from vla_jax.errors import UserError
from vla_jax.evaluation import vqa


# Inputs and outputs of the published script, run once.
@pytest.mark.parametrize(
    ("answer", "without_marks", "normal"),
    [
        ("A T-shirt", "A T shirt", "t shirt"),
        ("two, three", "two three", "2 3"),
        ("1,000 people", "1000 people", "1000 people"),
        ("yes,", "yes ", "yes"),
        ("3.5", "3.5", "3.5"),
        ("Mr. Smith", "Mr Smith", "mr smith"),
        ("dont know", "dont know", "don't know"),
        ("none", "none", "0"),
        ("the U.S.A.", "the USA", "usa"),
        ("rock/paper", "rock paper", "rock paper"),
        ("It's 5:30", "It's 5:30", "it's 5:30"),
        ("somebody'd", "somebody'd", "somebodyd"),
        ("twas", "twas", "'twas"),
        ("black & white", "black & white", "black & white"),
        ("(a)", " a ", ""),
        (".5", ".5", ".5"),
        ("he dve", "he dve", "he dve"),
        ("couldnt've", "couldnt've", "couldn't've"),
        ("ten\tdogs\n", None, "10 dogs"),
    ],
)
def test_normal_forms_are_those_of_the_published_script(answer, without_marks, normal):
    assert normalise(answer) == normal
    if without_marks is not None:
        assert without_punctuation(answer) == without_marks


def by_definition(prediction, answers):
    """Leaves out each annotator in turn."""
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    scores = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        scores.append(min(1, sum(other == prediction for other in others) / 3))
    return sum(scores) / len(scores)


def test_accuracy_is_the_mean_over_annotators_left_out():
    generator = random.Random(0)
    pool = ["yes", "no", "Yes", "t-shirt", "t shirt", "2", "two", "the dog", "dog", "none", "0"]
    for _ in range(500):
        answers = generator.choices(generator.sample(pool, generator.randint(1, 4)), k=10)
        prediction = generator.choice(pool)
        assert vqa.accuracy(prediction, answers) == pytest.approx(by_definition(prediction, answers), abs=1e-12)


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_known_values_of_ten_annotators(agree, expected):
    answers = ["red"] * agree + [f"other {n}" for n in range(10 - agree)]
    assert vqa.accuracy("red", answers) == pytest.approx(expected)


def test_where_all_agree_the_script_compares_as_is():
    assert vqa.accuracy("T-shirt", ["t-shirt"] * 10) == 0
    assert vqa.accuracy(" t-shirt\n", ["t-shirt"] * 10) == 1
    assert vqa.accuracy("T-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1


def test_one_annotator_is_right_or_wrong():
    assert vqa.accuracy("The Dog", [b"dog"]) == 1
    assert vqa.accuracy("cat", ["dog"]) == 0


def test_means_are_by_kind():
    found = vqa.evaluate(
        ["yes", "2", "cat"],
        [["yes"] * 10, ["2"] * 3 + ["3"] * 7, ["dog"] * 10],
        ["is the", b"how many", "is the"],
        ["yes/no", "number", "other"],
    )
    assert found.overall == pytest.approx((1 + 0.9 + 0) / 3)
    assert found.by_question == {"is the": 0.5, "how many": pytest.approx(0.9)}
    assert found.by_answer == {"yes/no": 1, "number": pytest.approx(0.9), "other": 0}
    assert found.count == {"is the": 2, "how many": 1, "yes/no": 1, "number": 1, "other": 1, "overall": 3}
    np.testing.assert_allclose(found.each, [1, 0.9, 0])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="1 of 2 questions have no answers, the first at place 1"):
        vqa.evaluate(["a", "b"], [["a"], []])
    with pytest.raises(UserError, match="'question_kinds': 1"):
        vqa.evaluate(["a", "b"], [["a"], ["b"]], ["what"])
    with pytest.raises(UserError, match="there must be some"):
        vqa.evaluate([], [])
    with pytest.raises(UserError, match="no answers"):
        vqa.accuracy("a", [])
