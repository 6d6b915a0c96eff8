"""Merging against the definitions, against the adapted backbone, and undone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained_clip import (
    AFFINE,
    CONFIG,
    DORA,
    LORA,
    PLACEMENTS,
    assert_same_changes,
    backbone,
    changes,
    config_for,
    features,
    inputs,
    plain_features,
    trained,
)

from vla_jax import names
from vla_jax.adapters import Affine, Average, Bottleneck, Fusion, LoRA, Placement, Prompt
from vla_jax.algebra import Adapter, Merged, merge, unmerge
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.export import export_backbone
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

named = lambda placement, name: dataclasses.replace(placement, name=name)  # noqa: E731

TOGETHER = {
    "lora_then_affine": [named(LORA["lora_everywhere"], "one"), named(AFFINE["ia3"], "two")],
    "affine_then_lora": [named(AFFINE["biases"], "one"), named(LORA["lora"], "two")],
    "lora_then_dora": [named(LORA["lora_everywhere"], "one"), named(DORA["dora"], "two")],
    "two_at_an_input": [
        Placement(Affine(shift=True), "one", slots=("mlp_hidden", "mlp_in")),
        Placement(Affine(shift=True), "two", slots=("mlp_hidden",)),
        named(DORA["dora"], "three"),
    ],
    "two_at_an_output": [
        Placement(Affine(shift=True), "one", slots=("mlp_out", "attn_sublayer")),
        Placement(LoRA(rank=2), "two", slots=("mlp_fc2", "attn_out")),
        Placement(Affine(shift=True), "three", slots=("mlp_fc2", "attn_in")),
    ],
}
SETTINGS = PLACEMENTS | TOGETHER


def relative(ours, theirs) -> float:
    return float(np.linalg.norm(np.subtract(ours, theirs)) / np.linalg.norm(theirs))


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_backbone_gives_the_adapted_features_and_unmerges(name):
    config = config_for(name)
    params, adapter = backbone(config), trained(SETTINGS[name], config)
    merged = merge(params, adapter)
    adapted, plain = features(config, params, adapter), plain_features(config)
    for ours, theirs, before in zip(features(config, merged.params), adapted, plain, strict=True):
        assert relative(ours, theirs) <= 1e-5
        assert relative(theirs, before) > 1e-2  # there was something to merge
    assert all(rounding == (0.0, 0.0) for rounding in merged.rounding.values())

    before, after = names.flatten(params), names.flatten(unmerge(merged, adapter))
    assert list(after) == list(before)
    for leaf, value in before.items():
        if leaf in merged.rounding:
            assert relative(after[leaf], value) <= 2e-6, leaf
        else:
            assert names.flatten(merged.params)[leaf] is value


@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name != "scale_and_shift"])
def test_what_is_added_is_the_definition(name):
    config = config_for(name)
    params, adapter = backbone(config), trained(PLACEMENTS[name], config)
    before, after = names.flatten(params), names.flatten(merge(params, adapter).params)
    added = {}
    for leaf in before:
        difference = np.asarray(after[leaf], np.float64) - np.asarray(before[leaf], np.float64)
        stacked = "/blocks/" in leaf
        added |= {f"{leaf}/{k}": change for k, change in enumerate(difference if stacked else [difference])}
    assert_same_changes(added, changes(adapter, params), tolerance=1e-6)


def test_one_of_several_tasks_is_merged():
    placements = [
        Placement(LoRA(rank=2), "stacked", slots=("attn_q",), tasks=("counting", "colours")),
        Placement(Affine(), "common", slots=("attn_v",)),
    ]
    adapter = trained(placements)
    for k, task in enumerate(("counting", "colours")):
        merged = merge(backbone(), adapter, task=task)
        routed = features(CONFIG, backbone(), adapter, route=jnp.full(3, k))
        assert relative(features(CONFIG, merged.params), routed) <= 1e-5
        again = names.flatten(unmerge(merged, adapter, task=task))
        assert (
            relative(again["vision/blocks/attn/q/kernel"], backbone()["vision"]["blocks"]["attn"]["q"]["kernel"]) < 2e-6
        )
    with pytest.raises(UserError, match=r"'stacked' has weights for 2 tasks; name the one .* of counting, colours"):
        merge(backbone(), adapter)
    with pytest.raises(UserError, match="unknown task of adapter 'stacked' 'color'; did you mean 'colours'"):
        merge(backbone(), adapter, task="color")
    with pytest.raises(UserError, match="no adapter has weights of its own for task 'counting'"):
        merge(backbone(), trained(LORA["lora"]), task="counting")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_measured_and_avoided_on_request(dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), backbone())
    adapter = trained(LORA["lora_everywhere"])
    merged, kept = merge(params, adapter), merge(params, adapter, keep_float32=True)
    before, after, exact = (names.flatten(tree) for tree in (params, merged.params, kept.params))
    assert set(merged.rounding) == set(kept.rounding) == {name for name in exact if exact[name].dtype == jnp.float32}
    digits = jnp.finfo(dtype).nmant + 1
    for name, rounding in merged.rounding.items():
        assert after[name].dtype == before[name].dtype == dtype
        assert kept.rounding[name] == (0.0, 0.0)
        old, new, whole = (np.asarray(flat[name].astype(jnp.float32), np.float64) for flat in (before, after, exact))
        if name.endswith("bias"):
            assert rounding == (0.0, 0.0)  # LoRA leaves biases alone
            continue
        assert rounding.weight == pytest.approx(np.linalg.norm(new - whole) / np.linalg.norm(whole), rel=1e-4)
        assert rounding.update == pytest.approx(np.linalg.norm(new - whole) / np.linalg.norm(whole - old), rel=1e-4)
        assert 0.1 * 2**-digits < rounding.weight < 2**-digits
    # From float32 the backbone comes back as it was, in its own dtype; from fewer bits only to their rounding.
    for name, leaf in names.flatten(unmerge(kept, adapter)).items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)
    for name, leaf in names.flatten(unmerge(merged, adapter)).items():
        assert leaf.dtype == dtype
        assert relative(leaf.astype(jnp.float32), before[name].astype(jnp.float32)) < 2 * 2**-digits


def test_an_update_below_the_last_digit_is_reported_as_lost():
    params = jax.tree.map(lambda a: a.astype("bfloat16"), backbone())
    adapter = trained(Placement(LoRA(rank=2), slots=("attn_q",)))
    tiny = Adapter(adapter.plan, jax.tree.map(lambda a: 1e-4 * a, adapter.params))
    merged = merge(params, tiny)
    for name, rounding in merged.rounding.items():
        if name.endswith("kernel"):
            assert rounding.update > 0.9
            assert rounding.weight < 1e-6


def test_float32_is_exact_to_rounding():
    adapter = trained(LORA["lora_everywhere"])
    before, after = names.flatten(backbone()), names.flatten(merge(backbone(), adapter).params)
    for label, change in changes(adapter, backbone()).items():
        name, _, layer = label.rpartition("/")
        at = () if "projection" in name else int(layer)
        exact = np.asarray(before[name][at], np.float64) + change
        assert relative(after[name][at], exact) < 1e-7


@pytest.mark.torch
@pytest.mark.parametrize("name", ["lora_everywhere", "dora", "ia3"])
def test_the_merged_backbone_gives_the_same_features_in_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    adapter = trained(SETTINGS[name])
    merged = merge(backbone(), adapter)
    model, report = transformers.CLIPModel.from_pretrained(
        export_backbone(merged.params, CONFIG, tmp_path), output_loading_info=True
    )
    assert not any(report.values())
    images, tokens = inputs(CONFIG)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(tokens, dtype=torch.long), pixel_values=pixels)
    both = (theirs.vision_model_output.pooler_output, theirs.text_model_output.pooler_output)
    for reference, ours in zip(both, features(CONFIG, backbone(), adapter), strict=True):
        assert relative(reference.numpy(), ours) <= 1e-5


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            Placement(Bottleneck(rank=2), slots=("mlp_out",)),
            r"\(bottleneck\) at vision/mlp_out/0 .* stands relu",
        ),
        (
            Placement(Bottleneck(rank=2, activation="identity"), slots=("mlp_out",)),
            "bottleneck is not known as",
        ),
        (Placement(Fusion(rank=4)), "at joint/block_out/1 .* the two towers read each other"),
        (
            Placement(Prompt(length=2), slots=("tokens",)),
            r"\(prompt\) at vision/tokens/0 cannot be turned",
        ),
        (Placement(Affine(), slots=("block_out",)), "at 'block_out' stands no linear map"),
        (
            Placement(Average((("x", LoRA(rank=2)), ("y", LoRA(rank=2)))), slots=("attn_q",)),
            r"\(average\) .* average is not known as a change of weights",
        ),
        (
            Placement(Affine(shift=True), slots=("projection",)),
            "the map 'vision/projection' has no bias that",
        ),
    ],
    ids=["bottleneck", "linear_bottleneck", "fusion", "prompt", "block_out", "composite", "projection_shift"],
)
def test_what_is_no_change_of_weights_is_refused(placement, message):
    with pytest.raises(UserError, match=message):
        merge(backbone(), trained(named(placement, "mine")))


def test_dora_after_a_shift_of_its_map_is_refused():
    adapter = trained([named(AFFINE["biases"], "one"), Placement(DORA["dora"].method, "two", slots=("attn_q",))])
    with pytest.raises(UserError, match=r"'two' \(lora\) at vision/attn_q/0 rescales .* 'one' .*place DoRA first"):
        merge(backbone(), adapter)


@pytest.mark.parametrize("name", ["lora", "ia3", "scale_and_shift"])
def test_another_backbone_is_refused(name):
    vision = dataclasses.replace(CONFIG.vision, width=20, mlp_width=28)
    wider = abstract_params(dataclasses.replace(CONFIG, vision=vision))
    with pytest.raises(UserError, match=r"made for another backbone: it needs 'vision/.*/kernel' of shape \[3, .*16"):
        merge(wider, trained(PLACEMENTS[name]))
    with pytest.raises(UserError, match="and this one has none"):
        merge({"text": backbone()["text"]}, trained(PLACEMENTS[name]))


def test_parameters_of_another_plan_are_refused():
    plan, params = trained(LORA["lora"])
    with pytest.raises(UserError, match="plan and parameters of an adapter differ in 'adapter/text/attn_q/a'"):
        merge(backbone(), Adapter(plan, {"adapter": {"vision": params["adapter"]["vision"]}}))
    for task in (None, "counting"):
        stacked, params = trained(dataclasses.replace(LORA["lora"], tasks=("counting",) if task else ()))
        with pytest.raises(UserError, match="differ in 'other/a'"):
            merge(backbone(), Adapter(stacked, params | {"other": {"a": jnp.zeros(2)}}), task=task)


def test_a_merged_backbone_from_elsewhere_unmerges_unless_dora_is_in_it():
    adapter = trained(LORA["lora"])
    again = unmerge(Merged(merge(backbone(), adapter).params), adapter)
    for name, leaf in names.flatten(again).items():
        assert relative(leaf, names.flatten(backbone())[name]) <= 2e-6
    adapter = trained(DORA["dora"])
    with pytest.raises(UserError, match=r"set the norms of the columns .* what they were is not known"):
        unmerge(Merged(merge(backbone(), adapter).params), adapter)


def test_a_scale_of_zero_cannot_be_unmerged():
    adapter = trained(AFFINE["ia3"])
    scale = names.flatten(adapter.params)["ia3/vision/attn_k/scale"].at[1, :2].set(0.0)
    adapter = Adapter(adapter.plan, names.unflatten(names.flatten(adapter.params) | {"ia3/vision/attn_k/scale": scale}))
    merged = merge(backbone(), adapter)
    with pytest.raises(UserError, match="at vision/attn_k/1 scales 2 channels by zero"):
        unmerge(merged, adapter)
