"""The optimiser: against AdamW written out, group by group, with its clip, its decay and its accumulation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax import names
from vla_jax.errors import UserError
from vla_jax.training.optimizer import GroupConfig, OptimizerConfig, learning_rates, make_optimizer, make_schedule
from vla_jax.training.table import ParameterTable, ResolvedTable, Rule

RULES = (
    Rule("heads/.*", group="head"),
    Rule(".*/bias", decay=False),
    Rule("(adapters|heads)/.*", train=True),
    Rule(".*", train=False, sharding=()),
)


# Exact in binary: 1 - 0.999 in float32 is wrong by some 1e-5, which would want a wider tolerance.
MOMENTS = {"b1": 0.5, "b2": 0.75}


def setting(rules: tuple[Rule, ...] = RULES) -> tuple[ResolvedTable, dict]:
    draw = np.random.default_rng(0)

    def linear(rows: int, columns: int) -> dict[str, jax.Array]:
        return {
            "kernel": jnp.asarray(draw.normal(size=(rows, columns)), jnp.float32),
            "bias": jnp.asarray(draw.normal(size=columns), jnp.float32),
        }

    params = {"backbone": {"fc": linear(4, 4)}, "adapters": {"down": linear(4, 2)}, "heads": {"out": linear(4, 3)}}
    table = ParameterTable(rules).resolve(params)
    return table, table.split(params)[0]


def gradients_like(tree: dict, seed: int, scale: float = 1.0) -> dict:
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * draw.normal(size=leaf.shape), jnp.float32), tree)


def run(optimizer: optax.GradientTransformation, params: dict, gradients: list[dict]) -> tuple[list[dict], list[dict]]:
    """The parameters after each update, and the learning rates."""

    @jax.jit
    def step(params: dict, state: optax.OptState, gradient: dict) -> tuple[dict, optax.OptState]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, trajectory, rates = optimizer.init(params), [], []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        trajectory.append(params)
        rates.append(learning_rates(state))
    return trajectory, rates


def adamw_by_hand(
    params: dict, gradients: list[dict], rate: dict[str, list[float]], decay: dict[str, float], clip: float | None
) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter 2019, algorithm 2, in float64, with MOMENTS and eps=1e-8."""
    b1, b2 = MOMENTS["b1"], MOMENTS["b2"]
    values = {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(params).items()}
    first, second = ({name: np.zeros_like(leaf) for name, leaf in values.items()} for _ in range(2))
    for step, gradient in enumerate(gradients):
        flat = {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(gradient).items()}
        norm = math.sqrt(sum((leaf**2).sum() for leaf in flat.values()))
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        for name, leaf in flat.items():
            first[name] = b1 * first[name] + (1 - b1) * scale * leaf
            second[name] = b2 * second[name] + (1 - b2) * (scale * leaf) ** 2
            direction = first[name] / (1 - b1 ** (step + 1))
            direction /= np.sqrt(second[name] / (1 - b2 ** (step + 1))) + 1e-8
            values[name] = values[name] - rate[name][step] * (direction + decay[name] * values[name])
    return values


def test_groups_decay_mask_and_clip_as_written_out():
    table, trainable = setting()
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        weight_decay=0.05,
        clip_norm=2.0,
        **MOMENTS,
        groups=(GroupConfig("head", learning_rate=0.01, schedule="linear", weight_decay=0.5),),
    )
    # The second gradient is below the clip norm, the others above.
    gradients = [gradients_like(trainable, seed, scale) for seed, scale in enumerate((3.0, 0.01, 1.0))]
    got, rates = run(make_optimizer(config, table, trainable, steps=4), trainable, gradients)
    rate = {name: [0.1] * 3 for name in names.flatten(trainable)}
    rate |= {f"heads/out/{leaf}": [0.01, 0.0075, 0.005] for leaf in ("kernel", "bias")}
    decay = {"adapters/down/kernel": 0.05, "heads/out/kernel": 0.5, "adapters/down/bias": 0.0, "heads/out/bias": 0.0}
    wanted = adamw_by_hand(trainable, gradients, rate, decay, clip=2.0)
    for name, leaf in names.flatten(got[-1]).items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose([r["learning_rate"] for r in rates], 0.1, rtol=1e-6)
    np.testing.assert_allclose([r["learning_rate/head"] for r in rates], [0.01, 0.0075, 0.005], rtol=1e-6)


def test_without_clipping_large_gradients_pass():
    table, trainable = setting()
    common = {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.0, "groups": (GroupConfig("head"),)}
    config = OptimizerConfig(**common, **MOMENTS, clip_norm=None)
    gradients = [gradients_like(trainable, seed, 10.0**seed) for seed in range(3)]
    got, _ = run(make_optimizer(config, table, trainable, steps=3), trainable, gradients)
    flat = names.flatten(trainable)
    wanted = adamw_by_hand(trainable, gradients, {name: [0.1] * 3 for name in flat}, dict.fromkeys(flat, 0.0), None)
    for name, leaf in names.flatten(got[-1]).items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("cosine", lambda part: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part))),
        ("linear", lambda part: 1 - 0.9 * part),
        ("constant", lambda part: 1.0),
    ],
)
@pytest.mark.parametrize("warmup", [{"warmup_steps": 5}, {"warmup_share": 0.25}])
def test_schedules(schedule: str, after, warmup: dict):
    config = OptimizerConfig(learning_rate=0.2, schedule=schedule, final_share=0.1, **warmup)
    rates = [float(make_schedule(config, "default", 20)(update)) for update in range(23)]
    wanted = [update / 5 for update in range(5)] + [after(min(1, (update - 5) / 15)) for update in range(5, 23)]
    np.testing.assert_allclose(rates, 0.2 * np.array(wanted), rtol=1e-6)


