"""LoRA against its definition, one number at a time, against a whole CLIP with merged kernels, against peft's layer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_layer import assign, close, peft_linear, run
from published_counts import TASKS
from settings import CONFIG, backbone, count, drawn, inputs, model, site

from vla_jax import names
from vla_jax.adapters import LoRA, Placement, clip_lora, place, vl_adapter_lora
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError
from vla_jax.slots import LINEAR_MAPS, TowerShape

TOKENS, IN, OUT = 4, 5, 6
SITE = site("attn_q", IN, OUT)


def example():
    """A linear map's input and output, and what training might have made of A and B for rank 3."""
    generator = np.random.default_rng(1)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(TOKENS, IN), draw(TOKENS, OUT), {"a": draw(IN, 3), "b": draw(3, OUT)}


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (LoRA(rank=3, alpha=3.0), 1.0),
        (LoRA(rank=3, alpha=16.0), 16 / 3),
        (LoRA(rank=3, alpha=2.0, rank_stabilised=True), 2 / math.sqrt(3)),
        (LoRA(rank=3, alpha=6.0, dropout=0.5), 2.0),
    ],
    ids=["one", "alpha", "rank_stabilised", "dropout_in_evaluation"],
)
def test_module_equals_the_definition(method, scale):
    x, y, params = example()
    expected = np.array(y, np.float64)
    for token in range(TOKENS):
        for out in range(OUT):
            for r in range(3):
                inner = sum(float(x[token, i]) * float(params["a"][i, r]) for i in range(IN))
                expected[token, out] += scale * inner * float(params["b"][r, out])
    close(np.asarray(jax.jit(method.module(SITE).apply)({"params": params}, x, y)), expected)


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (LoRA(), 2.0),
        (LoRA(rank=2, alpha=1.0), 0.5),
        (LoRA(rank=128, alpha=32.0), 0.25),
        (LoRA(rank=16, alpha=16.0, rank_stabilised=True), 4.0),
        (LoRA(rank=8, alpha=4.0).with_rank(2), 2.0),
    ],
)
def test_scale_by_hand(method, scale):
    assert method.scale == pytest.approx(scale, rel=1e-12)


def test_update_is_that_of_a_merged_kernel():
    x, _, params = example()
    method, kernel = LoRA(rank=3, alpha=5.0), np.random.default_rng(2).standard_normal((IN, OUT))
    merged = kernel + 5.0 / 3 * params["a"].astype(np.float64) @ params["b"]
    result = jax.jit(method.module(SITE).apply)({"params": params}, x, (x @ kernel).astype(np.float32))
    close(np.asarray(result), x @ merged)


def test_new_parameters():
    x, y = jnp.zeros((1, 400)), jnp.zeros((1, 300))
    new = jax.jit(LoRA(rank=100).module(SITE).init)(jax.random.key(0), x, y)["params"]
    assert {name: leaf.shape for name, leaf in new.items()} == {"a": (400, 100), "b": (100, 300)}
    assert count(LoRA(rank=100), site("attn_q", 400, 300)) == 400 * 100 + 100 * 300
    assert not np.any(new["b"])
    bound = 400**-0.5
    assert np.abs(new["a"]).max() <= bound
    # 40,000 uniform draws: the deviation's own standard error is 0.23 %.
    assert np.std(new["a"]) == pytest.approx(bound / math.sqrt(3), rel=0.015)


def test_dropout_spares_the_share_it_names_and_keeps_the_mean():
    # With A and B the identity and a scale of one, what is added is the input as the update sees it.
    width, tokens, rate = 64, 400, 0.25
    method = LoRA(rank=width, alpha=float(width), dropout=rate)
    params = {"a": jnp.eye(width), "b": jnp.eye(width)}
    run = jax.jit(lambda x, y, key: method.module(SITE).apply({"params": params}, x, y, rngs={"dropout": key}))
    x, y = jnp.ones((tokens, width)), jnp.full((tokens, width), 3.0)
    seen = np.asarray(run(x, y, jax.random.key(0))) - 3.0  # y itself is never dropped
    np.testing.assert_allclose(np.unique(seen), [0.0, 1 / (1 - rate)], rtol=1e-6)
    dropped = seen == 0
    deviation = math.sqrt(rate * (1 - rate) / seen.size)
    assert abs(dropped.mean() - rate) < 5 * deviation
    assert abs(seen.mean() - 1) < 5 * deviation / (1 - rate)
    # Every token and every channel has draws of its own.
    assert np.abs(dropped.mean(0) - rate).max() < 5 * math.sqrt(rate * (1 - rate) / tokens)
    assert np.abs(dropped.mean(1) - rate).max() < 5 * math.sqrt(rate * (1 - rate) / width)

    np.testing.assert_array_equal(run(x, y, jax.random.key(0)), seen + 3.0)
    other = np.asarray(run(x, y, jax.random.key(1))) - 3.0
    both = dropped & (other == 0)
    assert abs(both.mean() - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / seen.size)


