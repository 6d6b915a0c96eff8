"""Ways of sharing a backbone: what they train, by hand, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from small_model import CONFIG, backbone, batch

from vla_jax import names
from vla_jax.adapters import Bottleneck
from vla_jax.backbones.transformer import Compute
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.errors import UserError
from vla_jax.sharing import WAYS, Sharing
from vla_jax.tasks.classification import Classification
from vla_jax.tasks.matching import Matching
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.variants import Budget, TaskData

RATES = dict.fromkeys(("head", "adapters", "fusion", "full"), (1e-3,))


def _part(task, train: int = 6, test: int = 4) -> TaskData:
    sizes = {"train": train, "validation": test, "test": test}
    return TaskData(task, {split: ArraySource(batch(size)) for split, size in sizes.items()}, as_rows)


PARTS = {"pairs": _part(Matching()), "kinds": _part(Classification("kinds", 5)), "other": _part(Matching())}


def _sharing(**changes) -> Sharing:
    given = Sharing(
        backbone=backbone(),
        parts=PARTS,
        adapter=Bottleneck(rank=3),
        budget=Budget(steps=4, batch_size=12),
        rates=RATES,
        compute=Compute(),
        mesh=make_mesh(MeshConfig()),
        folder=Path(),
    )
    return dataclasses.replace(given, **changes)


def test_every_way_trains_what_its_name_says():
    # A head reads four features of the pair; towers of two blocks are 32 wide, and one bottleneck sits on each MLP.
    features, width, sites = 4 * CONFIG.projection, 32, 4
    heads = 2 * (features + 1) + 5 * (features + 1)
    down, up = width * 3 + 3, 3 * width + width
    whole = names.count(backbone().params)
    assert {name: _sharing().trained(name) for name in WAYS} == {
        "frozen": heads,
        "one": heads + sites * (down + up),
        "half_down": heads + sites * (down + 3 * up),
        "half_up": heads + sites * (3 * down + up),
        "each": heads + sites * 3 * (down + up),
        # For each task a query, a key and a value over the adapters of all three.
        "fusion": heads + sites * 3 * (down + up) + sites * 3 * (3 * width**2 + 2 * width),
        "full": heads + 3 * whole,
    }


def test_tasks_may_have_different_numbers_of_examples_to_be_tested_on():
    parts = PARTS | {"kinds": _part(Classification("kinds", 5), test=3)}
    assert _sharing(parts=parts).trained("each") == _sharing().trained("each")


def test_both_stages_together_see_every_example_once():
    seen = []
    for stage in (0, 1):
        source = _sharing()._half(stage).splits["train"]
        assert len(source) == 3 * 3
        seen += [(example["route"], example["image"].tobytes()) for example in map(source.__getitem__, range(9))]
    assert len(set(seen)) == 3 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": {"pairs": PARTS["pairs"]}}, "at least 2 tasks; got pairs"),
        ({"budget": Budget(batch_size=16)}, "batch_size 16 cannot be shared equally by 3 tasks"),
        ({"budget": Budget(steps=1, batch_size=12)}, "two stages"),
        (
            {"parts": PARTS | {"kinds": _part(Classification("kinds", 5), train=7)}},
            "equally many train examples; pairs has 6, kinds has 7, other has 6",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        _sharing(**changes)


def test_ways_are_known_by_name():
    with pytest.raises(UserError, match="unknown way of sharing 'half'; did you mean 'half_up'"):
        _sharing().run("half")
