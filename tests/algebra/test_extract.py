from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from trained_clip import CONFIG, LORA, assert_same_changes, backbone, changes, features, trained

from vla_jax import names
from vla_jax.adapters import Affine, Bottleneck, LoRA, Placement
from vla_jax.algebra import extract, merge
from vla_jax.errors import UserError

EVERYWHERE = LORA["lora_everywhere"]
BIASES = Placement(Affine(scale=False, shift=True), "biases", slots=("attn_q", "mlp_fc1"))


def fine_tuned(seed: int = 4) -> dict:
    """The backbone with every parameter moved."""
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda a: a + 0.1 * draw(a.shape).astype(np.float32), backbone())


@pytest.mark.parametrize("method", [EVERYWHERE.method, LoRA(rank=2, alpha=5.0, rank_stabilised=True)])
def test_a_change_of_the_rank_is_found_whole(method):
    placement = dataclasses.replace(EVERYWHERE, method=method, name="found")
    hidden = trained([EVERYWHERE, BIASES])
    merged = merge(backbone(), hidden).params
    found = extract(backbone(), merged, [placement, BIASES], CONFIG.towers)
    assert found.adapter.plan.placements == (placement, BIASES)
    assert_same_changes(changes(found.adapter, backbone()), changes(hidden, backbone()))
    touched = [name for name, leaf in names.flatten(merged).items() if leaf is not names.flatten(backbone())[name]]
    assert set(found.missing) <= set(touched)
    assert max(found.missing.values()) < 1e-5
    ours, theirs = features(CONFIG, backbone(), found.adapter), features(CONFIG, merged)
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_of_any_change_the_nearest_is_found_and_the_rest_told():
    after = fine_tuned()
    placement = Placement(LoRA(rank=3), "found", slots=("attn_q", "mlp_fc2", "projection"), layers="last 1")
    found = extract(backbone(), after, [placement, BIASES], CONFIG.towers)
    old, new = names.flatten(backbone()), names.flatten(after)
    assert set(found.missing) == set(old)
    for name in old:
        change = np.asarray(new[name], np.float64) - np.asarray(old[name], np.float64)
        served = name.startswith(("vision/", "text/")) and name.endswith(
            ("attn/q/kernel", "mlp/fc2/kernel", "projection/kernel")
        )
        lacking = change.copy()
        if served:
            last = change if "projection" in name else change[-1]
            left, values, right = np.linalg.svd(last)
            values[3:] = 0.0
            kept = (left[:, : len(values)] * values) @ right[: len(values)]
            lacking[() if "projection" in name else -1] -= kept
        elif name.endswith(("attn/q/bias", "mlp/fc1/bias")):
            lacking[:] = 0.0
        expected = np.linalg.norm(lacking) / np.linalg.norm(change)
        assert found.missing[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_equal_backbones_differ_in_nothing():
    found = extract(backbone(), backbone(), EVERYWHERE, CONFIG.towers)
    assert found.missing == {}
    assert all(np.abs(change).max() == 0 for change in changes(found.adapter, backbone()).values())


def test_half_precision_is_extracted_from_what_it_says():
    before, after = (jax.tree.map(lambda a: a.astype("bfloat16"), tree) for tree in (backbone(), fine_tuned()))
    placement = Placement(LoRA(rank=12), "found", slots=("attn_k",), towers=("text",))
    found = extract(before, after, placement, CONFIG.towers)
    assert found.missing["text/blocks/attn/k/kernel"] < 1e-5
    assert {leaf.dtype for leaf in jax.tree.leaves(found.adapter.params)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(Bottleneck(rank=2), slots=("mlp_out",)), r"'adapter' \(bottleneck\) cannot be extracted"),
        (Placement(LoRA(decomposed=True), slots=("attn_q",)), r"\(lora\) cannot be extracted"),
        (Placement(LoRA(init="pissa"), slots=("attn_q",)), r"\(lora\) cannot be extracted"),
        (Placement(Affine(), slots=("attn_q",)), r"\(affine\) cannot be extracted"),
        (Placement(BIASES.method, slots=("block_out",)), "sits at 'block_out', where no linear map stands"),
        (Placement(BIASES.method, slots=("projection",)), "change of 'vision/projection/bias': there is no such param"),
        (Placement(LoRA(), slots=("attn_q",), tied=True), "shares weights or stacks them over tasks"),
        (Placement(LoRA(), slots=("attn_q",), tasks=("a",)), "shares weights or stacks them over tasks"),
        (Placement(LoRA(rank=13), slots=("attn_q",)), "rank 13 exceeds the map at text/attn_q, 12 to 12"),
    ],
)
def test_what_cannot_be_extracted_is_refused(placement, message):
    with pytest.raises(UserError, match=message):
        extract(backbone(), fine_tuned(), placement, CONFIG.towers)


def test_backbones_of_other_parameters_are_refused():
    flat = names.flatten(backbone())
    less = names.unflatten({name: leaf for name, leaf in flat.items() if name != "logit_scale"})
    with pytest.raises(UserError, match=r"the two backbones differ in 'logit_scale', which is \(\) and None"):
        extract(backbone(), less, EVERYWHERE, CONFIG.towers)
    other = names.unflatten(flat | {"vision/class_embedding": flat["vision/class_embedding"][:3]})
    with pytest.raises(UserError, match=r"'vision/class_embedding', which is \(16,\) and \(3,\)"):
        extract(backbone(), other, EVERYWHERE, CONFIG.towers)
