"""Similarity: scores are scaled cosines, the loss is SigLIP's on given pairs, and orders are the backbone's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import batch, drawn_params, model

from vla_jax.errors import UserError
from vla_jax.tasks.similarity import Similarity

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASK = Similarity("pairs", scale=7.0, threshold=0.25)


def test_scores_are_scaled_cosines_and_the_loss_is_their_cross_entropy():
    given = model((), task=TASK)
    params, rows = drawn_params(given), batch(6)
    output = jax.jit(given.apply)(params, rows)
    image, text = np.asarray(output.image_features, np.float64), np.asarray(output.text_features, np.float64)
    cosine = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    head = {name: float(value) for name, value in params["heads"]["pairs"].items()}
    expected = np.exp(head["log_scale"]) * cosine + head["bias"]
    found = jax.jit(given.predict)(params, rows)
    np.testing.assert_allclose(found["score"], expected, rtol=1e-4)
    np.testing.assert_array_equal(found["correct"], (expected > 0) == (rows["label"] > 0))
    loss, _ = jax.jit(given.loss)(params, rows, jax.random.key(0))
    losses = np.logaddexp(0, np.where(rows["label"] > 0, -expected, expected))
    assert float(loss) == pytest.approx(losses[rows["valid"]].mean(), rel=1e-4)


def test_a_new_head_is_undecided_at_its_threshold():
    head = TASK.init(16)
    assert float(jnp.exp(head["log_scale"])) == pytest.approx(7.0)
    assert float(jnp.exp(head["log_scale"]) * 0.25 + head["bias"]) == pytest.approx(0, abs=1e-6)


def test_a_model_that_is_shown_one_modality_is_refused():
    given = model((), task=TASK, modalities=("text",))
    with pytest.raises(UserError, match="needs a picture and a text"):
        jax.eval_shape(given.predict, given.shapes(), batch(4))


def test_a_scale_that_is_not_positive_is_refused():
    with pytest.raises(UserError, match="scale must be positive, got 0"):
        Similarity(scale=0)
