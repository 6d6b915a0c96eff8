"""Retrieval by features against counting by hand and scikit-learn, exact where scores are nearly or wholly equal."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from vla_jax.errors import UserError
from vla_jax.evaluation import retrieval
from vla_jax.evaluation.exact_ranks import count_before
from vla_jax.evaluation.statistics import wilson

BLOCK = (7, 11)


def drawn(images=29, texts=67, width=16, seed=0):
    """Features, and which image each text belongs to: every image has one to several."""
    generator = np.random.default_rng(seed)
    owner = generator.permutation(np.concatenate([np.arange(images), generator.integers(0, images, texts - images)]))
    of_images = generator.standard_normal((images, width)).astype(np.float32)
    noise = 2 * generator.standard_normal((texts, width))
    return of_images, (of_images[owner] + noise).astype(np.float32), owner


def by_hand(images, texts, owner):
    """Wrong candidates before each right one, pair by pair, in float64."""
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    equal = 1e-12 * np.abs(scores).max()
    of_texts = [
        sum(scores[i, t] >= scores[own, t] - equal for i in range(len(images)) if i != own)
        for t, own in enumerate(owner)
    ]
    of_images = []
    for i in range(len(images)):
        mine = sorted((t for t in range(len(texts)) if owner[t] == i), key=lambda t, i=i: -scores[i, t])
        others = [t for t in range(len(texts)) if owner[t] != i]
        of_images.append([sum(scores[i, t] >= scores[i, own] - equal for t in others) for own in mine])
    return of_images, of_texts


def assert_counted(images, texts, owner):
    found = count_before(images, texts, owner, block=BLOCK)
    of_images, of_texts = by_hand(images, texts, owner)
    np.testing.assert_array_equal(found.text_to_image, of_texts)
    for row, expected in zip(found.image_to_text, of_images, strict=True):
        assert row[: len(expected)].tolist() == expected
        assert (row[len(expected) :] == -1).all()


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_a_loop(seed):
    assert_counted(*drawn(seed=seed))


def test_equal_features_tie_exactly_whatever_block_they_are_in():
    images, texts, owner = drawn(width=33)
    texts[5::9] = texts[5]
    images[3::4] = images[3]
    assert_counted(images, texts, owner)


def test_scores_that_float32_cannot_tell_apart_are_told_apart():
    """Texts whose scores differ by 1e-9 of their size: float32 products would put them in any order."""
    generator = np.random.default_rng(4)
    width, count = 64, 24
    image = generator.choice([-1.0, 1.0], width)
    texts = np.tile(image, (count, 1)).astype(np.float32) * 1000
    # A small feature beside the large ones; what it adds vanishes in a float32 sum.
    features = np.concatenate([np.tile(image, (count, 1)), np.full((count, 1), 1.0)], axis=1).astype(np.float32)
    texts = np.concatenate([texts, (1e-4 * generator.permutation(count))[:, None]], axis=1).astype(np.float32)
    found = count_before(features, texts, block=BLOCK)
    order = np.argsort(np.argsort(-texts[:, -1]))
    np.testing.assert_array_equal(found.image_to_text[:, 0], order)
    float32 = (features @ texts.T).astype(np.float32)
    assert len(np.unique(float32[0])) < count  # which a float32 product does not see


def test_a_constant_model_finds_nothing():
    owner = np.repeat(np.arange(20), 3)
    found = retrieval.evaluate(np.ones((20, 8)), np.ones((60, 8)), owner, at=(1, 5, 10))
    assert [found.image_to_text.recall[k].value for k in (1, 5, 10)] == [0, 0, 0]
    assert found.text_to_image.median_rank == 20
    assert found.image_to_text.median_rank == 58  # all texts of other pictures come first


def test_recall_median_and_precision_are_those_of_loops_and_scikit_learn():
    images, texts, owner = drawn(images=40, texts=200)
    found = retrieval.evaluate(images, texts, owner, at=(1, 5, 10))
    of_images, of_texts = by_hand(images, texts, owner)
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    for k in (1, 5, 10):
        assert found.image_to_text.recall[k] == wilson(sum(row[0] < k for row in of_images), 40)
        assert found.text_to_image.recall[k].value == pytest.approx(np.mean([before < k for before in of_texts]))
    assert found.image_to_text.median_rank == np.median([row[0] + 1 for row in of_images])
    assert found.text_to_image.median_rank == np.median([before + 1 for before in of_texts])
    precision = [average_precision_score(owner == i, scores[i]) for i in range(40)]
    assert found.image_to_text.mean_average_precision == pytest.approx(np.mean(precision))
    reciprocal = [average_precision_score(np.arange(40) == owner[t], scores[:, t]) for t in range(200)]
    assert found.text_to_image.mean_average_precision == pytest.approx(np.mean(reciprocal))
    assert (found.image_to_text.queries, found.image_to_text.candidates) == (40, 200)
    assert (found.text_to_image.queries, found.text_to_image.candidates) == (200, 40)


def test_five_captions_each_by_hand():
    """One picture's captions stand at ranks 1, 3 and 4, as in the order own, other, own, own, other."""
    images = np.array([[1.0, 0], [0, 1.0]])
    own, other = [[9, 1], [7, 1], [6, 1]], [[8, 5], [5, 4]]
    found = retrieval.evaluate(images, np.array(own + other), np.array([0, 0, 0, 1, 1]), at=(1, 2))
    assert found.image_to_text.recall[1].value == 1
    assert found.image_to_text.mean_average_precision == pytest.approx(((1 + 2 / 3 + 3 / 4) / 3 + 1) / 2)


def test_pairs_need_no_owner_and_agree_with_the_square():
    images, texts = (np.random.default_rng(s).standard_normal((23, 8)).astype(np.float32) for s in (0, 1))
    texts += images
    found, square = retrieval.evaluate(images, texts), retrieval.recall(images @ texts.T)
    assert found.image_to_text.recall == square.image_to_text
    assert {k: i.value for k, i in found.text_to_image.recall.items()} == {
        k: i.value for k, i in square.text_to_image.items()
    }


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (np.eye(3), np.eye(3)[:2], None, "3 images and 2 texts do not go in pairs"),
        (np.eye(3), np.eye(3), [0, 1, 1], "1 images have no text, the first of them image 2"),
        (np.eye(3), np.eye(3), [0, 1, 3], "text 2 belongs to image 3; there are images 0 to 2"),
        (np.eye(3), np.eye(3), [0, 1], "for each of 3 texts"),
        (np.eye(3), np.full((3, 3), np.nan), None, "features of texts must be finite; row 0"),
        (np.eye(3), np.ones((3, 2)), None, "width 3 and texts of 2"),
        (np.zeros((0, 3)), np.zeros((0, 3)), None, "at least one"),
    ],
)
def test_features_that_cannot_be_ranked_are_refused(images, texts, owner, message):
    with pytest.raises(UserError, match=message):
        retrieval.evaluate(images, texts, None if owner is None else np.array(owner), at=(1,))


def test_a_k_beyond_the_candidates_is_refused():
    with pytest.raises(UserError, match="recall at 5 of 3"):
        retrieval.evaluate(np.eye(3), np.eye(3), at=(5,))