def test_without_a_key_nothing_is_dropped():
    x, y, params = example()
    with_dropout = jax.jit(LoRA(rank=3, dropout=0.9).module(SITE).apply)({"params": params}, x, y)
    without = jax.jit(LoRA(rank=3).module(SITE).apply)({"params": params}, x, y)
    np.testing.assert_array_equal(with_dropout, without)


def test_products_follow_the_stream_in_half_precision():
    x, y, params = example()
    result = LoRA(rank=3).module(SITE).apply({"params": params}, jnp.bfloat16(x), jnp.bfloat16(y))
    assert result.dtype == jnp.bfloat16
    exact = y + 16 / 3 * (x @ params["a"]) @ params["b"]
    # About six roundings to 8 bits lie one behind the other.
    close(np.asarray(result, np.float32), exact, tolerance=6 * 2**-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"alpha": -1.0}, "alpha must be positive, got -1.0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"init": "pisa"}, "unknown lora init 'pisa'; did you mean 'pissa'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LoRA(**settings)


@pytest.mark.torch
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_output_and_gradients_equal_pefts(rank_stabilised):
    x, _, params = example()
    generator = np.random.default_rng(3)
    kernel, bias, slope = (generator.standard_normal(s).astype(np.float32) for s in ((IN, OUT), (OUT,), (TOKENS, OUT)))
    layer = peft_linear({"r": 3, "lora_alpha": 7, "use_rslora": rank_stabilised}, kernel, bias)
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assign(first, params["a"].T)
    assign(second, params["b"].T)
    expected = run(layer, x, slope)

    method = LoRA(rank=3, alpha=7.0, rank_stabilised=rank_stabilised)

    @jax.jit
    def forward(params):
        return method.module(SITE).apply({"params": params}, jnp.asarray(x), jnp.asarray(x @ kernel + bias))

    close(forward(params), expected)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(forward(p) * slope)))(params)
    close(gradient["a"], first.grad.numpy().T)
    close(gradient["b"], second.grad.numpy().T)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count(method, SITE)


# In a whole CLIP: tables of ranks and alphas, projections, magnitudes and singular vectors


IN_A_CLIP = {
    "tables": Placement(
        LoRA(rank=2, alpha=3.0),
        slots=("attn_q", "mlp_fc1"),
        ranks=((r"vision/attn_q/[13]", 4), ("text/.*", 1)),
        alphas=((r"vision/attn_q/1", 7.0), (r"text/mlp_fc1/.*", 2.0)),
    ),
    "projection": Placement(LoRA(rank=3, alpha=2.0, rank_stabilised=True), slots=("projection", "attn_out")),
    "dora": Placement(
        LoRA(rank=2, alpha=3.0, decomposed=True), slots=("attn_v", "projection"), alphas=((r"vision/attn_v/0", 1.0),)
    ),
    "pissa": Placement(LoRA(rank=2, alpha=3.0, init="pissa"), slots=("mlp_fc2", "projection")),
}


def scale_at(name, tower, slot, layer):
    """What the tables above say, by hand."""
    if name == "tables":
        rank, alpha = 2, 3.0
        if tower == "text":
            rank, alpha = 1, 2.0 if slot == "mlp_fc1" else 3.0
        elif slot == "attn_q" and layer in (1, 3):
            rank, alpha = 4, 7.0 if layer == 1 else 3.0
        return rank, alpha / rank
    if name == "dora":
        return 2, (1.0 if (tower, slot, layer) == ("vision", "attn_v", 0) else 3.0) / 2
    return {"projection": (3, 2 / math.sqrt(3)), "pissa": (2, 1.5)}[name]


