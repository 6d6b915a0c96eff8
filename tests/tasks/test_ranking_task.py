"""Ranking of texts against a loop over candidates."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BATCH, WIDTH, expected_features, head, output

from vla_jax.tasks.ranking import TextRanking

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASK, EXAMPLES, CANDIDATES = TextRanking(), BATCH // 4, 4
GIVEN = output().replace(scale=jnp.float32(3))
LABELS = jnp.array([2, -1, 0, 3], jnp.int32)


def expected(params):
    """Scores [examples, candidates], pair by pair."""
    image, text = (np.asarray(f, np.float64) for f in (GIVEN.image_features, GIVEN.text_features))
    cosines = [u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in zip(image, text, strict=True)]
    kernel, bias = (np.asarray(params["classifier"][name], np.float64) for name in ("kernel", "bias"))
    scores = 3 * np.exp(float(params["log_scale"])) * np.array(cosines)
    scores += (expected_features(GIVEN) @ kernel + bias)[:, 0]
    return scores.reshape(EXAMPLES, CANDIDATES)


PARAMS = head(4 * WIDTH, 1) | {"log_scale": jnp.float32(0.4)}


def test_scores_are_cosines_and_a_linear_map():
    np.testing.assert_allclose(TASK.logits(PARAMS, GIVEN, {"label": LABELS}), expected(PARAMS), rtol=1e-4, atol=1e-5)
    new = TASK.init(4 * WIDTH)
    np.testing.assert_allclose(TASK.logits(new, GIVEN, {"label": LABELS}), expected(new), rtol=1e-4, atol=1e-5)


def test_the_loss_leaves_out_examples_without_a_right_candidate():
    scores = expected(PARAMS)
    losses = [np.log(np.exp(scores[i]).sum()) - scores[i, LABELS[i]] for i in (0, 2, 3)]
    loss, metrics = TASK.loss(PARAMS, GIVEN, {"label": LABELS})
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    right = [scores[i].argmax() == LABELS[i] for i in (0, 2, 3)]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)
    valid = jnp.array([True, True, False, True])
    loss, _ = TASK.loss(PARAMS, GIVEN, {"label": LABELS, "valid": valid})
    np.testing.assert_allclose(loss, np.mean([losses[0], losses[2]]), rtol=1e-5)


def test_predictions_are_candidates_and_only_strictly_best_ones_are_right():
    best = expected(PARAMS).argmax(1)
    names = np.random.default_rng(0).permutation(100)[:16].reshape(4, 4).astype(np.int32)
    labels = best.astype(np.int32)
    labels[1] = -1
    labels[2] = (best[2] + 1) % 4
    found = TASK.predict(PARAMS, GIVEN, {"label": jnp.asarray(labels), "candidates": jnp.asarray(names)})
    np.testing.assert_array_equal(found["prediction"], names[np.arange(4), best])
    np.testing.assert_array_equal(found["correct"], [True, False, False, True])
    plain = TASK.predict(PARAMS, GIVEN, {"label": jnp.asarray(labels)})
    np.testing.assert_array_equal(plain["prediction"], best)


def test_a_constant_model_is_never_right():
    same = GIVEN.replace(image_features=jnp.ones((BATCH, WIDTH)), text_features=jnp.ones((BATCH, WIDTH)))
    found = TASK.predict(PARAMS, same, {"label": jnp.zeros(4, jnp.int32)})
    assert not found["correct"].any()


def test_where_annotators_disagree_any_of_their_most_frequent_answers_is_right():
    best = expected(PARAMS).argmax(1)
    candidates = np.tile(np.array([7, 3, 5, 0], np.int32), (EXAMPLES, 1))
    first, other = candidates[np.arange(4), best], candidates[np.arange(4), (best + 1) % 4]
    batch = {
        "label": jnp.asarray((best + 1) % 4, jnp.int32),
        "candidates": jnp.asarray(candidates),
        # Equally frequent; a rarer answer; rarer than an answer that is no candidate; unanimous.
        "answer_ids": jnp.asarray([[first[0], other[0]], [other[1], first[1]], [-1, first[2]], [first[3], -1]]),
        "answer_counts": jnp.asarray([[2, 2], [3, 1], [3, 1], [4, 0]]),
    }
    found = TASK.predict(PARAMS, GIVEN, batch)
    np.testing.assert_array_equal(found["prediction"], first)
    np.testing.assert_array_equal(found["correct"], [True, False, False, True])
    # One of four annotators at a time is left out; three others who agree are worth 1.
    np.testing.assert_allclose(found["accuracy"], [(2 * 1 / 3 + 2 * 2 / 3) / 4, 3 * 1 / 3 / 4, 3 * 1 / 3 / 4, 1])
    equal = TASK.predict(TASK.init(4 * WIDTH), GIVEN.replace(scale=jnp.float32(0)), batch)
    assert not equal["correct"].any()
