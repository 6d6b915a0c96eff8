"""AdapterFusion of every method that adds to a stream, by way of its two stages; and why it refuses the others."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import ALL, BATCH, LENGTH, WITHOUT_GRADIENT, backbone, begun, drawn, inputs, kinds, model, shape_for

from vla_jax import names
from vla_jax.adapters import Fuse, fuse, place
from vla_jax.adapters.composite import Composite
from vla_jax.errors import UserError

TASKS = ("a", "b", "c")

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _refused(placement) -> bool:
    return placement.method.joint or any(slot in Fuse.refused for slot in placement.slots)


# What the shared list of properties fuses already.
LISTED = set().union(*(kinds(one.method) for one in ALL.values() if isinstance(one.method, Fuse)))
# One setting a kind is enough, but not where weights are shared in ways of their own.
FUSED = {}
for _name, _placement in ALL.items():
    _known = LISTED.union(*(kinds(one.method) for one in FUSED.values()))
    _shares = bool(_placement.sharing) or _placement.tied
    _tables = _placement.ranks or _placement.alphas
    if not _refused(_placement) and not _tables and (_shares or not kinds(_placement.method) <= _known):
        # A composite runs several children for each of the fusion's; at one place it compiles in reasonable time.
        _one_place = {"towers": ("vision",), "slots": _placement.slots[:1]}
        _composite = isinstance(_placement.method, Composite)
        FUSED[_name] = dataclasses.replace(_placement, **_one_place) if _composite else _placement
REFUSED = {name: placement for name, placement in ALL.items() if _refused(placement)}


def test_every_kind_is_fused_or_refused():
    known = set().union(*(kinds(one.method) for one in ALL.values()))
    tested = set().union(LISTED, *(kinds(one.method) for one in (*FUSED.values(), *REFUSED.values())))
    assert known == tested
    assert {"hyperformer", "mma", "cross_modal", "bottleneck_half_shared", "uniadapter", "lora_tied"} <= set(FUSED)


@functools.cache
def _backbone(config):
    return backbone(config)


@functools.cache
def _first_stage(name):
    """Adapters of three tasks as training might leave them, no two alike, and the plan of one alone."""
    config = shape_for(name)
    plan = place(dataclasses.replace(FUSED[name], tasks=TASKS), config.towers)
    return plan, drawn(plan.shapes(), 8, 0.2, around=begun(plan, _backbone(config)))


@functools.cache
def _second_stage(name):
    """The fusion of three trained adapters, and of three copies of the first."""
    config = shape_for(name)
    plan, adapters = _first_stage(name)
    copies = adapters
    for task in (1, 2):
        copies = plan.set_task(copies, task, plan.select_task(adapters, 0))
    stages = [
        fuse(plan, given, config.towers, jax.random.key(0), backbone=_backbone(config)) for given in (adapters, copies)
    ]
    assert stages[0][0] == stages[1][0]
    return stages[0][0], stages[0][1], stages[1][1]


@functools.cache
def _program(config, plan):
    images, tokens, mask = inputs(config)
    target = jax.random.normal(jax.random.key(7), (BATCH, config.projection))

    @jax.jit
    def run(params, adapters):
        def loss(adapters):
            bound = plan.bind(adapters, inspect=True)
            out = model(config).apply({"params": params}, images, tokens, mask, adapters=bound)
            value = jnp.sum((out.image_features + 2 * out.text_features - target) ** 2)
            return value, (out.image_features, out.text_features, out.readings)

        (_, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(adapters)
        return outputs, gradient

    return run


@functools.cache
def _features(config, plan):
    @jax.jit
    def run(params, adapters):
        bound = None if plan is None else plan.bind(adapters)
        out = model(config).apply({"params": params}, *inputs(config), adapters=bound)
        return out.image_features, out.text_features

    return run


@pytest.mark.parametrize("name", FUSED)
def test_a_fusion_of_copies_is_at_first_the_one(name):
    config = shape_for(name)
    (plan, adapters), (fused, _, copies) = _first_stage(name), _second_stage(name)
    alone = _features(config, plan.single())(_backbone(config), plan.select_task(adapters, 0))
    plain = _features(config, None)(_backbone(config), None)
    (*together, _), _ = _program(config, fused)(_backbone(config), copies)
    assert any(np.linalg.norm(one - without) > 1e-2 for one, without in zip(alone, plain, strict=True))
    for ours, theirs in zip(together, alone, strict=True):
        # The values' 1e-6 beside the diagonal is what a new fusion changes, at every site.
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", FUSED)
def test_gradients_reach_every_child_and_the_attention(name):
    config, (plan, adapters, _) = shape_for(name), _second_stage(name)
    _, gradient = _program(config, plan)(_backbone(config), adapters)
    leaves, found = plan.leaves(), names.flatten(gradient)
    assert set(found) == set(leaves)
    for path, value in found.items():
        places = np.asarray(value if leaves[path].by_layer else value[None])
        by_place = np.abs(places).reshape(len(places), -1).max(1)
        assert (by_place > 0).all() or re.fullmatch(WITHOUT_GRADIENT, path), (path, by_place)
    # The children are those of the first stage, and each learns by itself unless the tasks shared it before.
    for group in plan.groups:
        assert {leaf.name.split("/")[0] for leaf in group.leaves} == {*TASKS, "fuse"}


# What runs beside a tower hands nothing out for inspection.
@pytest.mark.parametrize("name", [name for name, placement in FUSED.items() if "side" not in placement.slots])
def test_attention_is_handed_out_for_every_site(name):
    config, (plan, adapters, _) = shape_for(name), _second_stage(name)
    (*_, readings), _ = _program(config, plan)(_backbone(config), adapters)
    tokens = {"vision": 1 + config.grid**2, "text": LENGTH}
    expected = {}
    for group in plan.groups:
        tower, slot = group.site.tower, group.site.slot
        read = 1 if slot == "projection" else tokens[tower]
        expected[f"{'/'.join(group.path)}/attention"] = (group.depth, BATCH, read, len(TASKS))
    found = {label: weights for tower in readings.values() for label, weights in tower.items()}
    assert {label: weights.shape for label, weights in found.items()} == expected
    for weights in found.values():
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        assert np.std(np.asarray(weights)[..., 0]) > 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_adds_nothing_to_a_stream_is_refused(name):
    config, placement = shape_for(name), REFUSED[name]
    plan = place(dataclasses.replace(placement, tasks=TASKS), config.towers)
    reason = (
        Fuse.refused_joint
        if placement.method.joint
        else next(Fuse.refused[slot] for slot in placement.slots if slot in Fuse.refused)
    )
    with pytest.raises(UserError, match=re.escape(reason)):
        fuse(plan, drawn(plan.shapes(), 1, 0.2), config.towers, jax.random.key(0))
