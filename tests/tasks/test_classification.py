import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BATCH, WIDTH, assert_sharded_equals_one_device, expected_logits, head, output

from vla_jax.errors import UserError
from vla_jax.tasks.classification import Classification

CLASSES = 5
TASK = Classification("answers", CLASSES)
LABELS = np.random.default_rng(5).integers(0, CLASSES, BATCH).astype(np.int32)
VALID = np.arange(BATCH) % 5 != 3


def _expected(rows):
    """The mean cross-entropy and accuracy over some rows, one at a time."""
    losses, right = [], []
    for i in rows:
        logits = expected_logits(head(4 * WIDTH, CLASSES), output())[i]
        losses.append(-np.log(np.exp(logits[LABELS[i]]) / sum(np.exp(logits))))
        right.append(max(range(CLASSES), key=lambda k, logits=logits: logits[k]) == LABELS[i])
    return np.mean(losses), np.mean(right)


def test_loss_and_accuracy_are_those_of_a_loop():
    loss, metrics = TASK.loss(head(4 * WIDTH, CLASSES), output(), {"label": jnp.asarray(LABELS)})
    expected, accuracy = _expected(range(BATCH))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_padding_rows_do_not_count():
    batch = {"label": jnp.asarray(np.where(VALID, LABELS, 0)), "valid": jnp.asarray(VALID)}
    loss, metrics = TASK.loss(head(4 * WIDTH, CLASSES), output(), batch)
    expected, accuracy = _expected(np.flatnonzero(VALID))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_predictions_are_the_largest_logits():
    found = TASK.predict(head(4 * WIDTH, CLASSES), output(), {"label": jnp.asarray(LABELS)})
    largest = expected_logits(head(4 * WIDTH, CLASSES), output()).argmax(-1)
    np.testing.assert_array_equal(found["prediction"], largest)
    np.testing.assert_array_equal(found["correct"], largest == LABELS)
    assert found["prediction"].dtype == jnp.int32


def test_a_new_head_finds_every_class_equally_likely():
    loss, _ = TASK.loss(TASK.init(4 * WIDTH), output(), {"label": jnp.asarray(LABELS)})
    np.testing.assert_allclose(loss, np.log(CLASSES), rtol=1e-6)


def test_the_loss_is_a_mean_over_all_devices():
    batch = {"label": jnp.asarray(LABELS), "valid": jnp.asarray(VALID)}
    assert_sharded_equals_one_device(TASK, head(4 * WIDTH, CLASSES), batch)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        Classification("answers", 1)
