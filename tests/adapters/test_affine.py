"""Scales and shifts against their definition, against peft's (IA)^3, and against a changed bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_layer import assign, close, peft_linear, run
from settings import count, site

from vla_jax.adapters import Affine, Placement, ia3, place
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError

TOKENS, IN, OUT = 4, 5, 6
SITE = site("attn_k", IN, OUT)


def draw(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apply(method, params, x, y):
    return jax.jit(method.module(SITE).apply)({"params": params}, x, y)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_module_equals_the_definition(scale, shift):
    if not (scale or shift):
        return
    method, x, y = Affine(scale=scale, shift=shift), draw(TOKENS, IN), draw(TOKENS, OUT, seed=2)
    params = {name: draw(OUT, seed=3 + k) for k, name in enumerate(("scale", "shift")) if getattr(method, name)}
    expected = np.array(y, np.float64)
    for token in range(TOKENS):
        for channel in range(OUT):
            if scale:
                expected[token, channel] *= float(params["scale"][channel])
            if shift:
                expected[token, channel] += float(params["shift"][channel])
    close(apply(method, params, x, y), expected)
    assert count(method, SITE) == OUT * (scale + shift)


def test_new_parameters():
    x, y = jnp.zeros((1, IN)), jnp.zeros((1, OUT))
    new = Affine(shift=True).module(SITE).init(jax.random.key(0), x, y)["params"]
    np.testing.assert_array_equal(new["scale"], np.ones(OUT))
    np.testing.assert_array_equal(new["shift"], np.zeros(OUT))


@pytest.mark.torch
@pytest.mark.parametrize("feedforward", [False, True], ids=["after_the_map", "before_the_map"])
def test_output_and_gradient_equal_pefts(feedforward):
    x, kernel, bias, slope = draw(TOKENS, IN), draw(IN, OUT, seed=2), draw(OUT, seed=3), draw(TOKENS, OUT, seed=4)
    scale = draw(IN if feedforward else OUT, seed=5)
    names = ["linear"] if feedforward else []
    layer = peft_linear({"feedforward_modules": names}, kernel, bias, "IA3Config")
    theirs = layer.ia3_l["default"]
    assign(theirs, scale.reshape(tuple(theirs.shape)))
    expected = run(layer, x, slope)

    @jax.jit
    def forward(params):
        module = Affine().module(SITE)
        if feedforward:  # our slot mlp_hidden, in front of the second map of the MLP
            return module.apply({"params": params}, jnp.asarray(x), jnp.asarray(x)) @ kernel + bias
        return module.apply({"params": params}, jnp.asarray(x), jnp.asarray(x @ kernel + bias))

    close(forward({"scale": scale}), expected)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(forward(p) * slope)))({"scale": scale})
    close(gradient["scale"], theirs.grad.numpy().reshape(-1))


def test_a_shift_is_a_change_of_the_bias():
    x, kernel, bias, shift = draw(TOKENS, IN), draw(IN, OUT, seed=2), draw(OUT, seed=3), draw(OUT, seed=4)
    shifted = apply(Affine(scale=False, shift=True), {"shift": shift}, x, x @ kernel + bias)
    close(shifted, x @ kernel + (bias + shift))


def test_half_precision_streams_hear_of_small_changes():
    # 1.002 is one in bfloat16, whose step there is 2^-7; the product is rounded once, after it was taken.
    y = jnp.asarray(np.linspace(1, 2, 200), jnp.bfloat16)[:, None]
    scaled = apply(Affine(), {"scale": jnp.array([1.002])}, jnp.zeros((200, IN)), y)
    assert scaled.dtype == jnp.bfloat16
    exact = np.asarray(y, np.float64) * np.float32(1.002)
    np.testing.assert_array_equal(scaled, exact.astype(np.float32).astype(jnp.bfloat16))
    assert np.any(np.asarray(scaled) != np.asarray(y))


def test_published_count_of_ia3():
    # L (d_k + d_v + d_ff) numbers (Liu et al. 2022, section 3.3), for both towers of a B/16.
    towers = CLIPConfig.preset("vit_b_16").towers
    assert place(ia3(), towers).parameter_count() == 12 * (768 + 768 + 3072) + 12 * (512 + 512 + 2048) == 92_160


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine(scale=False), "affine with neither scale nor shift does nothing; set one of them"),
        (lambda: Placement(Affine(), slots=("attn_kv",)), "affine cannot sit in slot 'attn_kv'; it may sit in embed"),
        (lambda: Placement(Affine(), slots=("tokens",)), "affine cannot sit in slot 'tokens'"),
        (lambda: Affine().with_rank(2), "affine has no rank that a table could set"),
    ],
)
def test_settings_without_meaning_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
