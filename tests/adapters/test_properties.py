"""Properties of every adapter method, written once and applied to every setting of the list."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import ALL, BATCH, FAMILIES, PLACED, WITHOUT_GRADIENT, backbone, begun, drawn, inputs, model, shape_for

from vla_jax import names
from vla_jax.adapters import Placement, place
from vla_jax.adapters.base import methods
from vla_jax.adapters.plan import example
from vla_jax.slots import SINGLE_SLOTS, LinearWeights
from vla_jax.training.checkpoint import load_adapters, save_adapters
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.presets import preset
from vla_jax.training.sharding import MeshConfig, batch_sharding, make_mesh
from vla_jax.training.table import ParameterTable

TASKS = ("a", "b", "c")

pytestmark = pytest.mark.usefixtures("quick_compilation")
every_setting = pytest.mark.parametrize("name", ALL)
every_placed_setting = pytest.mark.parametrize("name", PLACED)
every_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def _backbone(config):
    return backbone(config)


@functools.cache
def _plan(name, **changes):
    return place(dataclasses.replace(ALL[name], **changes), shape_for(name).towers)


@functools.cache
def _new(name, plan):
    return begun(plan, _backbone(shape_for(name)))


@functools.cache
def _trained(name, plan):
    """Adapters as training might leave them: no leaf at its initial value."""
    return drawn(plan.shapes(), 6, 0.2, around=_new(name, plan))


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


def _adapted(plan):
    """Which towers hold adapters, by where their outputs stand: 0 for vision, 1 for text."""
    return [n for n, tower in enumerate(("vision", "text")) if any(tower in group.towers for group in plan.groups)]


@every_setting
def test_new_adapter_changes_nothing(name):
    # Bit for bit where the program is cut as the plain one is; cut elsewhere, the compiler may round otherwise.
    plan = _plan(name)
    plain, adapted = _outputs(name), _outputs(name, plan, _new(name, plan))
    if ALL[name].method.starts_as_identity:
        _close(adapted, plain, 1e-6)
        one_segment = not ALL[name].method.joint and len({group.layers for group in plan.groups}) == len(plan.depths)
        if one_segment and not ALL[name].method.uses_weights:
            for a, b in zip(adapted, plain, strict=True):
                np.testing.assert_array_equal(a, b)
    else:
        for n in _adapted(plan):
            assert not np.allclose(adapted[n], plain[n], rtol=1e-3)


def _random(arrays):
    """Normal noise for the numbers among these arrays."""
    generator = np.random.default_rng(9)
    draw = lambda a: a if a.dtype == bool else jnp.asarray(generator.standard_normal(a.shape), a.dtype)  # noqa: E731
    return jax.tree.map(draw, arrays)


@every_setting
def test_new_module_returns_what_it_was_given(name):
    plan = _plan(name)
    for group in plan.groups:
        frozen, rounding = None, 0.0
        if group.method.uses_weights:
            into, out = group.site.widths
            frozen, rounding = LinearWeights(jnp.zeros((into, out)), jnp.zeros(out)), 1e-6
        arrays = _random(example(group.method, group.site, frozen, tokens=3))
        module = group.method.module(group.site)
        params = jax.jit(module.init)(jax.random.key(0), *arrays)["params"]
        result = module.apply({"params": params}, *arrays)
        given = arrays[:2] if group.method.joint else arrays[1]
        close = lambda a, b, r=rounding: a.shape == b.shape and np.allclose(a, b, rtol=r, atol=r)  # noqa: E731
        same = jax.tree.map(close, result, given)
        assert all(jax.tree.leaves(same)) == group.method.starts_as_identity


@every_setting
def test_parameter_count_is_the_closed_formula(name):
    for tasks in ((), TASKS):
        plan = _plan(name, tasks=tasks)
        assert names.count(plan.shapes()) == plan.parameter_count()


@every_setting
def test_trained_adapter_changes_its_towers_alone(name):
    plan = _plan(name)
    plain, adapted = _outputs(name), _outputs(name, plan, _trained(name, plan))
    for n in range(2):
        if n in _adapted(plan):
            assert not np.allclose(plain[n], adapted[n], rtol=1e-3)
        else:
            _close([plain[n]], [adapted[n]], 1e-6)


@every_placed_setting
def test_scan_equals_unroll(name):
    plan = _plan(name)
    adapters = _trained(name, plan)
    _close(_outputs(name, plan, adapters, unroll=4), _outputs(name, plan, adapters))


@every_setting
def test_routed_batch_equals_batches_of_one_task(name):
    plan, single = _plan(name, tasks=TASKS), _plan(name)
    adapters, plain = _trained(name, plan), _outputs(name)
    route = jnp.array([2, 0, -1, 1, 1, -1, 0, 2])
    mixed = _outputs(name, plan, adapters, route=route)
    for task in range(-1, len(TASKS)):
        alone = plain if task == -1 else _outputs(name, single, plan.select_task(adapters, task))
        rows = np.flatnonzero(route == task)
        _close([a[rows] for a in mixed[:2]], [a[rows] for a in alone[:2]])
        _close([a[:, rows] for a in mixed[2:]], [a[:, rows] for a in alone[2:]])


@every_placed_setting
def test_route_minus_one_is_the_backbone(name):
    plain = _outputs(name)
    for tasks in ((), TASKS):
        plan = _plan(name, tasks=tasks)
        _close(_outputs(name, plan, _trained(name, plan), route=jnp.full((BATCH,), -1)), plain, 1e-6)


@every_setting
def test_route_beyond_the_last_task_is_not_a_number(name):
    plan = _plan(name, tasks=TASKS)
    outputs = _outputs(name, plan, _trained(name, plan), route=jnp.array([0, 1, 3, -1, 0, 1, 2, 1]))
    for n in _adapted(plan):
        assert np.isnan(outputs[n][2]).all()
        assert not np.isnan(np.delete(outputs[n], 2, axis=0)).any()


@every_placed_setting
def test_subset_of_layers_touches_only_those(name):
    plan = _plan(name, layers="-1", ranks=(), alphas=())
    embeds = {"embed", "tokens"} & set(plan.placements[0].slots)
    in_blocks = {g.site.tower for g in plan.groups if g.site.slot not in SINGLE_SLOTS and not g.method.joint}
    plain, adapted = _outputs(name), _outputs(name, plan, _trained(name, plan))
    for tower, before, after in zip(("vision", "text"), plain[2:], adapted[2:], strict=True):
        if not embeds:
            _close(after[:-1], before[:-1], 1e-6)  # embeddings and every block but the last
        assert not np.allclose(after[-1], before[-1], rtol=1e-3) or tower not in in_blocks
    own = [path for path, leaf in plan.leaves().items() if leaf.by_layer]
    assert {names.flatten(_new(name, plan))[path].shape[0] for path in own} == {1}


@functools.cache
def _gradients(config, plan):
    images, tokens, mask = inputs(config)
    target = jax.random.normal(jax.random.key(7), (BATCH, config.projection))

    @jax.jit
    @jax.grad
    def gradient(adapters, params, weights, route):
        out = model(config).apply({"params": params}, images, tokens, mask, adapters=plan.bind(adapters), route=route)
        return jnp.sum(weights[:, None] * (out.image_features + 2 * out.text_features - target) ** 2)

    return gradient


def _gradient(name, plan, adapters, weights=(1.0,) * BATCH, route=None):
    """The gradient of a sum over examples, each weighted, by the adapters' leaves."""
    config = shape_for(name)
    route = None if route is None else jnp.asarray(route)
    return names.flatten(_gradients(config, plan)(adapters, _backbone(config), jnp.asarray(weights), route))


