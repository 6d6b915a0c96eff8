import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BATCH, WIDTH, expected_features, output

from vla_jax.tasks.heads import apply_linear, linear_head, masked_mean, pair_features


def test_pair_features_are_those_of_a_loop():
    given = output()
    found = pair_features(given)
    assert found.shape == (BATCH, 4 * WIDTH)
    np.testing.assert_allclose(found, expected_features(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_alone_gives_its_own_features(tower):
    given = output(**{"image": tower == "image", "text": tower == "text"})
    np.testing.assert_allclose(pair_features(given), expected_features(given), rtol=1e-5)


def test_the_length_of_features_is_no_matter_and_their_entries_are_of_order_one():
    given = output()
    longer = given.replace(image_features=7 * given.image_features, text_features=0.1 * given.text_features)
    np.testing.assert_allclose(pair_features(longer), pair_features(given), rtol=1e-4, atol=1e-5)
    u, v = np.split(np.asarray(pair_features(given)), 4, axis=-1)[:2]
    np.testing.assert_allclose(np.mean(u**2, -1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.mean(v**2, -1), 1, rtol=1e-5)


def test_a_new_head_gives_zero_everywhere_in_float32_whatever_the_features_are_in():
    features = pair_features(output()).astype(jnp.bfloat16)
    found = apply_linear(linear_head(4 * WIDTH, 3), features)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.zeros((BATCH, 3)))


def test_masked_mean_is_the_mean_of_what_is_left():
    values = np.random.default_rng(0).normal(size=9).astype(np.float32)
    valid = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1], bool)
    np.testing.assert_allclose(masked_mean(jnp.asarray(values), jnp.asarray(valid)), values[valid].mean(), rtol=1e-6)
    np.testing.assert_allclose(masked_mean(jnp.asarray(values), None), values.mean(), rtol=1e-6)
    assert masked_mean(jnp.asarray(values), jnp.zeros(9, bool)) == 0
