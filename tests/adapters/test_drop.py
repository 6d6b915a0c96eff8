"""AdapterDrop: adapters left out for good are not computed, and those dropped in training follow the step's key."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from settings import CONFIG, backbone, drawn, inputs, model

from vla_jax import names
from vla_jax.adapters import Bottleneck, Fusion, LoRA, Placement, Prompt, drop_layers, place
from vla_jax.adapters.drop import draw
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import preset
from vla_jax.training.step import init_state, make_train_step
from vla_jax.training.table import ParameterTable

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOWERS = CONFIG.towers  # vision: 4 blocks; text: 2 blocks
PLACEMENTS = (
    Placement(Bottleneck(rank=4), "bottleneck", slots=("mlp_out", "block_out")),
    Placement(LoRA(rank=2), "lora", slots=("attn_q",), layers="every 2nd", towers=("vision",)),
    Placement(LoRA(rank=4), "ranks", slots=("attn_v",), ranks=((r"vision/.*/[01]", 2),)),
    Placement(Fusion(rank=4, heads=2), "joint"),
)


@functools.cache
def program(plan):
    def run(weights, params, dropped):
        bound = None if plan is None else plan.bind(params, dropped)
        out = model(CONFIG).apply({"params": weights}, *inputs(CONFIG), adapters=bound, hidden_states=True)
        return out.image_features, out.text_features, out.image_hidden, out.text_hidden

    return jax.jit(run)


def outputs(plan, params, dropped=None):
    """Both features and all hidden states."""
    return program(plan)(backbone(CONFIG), params, None if dropped is None else jnp.int32(dropped))


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(np.subtract(a, b)) <= tolerance * np.linalg.norm(b)


# Left out for good


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_what_is_left_out_is_what_is_switched_off(count):
    plan = place(PLACEMENTS, TOWERS)
    params = drawn(plan.shapes(), 1, 0.3)
    # The text tower has two blocks: from there on it runs bare.
    counts = {"vision": count, "text": min(count, 2)}
    left, kept = drop_layers(plan, params, counts)
    found, bare = outputs(left, kept), outputs(None, None)
    close(found, outputs(plan, params, count))
    close([found[2][: count + 1]], [bare[2][: count + 1]])
    if count < 4:
        assert not np.allclose(found[2][count + 1], bare[2][count + 1], rtol=1e-3)
    if count == 4:
        assert left.groups == ()
        assert kept == {}


def test_what_is_left_out_is_not_computed():
    # Unrolled, since the cost of a scan's body is counted once.
    @functools.partial(jax.jit, static_argnums=0)
    def run(plan, weights, params):
        bound = None if plan is None else plan.bind(params)
        return model(CONFIG, unroll=4).apply({"params": weights}, inputs(CONFIG)[0], adapters=bound).image_features

    def flops(plan, params):
        return run.lower(plan, backbone(CONFIG), params).compile().cost_analysis()["flops"]

    placement = Placement(Bottleneck(rank=4), slots=("mlp_out",), towers=("vision",))
    plan = place(placement, TOWERS)
    params = drawn(plan.shapes(), 1, 0.3)
    plain = flops(None, None)
    by_count = [flops(*drop_layers(plan, params, {"vision": n})) for n in (0, 2, 4)]
    without = place(dataclasses.replace(placement, layers="2:"), TOWERS)
    assert by_count[1] == flops(without, drawn(without.shapes(), 1, 0.3))
    assert by_count[2] == plain
    # Two layers save at least their products: each batch x tokens x (2 in r + 2 r out).
    assert (np.diff(by_count) <= -2 * 8 * 5 * (2 * 32 * 4 + 2 * 4 * 32)).all()


def test_counts_by_tower_names_and_rows():
    plan = place(PLACEMENTS, TOWERS)
    params = drawn(plan.shapes(), 1, 0.3)
    left, kept = drop_layers(plan, params, {"vision": 1})
    assert {group.path: group.layers for group in left.groups} == {
        ("bottleneck", "vision", "mlp_out"): ((1, 2, 3),),
        ("bottleneck", "vision", "block_out"): ((1, 2, 3),),
        ("bottleneck", "text", "mlp_out"): ((0, 1),),
        ("bottleneck", "text", "block_out"): ((0, 1),),
        ("lora", "vision", "attn_q"): ((1, 3),),
        ("ranks", "vision", "attn_v", "rank_2"): ((1,),),
        ("ranks", "vision", "attn_v", "rank_4"): ((2, 3),),
        ("ranks", "text", "attn_v"): ((0, 1),),
        ("joint", "joint", "block_out"): ((1, 3), (0, 1)),
    }
    before, after = names.flatten(params), names.flatten(kept)
    assert after.keys() == before.keys()
    assert {name: leaf.shape for name, leaf in after.items()} == {
        name: leaf.shape for name, leaf in names.flatten(left.shapes()).items()
    }
    name = "bottleneck/vision/mlp_out/up/kernel"
    np.testing.assert_array_equal(after[name], before[name][1:])
    np.testing.assert_array_equal(after["lora/vision/attn_q/a"], before["lora/vision/attn_q/a"])
    # The first joint stands behind block 1 of the vision and block 0 of the text tower: it goes with either.
    assert [g.layers for g in drop_layers(plan, params, {"text": 1})[0].groups if g.path[0] == "joint"] == [
        ((3,), (1,))
    ]
    assert [g.layers for g in drop_layers(plan, params, {"vision": 2})[0].groups if g.path[0] == "joint"] == [
        ((3,), (1,))
    ]


def test_a_plan_with_layers_left_out_is_its_description():
    plan = place(PLACEMENTS, TOWERS)
    params = drawn(plan.shapes(), 1, 0.3)
    left, kept = drop_layers(plan, params, {"vision": 2, "text": 1})
    described = json.loads(json.dumps(left.describe()))
    again = place([Placement.from_description(description) for description in described], TOWERS)
    assert again == left
    # Once more: layers count from the first block, and what is left out stays so.
    assert drop_layers(left, kept, {"vision": 1})[0].groups == left.groups
    assert (
        drop_layers(left, kept, {"text": 2})[0].groups == drop_layers(plan, params, {"vision": 2, "text": 2})[0].groups
    )


def test_what_a_tower_has_once_stays():
    placements = [
        Placement(Prompt(2), "prompt", slots=("tokens", "prompts")),
        Placement(Bottleneck(rank=4), "embed", slots=("embed",)),
        Placement(LoRA(rank=2), "projection", slots=("projection",)),
    ]
    plan = place(placements, TOWERS)
    params = drawn(plan.shapes(), 1, 0.3)
    left, kept = drop_layers(plan, params, 2)
    slots = {(group.site.tower, group.site.slot): group.layers for group in left.groups}
    assert slots == {
        **{(tower, slot): ((0,),) for tower in ("vision", "text") for slot in ("tokens", "embed", "projection")},
        ("vision", "prompts"): ((2, 3),),
    }
    close(outputs(left, kept), outputs(plan, params, 2))


def test_tasks_and_parameters_that_all_layers_share():
    tasks = Placement(Bottleneck(rank=4), "tasks", slots=("mlp_out",), tasks=("x", "y"))
    sharing = Placement.from_description(
        {"name": "shared", "method": {"kind": "bottleneck", "rank": 4}, "slots": ["mlp_out"], "towers": ["vision"]}
        | {"sharing": [{"pattern": "down/.*", "over": ["layers"]}]}
    )
    plan = place([tasks, sharing], TOWERS)
    params = drawn(plan.shapes(), 1, 0.3)
    kept = drop_layers(plan, params, 1)[1]
    assert kept["tasks"]["vision"]["mlp_out"]["up"]["kernel"].shape == (3, 2, 4, 32)
    down = kept["shared"]["vision"]["mlp_out"]["down"]["kernel"]
    np.testing.assert_array_equal(down, params["shared"]["vision"]["mlp_out"]["down"]["kernel"])
    gone, kept = drop_layers(plan, params, {"vision": 4})
    assert "shared" not in kept
    assert len(gone.groups) == 1


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, "adapters of 3 layers of the text tower cannot be dropped; it has 2"),
        ({"vision": -1}, "adapters of -1 layers of the vision tower cannot be dropped; it has 4"),
        ({"visoin": 1}, "unknown tower 'visoin'; did you mean 'vision'"),
    ],
)
def test_layers_that_do_not_exist_are_refused(count, message):
    plan = place(PLACEMENTS, TOWERS)
    with pytest.raises(UserError, match=message):
        drop_layers(plan, drawn(plan.shapes(), 1, 0.3), count)
    if isinstance(count, dict):
        with pytest.raises(UserError, match=message):
            place(dataclasses.replace(PLACEMENTS[0], dropped=tuple(count.items())), TOWERS)


def test_towers_that_share_layers_drop_equally_many():
    towers = {"vision": TowerShape(6, 32, 64), "text": TowerShape(3, 32, 64)}
    plan = place(Placement(LoRA(rank=2), slots=("attn_v",), layers="last 2", tied=True), towers)
    params = drawn(plan.shapes(), 1, 0.3)
    with pytest.raises(UserError, match="have 2 and 1 layers with adapters; choose equally many"):
        drop_layers(plan, params, 2)
    left, kept = drop_layers(plan, params, {"vision": 5, "text": 2})
    assert [group.layers for group in left.groups] == [((5,),), ((2,),)]
    np.testing.assert_array_equal(
        kept["adapter"]["shared"]["attn_v"]["a"], params["adapter"]["shared"]["attn_v"]["a"][1:]
    )


# Switched off for a batch


def test_one_program_serves_every_number():
    plan = place(PLACEMENTS[:3], TOWERS)
    params = drawn(plan.shapes(), 1, 0.3)
    hidden = [outputs(plan, params, count)[2] for count in range(5)]
    assert program(plan)._cache_size() == 1
    for count in range(4):
        np.testing.assert_array_equal(hidden[count + 1][: count + 1], hidden[count][: count + 1])
        assert not np.allclose(hidden[count + 1][-1], hidden[count][-1], rtol=1e-3)


def test_routes_and_dropped_layers_together():
    placement = Placement(Bottleneck(rank=4), slots=("mlp_out",), tasks=("x", "y"))
    plan = place(placement, TOWERS)
    params, route = drawn(plan.shapes(), 1, 0.3), jnp.array([0, 1, -1, 1, 0, -1, 0, 1])

    @functools.partial(jax.jit, static_argnums=0)
    def run(plan, params, dropped, weights):
        bound = plan.bind(params, dropped)
        return model(CONFIG).apply({"params": weights}, *inputs(CONFIG), adapters=bound, route=route).image_features

    weights = backbone(CONFIG)
    close([run(plan, params, jnp.int32(1), weights)], [run(*drop_layers(plan, params, 1), None, weights)])


def test_numbers_are_uniform_with_both_ends():
    numbers = np.asarray(jax.jit(jax.vmap(lambda k: draw(k, 11)))(jax.random.split(jax.random.key(0), 12_000)))
    counts = np.bincount(numbers, minlength=12)
    assert len(counts) == 12
    # 1,000 are expected of each, give or take 30.
    assert np.abs(counts - 1000).max() < 5 * (1000 * 11 / 12) ** 0.5
    assert int(draw(jax.random.key(0), 0)) == 0


# Robust training


def robust(most=1, layers="all", **changes):
    placements = (Placement(Bottleneck(rank=4), "bottleneck", slots=("mlp_out",), layers=layers),)
    return small_model.model(placements, robust_drop=most, **changes)


def test_each_step_drops_what_its_key_says_and_nothing_is_compiled_again():
    given = robust()
    params, rows = small_model.drawn_params(given), jax.tree.map(jnp.asarray, small_model.batch())
    loss = lambda adapters, rest, key: given.loss(rest | {"adapters": adapters}, rows, key)[0]  # noqa: E731
    seen, tried = jax.jit(jax.grad(loss)), set()
    for seed in range(8):
        key = jax.random.key(seed)
        gradient = seen(params["adapters"], params, key)["bottleneck"]["vision"]["mlp_out"]["up"]["kernel"]
        count = int(draw(key, 1))
        reached = np.abs(gradient).reshape(2, -1).max(1) > 0
        np.testing.assert_array_equal(reached, np.arange(2) >= count)
        tried.add(count)
    assert tried == {0, 1}
    assert seen._cache_size() == 1


def test_training_compiles_one_step():
    given = robust()
    params = small_model.drawn_params(given)
    table = ParameterTable(preset("adapters")).resolve(params)
    trainable, frozen = table.split(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), table, trainable, 6)
    step, state = make_train_step(given.loss, optimizer, seed=0), init_state(trainable, optimizer)
    norms = []
    for seed in range(6):
        state, metrics = step(state, frozen, small_model.batch(seed=seed))
        norms.append(float(metrics["gradient_norm"]))
    assert step.program._cache_size() == 1
    assert np.isfinite(norms).all()
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(6)]
    assert {int(draw(key, 1)) for key in keys} == {0, 1}


def test_evaluation_drops_nothing():
    given = robust()
    params, rows = small_model.drawn_params(given), jax.tree.map(jnp.asarray, small_model.batch())
    plain = dataclasses.replace(given, robust_drop=0)
    scores = [jax.jit(each.predict)(params, rows)["score"] for each in (given, plain)]
    np.testing.assert_array_equal(*scores)


def test_dropout_is_drawn_as_without():
    # The number has a key of its own, so that a run with one robust layer differs in nothing else.
    placements = (Placement(LoRA(rank=2, dropout=0.5), "lora", slots=("attn_q",)),)
    given = small_model.model(placements, robust_drop=1)
    params, rows = small_model.drawn_params(given), jax.tree.map(jnp.asarray, small_model.batch())
    key = next(k for k in map(jax.random.key, range(20)) if int(draw(k, 1)) == 0)
    plain = dataclasses.replace(given, robust_drop=0)
    losses = [float(jax.jit(lambda p, each=each: each.loss(p, rows, key)[0])(params)) for each in (given, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("most", "layers"), [(2, "all"), (-1, "all"), (1, "0")])
def test_dropping_every_adapter_is_refused(most, layers):
    with pytest.raises(
        UserError, match=f"robust_drop {most} must be at least 0 and at most {1 if layers == 'all' else 0}"
    ):
        robust(most, layers)