@every_setting
def test_gradients_reach_every_adapter_leaf_and_no_backbone_leaf(name):
    plan = _plan(name)
    gradient = _gradient(name, plan, _trained(name, plan))
    leaves = plan.leaves()
    assert set(gradient) == set(leaves)
    for path, value in gradient.items():
        places = value if leaves[path].by_layer else value[None]
        by_place = np.abs(places).reshape(len(places), -1).max(1)
        assert (by_place > 0).all() or re.fullmatch(WITHOUT_GRADIENT, path), (path, by_place)


@every_family
def test_a_mixed_batch_trains_each_task_as_its_examples_alone_do(name):
    plan, single = _plan(name, tasks=TASKS), _plan(name)
    adapters, leaves = _trained(name, plan), plan.leaves()
    # No two examples weigh the same, so that a gradient that went to another example's task would be seen to.
    route, weights = np.array([2, 0, -1, 1, 1, -1, 0, 2]), 1 + np.arange(BATCH, dtype=np.float32) / BATCH
    mixed = _gradient(name, plan, adapters, weights, route)
    alone = [
        _gradient(name, single, plan.select_task(adapters, task), weights * (route == task))
        for task in range(len(TASKS))
    ]
    without = _gradient(name, plan, adapters, weights, np.where(route == 1, 0, route))
    assert set(mixed) == set(leaves) == set(alone[0])
    for path, value in mixed.items():
        if leaves[path].by_task:
            axis = leaves[path].task_axis
            rows, rows_without = (np.moveaxis(np.asarray(a), axis, 0) for a in (value, without[path]))
            # What no example of the batch is routed to is not touched by it, not even by rounding.
            assert not rows_without[1].any(), path
        else:  # what tasks share learns from all of them
            rows = [value]
        if re.fullmatch(WITHOUT_GRADIENT, path):
            continue  # rounding alone
        expected = [a[path] for a in alone] if leaves[path].by_task else [sum(a[path] for a in alone)]
        for ours, theirs in zip(rows, expected, strict=True):
            assert np.any(theirs), path
            # Compiled otherwise, one and the same gradient differs by 1e-5 where a few large terms make it up.
            assert np.linalg.norm(ours - theirs) <= 3e-5 * np.linalg.norm(theirs), path


