"""Prefix tuning against its definition, against PyTorch's attention, and in a model with both towers by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_by_hand import image_by_hand, text_by_hand
from settings import CONFIG, backbone, count, drawn, inputs, model, site

from vla_jax import names
from vla_jax.adapters import Placement, Prefix, place, prefix_tuning
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.transformer import Attention, Compute, TowerConfig
from vla_jax.slots import KeysValues

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, TOKENS = 8, 5
SITE = site("attn_kv", WIDTH, WIDTH)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(ours, theirs, tolerance=2e-6):
    assert np.linalg.norm(np.subtract(ours, theirs)) <= tolerance * np.linalg.norm(theirs)


# The module


def test_learned_keys_and_values_stand_in_front():
    x, keys, values = draw(0, 4, WIDTH), draw(1, 4, WIDTH), draw(2, 4, WIDTH)
    params = {"key": draw(3, 2, WIDTH), "value": draw(4, 2, WIDTH)}
    result = jax.jit(Prefix(2).module(SITE).apply)({"params": params}, x, (keys, values))
    np.testing.assert_array_equal(result[0], [*params["key"], *keys])
    np.testing.assert_array_equal(result[1], [*params["value"], *values])


@pytest.mark.torch
@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_gradients_equal_pytorchs(causal):
    torch = pytest.importorskip("torch")
    functional, heads = torch.nn.functional, 2
    config = TowerConfig(width=WIDTH, depth=1, heads=heads, mlp_width=8)
    x, slope = draw(1, 3, TOKENS, WIDTH), draw(2, 3, TOKENS, WIDTH)
    weights = {
        name: {"kernel": draw(n, WIDTH, WIDTH), "bias": draw(n + 4, WIDTH)}
        for n, name in enumerate(("q", "k", "v", "out"))
    }
    params = {"key": draw(9, 2, WIDTH), "value": draw(10, 2, WIDTH)}

    tensors = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in params.items()}

    def linear(name, a):
        return functional.linear(a, torch.tensor(weights[name]["kernel"].T.copy()), torch.tensor(weights[name]["bias"]))

    def to_heads(a):
        return a.unflatten(-1, (heads, WIDTH // heads)).transpose(1, 2)

    stream = torch.tensor(x)
    key = torch.cat([tensors["key"].expand(3, -1, -1), linear("k", stream)], 1)
    value = torch.cat([tensors["value"].expand(3, -1, -1), linear("v", stream)], 1)
    seen = torch.ones(TOKENS, TOKENS).tril() > 0 if causal else torch.ones(TOKENS, TOKENS) > 0
    seen = torch.cat([torch.ones(TOKENS, 2) > 0, seen], 1)
    mixed = functional.scaled_dot_product_attention(to_heads(linear("q", stream)), to_heads(key), to_heads(value), seen)
    expected = linear("out", mixed.transpose(1, 2).flatten(2))
    (expected * torch.tensor(slope)).sum().backward()

    class OnePrefix:
        """The prefix for every example of the batch, in the block's slot."""

        def __init__(self, params):
            self.params, self.readings = params, {}

        def __call__(self, name, x, y, weights=None):
            if name != "attn_kv":
                return y
            module = Prefix(2).module(SITE)
            put = lambda x, keys, values: module.apply({"params": self.params}, x, (keys, values))  # noqa: E731
            return KeysValues(*jax.vmap(put)(x, y.keys, y.values))

    bias = np.where(np.tril(np.ones((TOKENS, TOKENS))), 0.0, -np.inf).astype(np.float32)[None, None] if causal else None

    @jax.jit
    def forward(params, x, bias):
        return Attention(config, Compute()).apply({"params": weights}, x, bias, OnePrefix(params))

    close(forward(params, x, bias), expected.detach().numpy())
    gradient = jax.grad(lambda p: jnp.sum(forward(p, x, bias) * slope))(params)
    for name, tensor in tensors.items():
        close(gradient[name], tensor.grad.numpy())


# In a model


def test_a_model_equals_both_towers_by_hand():
    plan = place(Placement(Prefix(3)), CONFIG.towers)
    adapters = drawn(plan.shapes(), 1, 0.5)
    params, (images, tokens, mask) = backbone(CONFIG), inputs(CONFIG)
    run = jax.jit(
        lambda params, adapters: model(CONFIG).apply(
            {"params": params}, images, tokens, mask, adapters=plan.bind(adapters)
        )
    )
    out = run(params, adapters)
    before = {
        tower: {layer: (own["attn_kv"]["key"][layer], own["attn_kv"]["value"][layer]) for layer in range(depth)}
        for (tower, own), depth in zip(sorted(adapters["adapter"].items()), (2, 4), strict=True)
    }
    for row in range(3):
        close(out.image_features[row], image_by_hand(params, CONFIG, images[row], {}, before["vision"]).feature)
        close(out.text_features[row], text_by_hand(params, CONFIG, tokens[row], mask[row], {}, before["text"]).feature)


def test_the_network_serves_all_blocks_of_a_tower():
    plan = place(Placement(Prefix(2, hidden=5), towers=("vision",)), CONFIG.towers)
    shapes = {name: leaf.shape for name, leaf in names.flatten(plan.shapes()).items()}
    assert shapes == {
        "adapter/vision/attn_kv/embedding": (2, 32),
        "adapter/vision/attn_kv/down/kernel": (32, 5),
        "adapter/vision/attn_kv/down/bias": (5,),
        "adapter/vision/attn_kv/to_key/kernel": (4, 5, 32),
        "adapter/vision/attn_kv/to_key/bias": (4, 32),
        "adapter/vision/attn_kv/to_value/kernel": (4, 5, 32),
        "adapter/vision/attn_kv/to_value/bias": (4, 32),
    }
    # Li and Liang: one map to the keys and values of all L blocks at once, 2 L w wide.
    width, hidden, depth = 32, 5, 4
    assert plan.parameter_count() == 2 * width + (width * hidden + hidden) + (hidden + 1) * depth * 2 * width


def test_preset_on_b_16():
    towers = CLIPConfig.preset("vit_b_16").towers
    expected = sum(10 * w + (w * 512 + 512) + 513 * 12 * 2 * w for w in (768, 512))
    assert place(prefix_tuning(), towers).parameter_count() == expected
    assert place(prefix_tuning(hidden=None), towers).parameter_count() == 12 * 2 * 10 * (768 + 512)
    assert count(Prefix(10), site("attn_kv", 768, 768)) == 2 * 10 * 768
