from __future__ import annotations

import numpy as np
import pytest
from exchanged_clip import CONFIG, close, drawn, features, loaded, write_backbone

from vla_jax import names
from vla_jax.adapters import LoRA, Placement, place
from vla_jax.algebra.places import Place, occupants
from vla_jax.errors import UserError
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.sites import Occupied, adapter_of, assemble, chosen, lacks_start, saved_as, uses_weights

TOWERS = CONFIG.towers
EVERY = [
    *(Place(0, tower, slot, k) for tower in TOWERS for slot in ("attn_q", "mlp_fc1") for k in range(TOWERS[tower][0])),
    *(Place(0, tower, "projection", 0) for tower in TOWERS),
]


def low_rank(at: Place, generator: np.random.Generator, **settings) -> Occupied:
    method = LoRA(**{"rank": 2, **settings})
    into, out = TOWERS[at.tower].widths(at.slot)
    a, b = (generator.standard_normal(shape) for shape in ((into, method.rank), (method.rank, out)))
    return Occupied(method, {"a": a.astype(np.float32), "b": b.astype(np.float32)})


def saved(placements, leaves=None) -> SavedAdapter:
    """A checkpoint with these placements, and random leaves where none are given."""
    described = {"placements": [placement.describe() for placement in placements]}
    towers = {name: shape._asdict() for name, shape in TOWERS.items()}
    if leaves is None:
        generator = np.random.default_rng(0)
        shapes = names.flatten({"adapters": place(placements, TOWERS).shapes()})
        leaves = {name: generator.standard_normal(leaf.shape) for name, leaf in shapes.items()}
    return SavedAdapter(leaves, described, "any", "", towers)


@pytest.mark.parametrize("seed", range(20))
def test_any_places_are_assembled_and_taken_apart_again(seed):
    generator = np.random.default_rng(seed)
    some = [at for at in EVERY if generator.random() < (0.3, 0.6, 0.9, 1.0)[seed % 4]] or EVERY[:1]
    places = {
        at: low_rank(at, generator, rank=int(generator.integers(1, 4)), alpha=float(generator.integers(1, 3)))
        for at in some
    }
    written = saved_as(saved(()), assemble(places, TOWERS, "adapter"))
    again = occupants(adapter_of(written))
    assert sorted(str(at) for at in again) == sorted(str(at) for at in places)
    for at, occupant in again.items():
        method, leaves = places[at._replace(placement=0)]
        assert occupant.method == method
        for leaf, value in leaves.items():
            np.testing.assert_array_equal(occupant.leaves[leaf], value)


@pytest.mark.parametrize(
    ("some", "expected"),
    [
        (EVERY, [("lora", ("vision", "text"), ("attn_q", "mlp_fc1", "projection"), "all")]),
        ([at for at in EVERY if at.layer == 1], [("lora", ("vision", "text"), ("attn_q", "mlp_fc1"), "1")]),
        (
            [at for at in EVERY if at.slot == "mlp_fc1" and at.layer == TOWERS[at.tower].depth - 1],
            [("lora", ("vision", "text"), ("mlp_fc1",), "-1")],
        ),
        (
            [at for at in EVERY if at.tower == "vision" and at.slot != "projection" and at.layer != 1],
            [("lora", ("vision",), ("attn_q", "mlp_fc1"), "0,2")],
        ),
        (
            [Place(0, "vision", "attn_q", 0), Place(0, "vision", "mlp_fc1", 1), Place(0, "text", "attn_q", 0)],
            [("lora", ("vision", "text"), ("attn_q",), "0"), ("lora_2", ("vision",), ("mlp_fc1",), "1")],
        ),
    ],
    ids=["all", "one_layer", "counted_from_the_end", "one_tower", "no_product"],
)
def test_products_of_towers_slots_and_layers_are_one_placement(some, expected):
    generator = np.random.default_rng(0)
    plan = assemble({at: low_rank(at, generator) for at in some}, TOWERS, "lora").plan
    assert [(p.name, p.towers, p.slots, p.layers) for p in plan.placements] == expected


def test_ranks_and_alphas_become_tables():
    generator = np.random.default_rng(0)
    some = [Place(0, "vision", "attn_q", k) for k in range(3)]
    settings = [{"rank": 2, "alpha": 4.0}, {"rank": 2, "alpha": 4.0}, {"rank": 3, "alpha": 8.0}]
    places = {at: low_rank(at, generator, **own) for at, own in zip(some, settings, strict=True)}
    (placement,) = assemble(places, TOWERS, "lora").plan.placements
    assert placement.method == LoRA(rank=2, alpha=4.0)
    assert placement.ranks == (("vision/attn_q/2", 3),)
    assert placement.alphas == (("vision/attn_q/2", 8.0),)


def test_adapters_are_chosen_by_name():
    both = (Placement(LoRA(), "a", slots=("attn_q",)), Placement(LoRA(), "a_longer", slots=("attn_q",)))
    checkpoint = saved(both)
    assert chosen(checkpoint, ()).description == checkpoint.description
    one = chosen(checkpoint, ("a",))
    assert set(one.leaves) == {name for name in checkpoint.leaves if name.startswith("adapters/a/")}
    adapter_of(one)
    with pytest.raises(UserError, match="unknown adapter 'b'; allowed: a, a_longer"):
        chosen(checkpoint, ("b",))


def test_leaves_that_do_not_fit_the_placements_are_named():
    placements = (Placement(LoRA(rank=2), slots=("attn_q",), towers=("text",)),)
    leaves = {"adapters/adapter/text/attn_q/a": np.zeros((2, 16, 2)), "adapters/adapter/text/attn_q/c": np.zeros(1)}
    with pytest.raises(UserError, match=r"missing: adapter/text/attn_q/b; extra: adapter/text/attn_q/c"):
        adapter_of(saved(placements, leaves))
    with pytest.raises(UserError, match="has no placements"):
        adapter_of(SavedAdapter(leaves, {"method": "lora"}, "any", "", {}))


@pytest.mark.usefixtures("quick_compilation_of_a_test")
def test_what_pissa_started_from_is_made_of_the_backbone(tmp_path):
    backbone = loaded(write_backbone(tmp_path))
    checkpoint = drawn(backbone, (Placement(LoRA(rank=2, init="pissa"), slots=("attn_q",), towers=("vision",)),))
    assert lacks_start(checkpoint)
    assert uses_weights(checkpoint)
    assert not any("frozen" in name for name in checkpoint.leaves)
    with pytest.raises(UserError, match="comes from the backbone's weights; give the backbone"):
        adapter_of(checkpoint)
    adapter = adapter_of(checkpoint, backbone.params)
    kernel = np.asarray(backbone.params["vision"]["blocks"]["attn"]["q"]["kernel"][0])
    left, values, right = np.linalg.svd(kernel)
    best = (left[:, :2] * values[:2]) @ right[:2]
    start = names.flatten(adapter.params)
    product = start["adapter/vision/attn_q/frozen/a"][0] @ start["adapter/vision/attn_q/frozen/b"][0]
    close((8.0 * product,), (best,))  # alpha over rank is eight
    # Nothing of that goes into the checkpoint again.
    again = saved_as(checkpoint, adapter)
    assert again.leaves.keys() == checkpoint.leaves.keys()
    close(features(backbone, again), features(backbone, checkpoint), 1e-7)
