import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax.errors import UserError
from vla_jax.tasks.contrastive import contrastive_loss, info_nce, matched_first, sigmoid


def _logits(seed: int, count: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (count, count))


def test_info_nce_is_the_mean_of_both_directions_cross_entropies():
    logits = _logits(0)
    images = [-logits[i, i] + np.log(sum(np.exp(logits[i, j]) for j in range(8))) for i in range(8)]
    texts = [-logits[j, j] + np.log(sum(np.exp(logits[i, j]) for i in range(8))) for j in range(8)]
    np.testing.assert_allclose(info_nce(jnp.asarray(logits)), (np.mean(images) + np.mean(texts)) / 2, rtol=1e-6)


def test_info_nce_of_equal_logits_is_the_logarithm_of_the_batch():
    np.testing.assert_allclose(info_nce(jnp.zeros((16, 16))), np.log(16), rtol=1e-6)


def test_info_nce_is_finite_and_float32_for_large_logits_in_bfloat16():
    loss = info_nce(100 * jnp.eye(4, dtype=jnp.bfloat16) - 100)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_sigmoid_judges_every_pair_for_itself():
    logits, bias = _logits(1), -2.0
    total = 0.0
    for i in range(8):
        for j in range(8):
            sign = 1 if i == j else -1
            total += np.log1p(np.exp(-sign * (logits[i, j] + bias)))
    np.testing.assert_allclose(sigmoid(jnp.asarray(logits), bias), total / 8, rtol=1e-6)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_transposing_changes_nothing(loss):
    logits = jnp.asarray(_logits(2))
    np.testing.assert_allclose(contrastive_loss(logits, loss), contrastive_loss(logits.T, loss), rtol=1e-6)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_loss_and_gradient_of_a_sharded_batch_are_those_of_one_device(loss):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    images, texts = (np.random.default_rng(seed).normal(size=(16, 4)).astype(np.float32) for seed in (3, 4))

    def loss_of(images, texts):
        return contrastive_loss(images @ texts.T, loss)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec("data"))
    alone = jax.value_and_grad(loss_of)(jnp.asarray(images), jnp.asarray(texts))
    sharded = jax.jit(jax.value_and_grad(loss_of), in_shardings=(cut, cut))(images, texts)
    np.testing.assert_allclose(sharded[0], alone[0], rtol=1e-6)
    np.testing.assert_allclose(sharded[1], alone[1], rtol=1e-5, atol=1e-7)


def test_matched_first_counts_strictly_best_partners():
    logits = jnp.array([[2.0, 1.0, 0.0], [3.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    found = matched_first(logits)
    np.testing.assert_allclose(found["image_to_text"], 2 / 3)  # the second image ties
    np.testing.assert_allclose(found["text_to_image"], 2 / 3)  # the first text prefers the second image


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(UserError, match=r"\[batch, batch\]"):
        info_nce(jnp.zeros((3, 4)))
    with pytest.raises(UserError, match="info_nce"):
        inspect.unwrap(contrastive_loss)(jnp.zeros((2, 2)), "infonce")  # without the tests' own check of types
