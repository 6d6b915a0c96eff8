"""LoRA from singular vectors (PiSSA): what it starts from, what is stored and what trained, and peft's layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_layer import assign, close, peft_linear, run
from settings import CONFIG, backbone, site

from vla_jax import names
from vla_jax.adapters import LoRA, Placement, clip_lora, place
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.slots import LinearWeights
from vla_jax.training.presets import preset
from vla_jax.training.table import ParameterTable

TOKENS, IN, OUT = 4, 5, 6
SITE = site("attn_q", IN, OUT)
PISSA = LoRA(rank=3, alpha=7.0, init="pissa")


def frozen_map():
    generator = np.random.default_rng(4)
    kernel, bias = (generator.standard_normal(shape).astype(np.float32) for shape in ((IN, OUT), (OUT,)))
    return LinearWeights(jnp.asarray(kernel), jnp.asarray(bias))


def new_from(weights):
    x = jnp.zeros((1, IN))
    return PISSA.module(SITE).init(jax.random.key(0), x, jnp.zeros((1, OUT)), weights)["params"]


def test_it_starts_from_the_best_approximation_of_its_rank():
    weights = frozen_map()
    new = new_from(weights)
    left, values, right = np.linalg.svd(np.asarray(weights.kernel, np.float64), full_matrices=False)
    close(PISSA.scale * np.asarray(new["a"], np.float64) @ new["b"], (left[:, :3] * values[:3]) @ right[:3])
    # Both factors take the root of each singular value, over the scale.
    for side in (new["a"].T @ new["a"], new["b"] @ new["b"].T):
        np.testing.assert_allclose(side, np.diag(values[:3] / PISSA.scale), atol=1e-5)
    for name in ("a", "b"):
        np.testing.assert_array_equal(new[name], new["frozen"][name])


def test_what_is_stored_and_what_is_trained():
    towers = CLIPConfig.preset("vit_b_16").towers
    placement = dataclasses.replace(clip_lora(), method=dataclasses.replace(clip_lora().method, init="pissa"))
    shapes = place(placement, towers).shapes()
    assert place(placement, towers).parameter_count() == names.count(shapes) == 2 * 184_320
    for rules in ("adapters", "full", "bitfit", "lora_plus"):
        assert ParameterTable(preset(rules)).resolve({"adapters": shapes}).trained == 184_320
    # Every task starts from the same ones, which are stored once.
    tasks = place(dataclasses.replace(placement, tasks=("a", "b", "c")), towers)
    assert tasks.parameter_count() == (3 + 1) * 184_320


@pytest.mark.torch
def test_singular_vectors_equal_pefts():
    weights = frozen_map()
    new, generator = new_from(weights), np.random.default_rng(5)
    shapes = ((TOKENS, IN), (TOKENS, OUT), (IN, 3), (3, OUT))
    x, slope, a, b = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    params = {"a": a, "b": b}
    config = {"r": 3, "lora_alpha": 7, "init_lora_weights": "pissa"}
    layer = peft_linear(config, np.asarray(weights.kernel), np.asarray(weights.bias))
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    close(new["a"] @ new["b"], (second @ first).detach().numpy().T)
    assign(first, params["a"].T)
    assign(second, params["b"].T)
    expected = run(layer, x, slope)

    @jax.jit
    def forward(trained):
        y = jnp.asarray(x) @ weights.kernel + weights.bias
        own = {"frozen": new["frozen"]} | trained
        return PISSA.module(SITE).apply({"params": own}, jnp.asarray(x), y, weights)

    close(forward(params), expected)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(forward(p) * slope)))(params)
    close(gradient["a"], first.grad.numpy().T)
    close(gradient["b"], second.grad.numpy().T)


def test_what_is_taken_off_comes_from_the_backbone_alone():
    # So that a run which has saved the trained leaves finds the rest again, whatever its key.
    plan = place(Placement(LoRA(rank=2, init="pissa"), slots=("attn_q", "projection")), CONFIG.towers)
    params = backbone(CONFIG)
    first, second = (names.flatten(plan.init(jax.random.key(k), params)) for k in (0, 7))
    kept = [path for path in first if "/frozen/" in path]
    assert len(kept) == 8
    for path in kept:
        np.testing.assert_array_equal(first[path], second[path])
