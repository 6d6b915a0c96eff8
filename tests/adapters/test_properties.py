"""Properties of every adapter method, written once and applied to every setting of the list."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from settings import ALL, BATCH, backbone, inputs, model, perturbed, shape_for

from vla_jax import names
from vla_jax.adapters import place
from vla_jax.adapters.base import methods

pytestmark = pytest.mark.parametrize("name", ALL)


@functools.cache
def _backbone(config):
    return backbone(config)


def _plan(name, **changes):
    import dataclasses

    return place(dataclasses.replace(ALL[name], **changes), shape_for(name).towers)


def _trained(plan):
    """Adapters as training might leave them: no leaf at its initial value."""
    return perturbed(plan.init(jax.random.key(5)), jax.random.key(6), 0.2)


def _outputs(name, plan=None, adapters=None, *, route=None, key=None, unroll=1, rows=slice(None), params=None):
    """Both features and all hidden states."""
    config = shape_for(name)
    images, tokens, mask = (a[rows] for a in inputs(config))

    @jax.jit
    def run(params, adapters):
        bound = None if adapters is None else plan.bind(adapters)
        out = model(config, unroll).apply(
            {"params": params}, images, tokens, mask, adapters=bound, route=route, key=key, hidden_states=True
        )
        return out.image_features, out.text_features, out.image_hidden, out.text_hidden

    return run(_backbone(config) if params is None else params, adapters)


def _close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))


def test_new_adapter_changes_nothing(name):
    plan = _plan(name)
    plain, adapted = _outputs(name), _outputs(name, plan, plan.init(jax.random.key(0)))
    if ALL[name].method.starts_as_identity:
        for a, b in zip(adapted, plain, strict=True):
            np.testing.assert_array_equal(a, b)
    else:
        assert not np.array_equal(adapted[0], plain[0])


def test_parameter_count_is_the_closed_formula(name):
    for tasks in ((), ("a", "b", "c")):
        plan = _plan(name, tasks=tasks)
        params = plan.init(jax.random.key(0))
        assert names.count(params) == plan.parameter_count()


def test_trained_adapter_changes_both_towers(name):
    plan = _plan(name)
    plain, adapted = _outputs(name), _outputs(name, plan, _trained(plan))
    assert not np.allclose(plain[0], adapted[0], atol=1e-3)
    assert not np.allclose(plain[1], adapted[1], atol=1e-3)


def test_scan_equals_unroll(name):
    plan = _plan(name)
    adapters = _trained(plan)
    _close(_outputs(name, plan, adapters), _outputs(name, plan, adapters, unroll=4))


def test_routed_batch_equals_batches_of_one_task(name):
    plan = _plan(name, tasks=("a", "b", "c"))
    single = _plan(name)
    adapters = _trained(plan)
    route = jnp.array([2, 0, -1, 1, 1, -1, 0, 2])
    mixed = _outputs(name, plan, adapters, route=route)
    for task in range(3):
        own = jax.tree.map(lambda a, task=task: a[:, task], adapters)
        alone = _outputs(name, single, own)
        rows = np.flatnonzero(route == task)
        _close([a[rows] for a in mixed[:2]], [a[rows] for a in alone[:2]])
        _close([a[:, rows] for a in mixed[2:]], [a[:, rows] for a in alone[2:]])


def test_route_minus_one_is_the_backbone(name):
    plain = _outputs(name)
    for tasks in ((), ("a", "b")):
        plan = _plan(name, tasks=tasks)
        off = _outputs(name, plan, _trained(plan), route=jnp.full((BATCH,), -1))
        for a, b in zip(off, plain, strict=True):
            np.testing.assert_array_equal(a, b)


def test_route_beyond_the_last_task_is_not_a_number(name):
    plan = _plan(name, tasks=("a", "b"))
    features = _outputs(name, plan, _trained(plan), route=jnp.array([0, 1, 2, -1, 0, 1, 0, 1]))[0]
    assert np.isnan(features[2]).all()
    assert not np.isnan(np.delete(features, 2, axis=0)).any()


def test_subset_of_layers_touches_only_those(name):
    if "ranks" in name or "embed" in name:
        pytest.skip("the setting names its layers itself")
    plan = _plan(name, layers="-1")
    plain, adapted = _outputs(name), _outputs(name, plan, _trained(plan))
    for before, after in zip(plain[2:], adapted[2:], strict=True):
        np.testing.assert_array_equal(after[:-1], before[:-1])  # embeddings and every block but the last
    assert {leaf.shape[0] for leaf in jax.tree.leaves(plan.init(jax.random.key(0)))} == {1}


def test_gradients_reach_every_adapter_leaf_and_no_backbone_leaf(name):
    config, plan = shape_for(name), _plan(name)
    images, tokens, mask = inputs(config)
    target = jax.random.normal(jax.random.key(7), (BATCH, config.projection))

    def loss(adapters, params):
        out = model(config).apply({"params": params}, images, tokens, mask, adapters=plan.bind(adapters))
        return jnp.sum((out.image_features + 2 * out.text_features - target) ** 2)

    gradient = jax.jit(jax.grad(loss))(_trained(plan), _backbone(config))
    for leaf, value in names.flatten(gradient).items():
        assert np.abs(value).max() > 0, leaf
        per_layer = np.abs(value).reshape(value.shape[0], -1).max(1)
        assert (per_layer > 0).all(), (leaf, per_layer)
    assert set(names.flatten(gradient)) == set(names.flatten(plan.init(jax.random.key(0))))


def test_sharded_equals_unsharded(name):
    config, plan = shape_for(name), _plan(name, tasks=("a", "b"))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    route, key, adapters = jnp.arange(BATCH) % 3 - 1, jax.random.key(8), _trained(plan)

    def run(params, adapters, images, tokens, mask, route):
        out = model(config).apply(
            {"params": params}, images, tokens, mask, adapters=plan.bind(adapters), route=route, key=key
        )
        return out.image_features, out.text_features, out.logits

    arguments = (_backbone(config), adapters, *inputs(config), route)
    alone = jax.jit(run)(*arguments)
    shardings = (everywhere, everywhere, *[over_batch] * 4)
    _close(jax.jit(run)(*jax.device_put(arguments, shardings)), alone)


def test_saved_and_restored_equals_itself(name, tmp_path):
    from orbax.checkpoint import v1 as ocp

    plan = _plan(name)
    adapters = _trained(plan)
    ocp.save_checkpointables(tmp_path / "adapter", {"adapters": adapters})
    abstract = jax.eval_shape(plan.init, jax.random.key(0))
    restored = ocp.load_checkpointables(tmp_path / "adapter", {"adapters": abstract})["adapters"]
    for leaf, value in names.flatten(restored).items():
        np.testing.assert_array_equal(value, names.flatten(adapters)[leaf])
    description = plan.describe()
    again = place([type(plan.placements[0]).from_description(d) for d in description], shape_for(name).towers)
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
