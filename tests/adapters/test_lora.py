"""LoRA against its definition, one number at a time, and against peft's layer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.adapters import LoRA
from vla_jax.errors import UserError

TOKENS, IN, OUT = 4, 5, 6


def example():
    """A linear map's input and output, and what training might have made of A and B for rank 3."""
    generator = np.random.default_rng(1)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(TOKENS, IN), draw(TOKENS, OUT), {"a": draw(IN, 3), "b": draw(3, OUT)}


def close(ours, theirs, tolerance=1e-6):
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


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
    close(np.asarray(jax.jit(method.module().apply)({"params": params}, x, y)), expected)


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
    result = jax.jit(method.module().apply)({"params": params}, x, (x @ kernel).astype(np.float32))
    close(np.asarray(result), x @ merged)


def test_new_parameters():
    x, y = jnp.zeros((1, 400)), jnp.zeros((1, 300))
    new = jax.jit(LoRA(rank=100).module().init)(jax.random.key(0), x, y)["params"]
    assert {name: leaf.shape for name, leaf in new.items()} == {"a": (400, 100), "b": (100, 300)}
    assert LoRA(rank=100).parameter_count(400, 300) == 400 * 100 + 100 * 300
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
    run = jax.jit(lambda x, y, key: method.module().apply({"params": params}, x, y, rngs={"dropout": key}))
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
    with_dropout = jax.jit(LoRA(rank=3, dropout=0.9).module().apply)({"params": params}, x, y)
    without = jax.jit(LoRA(rank=3).module().apply)({"params": params}, x, y)
    np.testing.assert_array_equal(with_dropout, without)


def test_products_follow_the_stream_in_half_precision():
    x, y, params = example()
    result = LoRA(rank=3).module().apply({"params": params}, jnp.bfloat16(x), jnp.bfloat16(y))
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
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LoRA(**settings)


@pytest.mark.torch
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_output_and_gradients_equal_pefts(rank_stabilised):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    x, _, params = example()
    generator = np.random.default_rng(3)
    kernel, bias, slope = (generator.standard_normal(s).astype(np.float32) for s in ((IN, OUT), (OUT,), (TOKENS, OUT)))
    settings = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=rank_stabilised, target_modules=["linear"])
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"linear": torch.nn.Linear(IN, OUT)}), settings)
    layer = theirs.base_model.model["linear"]
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for tensor, array in (
            (layer.base_layer.weight, kernel.T),
            (layer.base_layer.bias, bias),
            (first, params["a"].T),
            (second, params["b"].T),
        ):
            tensor.copy_(torch.tensor(array.copy()))
    expected = layer(torch.tensor(x))
    (expected * torch.tensor(slope)).sum().backward()

    method = LoRA(rank=3, alpha=7.0, rank_stabilised=rank_stabilised)

    @jax.jit
    def forward(params):
        return method.module().apply({"params": params}, jnp.asarray(x), jnp.asarray(x @ kernel + bias))

    close(np.asarray(forward(params)), expected.detach().numpy())
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(forward(p) * slope)))(params)
    close(np.asarray(gradient["a"]), first.grad.numpy().T)
    close(np.asarray(gradient["b"]), second.grad.numpy().T)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == method.parameter_count(IN, OUT)
