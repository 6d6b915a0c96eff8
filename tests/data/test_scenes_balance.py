"""Neither text nor picture of a statement tells its label: by enumeration, by symmetry, and by trained probes."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vla_jax.data.scenes import Scene, SceneConfig, SceneObject, SceneSource, draw_scene, hard_twins, seeded
from vla_jax.data.scenes.quadruples import possible_swaps, swap
from vla_jax.data.scenes.sampling import SPLITS, same_content, split_of
from vla_jax.data.scenes.statements import BINDING_TEMPLATES, binding_statement
from vla_jax.data.scenes.vocabulary import ATTRIBUTES, RELATIONS

TRAIN, TEST = 3000, 2000
# Two-sided binomial interval of a coin over the held-out examples, at 99.9 %.
INTERVAL = 3.29 * (0.25 / TEST) ** 0.5


@pytest.mark.parametrize("attribute", ["color", "size", "texture"])
def test_true_and_false_bindings_are_the_same_sentences(attribute):
    values, shapes = (itertools.permutations(range(len(ATTRIBUTES[name])), 2) for name in (attribute, "shape"))
    sentences = {0: Counter(), 1: Counter()}
    for (v1, v2), (s1, s2) in itertools.product(values, shapes):
        for label, template in itertools.product((0, 1), BINDING_TEMPLATES):
            sentences[label][binding_statement(attribute, ((v1, s1), (v2, s2)), label, template)] += 1
    assert sentences[0] == sentences[1]
    assert len(set(sentences[1].values())) == 1  # and all are equally likely


@pytest.mark.parametrize("greatest", [2, 3, 4])
def test_a_false_count_is_distributed_as_a_true_one(greatest):
    numbers = range(1, greatest + 1)
    true = {n: Fraction(1, greatest) for n in numbers}
    false = {m: sum(true[n] * Fraction(1, greatest - 1) for n in numbers if n != m) for m in numbers}
    assert true == false


@pytest.fixture(scope="module", params=["binding", "relation", "count"])
def statements(request):
    """Texts, pictures and labels of training and test examples of one kind."""
    config = SceneConfig(seed=11, statement_kinds=(request.param,), max_objects=4)
    data = {}
    for split, length in (("train", TRAIN), ("test", TEST)):
        source = SceneSource(split, "statements", config, length)
        examples = [source[index] for index in range(length)]
        labels = np.array([example["label"] for example in examples])
        data[split] = [e["text"] for e in examples], np.stack([e["image"] for e in examples]), labels
    return data


def accuracy(train, train_labels, test, test_labels):
    model = LogisticRegression(C=0.1, solver="newton-cholesky" if isinstance(train, np.ndarray) else "liblinear").fit(
        train, train_labels
    )
    return model.score(test, test_labels)


def words(texts):
    vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", binary=True).fit(texts["train"])
    return vectorizer.transform(texts["train"]), vectorizer.transform(texts["test"])


def picture_features(pictures):
    """Means of 16 x 16 blocks, and a histogram of 64 colours."""
    blocks = pictures.reshape(len(pictures), 4, 16, 4, 16, 3).mean((2, 4)).reshape(len(pictures), -1)
    bins = (pictures.astype(np.int32) // 64) @ np.array([16, 4, 1])
    histogram = np.stack([np.bincount(row.ravel(), minlength=64) for row in bins])
    return np.concatenate([blocks, histogram], 1)


def test_words_alone_stay_at_chance(statements):
    train, test = words({split: values[0] for split, values in statements.items()})
    assert abs(accuracy(train, statements["train"][2], test, statements["test"][2]) - 0.5) < INTERVAL


def test_the_picture_alone_stays_at_chance(statements):
    features = [picture_features(statements[split][1]) for split in ("train", "test")]
    scaler = StandardScaler().fit(features[0])
    train, test = map(scaler.transform, features)
    assert abs(accuracy(train, statements["train"][2], test, statements["test"][2]) - 0.5) < INTERVAL


def test_labels_are_a_fair_coin(statements):
    for _, _, labels in statements.values():
        assert abs(labels.mean() - 0.5) < 3.29 * (0.25 / len(labels)) ** 0.5


def test_the_probe_finds_a_leak(statements):
    # The same probe, where every third true statement is the same sentence.
    texts = {}
    for split, (said, _, labels) in statements.items():
        texts[split] = [
            "a teal star" if label and not index % 3 else text
            for index, (text, label) in enumerate(zip(said, labels, strict=True))
        ]
    train, test = words(texts)
    assert accuracy(train, statements["train"][2], test, statements["test"][2]) > 0.5 + INTERVAL


@pytest.mark.parametrize("split", SPLITS)
def test_swaps_never_leave_a_split(split):
    # With this the distribution of scenes within a split is exactly symmetric under swaps.
    config = SceneConfig(min_objects=2)
    for index in range(150):
        rng = seeded("swap", index)
        scene = draw_scene(rng, config, split)
        for what, pairs in possible_swaps(scene).items():
            for first, second in pairs:
                twin = swap(scene, first, second, what)
                assert split_of(twin) == split
                assert not same_content(scene, twin)
                assert same_content(scene, swap(twin, first, second, what))
        twin = hard_twins(scene, rng)
        assert (twin is None) == (not possible_swaps(scene))


def test_what_cannot_be_swapped_has_no_twin():
    alike = [SceneObject(0, 0, 0, 0, cell, 0.5, 0.5, 0.2) for cell in (0, 8)]
    assert hard_twins(Scene((alike[0],)), seeded("twin")) is None
    assert hard_twins(Scene(tuple(alike)), seeded("twin")) is None


def test_relations_come_in_every_direction_equally_often():
    source = SceneSource("test", "statements", SceneConfig(seed=4, statement_kinds=("relation",)))
    counts = Counter()
    for index in range(2000):
        example = source[index]
        said = next(name for name in RELATIONS if f" {name} " in example["text"])
        counts[said, example["label"]] += 1
    # Eight cells of 250; four standard deviations are 59.
    assert len(counts) == 8
    assert all(abs(count - 250) < 60 for count in counts.values())
