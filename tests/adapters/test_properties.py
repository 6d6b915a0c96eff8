"""Properties of every adapter method, written once and applied to every setting of the list."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from settings import ALL, BATCH, backbone, drawn, inputs, model, shape_for

from vla_jax import names
from vla_jax.adapters import Placement, place
from vla_jax.adapters.base import methods

TASKS = ("a", "b", "c")

pytestmark = [pytest.mark.parametrize("name", ALL), pytest.mark.usefixtures("quick_compilation")]


@functools.cache
def _backbone(config):
    return backbone(config)


@functools.cache
def _plan(name, **changes):
    return place(dataclasses.replace(ALL[name], **changes), shape_for(name).towers)


@functools.cache
def _new(plan):
    return plan.init(jax.random.key(5))


@functools.cache
def _trained(plan):
    """Adapters as training might leave them: no leaf at its initial value."""
    return drawn(jax.eval_shape(plan.init, jax.random.key(0)), 6, 0.2, around=_new(plan))


@functools.cache
def _program(config, plan, unroll):
    images, tokens, mask = inputs(config)

    @jax.jit
    def run(params, adapters, route, key):
        bound = None if plan is None else plan.bind(adapters)
        out = model(config, unroll).apply(
            {"params": params}, images, tokens, mask, adapters=bound, route=route, key=key, hidden_states=True
        )
        return out.image_features, out.text_features, out.image_hidden, out.text_hidden

    return run


def _outputs(name, plan=None, adapters=None, *, route=None, key=None, unroll=1):
    """Both features and all hidden states."""
    config = shape_for(name)
    return _program(config, plan, unroll)(_backbone(config), adapters, route, key)


def _close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(np.subtract(a, b)) <= tolerance * np.linalg.norm(b)


def test_new_adapter_changes_nothing(name):
    # Bit for bit where the program is cut as the plain one is; cut elsewhere, the compiler may round otherwise.
    plan = _plan(name)
    plain, adapted = _outputs(name), _outputs(name, plan, _new(plan))
    if ALL[name].method.starts_as_identity:
        _close(adapted, plain, 1e-6)
        one_segment = not ALL[name].method.joint and len({group.layers for group in plan.groups}) == len(plan.depths)
        if one_segment:
            for a, b in zip(adapted, plain, strict=True):
                np.testing.assert_array_equal(a, b)
    else:
        assert not np.allclose(adapted[0], plain[0], rtol=1e-3)


def test_new_module_returns_what_it_was_given(name):
    plan = _plan(name)
    for group in plan.groups:
        x, y = (jax.random.normal(jax.random.key(9), (3, width)) for width in group.widths)
        arrays = (x, y, jnp.ones(3, bool)) if group.method.joint else (x, y)
        module = group.method.module()
        result = module.apply({"params": module.init(jax.random.key(0), *arrays)["params"]}, *arrays)
        given = (x, y) if group.method.joint else y
        same = jax.tree.map(np.array_equal, result, given)
        assert all(jax.tree.leaves(same)) == group.method.starts_as_identity


def test_parameter_count_is_the_closed_formula(name):
    for tasks in ((), TASKS):
        plan = _plan(name, tasks=tasks)
        assert names.count(jax.eval_shape(plan.init, jax.random.key(0))) == plan.parameter_count()


def test_trained_adapter_changes_both_towers(name):
    plan = _plan(name)
    plain, adapted = _outputs(name), _outputs(name, plan, _trained(plan))
    assert not np.allclose(plain[0], adapted[0], rtol=1e-3)
    assert not np.allclose(plain[1], adapted[1], rtol=1e-3)


def test_scan_equals_unroll(name):
    plan = _plan(name)
    adapters = _trained(plan)
    _close(_outputs(name, plan, adapters, unroll=4), _outputs(name, plan, adapters))


def test_routed_batch_equals_batches_of_one_task(name):
    plan, single = _plan(name, tasks=TASKS), _plan(name)
    adapters, plain = _trained(plan), _outputs(name)
    route = jnp.array([2, 0, -1, 1, 1, -1, 0, 2])
    mixed = _outputs(name, plan, adapters, route=route)
    for task in range(-1, len(TASKS)):
        own = jax.tree.map(lambda a, task=task: a[:, task], adapters)
        alone = plain if task == -1 else _outputs(name, single, own)
        rows = np.flatnonzero(route == task)
        _close([a[rows] for a in mixed[:2]], [a[rows] for a in alone[:2]])
        _close([a[:, rows] for a in mixed[2:]], [a[:, rows] for a in alone[2:]])


def test_route_minus_one_is_the_backbone(name):
    plain = _outputs(name)
    for tasks in ((), TASKS):
        plan = _plan(name, tasks=tasks)
        _close(_outputs(name, plan, _trained(plan), route=jnp.full((BATCH,), -1)), plain, 1e-6)


def test_route_beyond_the_last_task_is_not_a_number(name):
    plan = _plan(name, tasks=TASKS)
    features = _outputs(name, plan, _trained(plan), route=jnp.array([0, 1, 3, -1, 0, 1, 2, 1]))[0]
    assert np.isnan(features[2]).all()
    assert not np.isnan(np.delete(features, 2, axis=0)).any()


def test_subset_of_layers_touches_only_those(name):
    plan = _plan(name, layers="-1", ranks=())
    embeds = "embed" in plan.placements[0].slots
    plain, adapted = _outputs(name), _outputs(name, plan, _trained(plan))
    for before, after in zip(plain[2:], adapted[2:], strict=True):
        if not embeds:
            _close(after[:-1], before[:-1], 1e-6)  # embeddings and every block but the last
        assert not np.allclose(after[-1], before[-1], rtol=1e-3) or plan.groups[0].method.joint
    assert {leaf.shape[0] for leaf in jax.tree.leaves(_new(plan))} == {1}


def test_gradients_reach_every_adapter_leaf_and_no_backbone_leaf(name):
    config, plan = shape_for(name), _plan(name)
    images, tokens, mask = inputs(config)
    target = jax.random.normal(jax.random.key(7), (BATCH, config.projection))

    def loss(adapters, params):
        out = model(config).apply({"params": params}, images, tokens, mask, adapters=plan.bind(adapters))
        return jnp.sum((out.image_features + 2 * out.text_features - target) ** 2)

    gradient = names.flatten(jax.jit(jax.grad(loss))(_trained(plan), _backbone(config)))
    assert set(gradient) == set(names.flatten(_new(plan)))
    for leaf, value in gradient.items():
        by_layer = np.abs(value).reshape(value.shape[0], -1).max(1)
        assert (by_layer > 0).all(), (leaf, by_layer)


def test_sharded_equals_unsharded(name):
    config, plan = shape_for(name), _plan(name, tasks=TASKS)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    key = jax.random.key(8)

    def run(params, adapters, images, tokens, mask, route):
        out = model(config).apply(
            {"params": params}, images, tokens, mask, adapters=plan.bind(adapters), route=route, key=key
        )
        return out.image_features, out.text_features, out.logits

    arguments = (_backbone(config), _trained(plan), *inputs(config), jnp.arange(BATCH) % 4 - 1)
    shardings = (everywhere, everywhere, *[over_batch] * 4)
    _close(jax.jit(run)(*jax.device_put(arguments, shardings)), jax.jit(run)(*arguments))


def test_saved_and_restored_equals_itself(name, tmp_path):
    plan = _plan(name)
    adapters = _trained(plan)
    ocp.save_checkpointables(tmp_path / "adapter", {"adapters": adapters})
    abstract = jax.eval_shape(plan.init, jax.random.key(0))
    restored = ocp.load_checkpointables(tmp_path / "adapter", {"adapters": abstract})["adapters"]
    for leaf, value in names.flatten(restored).items():
        np.testing.assert_array_equal(value, names.flatten(adapters)[leaf])
    again = place([Placement.from_description(d) for d in plan.describe()], shape_for(name).towers)
    assert again == plan


def test_method_is_found_by_its_kind(name):
    method = ALL[name].method
    assert methods()[method.kind] is type(method)


def test_dropout_follows_its_key_and_spares_evaluation(name):
    plan = _plan(name)
    adapters = _trained(plan)
    first, again, other = (_outputs(name, plan, adapters, key=jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert ALL[name].method.uses_dropout != np.array_equal(first, other)
    if not ALL[name].method.uses_dropout:
        _close([first], _outputs(name, plan, adapters)[:1], 1e-6)
