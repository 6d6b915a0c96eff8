import jax.numpy as jnp
import numpy as np
from pairs import BATCH, WIDTH, assert_sharded_equals_one_device, expected_logits, head, output

from vla_jax.tasks.matching import Matching

LABELS = np.random.default_rng(5).integers(0, 2, BATCH).astype(np.int32)
VALID = np.arange(BATCH) % 5 != 3


def _expected(rows):
    """The mean cross-entropy and accuracy over some rows, one at a time."""
    losses, right = [], []
    for i in rows:
        logit = expected_logits(head(4 * WIDTH, 1), output())[i, 0]
        probability = 1 / (1 + np.exp(-logit))
        losses.append(-np.log(probability if LABELS[i] else 1 - probability))
        right.append((logit > 0) == bool(LABELS[i]))
    return np.mean(losses), np.mean(right)


def test_loss_and_accuracy_are_those_of_a_loop():
    loss, metrics = Matching().loss(head(4 * WIDTH, 1), output(), {"label": jnp.asarray(LABELS)})
    expected, accuracy = _expected(range(BATCH))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert 0 < accuracy < 1


def test_padding_rows_do_not_count():
    batch = {"label": jnp.asarray(np.where(VALID, LABELS, 1 - LABELS)), "valid": jnp.asarray(VALID)}
    loss, metrics = Matching().loss(head(4 * WIDTH, 1), output(), batch)
    expected, accuracy = _expected(np.flatnonzero(VALID))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_predictions_are_the_logits_and_a_tie_counts_as_false():
    found = Matching().predict(head(4 * WIDTH, 1), output(), {"label": jnp.asarray(LABELS)})
    logits = expected_logits(head(4 * WIDTH, 1), output())[:, 0]
    np.testing.assert_allclose(found["score"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["correct"], (logits > 0) == LABELS)
    new = Matching().init(4 * WIDTH)
    batch = {"label": jnp.asarray(LABELS)}
    np.testing.assert_array_equal(Matching().predict(new, output(), batch)["correct"], LABELS == 0)
    np.testing.assert_allclose(Matching().loss(new, output(), batch)[0], np.log(2), rtol=1e-6)


def test_the_loss_is_a_mean_over_all_devices():
    batch = {"label": jnp.asarray(LABELS), "valid": jnp.asarray(VALID)}
    assert_sharded_equals_one_device(Matching(), head(4 * WIDTH, 1), batch)
