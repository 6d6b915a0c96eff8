"""PHM and Compacter against sums of Kronecker products, made by NumPy."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_counts import B_16, BART_BASE, T5_BASE, TASKS, trained_share
from settings import count, drawn, site
from through_slots import through_slots

from vla_jax import names
from vla_jax.adapters import PHM, Placement, Share, compacter, place, vl_adapter_compacter
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, TOKENS = 12, 5
SITE = site("mlp_out", WIDTH, WIDTH)

SETTINGS = {
    "compacter": PHM(n=2, rank=4, activation="identity"),
    "factor_rank": PHM(n=2, rank=4, factor_rank=2, activation="identity"),
    "own_rules": PHM(n=4, rank=8, shared_rule=False, activation="identity"),
    "phm": PHM(n=3, rank=6, factorised=False, activation="relu"),
    "phm_own_rules": PHM(n=4, rank=4, factorised=False, shared_rule=False, activation="relu"),
    "one_block": PHM(n=1, rank=3, factorised=False, activation="relu"),
    "reduction": PHM(n=2, reduction=3, activation="relu"),
}


def weights(method: PHM, params, name: str) -> np.ndarray:
    """A map's kernel, ``sum_i A_i (x) B_i``."""
    flat = {leaf: np.asarray(value, np.float64) for leaf, value in names.flatten(params).items()}
    rule = flat["rule"] if method.shared_rule else flat[f"{name}/rule"]
    if method.factorised:
        blocks = [left @ right for left, right in zip(flat[f"{name}/left"], flat[f"{name}/right"], strict=True)]
    else:
        blocks = flat[f"{name}/blocks"]
    return sum(np.kron(a, b) for a, b in zip(rule, blocks, strict=True))


def reference(method: PHM, params, y: np.ndarray) -> np.ndarray:
    """The bottleneck with the maps written out."""
    y = np.asarray(y, np.float64)
    hidden = y @ weights(method, params, "down") + np.asarray(params["down"]["bias"])
    hidden = np.maximum(hidden, 0) if method.activation == "relu" else hidden
    return y + hidden @ weights(method, params, "up") + np.asarray(params["up"]["bias"])


def example() -> np.ndarray:
    return np.random.default_rng(1).normal(0.2, 1.0, (TOKENS, WIDTH)).astype(np.float32)


def parameters(method: PHM):
    shapes = jax.eval_shape(method.module(SITE).init, jax.random.key(0), example(), example())["params"]
    return drawn(shapes, 2, 0.6)


def applied(method: PHM, params, y) -> np.ndarray:
    return np.asarray(jax.jit(method.module(SITE).apply)({"params": params}, y, y))


def close(ours, theirs, tolerance=2e-6):
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", SETTINGS)
def test_module_equals_sums_of_kronecker_products(name):
    method, y = SETTINGS[name], example()
    params = parameters(method)
    expected = reference(method, params, y)
    assert np.linalg.norm(expected - y) > 0.1 * np.linalg.norm(y)
    close(applied(method, params, y), expected)


def test_with_one_block_and_a_rule_of_one_a_map_is_a_plain_one():
    method, y = SETTINGS["one_block"], example()
    params = parameters(method) | {"rule": jnp.ones((1, 1, 1))}
    np.testing.assert_array_equal(weights(method, params, "down"), np.float64(params["down"]["blocks"][0]))
    close(applied(method, params, y), reference(method, params, y))