def merged(name, plan, adapters, params):
    """The backbone with every update in its kernels, in float64 and one layer at a time."""
    flat = {leaf: np.array(value, np.float64) for leaf, value in names.flatten(params).items()}
    leaves = names.flatten(adapters)
    for group in plan.groups:
        slot = group.site.slot
        kernels = flat[f"{group.site.tower}/{LINEAR_MAPS[slot]}/kernel"]
        for index, layer in enumerate(group.layers[0]):
            own = {leaf.name: np.asarray(leaves[leaf.path][index], np.float64) for leaf in group.leaves}
            rank, scale = scale_at(name, group.site.tower, slot, layer)
            assert own["a"].shape[1] == own["b"].shape[0] == rank
            kernel = kernels if slot == "projection" else kernels[layer]
            new = kernel + scale * own["a"] @ own["b"]
            if name == "pissa":
                new -= scale * own["frozen/a"] @ own["frozen/b"]
            if name == "dora":
                new *= own["magnitude"] / np.linalg.norm(new, axis=0)
            kernel[...] = new
    return names.unflatten({leaf: value.astype(np.float32) for leaf, value in flat.items()})


@pytest.mark.usefixtures("quick_compilation_of_a_test")
@pytest.mark.parametrize("name", IN_A_CLIP)
def test_a_clip_with_adapters_is_a_clip_with_merged_kernels(name):
    plan, params = place(IN_A_CLIP[name], CONFIG.towers), backbone(CONFIG)
    adapters = drawn(plan.shapes(), 6, 0.2, around=plan.init(jax.random.key(0), params))
    images, tokens, mask = inputs(CONFIG)

    @jax.jit
    def features(params, adapters):
        bound = None if adapters is None else plan.bind(adapters)
        out = model(CONFIG).apply({"params": params}, images, tokens, mask, adapters=bound)
        return out.image_features, out.text_features

    plain, adapted = features(params, None), features(params, adapters)
    expected = features(merged(name, plan, adapters, params), None)
    for ours, theirs, without in zip(adapted, expected, plain, strict=True):
        close(ours, theirs, 1e-5)
        assert not np.allclose(ours, without, rtol=1e-2)


# Presets and places


def test_published_count_of_clip_lora():
    assert place(clip_lora(), CLIPConfig.preset("vit_b_16").towers).parameter_count() == 184_320
    # Its authors divide alpha by the root of the rank.
    assert clip_lora().method.scale == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize(
    ("tasks", "added", "published"),
    [((), 7_077_888, 5.93), (TASKS, 4 * 7_077_888, 17.71)],
    ids=["single", "multiple"],
)
def test_published_share_of_vl_adapters_lora(tasks, added, published):
    # Queries and values of 6 + 2 * 6 attentions of BART-base, an update for each task or one for all, beside what is
    # always trained and every bias, of which there is one set either way.
    attentions = {"vision": TowerShape(6, 768, 3072), "text": TowerShape(2 * 6, 768, 3072)}
    plan = place(dataclasses.replace(vl_adapter_lora(), tasks=tasks), attentions)
    assert plan.parameter_count() == added
    always, biases = 1_582_848, 125_952
    base = 139_420_416 + 200 * 768 + always
    assert round(100 * (added + always + biases) / (base + added), 2) == published
    assert plan.placements[0].method.scale == 0.25


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            Placement(LoRA(rank=25), slots=("attn_q",)),
            "rank 25 exceeds the map at text/attn_q, 24 to 24; give at most 24",
        ),
        (
            Placement(LoRA(rank=17, init="pissa"), slots=("projection",)),
            "rank 17 exceeds the map at vision/projection, 32 to 16; give at most 16",
        ),
        (
            Placement(LoRA(), slots=("attn_q",), ranks=(("text/attn_q/1", 30),)),
            "rank 30 exceeds the map at text/attn_q",
        ),
        (
            Placement(LoRA(), slots=("attn_q",), alphas=(("text/attn_q/0", -2.0),)),
            "alpha must be positive, got -2.0",
        ),
        (
            Placement(LoRA(), slots=("attn_q",), alphas=(("text/attn_k/0", 2.0),)),
            "unknown pattern of ranks or alphas 'text/attn_k/0'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(placement, message):
    with pytest.raises(UserError, match=message):
        place(placement, CONFIG.towers)


@pytest.mark.parametrize("slot", ["mlp_hidden", "attn_kv", "mlp_out", "embed"])
def test_slots_without_a_map_are_refused(slot):
    with pytest.raises(UserError, match=f"lora cannot sit in slot '{slot}'; it may sit in attn_q, "):
        Placement(LoRA(), slots=(slot,))
