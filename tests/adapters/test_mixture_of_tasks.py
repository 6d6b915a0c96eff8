"""Weights in place of a route: a mixture of one task is that task, one of two is between them, none is the backbone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import ALL, backbone, begun, drawn, inputs, model, shape_for

from vla_jax.adapters import place

# One setting of each way in which a method's output, or its parameters' tasks, differ.
KINDS = (
    "bottleneck_half_shared",
    "lora_dropout",
    "dora_pissa",
    "affine_ia3",
    "ladder",
    "fusion",
    "hyperformer",
    "mma",
    "prompt_deep",
    "prefix_made",
    "cocoop",
    "maple",
    "clip_adapter",
    "fuse",
    "parallel_fusions",
    "lora_tied",
)
ROUTE = np.array([2, 0, -1, 1, 1, -1, 0, 2])

pytestmark = [pytest.mark.parametrize("name", KINDS), pytest.mark.usefixtures("quick_compilation")]


@functools.cache
def _run(name):
    """``run(route) -> features`` of adapters as training might leave them."""
    config = shape_for(name)
    params = backbone(config)
    plan = place(dataclasses.replace(ALL[name], tasks=("a", "b", "c")), config.towers)
    adapters = drawn(plan.shapes(), 6, 0.2, around=begun(plan, params))

    @jax.jit
    def run(params, adapters, arrays, route):  # arguments: the compiler would work constants out beforehand
        out = model(config).apply({"params": params}, *arrays, adapters=plan.bind(adapters), route=route)
        return jnp.concatenate([out.image_features, out.text_features], axis=-1)

    return functools.partial(run, params, adapters, inputs(config))


def test_a_mixture_of_one_task_is_its_route(name):
    weights = 0.3 * jax.nn.one_hot(ROUTE, 3)  # only their proportions count; -1 has none
    mixed, routed = _run(name)(weights), _run(name)(jnp.asarray(ROUTE))
    assert np.linalg.norm(mixed - routed) <= 1e-5 * np.linalg.norm(routed)
    assert not np.allclose(routed[0], _run(name)(jnp.zeros(8, jnp.int32))[0], rtol=1e-3)


def test_a_mixture_of_two_is_neither(name):
    halves = _run(name)(jnp.tile(jnp.array([[0.5, 0.5, 0.0]]), (8, 1)))
    assert np.isfinite(halves).all()
    for task in (0, 1):
        assert not np.allclose(halves, _run(name)(jnp.full(8, task)), rtol=1e-3)