def test_accumulated_halves_are_one_whole_batch():
    """Mean gradients of two halves make the update of their mean, clip included, and the schedule counts updates."""
    table, trainable = setting()
    common = {"learning_rate": 0.1, "clip_norm": 1.0, "groups": (GroupConfig("head", learning_rate=0.02),)}
    halves = [gradients_like(trainable, seed) for seed in range(6)]
    wholes = [jax.tree.map(lambda a, b: (a + b) / 2, *halves[i : i + 2]) for i in range(0, 6, 2)]
    whole = make_optimizer(OptimizerConfig(**common), table, trainable, steps=3)
    half = make_optimizer(OptimizerConfig(**common, accumulate=2), table, trainable, steps=6)
    wanted, rates = run(whole, trainable, wholes)
    got, half_rates = run(half, trainable, halves)
    for name, leaf in names.flatten(got[-1]).items():
        np.testing.assert_allclose(leaf, names.flatten(wanted[-1])[name], rtol=1e-6, err_msg=name)
    # Between updates nothing moves, and what is logged is the last update's.
    assert half_rates[1::2] == rates
    assert half_rates[2::2] == rates[:-1]
    jax.tree.map(np.testing.assert_array_equal, got[0], trainable)
    jax.tree.map(np.testing.assert_array_equal, got[1:-1:2], got[2::2])


def test_the_state_holds_two_moments_of_the_trained_leaves_and_scalars():
    table, trainable = setting()
    optimizer = make_optimizer(OptimizerConfig(groups=(GroupConfig("head"),)), table, trainable, steps=3)
    arrays = [leaf for leaf in jax.tree.leaves(optimizer.init(trainable)) if leaf.ndim]
    assert sorted(leaf.shape for leaf in arrays) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(trainable)])
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float32")}


def test_a_ratio_follows_the_optimisers_own_learning_rate():
    group = GroupConfig("head", learning_rate_ratio=16.0, weight_decay=0.5)
    for rate in (0.001, 0.02):
        config = OptimizerConfig(learning_rate=rate, schedule="constant", groups=(group,))
        assert config.group("head") == GroupConfig("head", 16 * rate, "constant", 0.5)
        assert make_schedule(config, "head", 4)(2) == pytest.approx(16 * rate)


@pytest.mark.parametrize(
    ("rules", "groups", "message"),
    [
        (RULES, (), "unknown optimiser group in the parameter table 'head'; allowed: default"),
        (RULES, ("haed",), r"in the parameter table 'head'; did you mean 'haed'"),
        (RULES, ("head", "text"), r"unknown optimiser group in the configuration 'text'.*No trained parameter has it"),
        ((Rule(".*", train=False, sharding=()),), (), "trains nothing"),
    ],
)
def test_groups_of_table_and_configuration_must_agree(rules, groups: tuple[str, ...], message: str):
    table, trainable = setting(rules)
    config = OptimizerConfig(groups=tuple(GroupConfig(name) for name in groups))
    with pytest.raises(UserError, match=message):
        make_optimizer(config, table, trainable, steps=3)


def test_steps_must_make_whole_updates_and_outlast_the_warm_up():
    table, trainable = setting(RULES[1:])
    with pytest.raises(UserError, match=r"7 steps do not make whole updates.*3 steps each; nearest.*: 6 and 9"):
        make_optimizer(OptimizerConfig(accumulate=3), table, trainable, steps=7)
    with pytest.raises(UserError, match="warm-up takes 5 of 5 updates"):
        make_optimizer(OptimizerConfig(accumulate=2, warmup_steps=5), table, trainable, steps=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate of the optimiser is -1.0"),
        ({"schedule": "cosin"}, "unknown schedule of the optimiser 'cosin'; did you mean 'cosine'"),
        ({"warmup_share": 1.5}, "warmup_share of the optimiser is 1.5; allowed: 0 to 1"),
        ({"warmup_share": 0.1, "warmup_steps": 3}, "both warmup_share=0.1 and warmup_steps=3"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"b2": 1.0}, "b2 of the optimiser is 1.0; allowed: 0 up to but without 1"),
        ({"eps": 0.0}, "eps of the optimiser is 0.0"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; allowed: above 0, or None"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"groups": (GroupConfig("a"), GroupConfig("b"), GroupConfig("a"))}, "group 'a' is given 2 times"),
        ({"groups": (GroupConfig("default"),)}, "group 'default' cannot be given"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "group name ''"),
        ({"name": "a/b"}, "group name 'a/b'"),
        ({"name": "head", "schedule": "lin"}, "schedule of optimiser group 'head' 'lin'"),
        ({"name": "head", "learning_rate": -1.0}, "learning_rate of optimiser group 'head'"),
        ({"name": "head", "learning_rate_ratio": -1.0}, "learning_rate_ratio of optimiser group 'head' is -1.0"),
        (
            {"name": "head", "learning_rate": 0.1, "learning_rate_ratio": 2.0},
            "'head' has both learning_rate=0.1 and learning_rate_ratio=2.0; set one",
        ),
    ],
)
def test_group_settings_that_cannot_be_meant_are_refused(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        GroupConfig(**arguments)
