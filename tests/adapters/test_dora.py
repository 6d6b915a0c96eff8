"""DoRA against its definition, one number at a time, and against peft's layer, dropout and half precision included."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_layer import assign, close, peft_linear, run
from settings import count, site

from vla_jax.adapters import LoRA, Placement, Share, place
from vla_jax.adapters.lora import column_norms
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError
from vla_jax.slots import LinearWeights

TOKENS, IN, OUT, RANK = 4, 7, 6, 3
SITE = site("attn_q", IN, OUT)


def draw(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def trained():
    """What training might have made of a rank of 3."""
    drawn = {"a": draw(IN, RANK, seed=2), "b": draw(RANK, OUT, seed=3), "magnitude": 1 + draw(OUT, seed=4) ** 2}
    return jax.tree.map(jnp.asarray, drawn)


KERNEL, BIAS, X, SLOPE = draw(IN, OUT, seed=5), draw(OUT, seed=6), draw(TOKENS, IN, seed=7), draw(TOKENS, OUT, seed=8)


def weights(bias=BIAS):
    return LinearWeights(jnp.asarray(KERNEL), None if bias is None else jnp.asarray(bias))


@functools.partial(jax.jit, static_argnames=("method", "with_bias"))
def forward(params, method, with_bias=True, key=None):
    own = weights(BIAS if with_bias else None)
    y = X @ own.kernel + (own.bias if with_bias else 0)
    rngs = None if key is None else {"dropout": key}
    return method.module(SITE).apply({"params": params}, jnp.asarray(X), y, own, rngs=rngs)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (LoRA(rank=RANK, alpha=6.0, decomposed=True), 2.0),
        (LoRA(rank=RANK, alpha=2.0, decomposed=True, rank_stabilised=True), 2 / math.sqrt(3)),
        (LoRA(rank=RANK, alpha=6.0, decomposed=True, dropout=0.5), 2.0),
    ],
    ids=["alpha", "rank_stabilised", "dropout_in_evaluation"],
)
def test_module_equals_the_definition(method, scale, with_bias):
    params = trained()
    kernel = [[0.0] * OUT for _ in range(IN)]
    for i in range(IN):
        for j in range(OUT):
            low_rank = sum(float(params["a"][i, r]) * float(params["b"][r, j]) for r in range(RANK))
            kernel[i][j] = float(KERNEL[i, j]) + scale * low_rank
    expected = np.zeros((TOKENS, OUT))
    for j in range(OUT):
        norm = math.sqrt(sum(kernel[i][j] ** 2 for i in range(IN)))
        for token in range(TOKENS):
            product = sum(float(X[token, i]) * kernel[i][j] for i in range(IN))
            expected[token, j] = float(params["magnitude"][j]) / norm * product + with_bias * float(BIAS[j])
    close(forward(params, method, with_bias), expected)


def test_new_parameters():
    method = LoRA(rank=RANK, decomposed=True)
    new = method.module(SITE).init(jax.random.key(0), jnp.asarray(X), jnp.zeros((TOKENS, OUT)), weights())["params"]
    close(new["magnitude"], [math.sqrt(sum(float(w) ** 2 for w in column)) for column in KERNEL.T])
    assert not np.any(new["b"])
    assert method.parameter_counts(SITE) == {"a": IN * RANK, "b": RANK * OUT, "magnitude": OUT}
    assert count(method, SITE) == sum(leaf.size for leaf in new.values())


def test_magnitudes_are_one_number_an_output():
    towers = CLIPConfig.preset("vit_b_16").towers
    slots = ("attn_q", "attn_k", "attn_v", "mlp_fc1", "mlp_fc2")
    plain, decomposed = (place(Placement(LoRA(decomposed=d), slots=slots), towers) for d in (False, True))
    outputs = 12 * (3 * 768 + 3072 + 768) + 12 * (3 * 512 + 2048 + 512)
    assert decomposed.parameter_count() - plain.parameter_count() == outputs


def peft_layer(method, kernel=KERNEL, bias=BIAS, init=True):
    config = {"r": RANK, "lora_alpha": method.alpha, "use_dora": True, "use_rslora": method.rank_stabilised}
    return peft_linear(config | {"lora_dropout": method.dropout, "init_lora_weights": init}, kernel, bias)


def set_trained(layer, params):
    assign(layer.lora_A["default"].weight, params["a"].T)
    assign(layer.lora_B["default"].weight, params["b"].T)
    assign(layer.lora_magnitude_vector["default"].weight, params["magnitude"])


def assert_gradients_equal(gradient, layer, tolerance=1e-6):
    close(gradient["a"], layer.lora_A["default"].weight.grad.numpy().T, tolerance)
    close(gradient["b"], layer.lora_B["default"].weight.grad.numpy().T, tolerance)
    close(gradient["magnitude"], layer.lora_magnitude_vector["default"].weight.grad.numpy(), tolerance)


@pytest.mark.torch
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_output_and_gradients_equal_pefts(rank_stabilised, with_bias):
    method = LoRA(rank=RANK, alpha=7.0, decomposed=True, rank_stabilised=rank_stabilised)
    layer = peft_layer(method, bias=BIAS if with_bias else None)
    new = method.module(SITE).init(jax.random.key(0), jnp.asarray(X), jnp.zeros((TOKENS, OUT)), weights())["params"]
    close(new["magnitude"], layer.lora_magnitude_vector["default"].weight.detach().numpy())
    set_trained(layer, trained())
    close(forward(trained(), method, with_bias), run(layer, X, SLOPE))
    gradient = jax.grad(lambda p: jnp.sum(forward(p, method, with_bias) * SLOPE))(trained())
    assert_gradients_equal(gradient, layer)


def kept_entries(method, key):
    """Which inputs dropout lets through, times 1 / (1 - rate): what a LoRA of identities and no frozen map adds."""
    plain = LoRA(rank=IN, alpha=float(IN), dropout=method.dropout)
    identities = {"a": jnp.eye(IN), "b": jnp.eye(IN)}
    ones, place = jnp.ones((TOKENS, IN)), site("attn_q", IN, IN)
    return plain.module(place).apply({"params": identities}, ones, jnp.zeros_like(ones), rngs={"dropout": key})


@pytest.mark.torch
# From singular vectors, peft takes the start off its kernel and adds the update to what rounding left.
@pytest.mark.parametrize(("init", "tolerance"), [("default", 1e-6), ("pissa", 3e-6)])
def test_training_with_dropout_equals_pefts(init, tolerance):
    torch = pytest.importorskip("torch")
    method = LoRA(rank=RANK, alpha=7.0, decomposed=True, dropout=0.5, init=init)
    key = jax.random.key(3)
    mask = np.array(kept_entries(method, key))
    assert 0 < np.count_nonzero(mask) < mask.size

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(mask)

    layer = peft_layer(method, init=True if init == "default" else "pissa")
    params = trained()
    if init == "pissa":
        factors = method.module(SITE).init(jax.random.key(0), jnp.asarray(X), jnp.zeros((TOKENS, OUT)), weights())
        params["frozen"] = factors["params"]["frozen"]
    set_trained(layer, params)
    layer.lora_dropout["default"] = Masked()
    layer.train()
    close(forward(params, method, key=key), run(layer, X, SLOPE), tolerance)
    gradient = jax.grad(lambda p: jnp.sum(forward(p, method, key=key) * SLOPE))(params)
    assert_gradients_equal(gradient, layer, tolerance)


def test_the_norm_is_constant_in_the_gradient():
    # Equation 11 of the paper: m / n times the gradient of the new map, nothing of that of n.
    method, params = LoRA(rank=RANK, alpha=6.0, decomposed=True), trained()
    norms = np.linalg.norm(KERNEL + 2.0 * params["a"] @ params["b"], axis=0)

    def held(params):
        return X @ ((KERNEL + 2.0 * params["a"] @ params["b"]) * (params["magnitude"] / norms)) + BIAS

    def free(params):
        kernel = KERNEL + 2.0 * params["a"] @ params["b"]
        return X @ (kernel * (params["magnitude"] / jnp.linalg.norm(kernel, axis=0))) + BIAS

    ours, expected, other = (
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p) * SLOPE)))(params)
        for f in (functools.partial(forward, method=method), held, free)
    )
    for name in params:
        close(ours[name], expected[name])
    assert not np.allclose(ours["b"], other["b"], rtol=0.1)


def test_norms_are_those_of_the_whole_kernel():
    params = trained()
    start = jax.tree.map(jnp.asarray, {"a": draw(IN, RANK, seed=10), "b": draw(RANK, OUT, seed=11)})
    whole = KERNEL + 0.7 * np.asarray(params["a"], np.float64) @ params["b"]
    close(column_norms(jnp.asarray(KERNEL), params, None, 0.7), np.linalg.norm(whole, axis=0))
    whole = whole - 0.7 * np.asarray(start["a"], np.float64) @ start["b"]
    close(column_norms(jnp.asarray(KERNEL), params, start, 0.7), np.linalg.norm(whole, axis=0))


def test_an_output_whose_weights_are_zero_stays_the_bias():
    method = LoRA(rank=RANK, decomposed=True)
    kernel = jnp.asarray(KERNEL).at[:, 2].set(0.0)
    own = LinearWeights(kernel, jnp.asarray(BIAS))
    module, y = method.module(SITE), X @ kernel + BIAS
    params = module.init(jax.random.key(0), jnp.asarray(X), y, own)["params"]
    result, gradient = jax.jit(
        lambda p: (
            module.apply({"params": p}, jnp.asarray(X), y, own),
            jax.grad(lambda q: jnp.sum(module.apply({"params": q}, jnp.asarray(X), y, own) * SLOPE))(p),
        )
    )(params)
    close(result, y)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_no_example_has_a_kernel_of_its_own():
    # Each example has factors of its own under routing; [batch, in, out] would be the backbone once more for each.
    method, batch = LoRA(rank=RANK, decomposed=True), 5
    module, own = method.module(SITE), weights()
    params = jax.tree.map(lambda a: jnp.stack([a] * batch), trained())
    x, y = jnp.zeros((batch, TOKENS, IN)), jnp.zeros((batch, TOKENS, OUT))

    def loss(params):
        return jax.vmap(lambda p, x, y: module.apply({"params": p}, x, y, own))(params, x, y).sum()

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert f"tensor<{batch}x{IN}x{RANK}xf32>" in text
    assert f"tensor<{batch}x{IN}x{OUT}xf32>" not in text
    assert f"tensor<{batch}x{OUT}x{IN}xf32>" not in text


def test_half_precision():
    method, params = LoRA(rank=RANK, alpha=3.0, decomposed=True), trained()
    own = jax.tree.map(jnp.bfloat16, weights())
    x, y = jnp.bfloat16(X), jnp.bfloat16(X @ KERNEL + BIAS)
    result = method.module(SITE).apply({"params": params}, x, y, own)
    assert result.dtype == jnp.bfloat16
    # About eight roundings to 8 bits lie one behind the other.
    close(np.asarray(result, np.float32), forward(params, method), tolerance=8 * 2**-8)


@pytest.mark.parametrize("over", ["layers", "towers", "slots"])
@pytest.mark.parametrize("method", [LoRA(decomposed=True), LoRA(init="pissa")], ids=["magnitudes", "singular_vectors"])
def test_what_starts_from_frozen_weights_is_not_shared_between_places(method, over):
    with pytest.raises(UserError, match="starts from the frozen weights of each place, which others do not have"):
        Placement(method, slots=("attn_q",), sharing=(Share(".*", (over,)),))
    Placement(method, slots=("attn_q",), tasks=("one", "two"), sharing=(Share("a", ("tasks",)),))


def test_initialisation_needs_the_backbone():
    plan = place(Placement(LoRA(rank=2, decomposed=True), slots=("attn_q",)), CLIPConfig.preset("vit_b_32").towers)
    with pytest.raises(UserError, match="lora at adapter/vision/attn_q starts from the frozen weights; give the"):
        plan.init(jax.random.key(0))
