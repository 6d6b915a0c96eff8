"""The vocabulary of answers, and what rows carry of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vla_jax.data.answers import AnswerCounts, AnswerVocabulary
from vla_jax.data.candidate_texts import CandidateTexts
from vla_jax.errors import UserError

QUESTIONS = [["Two"] * 6 + ["3"] * 4, ["2"] * 10, ["a cat"] * 10, ["cat"] * 5 + ["the dog"] * 5, ["red"] * 10]
VOCABULARY = AnswerVocabulary(("2", "cat", "t shirt"))


def test_a_vocabulary_has_the_answers_of_enough_questions():
    assert AnswerVocabulary.build(QUESTIONS, least=2).answers == ("2", "cat")
    assert AnswerVocabulary.build(QUESTIONS, least=1).answers == ("2", "cat", "red")


def test_any_form_of_an_answer_has_its_place():
    assert [VOCABULARY.place(answer) for answer in ("two", "The cat", "T-shirt", "dog")] == [0, 1, 2, -1]
    assert len(VOCABULARY) == 3


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
    vocabulary = AnswerVocabulary(("2", "café"))
    vocabulary.save(tmp_path / "answers.json")
    assert AnswerVocabulary.load(tmp_path / "answers.json") == vocabulary


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnswerVocabulary.build(QUESTIONS, least=9), "0 of 3 answers are those of at least 9"),
        (lambda: AnswerVocabulary.build([["a"], []]), "question 1 has no answers"),
        (lambda: AnswerVocabulary(("cat", "Cat")), "normal form 'cat'"),
        (lambda: AnswerVocabulary(("cat", "cat")), "1 answers twice, such as 'cat'"),
        (lambda: AnswerVocabulary(("cat",)), "at least 2 answers, got 1"),
    ],
)
def test_vocabularies_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_rows_count_annotators():
    row = AnswerCounts(VOCABULARY)({"answers": [b"cat", "a cat", "2", "dog", "dog"]}, (), None)
    counted = Counter(dict(zip(row["answer_ids"].tolist(), row["answer_counts"].tolist(), strict=True)))
    assert row["answer_ids"].shape == row["answer_counts"].shape == (10,)
    assert {1: 2, 0: 1}.items() <= counted.items()
    assert row["answer_counts"].sum() == 5
    np.testing.assert_array_equal(row["answer_counts"][row["answer_ids"] == -1][:1], [2])  # the dogs


def test_a_single_answer_need_not_be_a_list():
    row = AnswerCounts(VOCABULARY, places=1, key="answer")({"answer": b"two"}, (), None)
    assert (row["answer_ids"].tolist(), row["answer_counts"].tolist()) == ([0], [1])


def test_too_many_or_no_answers_are_refused():
    with pytest.raises(UserError, match="2 different answers and there are 1 places"):
        AnswerCounts(VOCABULARY, places=1)({"answers": ["a cat", "dog"]}, (), None)
    with pytest.raises(UserError, match="'answers' is empty"):
        AnswerCounts(VOCABULARY)({"answers": []}, (), None)
    with pytest.raises(UserError, match="did you mean 'answers'"):
        AnswerCounts(VOCABULARY, key="answer")({"answers": ["cat"]}, (), None)


def spelled(text):
    """A tokenizer whose tokens are the letters."""
    codes = np.frombuffer(text.encode().ljust(40)[:40], np.uint8).astype(np.int32)
    return codes, codes != ord(" ")


def read(tokens):
    return bytes(tokens.astype(np.uint8)).decode().strip()


CANDIDATES = CandidateTexts(spelled, ("cat", "dog", "bird", "fish"), "q: {question} a: {}", shown=3)
EXAMPLE = {"question": b"which pet?", "answers": ["Dog", "dog", "cat"], "image": b"not a text"}


def test_evaluation_ranks_all_candidates():
    row = CANDIDATES(EXAMPLE, (), None)
    assert [read(tokens) for tokens in row["tokens"]] == [f"q: which pet? a: {a}" for a in CANDIDATES.candidates]
    assert row["label"] == 1
    np.testing.assert_array_equal(row["candidates"], range(4))
    assert row["text_mask"].shape == (4, 40)


def test_training_shows_the_right_one_among_others_that_are_drawn():
    shown = Counter()
    for seed in range(60):
        row = CANDIDATES(EXAMPLE, (), np.random.default_rng(seed))
        assert len(set(row["candidates"].tolist())) == 3
        assert row["candidates"][row["label"]] == 1
        assert read(row["tokens"][row["label"]]).endswith("a: dog")
        shown.update(row["candidates"].tolist())
        shown["first"] += int(row["label"] == 0)
    assert min(shown[place] for place in (0, 2, 3)) > 25  # of 60 times two of three
    assert 8 < shown["first"] < 35


def test_an_answer_that_is_no_candidate_is_wrong_in_evaluation_and_refused_in_training():
    example = EXAMPLE | {"answers": ["horse"]}
    assert CANDIDATES(example, (), None)["label"] == -1
    with pytest.raises(UserError, match="unknown candidate answer 'horse'"):
        CANDIDATES(example, (), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ("cat", "the cat")}, "one normal form"),
        ({"candidates": ("cat",)}, "at least 2 candidates"),
        ({"template": "{question}"}, "no {} for the candidate"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    settings = {"tokenize": spelled, "candidates": ("cat", "dog"), "template": "{}"} | changes
    with pytest.raises(UserError, match=message):
        CandidateTexts(**settings)
