"""Hyperformer against its definition: embeddings, the network that joins them, generated weights, the bottleneck."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_counts import B_16, BART_BASE, TASKS, trained_share
from settings import count, drawn, site
from through_slots import through_slots

from vla_jax import names
from vla_jax.adapters import Hyperformer, Placement, hyperformer, place, vl_adapter_hyperformer
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, RANK = 6, 2
SITE = site("mlp_out", WIDTH, WIDTH)
SMALL = {"rank": RANK, "embedding": 5, "hidden": 7, "projection": 4, "activation": "relu"}
BOTH = pytest.mark.parametrize("per_slot", [False, True], ids=["one_generator", "generator_per_slot"])


def reference(params, y: np.ndarray, embeddings: list[str]) -> np.ndarray:
    """The definition for one place, with that place's embeddings."""
    flat = {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(params).items()}
    joined = np.concatenate([flat[name] for name in embeddings])
    hidden = np.maximum(joined @ flat["join/kernel"] + flat["join/bias"], 0)
    place_ = hidden @ flat["project/kernel"] + flat["project/bias"]
    place_ = (place_ - place_.mean()) / math.sqrt(place_.var() + 1e-6) * flat["norm/scale"] + flat["norm/bias"]

    def generated(name, *shape):
        weights = np.zeros(math.prod(shape))
        for k, value in enumerate(place_):
            weights += value * flat[f"{name}/kernel"][k]
        return (weights + flat[f"{name}/bias"]).reshape(shape)

    y, width = np.asarray(y, np.float64), y.shape[-1]
    hidden = np.maximum(y @ generated("down_kernel", width, RANK) + generated("down_bias", RANK), 0)
    return y + hidden @ generated("up_kernel", RANK, width) + generated("up_bias", width)


def close(ours, theirs, tolerance=5e-6):
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def example() -> np.ndarray:
    return np.random.default_rng(1).normal(0.2, 1.0, (3, WIDTH)).astype(np.float32)


def parameters(method: Hyperformer):
    return drawn(jax.eval_shape(method.module(SITE).init, jax.random.key(0), example(), example())["params"], 2, 0.6)


@BOTH
def test_module_equals_the_definition(per_slot):
    method, y = Hyperformer(**SMALL, per_slot=per_slot), example()
    params = parameters(method)
    embeddings = ["task_embedding", "layer_embedding"] + ([] if per_slot else ["slot_embedding"])
    assert {name for name in params if name.endswith("embedding")} == set(embeddings)
    expected = reference(params, y, embeddings)
    assert np.linalg.norm(expected - y) > 0.1 * np.linalg.norm(y)
    close(np.asarray(jax.jit(method.module(SITE).apply)({"params": params}, y, y)), expected)


@BOTH
def test_every_place_has_weights_made_from_its_own_embeddings(per_slot):
    method = Hyperformer(**SMALL, per_slot=per_slot)
    towers = {"vision": TowerShape(3, 6, 24), "text": TowerShape(2, 4, 16)}
    slots = ("attn_sublayer", "mlp_out")
    plan = place(Placement(method, slots=slots, tasks=("a", "b")), towers)
    params, draw = drawn(plan.shapes(), 3, 0.6), np.random.default_rng(4).standard_normal
    streams = {tower: draw((4, 3, shape.width)).astype(np.float32) for tower, shape in towers.items()}
    route = np.array([1, 0, -1, 1])
    run = jax.jit(lambda params: through_slots(plan, params, jax.tree.map(jnp.asarray, streams), jnp.asarray(route)))
    results, stored = run(params), params["adapter"]
    for tower, shape in towers.items():
        own = stored[tower]
        for example_, task in enumerate(route):
            expected = streams[tower][example_]
            for layer in range(shape.depth if task >= 0 else 0):
                for slot in slots:
                    here = {name: own[name] for name in ("join", "project", "norm")}
                    here |= own[slot] if per_slot else {k: v for k, v in own.items() if k.startswith(("down", "up"))}
                    here |= {
                        "task_embedding": stored["shared"]["task_embedding"][task],
                        "layer_embedding": own["layer_embedding"][layer],
                    }
                    embeddings = ["task_embedding", "layer_embedding"] + ([] if per_slot else ["slot_embedding"])
                    if not per_slot:
                        here["slot_embedding"] = own[slot]["slot_embedding"]
                    expected = reference(here, expected, embeddings)
            close(np.asarray(results[tower][example_]), expected, 2e-5)


def test_what_is_stored_once_and_what_for_each_layer_task_slot_and_tower():
    towers = {"vision": TowerShape(3, 6, 24), "text": TowerShape(2, 4, 16)}
    placement = Placement(Hyperformer(**SMALL), slots=("attn_sublayer", "mlp_out"), tasks=("a", "b"))
    flat = _shapes(placement, towers)
    assert {name: shape for name, shape in flat.items() if "embedding" in name} == {
        "shared/task_embedding": (2, 5),
        "vision/layer_embedding": (3, 5),
        "text/layer_embedding": (2, 5),
        "vision/attn_sublayer/slot_embedding": (5,),
        "vision/mlp_out/slot_embedding": (5,),
        "text/attn_sublayer/slot_embedding": (5,),
        "text/mlp_out/slot_embedding": (5,),
    }
    assert flat["vision/join/kernel"] == (15, 7)
    assert flat["vision/down_kernel/kernel"] == (4, 6 * 2)
    assert flat["text/up_bias/kernel"] == (4, 4)
    per_slot = dataclasses.replace(placement, method=Hyperformer(**SMALL, per_slot=True))
    flat = _shapes(per_slot, towers)
    assert flat["vision/join/kernel"] == (10, 7)
    assert flat["vision/mlp_out/down_kernel/kernel"] == (4, 6 * 2)
    assert not [name for name in flat if "slot_embedding" in name]


