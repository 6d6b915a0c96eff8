"""Bottlenecks of which tasks or towers share a half: what is stored, counted and learnt."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_counts import B_16, BART_BASE, TASKS, trained_share
from settings import drawn
from through_slots import through_slots

from vla_jax import names
from vla_jax.adapters import Bottleneck, Placement, Share, place, vl_adapter
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")


EQUAL = {"vision": TowerShape(2, 8, 16), "text": TowerShape(2, 8, 16)}


def _gradient(placement: Placement, adapters, route):
    """The gradient of something that depends on both towers, with respect to adapters of these values."""
    plan, draw = place(placement, EQUAL), np.random.default_rng(4).standard_normal
    streams = {tower: jnp.asarray(draw((6, 3, 8)), jnp.float32) for tower in EQUAL}

    def loss(adapters):
        results = through_slots(plan, adapters, streams, route)
        return jnp.sum(jnp.sin(results["vision"]) + 2 * jnp.sin(results["text"]))

    return names.flatten(jax.jit(jax.grad(loss))(adapters))


@pytest.mark.parametrize("half", ["down", "up"])
@pytest.mark.parametrize("axis", ["tasks", "towers"])
def test_the_gradient_of_a_shared_half_is_the_sum_over_its_users(half, axis):
    tasks = ("a", "b") if axis == "tasks" else ()
    route = jnp.array([0, 1, 1, 0, -1, 1]) if tasks else None
    alone = Placement(Bottleneck(rank=3, activation="gelu"), slots=("mlp_out",), tasks=tasks)
    together = dataclasses.replace(alone, sharing=(Share(f"{half}/.*", (axis,)),))
    shared = names.flatten(drawn(place(together, EQUAL).shapes(), 3, 0.3))

    def of(path: str) -> str:
        """The shared parameter that a parameter of one tower is a copy of."""
        return path if path in shared else path.replace("vision", "shared").replace("text", "shared")

    copies = {}
    for path, leaf in names.flatten(place(alone, EQUAL).shapes()).items():
        value = shared[of(path)]
        copies[path] = jnp.broadcast_to(value if value.ndim == len(leaf.shape) else value[:, None], leaf.shape)
    expected = dict.fromkeys(shared, 0.0)
    for path, value in _gradient(alone, names.unflatten(copies), route).items():
        over_tasks = value.ndim > shared[of(path)].ndim
        expected[of(path)] += np.asarray(value).sum(1) if over_tasks else np.asarray(value)
    found = _gradient(together, names.unflatten(shared), route)
    assert set(found) == set(expected)
    for path, value in found.items():
        assert np.abs(value).min() > 0
        assert np.linalg.norm(value - expected[path]) <= 1e-5 * np.linalg.norm(expected[path])


def test_tied_towers_and_tasks_have_one_bottleneck():
    everything = Placement(Bottleneck(rank=3), slots=("mlp_out",), tasks=("a", "b"))
    everything = dataclasses.replace(everything, sharing=(Share(".*", ("tasks", "towers")),))
    plan = place(everything, EQUAL)
    assert plan.parameter_count() == 2 * (2 * 8 * 3 + 3 + 8) == names.count(plan.shapes())


def test_halves_shared_by_towers_of_different_widths_are_refused():
    placement = Placement(Bottleneck(rank=3), slots=("mlp_out",), sharing=(Share("down/.*", ("towers",)),))
    with pytest.raises(UserError, match=r"down/kernel' is shared by vision/mlp_out and text/mlp_out, which need it as"):
        place(placement, B_16)


@pytest.mark.parametrize(
    ("tasks", "shared", "count", "published"),
    [
        # VL-PET, table 2, and VL-Adapter's own; 30 sites.
        ((), None, 4_449_600, 4.18),
        (TASKS, None, 4 * 4_449_600, 12.22),
        (TASKS, "up", 30 * (4 * (768 * 96 + 96) + 96 * 768 + 768), 8.36),
        # 8.3948 %: the publication rounded twice.
        (TASKS, "down", 30 * (768 * 96 + 96 + 4 * (96 * 768 + 768)), 8.40),
    ],
    ids=["single", "multiple", "half_shared_up", "half_shared_down"],
)
def test_published_shares_of_vl_adapter(tasks, shared, count, published):
    sharing = () if shared is None else (Share(f"{shared}/.*", ("tasks",)),)
    plan = place(dataclasses.replace(vl_adapter(), tasks=tasks, sharing=sharing), BART_BASE)
    assert plan.parameter_count() == names.count(plan.shapes()) == count
    assert round(round(trained_share(count), 3) + 1e-9, 2) == published
