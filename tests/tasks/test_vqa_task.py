"""Answers with soft targets against a loop over answers, and their accuracy against the evaluation's own."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BATCH, WIDTH, assert_sharded_equals_one_device, expected_logits, head, output

from vla_jax.data.answers import AnswerCounts, AnswerVocabulary
from vla_jax.errors import UserError
from vla_jax.evaluation import vqa
from vla_jax.tasks.vqa import AnswerClassification

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORDS = ("yes", "no", "2", "cat", "dog")
UNKNOWN = ("zebra", "giraffe")
TASK = AnswerClassification("vqa", len(WORDS))
PARAMS = head(4 * WIDTH, len(WORDS))


def questions(annotators=10, seed=0):
    """Answers that agree more or less, some of them outside the vocabulary."""
    generator = np.random.default_rng(seed)
    pools = [generator.choice([*WORDS, *UNKNOWN], 3, replace=False) for _ in range(BATCH)]
    return [generator.choice(pool, annotators, p=[0.6, 0.3, 0.1]).tolist() for pool in pools]


def batch(answers):
    rows = [AnswerCounts(AnswerVocabulary(WORDS))({"answers": given}, (), None) for given in answers]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


@pytest.mark.parametrize("annotators", [10, 3, 2, 1])
def test_the_loss_is_a_sum_of_binary_cross_entropies(annotators):
    answers, logits = questions(annotators), expected_logits(PARAMS, output())
    losses = []
    for given, row in zip(answers, logits, strict=True):
        total = 0.0
        for word, logit in zip(WORDS, row, strict=True):
            target = min(given.count(word) / min(3, annotators), 1)
            probability = 1 / (1 + np.exp(-logit))
            total -= target * np.log(probability) + (1 - target) * np.log(1 - probability)
        losses.append(total)
    valid = np.arange(BATCH) % 3 != 1
    np.testing.assert_allclose(TASK.loss(PARAMS, output(), batch(answers))[0], np.mean(losses), rtol=1e-5)
    masked, _ = TASK.loss(PARAMS, output(), batch(answers) | {"valid": jnp.asarray(valid)})
    np.testing.assert_allclose(masked, np.mean(np.array(losses)[valid]), rtol=1e-5)


@pytest.mark.parametrize("annotators", [10, 3, 1])
def test_accuracy_is_that_of_the_evaluation(annotators):
    answers = questions(annotators)
    found = TASK.predict(PARAMS, output(), batch(answers))
    largest = expected_logits(PARAMS, output()).argmax(-1)
    np.testing.assert_array_equal(found["prediction"], largest)
    expected = [vqa.accuracy(WORDS[place], given) for place, given in zip(largest, answers, strict=True)]
    np.testing.assert_allclose(found["accuracy"], expected, rtol=1e-6)
    _, metrics = TASK.loss(PARAMS, output(), batch(answers))
    np.testing.assert_allclose(metrics["accuracy"], np.mean(expected), rtol=1e-6)
    most = [
        given.count(WORDS[place]) == max(map(given.count, given)) for place, given in zip(largest, answers, strict=True)
    ]
    np.testing.assert_array_equal(found["correct"], most)
    assert 0 < np.mean(expected) < 1


def test_answers_outside_the_vocabulary_are_targets_of_nothing():
    unknown = batch([["zebra"] * 10] * BATCH)
    loss, metrics = TASK.loss(TASK.init(4 * WIDTH), output(), unknown)
    np.testing.assert_allclose(loss, len(WORDS) * np.log(2), rtol=1e-6)
    assert metrics["accuracy"] == 0
    assert not TASK.predict(PARAMS, output(), unknown)["correct"].any()


def test_the_loss_is_a_mean_over_all_devices():
    assert_sharded_equals_one_device(TASK, PARAMS, batch(questions()) | {"valid": jnp.arange(BATCH) % 5 != 3})


def test_one_answer_is_refused():
    with pytest.raises(UserError, match="at least 2 answers, got 1"):
        AnswerClassification("vqa", 1)