def test_hamilton_s_rule_multiplies_quaternions():
    # The example of Zhang et al.: with the signs of i, j and k as rule, a map multiplies by a quaternion.
    signs = [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
        [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
        [[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
    ]
    rule = jnp.asarray(signs, jnp.float32).transpose(0, 2, 1)  # x W instead of W x
    method = PHM(n=4, rank=4, factorised=False, activation="identity")
    place_ = site("mlp_out", 4, 4)
    q, x = np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.3, 1.5, -1.0, 2.0])
    params = {
        "rule": rule,
        "down": {"blocks": jnp.asarray(q[:, None, None], jnp.float32), "bias": jnp.zeros(4)},
        "up": {"blocks": jnp.asarray([1.0, 0, 0, 0], jnp.float32)[:, None, None], "bias": jnp.zeros(4)},
    }
    y = jnp.asarray(x[None], jnp.float32)
    result = jax.jit(method.module(place_).apply)({"params": params}, y, y) - y
    a, b, c, d = q
    e, f, g, h = x
    product = [a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g]
    product += [a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e]
    np.testing.assert_allclose(result[0], product, rtol=1e-5)


@pytest.mark.parametrize("method", SETTINGS.values(), ids=SETTINGS)
def test_parameters_are_those_of_the_formula(method):
    shapes = {name: leaf.shape for name, leaf in names.flatten(parameters(method)).items()}
    assert method.parameter_counts(SITE) == {name: math.prod(shape) for name, shape in shapes.items()}


def test_parameter_counts_by_hand():
    # Down 12 x 4 and up 4 x 12: left and right factors of rank 1, biases, one rule of 2 x 2 x 2.
    assert count(PHM(n=2, rank=4), SITE) == 2 * (12 + 4) + 4 + 12 + 8
    assert count(PHM(n=4, rank=4, factorised=False, shared_rule=False), SITE) == 2 * (12 * 4 // 4 + 64) + 4 + 12


def test_new_parameters_are_drawn_as_published():
    method = PHM(n=2, rank=64, factor_rank=8, init="glorot", shared_rule=False)
    wide = jnp.zeros((1, 512))
    init = jax.jit(method.module(site("mlp_out", 512, 512)).init)
    new = names.flatten(init(jax.random.key(0), wide, wide)["params"])
    for name, fans in {"down/left": 256 + 8, "down/right": 8 + 32, "up/left": 32 + 8, "up/right": 8 + 256}.items():
        bound = math.sqrt(2) * math.sqrt(6 / fans)
        assert np.abs(new[name]).max() <= bound
        # At least 512 uniform draws: the deviation's own standard error is 2 %.
        assert np.std(new[name]) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert 0.001 < np.std(new["down/rule"]) < 0.03
    assert not np.any(new["down/bias"])
    zero = jax.jit(dataclasses.replace(method, init="zero_up").module(site("mlp_out", 512, 512)).init)
    assert not np.any(zero(jax.random.key(0), wide, wide)["params"]["up"]["right"])


# The rule


def test_a_shared_rule_is_one_for_all_places_and_each_task_has_its_own():
    places = Placement(PHM(n=2, rank=4), slots=("attn_sublayer", "mlp_out"), tasks=("a", "b", "c"))
    towers = {"vision": TowerShape(3, 12, 24), "text": TowerShape(2, 8, 16)}
    shapes = {name: leaf.shape for name, leaf in names.flatten(place(places, towers).shapes()).items()}
    assert {name: shape for name, shape in shapes.items() if "rule" in name} == {"adapter/shared/rule": (3, 2, 2, 2)}
    assert shapes["adapter/vision/mlp_out/down/left"] == (3, 3, 2, 6, 1)
    own = dataclasses.replace(places, method=PHM(n=2, rank=4, shared_rule=False), tasks=())
    shapes = {name: leaf.shape for name, leaf in names.flatten(place(own, towers).shapes()).items()}
    assert len([name for name in shapes if "rule" in name]) == 8
    assert shapes["adapter/text/attn_sublayer/up/rule"] == (2, 2, 2, 2)
    joined = dataclasses.replace(places, sharing=(Share("rule", ("layers", "slots", "towers", "tasks")),))
    assert names.flatten(place(joined, towers).shapes())["adapter/shared/rule"].shape == (2, 2, 2)


def test_every_place_acts_with_the_one_rule():
    method = PHM(n=2, rank=4, activation="identity")
    towers = {"vision": TowerShape(2, 12, 24), "text": TowerShape(1, 8, 16)}
    plan = place(Placement(method, slots=("attn_sublayer", "mlp_out")), towers)
    params, draw = drawn(plan.shapes(), 3, 0.5), np.random.default_rng(4).standard_normal
    streams = {tower: draw((2, 3, shape.width)).astype(np.float32) for tower, shape in towers.items()}
    results = jax.jit(lambda params: through_slots(plan, params, jax.tree.map(jnp.asarray, streams)))(params)
    own = params["adapter"]
    for tower, shape in towers.items():
        expected = streams[tower].astype(np.float64)
        for layer in range(shape.depth):
            for slot in ("attn_sublayer", "mlp_out"):
                here = jax.tree.map(lambda a, layer=layer: a[layer], own[tower][slot]) | {"rule": own["shared"]["rule"]}
                expected = np.stack([reference(method, here, y) for y in expected])
        close(np.asarray(results[tower]), expected, 1e-5)


# Published counts


def test_published_counts_of_compacter():
    # T5 base, adapters and LayerNorms trained: 0.073 % with both sublayers, 0.047 % with the MLP alone (Compacter++).
    both, layer_norms, whole = compacter(), (2 * 12 + 1 + 3 * 12 + 1) * 768, 222_903_552
    assert (both.method.n, both.method.reduction, both.method.factor_rank) == (4, 32, 1)
    count = place(both, T5_BASE).parameter_count()
    assert count == 48 * (4 * 192 + 4 * 6 + 24 + 4 * 6 + 4 * 192 + 768) + 64
    assert round(100 * (count + layer_norms) / whole, 3) == 0.073
    mlp_alone = place(dataclasses.replace(both, slots=("mlp_out",)), T5_BASE).parameter_count()
    assert round(100 * (mlp_alone + layer_norms) / whole, 3) == 0.047


@pytest.mark.parametrize(("tasks", "published"), [((), 2.70), (TASKS, 7.05)], ids=["single", "multiple"])
def test_published_shares_of_vl_adapter(tasks, published):
    # What its code runs under the name is PHM: neither a shared rule nor factors, n = 2.
    count = place(dataclasses.replace(vl_adapter_compacter(), tasks=tasks), BART_BASE).parameter_count()
    assert count == max(1, len(tasks)) * 30 * (2 * 2 * 384 * 48 + 96 + 768 + 2 * 8)
    assert round(trained_share(count), 2) == published


def test_products_follow_the_stream_in_half_precision():
    y = example()
    for method in (SETTINGS["compacter"], SETTINGS["phm"]):
        params = parameters(method)
        result = applied(method, params, jnp.bfloat16(y))
        assert result.dtype == jnp.bfloat16
        # About ten roundings to 8 bits lie one behind the other.
        close(np.asarray(result, np.float32), reference(method, params, y), tolerance=10 * 2**-8)


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"factor_rank": 0}, "factor_rank must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"activation": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
        ({"init": "zero"}, "unknown phm init 'zero'; did you mean 'zero_up'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PHM(**settings)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PHM(n=5, rank=5), "n = 5 does not divide the width 768 of vision/mlp_out; both can be divided by 1"),
        (PHM(n=4, rank=6), "n = 4 does not divide the bottleneck's width 6 there; both can be divided by 1, 2, 3, 6"),
        (PHM(n=4, reduction=512), "n = 4 does not divide the bottleneck's width 1 there"),
        (
            PHM(n=4, rank=8, factor_rank=3),
            "factor_rank 3 exceeds the blocks at vision/mlp_out, 192 by 2; .* at most 2",
        ),
        (PHM(n=4, reduction=1000), "reduction 1000 leaves nothing of a width of 768"),
    ],
)
def test_what_cannot_be_cut_into_blocks_is_refused_when_placed(method, message):
    with pytest.raises(UserError, match=message):
        place(Placement(method, slots=("mlp_out",)), B_16)
