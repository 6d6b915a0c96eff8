"""One scene and all that is said of it: every text against the oracle, and statements that nothing gives away alone."""

from __future__ import annotations

import numpy as np
import pytest
from scenes_oracle import answer_to, matches, true_of
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vla_jax.data.scenes import SceneConfig, SceneSource
from vla_jax.data.scenes.vocabulary import ANSWERS, COLORS, MAX_WORDS, SHAPES, STATEMENT_KINDS, WORDS, split_words
from vla_jax.errors import UserError

LENGTH = 400


@pytest.fixture(scope="module", params=["color", "size", "texture"])
def drawn(request):
    source = SceneSource("test", "complete", SceneConfig(seed=6, binding_attributes=(request.param,)))
    return [source[index] for index in range(LENGTH)]


def test_captions_differ_and_are_true(drawn):
    for example in drawn:
        objects = example["scene"]["objects"]
        assert len(set(example["captions"])) == len(example["captions"]) == 5
        assert all(true_of(text, objects) for text in example["captions"]), example


def test_every_kind_of_statement_is_said_truly_and_falsely(drawn):
    orders = set()
    for example in drawn:
        told = list(zip(example["statement_kinds"], example["statement_labels"], strict=True))
        assert sorted(told) == sorted((kind, label) for kind in STATEMENT_KINDS for label in (0, 1))
        orders.add(tuple(example["statement_labels"]))
        for text, label in zip(example["statements"], example["statement_labels"], strict=True):
            assert true_of(text, example["scene"]["objects"]) == bool(label), (text, example)
    assert len(orders) == 8  # which comes first says nothing


def test_every_kind_of_question_has_one_answer(drawn):
    for example in drawn:
        assert example["question_kinds"] == list(SceneConfig().question_kinds)
        for question, answer, number in zip(
            example["questions"], example["answers"], example["answer_ids"], strict=True
        ):
            assert answer_to(question, example["scene"]["objects"]) == {answer}, (question, example)
            assert ANSWERS[number] == answer


def test_every_object_has_a_phrase_and_its_box(drawn):
    for example in drawn:
        objects = example["scene"]["objects"]
        assert [thing["box"] for thing in objects] == example["boxes"]
        for phrase, box in zip(example["phrases"], example["boxes"], strict=True):
            assert [thing["box"] for thing in objects if matches(phrase, thing, 64)] == [box], (phrase, example)


def test_the_class_is_that_of_the_largest_object(drawn):
    def extent(thing):
        x0, y0, x1, y1 = thing["box"]
        return max(x1 - x0, y1 - y0)

    for example in drawn:
        objects = example["scene"]["objects"]
        most = max(map(extent, objects))
        largest = [
            (thing["shape"], thing["color"]) for thing in objects if extent(thing) >= most - 1
        ]  # pixels' rounding
        assert (example["class_name"], example["color_name"]) in largest
        assert (SHAPES[example["label"]], COLORS[example["color_label"]]) == (
            example["class_name"],
            example["color_name"],
        )


def test_the_quadruple_is_true_crosswise_and_of_the_same_words(drawn):
    tags = set()
    for example in drawn:
        first, second = example["scene"]["objects"], example["scene_1"]["objects"]
        one, other = example["caption_0"], example["caption_1"]
        assert sorted(split_words(one)) == sorted(split_words(other))
        assert (true_of(one, first), true_of(one, second)) == (True, False), example
        assert (true_of(other, first), true_of(other, second)) == (False, True), example
        assert (example["image"] != example["image_1"]).any()
        tags.add((example["tag"], example["collapsed_tag"], example["num_main_preds"]))
    assert tags == {("Object", "Object", 1), ("Attribute", "Relation", 1), ("Relation", "Relation", 2)}


def test_the_words_are_those_of_the_vocabulary(drawn):
    for example in drawn:
        texts = [example["caption_0"], example["caption_1"]]
        texts += [text for name in ("captions", "statements", "questions", "phrases") for text in example[name]]
        assert set(split_words(" ".join(texts))) <= set(WORDS)
        assert max(len(split_words(text)) for text in texts) <= MAX_WORDS


@pytest.fixture(scope="module")
def told():
    """By split and kind: texts, features of pictures, labels; one of the two statements of each scene."""
    found = {}
    for split, length in (("train", 3000), ("test", 2000)):
        source = SceneSource(split, "complete", SceneConfig(seed=12, image_size=32))
        coin = np.random.default_rng(length).integers(0, 2, (length, len(STATEMENT_KINDS)))
        for index in range(length):
            example = source[index]
            seen = example["image"].reshape(4, 8, 4, 8, 3).mean((1, 3)).ravel()
            for place, kind in enumerate(STATEMENT_KINDS):
                chosen = 2 * place + coin[index, place]
                assert example["statement_kinds"][chosen] == kind
                row = example["statements"][chosen], seen, example["statement_labels"][chosen]
                found.setdefault((split, kind), []).append(row)
    return found


@pytest.mark.parametrize("kind", STATEMENT_KINDS)
def test_neither_words_nor_picture_tell_a_label(told, kind):
    (texts, seen, labels), (test_texts, test_seen, test_labels) = (
        zip(*told[split, kind], strict=True) for split in ("train", "test")
    )
    interval = 3.29 * (0.25 / len(test_labels)) ** 0.5
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", binary=True).fit(texts)
    words = LogisticRegression(C=0.1, solver="liblinear").fit(vectorizer.transform(texts), labels)
    assert abs(words.score(vectorizer.transform(test_texts), test_labels) - 0.5) < interval
    scaler = StandardScaler().fit(seen)
    picture = LogisticRegression(C=0.1, solver="newton-cholesky").fit(scaler.transform(seen), labels)
    assert abs(picture.score(scaler.transform(test_seen), test_labels) - 0.5) < interval


def test_fewer_objects_leave_out_what_needs_them():
    source = SceneSource("train", "complete", SceneConfig(max_objects=3))
    examples = [source[index] for index in range(60)]
    assert {example["tag"] for example in examples} == {"Object", "Attribute"}
    assert {len(example["phrases"]) for example in examples} <= {2, 3}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SceneConfig(max_objects=2), "needs 3 objects; max_objects is 2, raise it"),
        (SceneConfig(max_objects=3, quadruple_tags=("Relation",)), "max_objects of at least 4"),
        (SceneConfig(shapes=("circle",)), "needs 2 values of shape; allowed are 1"),
        (SceneConfig(shapes=("circle", "star"), quadruple_tags=("Object",)), "needs 3 values of shape; allow more"),
        (SceneConfig(colors=("red", "blue"), quadruple_tags=("Object",)), "needs 3 values of color; allow more"),
    ],
)
def test_what_leaves_too_little_is_refused(config, message):
    source = SceneSource("train", "complete", config)
    with pytest.raises(UserError, match=message):
        [source[index] for index in range(20)]