def _shapes(placement, towers):
    flat = names.flatten(place(placement, towers).shapes()["adapter"])
    return {name: leaf.shape for name, leaf in flat.items()}


def test_parameter_counts_by_hand():
    # Embeddings of 5; 15 -> 7 -> 4 and a LayerNorm; generators of 6 x 2, 2, 2 x 6 and 6 numbers from 4.
    generators = (4 + 1) * (12 + 2 + 12 + 6)
    assert count(Hyperformer(**SMALL), SITE) == 3 * 5 + (15 * 7 + 7) + (7 * 4 + 4) + 8 + generators
    per_slot = Hyperformer(**SMALL, per_slot=True)
    assert count(per_slot, SITE) == 2 * 5 + (10 * 7 + 7) + (7 * 4 + 4) + 8 + generators
    for method in (per_slot, Hyperformer(**SMALL)):
        shapes = {name: math.prod(leaf.shape) for name, leaf in names.flatten(parameters(method)).items()}
        assert method.parameter_counts(SITE) == shapes


def test_a_further_layer_or_task_costs_an_embedding():
    def total(depth, tasks):
        towers = {"vision": TowerShape(depth, 6, 24), "text": TowerShape(2, 4, 16)}
        placement = Placement(Hyperformer(**SMALL), slots=("attn_sublayer", "mlp_out"), tasks=tasks)
        return place(placement, towers).parameter_count()

    assert total(4, ("a", "b")) == total(3, ("a", "b")) + 5 == total(3, ("a", "b", "c")) == total(3, ("a",)) + 10


def test_published_share_of_vl_adapter():
    # Encoder and decoder have a network each, the decoder's with cross-attention as a third slot; both know the tasks.
    method = dataclasses.replace(vl_adapter_hyperformer(), tasks=TASKS)
    encoder = dataclasses.replace(method, name="encoder", towers=("vision",))
    decoder = dataclasses.replace(method, name="decoder", towers=("text",), slots=(*method.slots, "block_out"))
    towers = BART_BASE | {"text": TowerShape(6, 768, 3072)}
    twice = len(TASKS) * 512
    found = place([encoder, decoder], towers).parameter_count() - twice
    down, up = (8 + 1) * (768 * 96 + 96), (8 + 1) * (96 * 768 + 768)
    controller = 6 * 512 + (1024 * 128 + 128) + (128 * 8 + 8) + 2 * 8
    assert found == 5 * (down + up) + 2 * controller + len(TASKS) * 512 == 6_947_088
    assert round(trained_share(found), 2) == 5.79


def test_presets_are_as_published():
    plus, vl = hyperformer(), vl_adapter_hyperformer()
    assert (plus.method.embedding, plus.method.projection, plus.method.reduction) == (64, 64, 32)
    assert plus.slots == vl.slots == ("attn_sublayer", "mlp_out")
    assert place(plus, B_16).parameter_count() == names.count(place(plus, B_16).shapes())


def test_new_parameters_are_drawn_as_published():
    method, y = Hyperformer(rank=16, embedding=64, hidden=64, projection=16, init="normal"), jnp.zeros((1, 64))
    wide = site("mlp_out", 64, 64)
    new = names.flatten(jax.jit(method.module(wide).init)(jax.random.key(0), y, y)["params"])
    for name in ("join/kernel", "project/kernel", "down_kernel/kernel", "up_kernel/kernel"):
        # At least 1,024 draws: the deviation's own standard error is 2.2 %.
        assert np.std(new[name]) == pytest.approx(0.01, rel=0.1)
    assert 0.5 < np.std(new["layer_embedding"]) < 1.5
    assert not any(np.any(leaf) for name, leaf in new.items() if name.endswith("/bias"))
    zero = jax.jit(dataclasses.replace(method, init="zero_up").module(wide).init)(jax.random.key(0), y, y)["params"]
    assert not np.any(zero["up_kernel"]["kernel"])
    assert not np.any(zero["up_bias"]["kernel"])


def test_products_follow_the_stream_in_half_precision():
    method, y = Hyperformer(**SMALL), example()
    params = parameters(method)
    result = jax.jit(method.module(SITE).apply)({"params": params}, jnp.bfloat16(y), jnp.bfloat16(y))
    assert result.dtype == jnp.bfloat16
    # About ten roundings to 8 bits lie one behind the other.
    expected = reference(params, y, ["task_embedding", "layer_embedding", "slot_embedding"])
    close(np.asarray(result, np.float32), expected, tolerance=10 * 2**-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"projection": 1}, "projection must be at least 2, got 1"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"activation": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
        ({"init": "normall"}, "unknown hyperformer init 'normall'; did you mean 'normal'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Hyperformer(**settings)


def test_a_reduction_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="reduction 1000 leaves nothing of a width of 768"):
        place(Placement(Hyperformer(reduction=1000), slots=("mlp_out",)), B_16)
