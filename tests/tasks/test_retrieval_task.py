"""Retrieval against a loop over galleries, and its loss against the contrastive one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import output

from vla_jax.errors import UserError
from vla_jax.tasks.contrastive import info_nce
from vla_jax.tasks.retrieval import Retrieval


def _found(examples: int):
    generator = np.random.default_rng(3)
    image = generator.standard_normal((examples, 6)).astype(np.float32)
    text = image + generator.standard_normal((examples, 6)).astype(np.float32)
    return {"image_feature": image, "text_feature": text, "index": np.arange(examples)}


@pytest.mark.parametrize("examples", [8, 11, 3])
def test_galleries_are_those_of_a_loop(examples):
    found = _found(examples)
    result = Retrieval(gallery=4).finish(found)
    for i in range(examples):
        stop = min((i // 4 + 1) * 4, examples)
        gallery = range(max(0, stop - 4), stop)
        own = found["image_feature"][i] @ found["text_feature"][i]
        texts = [found["image_feature"][i] @ found["text_feature"][j] for j in gallery if j != i]
        images = [found["image_feature"][j] @ found["text_feature"][i] for j in gallery if j != i]
        assert result["image_to_text"][i] == all(own > other for other in texts)
        assert result["text_to_image"][i] == all(own > other for other in images)
    np.testing.assert_array_equal(result["correct"], result["image_to_text"])
    np.testing.assert_array_equal(result["index"], found["index"])
    assert set(result) == {"image_to_text", "text_to_image", "correct", "index"}


def test_a_tie_is_no_hit():
    same = np.ones((4, 2), np.float32)
    assert not Retrieval(gallery=4).finish({"image_feature": same, "text_feature": same})["correct"].any()


def test_the_head_is_a_factor_on_the_backbones_scale():
    task, given = Retrieval(), output()
    new = task.init(99)
    np.testing.assert_allclose(task.loss(new, given, {})[0], info_nce(given.logits), rtol=1e-6)
    doubled = {"log_scale": jnp.log(jnp.float32(2))}
    np.testing.assert_allclose(task.loss(doubled, given, {})[0], info_nce(2 * given.logits), rtol=1e-5)


def test_predictions_are_features_of_length_one():
    found = Retrieval().predict({}, output(), {})
    np.testing.assert_allclose(np.linalg.norm(found["image_feature"], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found["text_feature"], axis=1), 1, rtol=1e-6)


def test_a_gallery_of_one_is_refused():
    with pytest.raises(UserError, match="at least 2 examples, got 1"):
        Retrieval(gallery=1)
