"""Prompt tuning, CoOp and VPT: what the module puts where, published counts, and starting from a phrase."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_by_hand import image_by_hand, text_by_hand
from settings import CONFIG, backbone, drawn, inputs, model, site

from vla_jax.adapters import (
    Prompt,
    coop,
    place,
    prompt_tuning,
    start_from_phrase,
    vpt_deep,
    vpt_shallow,
)
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH = 5
B_16 = CLIPConfig.preset("vit_b_16").towers


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def close(ours, theirs, tolerance=2e-6):
    assert np.linalg.norm(np.subtract(ours, theirs)) <= tolerance * np.linalg.norm(theirs)


# The module


def test_tokens_stand_behind_those_inserted_before():
    x, y, prompt = draw(4, WIDTH), draw(2, WIDTH), draw(3, WIDTH)
    module = Prompt(3).module(site("tokens", WIDTH, WIDTH))
    result = jax.jit(module.apply)({"params": {"prompt": prompt}}, x, y)
    np.testing.assert_array_equal(result, [*y, *prompt])


def test_deep_tokens_stand_in_the_place_of_what_the_block_before_made():
    x, y, prompt = draw(4, WIDTH), draw(3, WIDTH), draw(3, WIDTH)
    module = Prompt(3).module(site("prompts", WIDTH, WIDTH))
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": {"prompt": prompt}}, x, y), prompt)


def test_new_tokens_are_drawn_as_asked_for():
    x, y = jnp.zeros((1, 400)), jnp.zeros((0, 400))
    place_ = site("tokens", 400, 400)
    new = jax.jit(Prompt(100, std=0.5).module(place_).init)(jax.random.key(0), x, y)["params"]
    assert new["prompt"].shape == (100, 400)
    # 40,000 draws: the deviation's own standard error is 0.35 %.
    assert np.std(new["prompt"]) == pytest.approx(0.5, rel=0.02)
    made = jax.jit(Prompt(100, hidden=9).module(place_).init)(jax.random.key(0), x, y)["params"]
    assert np.std(made["embedding"]) == pytest.approx(1.0, rel=0.02)


def test_tokens_take_the_dtype_of_the_stream():
    x, y = jnp.zeros((1, WIDTH), jnp.bfloat16), jnp.zeros((0, WIDTH), jnp.bfloat16)
    for method in (Prompt(3), Prompt(3, hidden=4)):
        module = method.module(site("tokens", WIDTH, WIDTH))
        result, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x, y)
        assert result.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


# Presets


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (coop(4), 2_048),  # as MaPLe's paper counts it
        (coop(), 8_192),
        (vpt_shallow(50), 38_400),
        (vpt_deep(50), 12 * 38_400),
        (prompt_tuning(20), 10_240),
        (prompt_tuning(20, ("vision", "text")), 10_240 + 15_360),
    ],
    ids=["coop_4", "coop_16", "vpt_shallow", "vpt_deep", "prompt_tuning", "prompt_tuning_both"],
)
def test_parameters_on_b_16(placement, expected):
    plan = place(placement, B_16)
    assert plan.parameter_count() == expected
    assert sum(leaf.size for leaf in jax.tree.leaves(plan.shapes())) == expected


def test_vl_adapters_published_shares():
    # BART-base has one encoder, 768 wide, which reads both modalities: prompts stand once at its input.
    bart, visual, order = 139_420_416, 1_582_848, 200 * 768
    own = place(prompt_tuning(40, hidden=800), {"text": TowerShape(6, 768, 3072)}).parameter_count()
    assert own == 1_261_088
    for tasks, published in ((1, 2.00), (4, 4.53)):
        trained = tasks * own + visual
        assert round(100 * trained / (bart + order + trained), 2) == published


# In a model


def run(plan, adapters):
    images, tokens, mask = inputs(CONFIG)
    forward = jax.jit(
        lambda params, adapters: model(CONFIG).apply(
            {"params": params}, images, tokens, mask, adapters=plan.bind(adapters), hidden_states=True
        )
    )
    return forward(backbone(CONFIG), adapters)


def test_coop_and_vpt_in_one_model_equal_the_towers_by_hand():
    plan = place([coop(2), vpt_deep(3)], CONFIG.towers)
    adapters = drawn(plan.shapes(), 1, 0.5)
    out, params, (images, tokens, mask) = run(plan, adapters), backbone(CONFIG), inputs(CONFIG)
    context, vision = adapters["coop"]["text"]["tokens"]["prompt"], adapters["vpt_deep"]["vision"]
    deep = {0: vision["tokens"]["prompt"][0]} | dict(enumerate(vision["prompts"]["prompt"], 1))
    assert sorted(deep) == [0, 1, 2, 3]
    for row in range(2):
        image = image_by_hand(params, CONFIG, images[row], deep, {})
        text = text_by_hand(params, CONFIG, tokens[row], mask[row], {0: context[0]}, {})
        close(out.image_features[row], image.feature)
        close(out.image_hidden[:, row], image.hidden)
        close(out.text_features[row], text.feature)
        close(out.text_hidden[:, row], text.hidden)


# From a phrase


TABLE = draw(50, 24)
PHRASE, MASK = np.array([48, 7, 9, 49, 0, 0]), np.array([1, 1, 1, 1, 0, 0], bool)


@pytest.mark.parametrize("tasks", [(), ("a", "b")])
def test_a_prompt_starts_from_a_phrase(tasks):
    placement = dataclasses.replace(coop(2), tasks=tasks)
    plan = place([placement, vpt_shallow(2)], CONFIG.towers)
    adapters = drawn(plan.shapes(), 3, 0.5)
    started = start_from_phrase(plan, adapters, "coop", TABLE, PHRASE, MASK)
    prompt = started["coop"]["text"]["tokens"]["prompt"]
    assert prompt.shape == (1, *([2] if tasks else []), 2, 24)
    np.testing.assert_array_equal(prompt, np.broadcast_to(TABLE[[7, 9]], prompt.shape))
    np.testing.assert_array_equal(
        started["vpt_shallow"]["vision"]["tokens"]["prompt"], adapters["vpt_shallow"]["vision"]["tokens"]["prompt"]
    )


def test_a_prompt_that_starts_as_the_phrase_is_the_phrase():
    # The texts with the phrase as words, and without it behind a prompt that starts from it: one text.
    params, (images, tokens, mask) = backbone(CONFIG), inputs(CONFIG)
    plan = place(coop(2), CONFIG.towers)
    phrase = np.asarray([48, 7, 9, 49])
    new = plan.init(jax.random.key(0))
    adapters = start_from_phrase(plan, new, "coop", params["text"]["token_embedding"], phrase, np.ones(4, bool))
    insert = lambda a, values: jnp.concatenate([a[:, :1], jnp.tile(jnp.asarray(values), (8, 1)), a[:, 1:]], 1)  # noqa: E731
    spoken, longer = insert(tokens, [7, 9]), insert(mask, [True, True])
    plain = jax.jit(lambda params: model(CONFIG).apply({"params": params}, images, spoken, longer))(params)
    close(run(plan, adapters).text_features, plain.text_features, 1e-6)


@pytest.mark.parametrize(
    ("placement", "name", "message"),
    [
        (coop(3), "coop", "phrase has 2 tokens between start and end, and the prompt of adapter 'coop' has 3"),
        (vpt_shallow(2), "vpt_shallow", "adapter 'vpt_shallow' learns no tokens of the text directly"),
        (coop(2), "other", "adapter 'other' learns no tokens of the text directly"),
        (prompt_tuning(2, hidden=4), "prompt_tuning", "without hidden"),
    ],
    ids=["length", "tower", "name", "made"],
)
def test_phrases_that_fit_no_prompt_are_refused(placement, name, message):
    plan = place(placement, CONFIG.towers)
    with pytest.raises(UserError, match=message):
        start_from_phrase(plan, drawn(plan.shapes(), 3, 0.5), name, TABLE, PHRASE, MASK)
