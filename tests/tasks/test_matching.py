import jax.numpy as jnp
import numpy as np
from pairs import BATCH, WIDTH, assert_sharded_equals_one_device, expected_features, expected_logits, head, output

from vla_jax.tasks.matching import Matching, PairMatching

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


def test_two_pictures_are_judged_by_the_features_of_both_pairs():
    task, given = PairMatching(), output()
    params = head(4 * 4 * WIDTH, 1)
    rows = expected_features(given).reshape(BATCH // 2, 2, 4 * WIDTH)
    kernel, bias = (np.asarray(params["classifier"][name], np.float64) for name in ("kernel", "bias"))
    expected = []
    for first, second in rows:
        expected.append(np.concatenate([first, second, first * second, abs(first - second)]) @ kernel[:, 0] + bias[0])
    labels = np.arange(BATCH // 2) % 2
    found = task.predict(params, given, {"label": jnp.asarray(labels)})
    np.testing.assert_allclose(found["score"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found["correct"], (np.array(expected) > 0) == (labels > 0))
    loss, _ = task.loss(params, given, {"label": jnp.asarray(labels)})
    np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp(np.where(labels, -1, 1) * np.array(expected)))), rtol=1e-4)
    assert task.init(4 * WIDTH)["classifier"]["kernel"].shape == (16 * WIDTH, 1)


def test_a_model_shown_the_text_alone_judges_two_pictures_too():
    task, given = PairMatching(), output(image=False)
    found = task.predict(head(4 * WIDTH, 1), given, {"label": jnp.zeros(BATCH, jnp.int32)})
    assert found["score"].shape == (BATCH,)
    assert len(np.unique(found["score"])) == BATCH
