"""Cross-Modal Adapter, MMA and UniAdapter against their definitions, and what their towers have in common."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_counts import B_16, T5_BASE
from settings import count, drawn, site
from through_slots import through_slots

from vla_jax import names
from vla_jax.adapters import MMA, CrossModal, Placement, cross_modal_adapter, mma, place, uniadapter
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDE, NARROW = 8, 6
TOWERS = {"vision": TowerShape(2, WIDE, 32), "text": TowerShape(2, NARROW, 24)}
SITE = site("mlp_out", WIDE, WIDE)


def linear(own, name: str, token: np.ndarray) -> np.ndarray:
    return token @ np.asarray(own[name]["kernel"], np.float64) + np.asarray(own[name]["bias"])


def cross_modal_reference(own, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``y + [W_u ; W_shared] quick_gelu(W_d y)``, the shared channels last."""
    hidden = [v / (1 + math.exp(-1.702 * v)) for v in linear(own, "down", y)]
    return y + np.concatenate([linear(own, "up", np.array(hidden)), linear(own, "shared", np.array(hidden))])


def mma_reference(own, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``y + s W_u relu(W_shared relu(W_d x))`` with s = 0.5."""
    hidden = np.maximum(linear(own, "down", x), 0)
    return y + 0.5 * linear(own, "up", np.maximum(linear(own, "shared", hidden), 0))


def uniadapter_reference(own, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``y + 0.1 W_u relu(W_d LN(x))``."""
    read = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
    read = read * np.asarray(own["norm"]["scale"], np.float64) + np.asarray(own["norm"]["bias"])
    return y + 0.1 * linear(own, "up", np.maximum(linear(own, "down", read), 0))


def small_uniadapter() -> Placement:
    return dataclasses.replace(uniadapter(), method=dataclasses.replace(uniadapter().method, rank=3), name="adapter")


CASES = {
    "cross_modal": (
        Placement(CrossModal(rank=3, shared=4), slots=("attn_sublayer", "mlp_out")),
        TOWERS,
        cross_modal_reference,
        {"shared"},
    ),
    "mma": (Placement(MMA(rank=3, scale=0.5)), TOWERS, mma_reference, {"shared"}),
    "uniadapter": (
        small_uniadapter(),
        TOWERS | {"text": TOWERS["vision"]},
        uniadapter_reference,
        {"down", "norm"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_towers_act_as_defined_with_what_they_share_layer_by_layer(name):
    placement, towers, reference, common = CASES[name]
    plan, draw = place(placement, towers), np.random.default_rng(4).standard_normal
    params = drawn(plan.shapes(), 3, 0.5)["adapter"]
    streams = {tower: draw((2, 3, shape.width)).astype(np.float32) for tower, shape in towers.items()}
    run = jax.jit(lambda params: through_slots(plan, {"adapter": params}, jax.tree.map(jnp.asarray, streams)))
    results = run(params)
    for slot in placement.slots:
        assert set(params["shared"][slot]) == common
        assert not common & set(params["vision"][slot])
    for tower in towers:
        expected = streams[tower].astype(np.float64)
        for layer in range(2):
            for slot in placement.slots:
                both = params[tower][slot] | params["shared"][slot]
                own = jax.tree.map(lambda a, layer=layer: a[layer], both)
                for example in range(2):
                    for token in range(3):
                        x = streams[tower][example, token].astype(np.float64)
                        expected[example, token] = reference(own, x, expected[example, token])
        assert np.linalg.norm(expected - streams[tower]) > 0.02 * np.linalg.norm(expected)
        assert np.linalg.norm(results[tower] - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", CASES)
def test_both_towers_gradients_meet_in_what_they_share_and_nowhere_else(name):
    placement, towers, _, _ = CASES[name]
    plan, draw = place(placement, towers), np.random.default_rng(4).standard_normal
    params = drawn(plan.shapes(), 3, 0.5)
    streams = {tower: jnp.asarray(draw((2, 3, shape.width)), jnp.float32) for tower, shape in towers.items()}

    def gradient(weights):
        def loss(params):
            results = through_slots(plan, params, streams)
            return sum(weight * jnp.sum(jnp.sin(results[tower])) for tower, weight in weights.items())

        return names.flatten(jax.grad(loss)(params))

    vision, text, both = jax.jit(
        lambda: [gradient({"vision": a, "text": b}) for a, b in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))]
    )()
    for path in both:
        np.testing.assert_allclose(both[path], vision[path] + text[path], rtol=1e-4, atol=1e-5)
        users = {tower for tower, own in (("vision", vision), ("text", text)) if np.any(own[path])}
        owner = path.split("/")[1]
        assert users == ({"vision", "text"} if owner == "shared" else {owner})


# Published counts


def test_published_count_of_mma():
    # Layers 5 to 12 of a B/16; only with a bias on each map and no LayerNorm does it come to 674,560.
    plan = place(mma(), B_16)
    assert {group.layers for group in plan.groups} == {(tuple(range(4, 12)),)}
    assert plan.parameter_count() == names.count(plan.shapes()) == 674_560
    per_layer = 768 * 32 + 32 + 32 * 768 + 768 + 512 * 32 + 32 + 32 * 512 + 512 + 32 * 32 + 32
    assert 8 * per_layer == 674_560
    assert (mma().method.rank, mma().method.scale) == (32, 0.001)


def test_published_saving_of_the_cross_modal_adapter():
    # The authors' code: two sites a layer, the text tower's channels but 16, and 16 for both. 99.6 % are saved.
    plan = place(cross_modal_adapter(), B_16)
    site_count = 2 * 8 + (768 + 512) * 8 + (752 + 496) * (8 + 1) + 16 * (8 + 1)
    assert plan.parameter_count() == names.count(plan.shapes()) == 24 * site_count == 519_168
    assert 100 * (1 - 519_168 / 151_277_313) >= 99.6


def test_count_of_uniadapter_without_its_third_up_projection():
    plan = place(uniadapter(), T5_BASE)
    down, up, norm = 768 * 512 + 512, 512 * 768 + 768, 2 * 768
    assert plan.parameter_count() == names.count(plan.shapes()) == 12 * (down + 2 * up + norm)


def test_parameter_counts_by_hand():
    assert count(CrossModal(rank=3, shared=4), SITE) == 8 * 3 + 3 + 3 * 4 + 4 + 3 * 4 + 4
    assert count(MMA(rank=3), SITE) == 8 * 3 + 3 + 3 * 3 + 3 + 3 * 8 + 8


# New parameters


def test_new_parameters_are_drawn_as_published():
    y = jnp.zeros((1, 400))
    wide = site("mlp_out", 400, 400)
    crossed = jax.jit(CrossModal(rank=100, shared=100).module(wide).init)(jax.random.key(0), y, y)["params"]
    for name in ("down", "up", "shared"):
        # At least 10,000 draws: the deviation's own standard error is 0.7 %.
        assert np.std(crossed[name]["kernel"]) == pytest.approx(0.01, rel=0.03)
        assert not np.any(crossed[name]["bias"])
    met = jax.jit(MMA(rank=100).module(wide).init)(jax.random.key(0), y, y)["params"]
    for name, fan_out in (("down", 100), ("shared", 100), ("up", 400)):
        assert np.std(met[name]["kernel"]) == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        assert not np.any(met[name]["bias"])


def test_products_follow_the_stream_in_half_precision():
    x, y = (np.random.default_rng(k).normal(0.2, 1.0, (3, WIDE)).astype(np.float32) for k in (1, 2))
    for method, reference in (
        (CrossModal(rank=3, shared=4), cross_modal_reference),
        (MMA(rank=3, scale=0.5), mma_reference),
    ):
        params = drawn(jax.eval_shape(method.module(SITE).init, jax.random.key(0), x, y)["params"], 2, 0.5)
        result = jax.jit(method.module(SITE).apply)({"params": params}, jnp.bfloat16(x), jnp.bfloat16(y))
        assert result.dtype == jnp.bfloat16
        expected = np.stack([reference(params, *pair) for pair in zip(np.float64(x), np.float64(y), strict=True)])
        # About ten roundings to 8 bits lie one behind the other.
        assert np.linalg.norm(np.float64(result) - expected) <= 10 * 2**-8 * np.linalg.norm(expected)


# Bad input


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (CrossModal, {"rank": 0}, "rank must be at least 1, got 0"),
        (CrossModal, {"shared": 0}, "shared must be at least 1, got 0"),
        (CrossModal, {"activation": "quickgelu"}, "unknown activation 'quickgelu'; did you mean 'quick_gelu'"),
        (MMA, {"rank": 0}, "rank must be at least 1, got 0"),
        (MMA, {"scale": 0.0}, "scale 0 switches the adapter off"),
    ],
)
def test_settings_without_meaning_are_refused(method, settings, message):
    with pytest.raises(UserError, match=message):
        method(**settings)


@pytest.mark.parametrize(
    ("placement", "towers", "message"),
    [
        (
            Placement(CrossModal(shared=512), slots=("mlp_out",)),
            B_16,
            "512 shared channels leave none of the 512 at text/mlp_out to the tower; give at most 511",
        ),
        (uniadapter(), B_16, r"down/kernel' is shared by vision/.*which need it as \(768, 512\) and \(512, 512\)"),
        (
            Placement(MMA(rank=4)),
            TOWERS | {"text": TowerShape(1, NARROW, 24)},
            "shared/mlp_out/shared/.*' is shared by .*have 2 and 1 layers with adapters; choose equally many",
        ),
        (
            Placement(MMA(rank=4), ranks=(("text/.*", 2),)),
            TOWERS,
            r"which need it as \(4,\) and \(2,\); share between places of one width and one rank",
        ),
    ],
    ids=["no_channel_left", "widths", "depths", "ranks"],
)
def test_towers_that_cannot_share_are_refused(placement, towers, message):
    with pytest.raises(UserError, match=message):
        place(placement, towers)
