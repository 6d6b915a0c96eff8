"""Ladder side tuning against its definition, and what it spares: the backbone's backward pass."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import CONFIG, backbone, count, drawn, inputs, model, site

from vla_jax import names
from vla_jax.adapters import Ladder, LoRA, Placement, place
from vla_jax.errors import UserError
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import preset
from vla_jax.training.step import init_state, make_train_step
from vla_jax.training.table import ParameterTable

WIDTH, TOKENS = 12, 5
SITE = site("side", WIDTH, WIDTH)._replace(depth=3)


def _norm(rows, leaves):
    rows = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    return rows * leaves["scale"] + leaves["bias"]


def _linear(rows, leaves):
    return rows @ leaves["kernel"] + leaves["bias"]


def _attended(x, leaves, seen, heads):
    """Attention one query of one head at a time."""
    query, key, value = (
        np.einsum("tw,whd->thd", x, leaves[n]["kernel"]) + leaves[n]["bias"] for n in ("query", "key", "value")
    )
    mixed = np.zeros_like(query)
    for head in range(heads):
        for token in range(len(x)):
            others = np.flatnonzero(seen[token])
            scores = np.exp(key[others, head] @ query[token, head] / math.sqrt(query.shape[-1]))
            mixed[token, head] = scores @ value[others, head] / scores.sum()
    return np.einsum("thd,hdw->tw", mixed, leaves["out"]["kernel"]) + leaves["out"]["bias"]


def by_hand(params, states, y, seen, read, heads):
    side = _linear(states[0], params["embed"])
    for rung, state in enumerate(read):
        leaves = jax.tree.map(lambda a, rung=rung: a[rung], params["rungs"])
        mu = 1 / (1 + math.exp(-leaves["gate"] / 0.1))
        side = mu * side + (1 - mu) * _linear(states[state], leaves["down"])
        side = side + _attended(_norm(side, leaves["norm1"]), leaves["attention"], seen, heads)
        hidden = _linear(_norm(side, leaves["norm2"]), leaves["fc1"])
        side = side + _linear(hidden / (1 + np.exp(-1.702 * hidden)), leaves["fc2"])
    return y + _linear(_norm(side, params["norm"]), params["up"])


@pytest.mark.parametrize(("rungs", "read"), [("all", (1, 2, 3)), ("0,2", (1, 3))])
def test_definition(rungs, read):
    method = Ladder(rank=6, heads=2, rungs=rungs)
    module = method.module(SITE)
    generator = np.random.default_rng(0)
    states = generator.standard_normal((4, TOKENS, WIDTH)).astype(np.float32)
    y = generator.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    seen = np.tril(np.ones((TOKENS, TOKENS), bool))
    seen[:, -1] = False
    seen[-1, -1] = True
    shapes = jax.eval_shape(module.init, jax.random.key(0), states, y, seen)["params"]
    params = drawn(shapes, 1, 0.3)
    ours = jax.jit(module.apply)({"params": params}, states, y, seen)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    theirs = by_hand(exact, states.astype(np.float64), y, seen, read, heads=2)
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert count(method, SITE) == names.count(shapes)


def test_count_by_hand():
    # Side width 6: embed 78; each of 3 rungs: gate 1, down 78, norms 24, attention 168, MLP 6 * 24 + 24 + 24 * 6 + 6;
    # norm 12; up 84.
    assert count(Ladder(rank=6, heads=2), SITE) == 78 + 3 * (1 + 78 + 24 + 168 + 318) + 12 + 84


def _compiled(placement):
    """The compiled gradient of the adapters alone, on a deeper CLIP."""
    tower = dataclasses.replace(CONFIG.vision, depth=8)
    config = dataclasses.replace(CONFIG, vision=tower, text=tower)
    plan = place(placement, config.towers)
    params, adapters = backbone(config), drawn(plan.shapes(), 1, 0.1)

    def loss(adapters, params, images, tokens, mask):
        out = model(config, 8).apply({"params": params}, images, tokens, mask, adapters=plan.bind(adapters))
        return jnp.sum(out.image_features) + jnp.sum(out.text_features)

    def plain(params, images, tokens, mask):
        out = model(config, 8).apply({"params": params}, images, tokens, mask)
        return out.image_features, out.text_features

    gradient = jax.jit(jax.grad(loss)).lower(adapters, params, *inputs(config)).compile()
    forward = jax.jit(plain).lower(params, *inputs(config)).compile()
    return gradient, forward, plan


def test_no_gradient_goes_through_the_backbone():
    # Whatever the compiler does, work is what tells: LoRA at the first layer needs the backward pass of all blocks, at
    # about the forward pass's cost; a ladder needs its own alone.
    ladder, forward, plan = _compiled(Placement(Ladder(rank=4, heads=1)))
    lora, _, _ = _compiled(Placement(LoRA(rank=1), slots=("attn_q",), layers="0"))
    flops = lambda program: program.cost_analysis()["flops"]  # noqa: E731
    assert plan.parameter_count() > 0
    assert flops(lora) > 1.7 * flops(forward)
    assert flops(ladder) < 1.3 * flops(forward)


@functools.cache
def _training_step(name):
    """The compiled training step of these adapters on that CLIP; ``plain`` is the forward pass without any."""
    tower = dataclasses.replace(CONFIG.vision, depth=8)
    config = dataclasses.replace(CONFIG, vision=tower, text=tower)
    # With many examples, so that what is kept of them takes the memory and not a copy of some block's weights.
    batch = jax.tree.map(lambda a: np.tile(a, (64,) + (1,) * (a.ndim - 1)), inputs(config))

    def forward(params, batch, adapters=None, key=None):
        out = model(config, 8).apply({"params": params}, *batch, adapters=adapters, key=key)
        return jnp.mean(jnp.sum(out.image_features * out.text_features, -1))

    if name == "plain":
        return jax.jit(forward).lower(backbone(config), batch).compile()
    plan = place(TRAINED[name], config.towers)

    def loss(params, batch, key):
        return forward(params["backbone"], batch, plan.bind(params["adapters"]), key), {}

    params = {"backbone": backbone(config), "adapters": drawn(plan.shapes(), 1, 0.1)}
    table = ParameterTable(preset("adapters")).resolve(params)
    trainable, frozen = table.split(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), table, trainable, steps=10)
    return make_train_step(loss, optimizer, seed=0).lower(init_state(trainable, optimizer), frozen, batch).compile()


TRAINED = {
    "ladder": Placement(Ladder(rank=4, heads=1)),
    "lora_at_the_bottom": Placement(LoRA(rank=1), slots=("attn_q",), layers="0"),
}


def test_the_training_step_computes_no_backward_pass_of_the_backbone():
    flops = lambda name: _training_step(name).cost_analysis()["flops"]  # noqa: E731
    assert flops("lora_at_the_bottom") > 1.7 * flops("plain")
    # The backward pass of one of the eight blocks would cost more than this.
    assert flops("ladder") < 1.1 * flops("plain")


def test_the_training_step_keeps_less_than_one_that_goes_through_the_backbone():
    # Of each block a backward pass keeps what its maps, norms and attention read; a ladder keeps its output.
    ladder, bottom = (_training_step(name).memory_analysis().temp_size_in_bytes for name in TRAINED)
    assert 0 < ladder < 0.6 * bottom, (ladder, bottom)


def test_rungs_that_do_not_exist_and_widths_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="layer 7 does not exist: the vision tower has 4 layers"):
        place(Placement(Ladder(rank=4, rungs="7")), CONFIG.towers)
    with pytest.raises(UserError, match="side stream's width 6 beside the vision tower does not divide into 4 heads"):
        place(Placement(Ladder(rank=6)), CONFIG.towers)
    with pytest.raises(UserError, match="heads and mlp_ratio must be at least 1, got 0 and 4"):
        Ladder(heads=0)
