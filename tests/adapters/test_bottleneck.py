"""The bottleneck against its definition, written out one token and one unit at a time."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_counts import B_16, BART_BASE
from settings import count, drawn, site

from vla_jax import names
from vla_jax.adapters import (
    Bottleneck,
    adapter_plus,
    houlsby,
    parallel,
    pfeiffer,
    place,
    vl_adapter,
)
from vla_jax.errors import UserError

TOKENS, IN, OUT = 4, 5, 6
SITE = site("mlp_out", IN, OUT)

ACTIVATIONS = {
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
    "swish": lambda v: v / (1 + math.exp(-v)),
    "identity": lambda v: v,
}

SETTINGS = {
    "sequential": Bottleneck(rank=3),
    "parallel": Bottleneck(rank=3, parallel=True),
    "scaled": Bottleneck(rank=3, scale=-0.5, activation="swish"),
    "parallel_scaled": Bottleneck(rank=3, parallel=True, scale=4.0, activation="quick_gelu"),
    "norm": Bottleneck(rank=3, layer_norm=True, activation="gelu"),
    "parallel_norm": Bottleneck(rank=2, parallel=True, layer_norm=True, scale=2.0, activation="gelu_tanh"),
    "normal": Bottleneck(rank=5, init="normal", activation="identity"),
    "reduction": Bottleneck(reduction=3, activation="gelu"),
    "channel_scale": Bottleneck(rank=3, channel_scale=True, scale=2.0),
    "drop_path_in_evaluation": Bottleneck(rank=3, drop_path=0.9),
}


def reference(method: Bottleneck, params, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The definition, one number at a time."""
    flat = {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(params).items()}
    function, result = ACTIVATIONS[method.activation], np.array(y, np.float64)
    for token in range(len(y)):
        read = [float(v) for v in (x if method.parallel else y)[token]]
        if method.layer_norm:
            mean = sum(read) / len(read)
            variance = sum((v - mean) ** 2 for v in read) / len(read)
            read = [
                (v - mean) / math.sqrt(variance + 1e-5) * scale + bias
                for v, scale, bias in zip(read, flat["norm/scale"], flat["norm/bias"], strict=True)
            ]
        hidden = []
        for unit, bias in enumerate(flat["down/bias"]):
            hidden.append(function(bias + sum(v * flat["down/kernel"][i, unit] for i, v in enumerate(read))))
        for out in range(y.shape[1]):
            added = flat["up/bias"][out] + sum(h * flat["up/kernel"][unit, out] for unit, h in enumerate(hidden))
            result[token, out] += (flat["scale"][out] if method.channel_scale else method.scale) * added
    return result


def example(tokens: int = TOKENS):
    """A sublayer's input and output, of different widths so that they cannot be taken for one another."""
    generator = np.random.default_rng(1)
    return tuple(generator.normal(0.3, 1.5, (tokens, width)).astype(np.float32) for width in (IN, OUT))


def parameters(method: Bottleneck):
    """Parameters as training might leave them."""
    return drawn(jax.eval_shape(method.module(SITE).init, jax.random.key(0), *example())["params"], 2, 0.7)


def applied(method: Bottleneck, params, x, y) -> np.ndarray:
    """The module's output; compiled as a whole, which is quicker than one program an operation."""
    return np.asarray(jax.jit(method.module(SITE).apply)({"params": params}, x, y))