def _table(name, plan, adapters):
    """The whole tree with the rules that training adapters has."""
    tree = {"backbone": _backbone(shape_for(name)), "adapters": adapters}
    return ParameterTable(preset("adapters")).resolve(tree), tree


@every_placed_setting
def test_sharded_equals_unsharded(name):
    # The batch is cut along two axes, and weights along the other two of these three.
    config, plan = shape_for(name), _plan(name, tasks=TASKS)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    table, tree = _table(name, plan, _trained(name, plan))
    shardings = table.shardings(mesh)
    cut = [path for path, leaf in names.flatten(shardings).items() if not leaf.is_fully_replicated]
    assert "backbone/vision/blocks/attn/q/kernel" in cut
    # Where nothing is dropped, the other program is one that another property has compiled.
    key = jax.random.key(8) if ALL[name].method.uses_dropout else None

    @jax.jit
    def run(tree, images, tokens, mask, route):
        out = model(config).apply(
            {"params": tree["backbone"]},
            *(images, tokens, mask),
            adapters=plan.bind(tree["adapters"]),
            route=route,
            key=key,
        )
        return out.image_features, out.text_features, out.logits

    route = jnp.arange(BATCH) % 4 - 1
    placed = jax.device_put((tree, *inputs(config), route), (shardings, *[batch_sharding(mesh)] * 4))
    features = _outputs(name, plan, tree["adapters"], route=route, key=key)[:2]
    image, text = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in features)
    logits = np.exp(tree["backbone"]["logit_scale"]) * (image @ text.T)  # every image with every text of the batch
    _close(run(*placed), (*features, logits))


@every_setting
def test_saved_and_restored_equals_itself(name, tmp_path):
    plan = _plan(name)
    table, tree = _table(name, plan, _trained(name, plan))
    trained, frozen = table.split(tree)
    identity = Identity("random", "0" * 16, {"placements": plan.describe()})
    save_adapters(tmp_path / "adapter", trained, identity, 1)
    restored, metadata = load_adapters(tmp_path / "adapter", identity=identity, expected=trained)
    # What a method keeps of the backbone, which training leaves as it is, is made of that again.
    assert not [path for path in names.flatten(restored) if "/frozen/" in path or not path.startswith("adapters/")]
    own = names.flatten(names.merge(restored, frozen)["adapters"])
    for leaf, value in names.flatten(tree["adapters"]).items():
        np.testing.assert_array_equal(own[leaf], value)
    described = metadata.identity.adapters["placements"]
    again = place([Placement.from_description(d) for d in described], shape_for(name).towers)
    assert again == plan


@every_setting
def test_method_is_found_by_its_kind(name):
    method = ALL[name].method
    assert methods()[method.kind] is type(method)


@every_setting
def test_dropout_follows_its_key_and_spares_evaluation(name):
    plan = _plan(name)
    adapters = _trained(name, plan)
    first, again, other = (_outputs(name, plan, adapters, key=jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert ALL[name].method.uses_dropout != np.array_equal(first, other)
    if not ALL[name].method.uses_dropout:
        _close([first], _outputs(name, plan, adapters)[:1], 1e-6)
