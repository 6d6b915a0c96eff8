"""Shifts and scales in a whole CLIP: biases and LayerNorms of each task's own beside one frozen backbone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import BATCH, CONFIG, backbone, drawn, inputs, model

from vla_jax import names
from vla_jax.adapters import Affine, Placement, place
from vla_jax.slots import LINEAR_MAPS

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASKS = ("a", "b")
ROUTE = np.array([0, 1, -1, 1, 0, 0, -1, 1])

# A projection has no bias that could be changed.
BIASED = tuple(slot for slot in LINEAR_MAPS if slot != "projection")
PLACEMENTS = {
    "biases": (Placement(Affine(scale=False, shift=True), "biases", slots=BIASED, tasks=TASKS),),
    # Behind a LayerNorm stand the inputs of both sublayers, and a picture's embeddings; words' are not normalised.
    "layer_norms": (
        Placement(Affine(shift=True), "sublayers", slots=("attn_in", "mlp_in"), tasks=TASKS),
        Placement(Affine(shift=True), "embedded", towers=("vision",), slots=("embed",), tasks=TASKS),
    ),
}
NORMS = {"attn_in": "blocks/norm1", "mlp_in": "blocks/norm2", "embed": "pre_norm"}


def changed(plan, adapters, task: int):
    """The backbone with one task's numbers in its own biases and LayerNorms."""
    flat = {leaf: np.array(value) for leaf, value in names.flatten(backbone(CONFIG)).items()}
    given = names.flatten(adapters)
    for group in plan.groups:
        own = {leaf.name: np.asarray(given[leaf.path])[:, task] for leaf in group.leaves}  # [layers, width] each
        own = {name: value[0] if group.site.slot == "embed" else value for name, value in own.items()}
        if group.site.slot in NORMS:
            norm = f"{group.site.tower}/{NORMS[group.site.slot]}"
            # scale (gain n + offset) + shift
            flat[f"{norm}/scale"] *= own["scale"]
            flat[f"{norm}/bias"] = own["scale"] * flat[f"{norm}/bias"] + own["shift"]
        else:
            flat[f"{group.site.tower}/{LINEAR_MAPS[group.site.slot]}/bias"] += own["shift"]
    return names.unflatten(flat)


@functools.cache
def _program(plan):
    @jax.jit
    def run(params, adapters, route):
        bound = None if plan is None else plan.bind(adapters)
        out = model(CONFIG).apply({"params": params}, *inputs(CONFIG), adapters=bound, route=route, hidden_states=True)
        return out.image_features, out.text_features, *(a.swapaxes(0, 1) for a in (out.image_hidden, out.text_hidden))

    return run


@pytest.mark.parametrize("name", PLACEMENTS)
def test_each_tasks_examples_see_a_backbone_of_its_own(name):
    plan, plain = place(PLACEMENTS[name], CONFIG.towers), backbone(CONFIG)
    adapters = drawn(plan.shapes(), 6, 0.2, around=jax.jit(plan.init)(jax.random.key(0)))
    mixed = _program(plan)(plain, adapters, jnp.asarray(ROUTE))
    without = _program(None)(plain, None, None)
    for task in range(-1, len(TASKS)):
        alone = without if task == -1 else _program(None)(changed(plan, adapters, task), None, None)
        rows = np.flatnonzero(task == ROUTE)
        assert 0 < len(rows) < BATCH
        for ours, theirs, before in zip(mixed, alone, without, strict=True):
            assert np.linalg.norm(ours[rows] - theirs[rows]) <= 1e-5 * np.linalg.norm(theirs[rows])
            assert task == -1 or np.linalg.norm(theirs[rows] - before[rows]) > 1e-2 * np.linalg.norm(before[rows])


@pytest.mark.parametrize("name", PLACEMENTS)
def test_nothing_of_the_backbone_is_left_out(name):
    # One number for each of the backbone's own of that kind; the last LayerNorms have no slot behind them.
    plan = place(PLACEMENTS[name], CONFIG.towers)
    if name == "biases":
        kind = lambda leaf: leaf.endswith("bias") and "norm" not in leaf  # noqa: E731
    else:
        kind = lambda leaf: "norm" in leaf and "post_norm" not in leaf  # noqa: E731
    own = sum(leaf.size for path, leaf in names.flatten(backbone(CONFIG)).items() if kind(path))
    assert plan.parameter_count() == len(TASKS) * own