def close(ours, theirs, tolerance=1e-6):
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", SETTINGS)
def test_module_equals_the_definition(name):
    method, (x, y) = SETTINGS[name], example()
    params = parameters(method)
    expected = reference(method, params, x, y)
    assert np.linalg.norm(expected - y) > 0.1 * np.linalg.norm(y)
    close(applied(method, params, x, y), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_its_formula(activation):
    method, (x, y) = Bottleneck(rank=3, activation=activation), example()
    params = parameters(method)
    close(applied(method, params, x, y), reference(method, params, x, y))


def test_the_two_forms_of_gelu_are_told_apart():
    x, y = example()
    params = parameters(Bottleneck(rank=3))
    exact, tanh = (applied(Bottleneck(rank=3, activation=a), params, x, y) for a in ("gelu", "gelu_tanh"))
    assert np.abs(exact - tanh).max() > 1e-5


@pytest.mark.parametrize("method", SETTINGS.values(), ids=SETTINGS)
def test_parameters_are_those_of_the_formula(method):
    x, y = example()
    read = IN if method.parallel else OUT
    rank = method.rank or OUT // method.reduction
    expected = {"down/kernel": (read, rank), "down/bias": (rank,), "up/kernel": (rank, OUT), "up/bias": (OUT,)}
    if method.layer_norm:
        expected |= {"norm/scale": (read,), "norm/bias": (read,)}
    if method.channel_scale:
        expected["scale"] = (OUT,)
    shapes = jax.eval_shape(method.module(SITE).init, jax.random.key(0), x, y)["params"]
    assert {name: leaf.shape for name, leaf in names.flatten(shapes).items()} == expected
    assert count(method, SITE) == sum(math.prod(shape) for shape in expected.values())


def _new(init: str):
    x = jnp.zeros((1, 400))
    init = jax.jit(Bottleneck(rank=200, init=init).module(SITE).init)
    return names.flatten(init(jax.random.key(3), x, x)["params"])


def test_zero_up_starts_with_an_up_projection_of_zero_and_a_drawn_down_projection():
    new = _new("zero_up")
    assert not np.any(new["up/kernel"])
    assert not np.any(new["up/bias"])
    assert not np.any(new["down/bias"])
    bound, down = 400**-0.5, np.asarray(new["down/kernel"])
    assert np.abs(down).max() <= bound
    # 80,000 uniform draws: the deviation's own standard error is 0.16 %.
    assert np.std(down) == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_normal_draws_both_kernels_as_vl_adapter_does():
    new = _new("normal")
    for kernel in ("down/kernel", "up/kernel"):
        # 80,000 normal draws: the deviation's own standard error is 0.25 %, the mean's 0.00007.
        assert np.std(new[kernel]) == pytest.approx(0.02, rel=0.015)
        assert abs(np.mean(new[kernel])) < 0.0004
    assert not np.any(new["up/bias"])
    assert not np.any(new["down/bias"])


def test_truncated_draws_both_kernels_within_two_deviations():
    new = _new("truncated")
    for kernel in ("down/kernel", "up/kernel"):
        values = np.asarray(new[kernel])
        assert 0.0199 < np.abs(values).max() <= 0.02
        # A normal variable cut at two deviations has 0.8796 of its deviation.
        assert np.std(values) == pytest.approx(0.008796, rel=0.01)


def test_learned_factors_start_at_the_scale():
    method, (x, y) = Bottleneck(rank=3, channel_scale=True, scale=0.25), example()
    new = jax.jit(method.module(SITE).init)(jax.random.key(0), x, y)["params"]
    np.testing.assert_array_equal(new["scale"], np.full(OUT, 0.25, np.float32))


# Stochastic depth


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    rate, examples = 0.3, 2000
    method, (x, y) = Bottleneck(rank=3, drop_path=rate), example()
    params = parameters(method)
    whole = applied(method, params, x, y) - y

    @jax.jit
    def run(key, x, y):
        call = lambda k: method.module(SITE).apply({"params": params}, x, y, rngs={"dropout": k}) - y  # noqa: E731
        return jax.vmap(call)(jax.random.split(key, examples))

    added = np.asarray(run(jax.random.key(0), x, y))
    dropped = np.array([not one.any() for one in added])
    assert abs(dropped.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / examples)
    kept = added[~dropped]
    np.testing.assert_allclose(kept, np.broadcast_to(whole / (1 - rate), kept.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(jax.random.key(0), x, y), added)
    assert (np.array([not one.any() for one in np.asarray(run(jax.random.key(1), x, y))]) != dropped).any()


# Published settings


def test_presets_sit_where_their_papers_put_them():
    both = ("attn_sublayer", "mlp_out")
    assert [preset().slots for preset in (houlsby, pfeiffer, parallel, adapter_plus, vl_adapter)] == [
        both,
        ("mlp_out",),
        ("mlp_out",),
        ("block_out",),
        both,
    ]
    widths = [preset().method.rank_for(768) for preset in (houlsby, pfeiffer, parallel, adapter_plus, vl_adapter)]
    assert widths == [48, 48, 384, 8, 96]
    assert parallel().method.starts_as_identity
    assert parallel().method.parallel
    assert parallel().method.scale == 4
    assert adapter_plus().method.drop_path == 0.1


@pytest.mark.parametrize(
    ("preset", "sites", "reduction", "more"),
    [(houlsby, 2, 16, 0), (pfeiffer, 1, 16, 0), (parallel, 1, 2, 0), (adapter_plus, 1, 96, 1), (vl_adapter, 2, 8, 0)],
)
def test_counts_of_the_presets_on_b_16(preset, sites, reduction, more):
    # 2 w r + r + w a site, and w more for learned factors.
    expected = sum(12 * sites * (2 * w * (w // reduction) + w // reduction + w + more * w) for w in (768, 512))
    assert place(preset(), B_16).parameter_count() == expected


def test_published_count_of_vl_adapter():
    # 30 sites in BART-base at a reduction of 8, the visual embedding and the LayerNorms (VL-PET, table 2: 4.18 %).
    assert place(vl_adapter(), BART_BASE).parameter_count() + 1_582_848 + 49_152 == 6_081_600


def test_products_follow_the_stream_in_half_precision():
    method, (x, y) = Bottleneck(rank=3, layer_norm=True, scale=0.5), example()
    params = parameters(method)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    result = applied(method, params, jnp.bfloat16(x), jnp.bfloat16(y))
    assert result.dtype == jnp.bfloat16
    # About ten roundings to 8 bits lie one behind the other.
    close(np.asarray(result, np.float32), reference(method, params, x, y), tolerance=10 * 2**-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": None, "reduction": None}, "either rank or reduction"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": -2}, "rank must be at least 1, got -2"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"activation": "geluu"}, "unknown activation 'geluu'; did you mean 'gelu'"),
        ({"activation": "tanh"}, "allowed|Allowed: relu, gelu"),
        ({"init": "zeros"}, "unknown bottleneck init 'zeros'.*zero_up"),
        ({"scale": 0.0}, "scale 0 switches the adapter off"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path must be at least 0 and below 1, got -0.1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Bottleneck(**settings)


def test_a_reduction_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="reduction 16 leaves nothing of a width of 8"):
        count(Bottleneck(), site("mlp_out", 8, 8))
    assert Bottleneck().rank_for(16) == 1
    assert Bottleneck().rank_for(47) == 2


def test_another_rank_wins_over_the_reduction_and_leaves_the_rest():
    method = Bottleneck(reduction=2, scale=3.0, activation="swish").with_rank(5)
    assert method.rank_for(100) == 5
    assert dataclasses.replace(method, rank=None, reduction=2) == Bottleneck(reduction=2, scale=3.0, activation="swish")


def test_the_rank_a_method_has_already_makes_no_other_method():
    # Sites are stacked by their method: two equal ones that differ in name only would claim the same parameters.
    assert Bottleneck(rank=4).with_rank(4) == Bottleneck(rank=4)
