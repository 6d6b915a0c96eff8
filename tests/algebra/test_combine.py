"""The laws of combining, on what adapters do to weights by definition."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from trained_clip import (
    AFFINE,
    CONFIG,
    DORA,
    LORA,
    PLACEMENTS,
    TIED,
    assert_same_changes,
    backbone,
    changes,
    config_for,
    features,
    trained,
    weighted,
)

from vla_jax import names
from vla_jax.adapters import Affine, Bottleneck, LoRA, Placement, Share, place
from vla_jax.algebra import (
    Adapter,
    add,
    average,
    combine,
    interpolate,
    merge,
    negate,
    scale,
    select_task,
)
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Every setting whose update is that of single maps; scale_and_shift sits at inputs, of which one map cannot tell.
SETTINGS = [name for name in PLACEMENTS if name != "scale_and_shift"]
FULL_RANK = 100  # more than any map here has; what is sparse is then whole
EVERY_WAY = {
    "cat": {},
    "svd": {},
    "linear": {},
    "ties": {"density": 1.0, "rank": FULL_RANK},
    "dare_linear": {"density": 1.0, "rank": FULL_RANK, "key": jax.random.key(0)},
    "dare_ties": {"density": 1.0, "rank": FULL_RANK, "key": jax.random.key(0)},
    "magnitude_prune": {"density": 1.0, "rank": FULL_RANK},
}


def _means(how: str, name: str) -> bool:
    """Whether the combination has a meaning for the setting; that it is refused otherwise is tested further down."""
    if name in DORA:
        return how in ("cat", "svd")
    return how != "linear" if name == "pissa" else name != "lora_shared_a" or how in ("cat", "linear")


def pair(name: str) -> tuple[Adapter, Adapter]:
    """Two adapters of a setting, with names of their own."""
    config = config_for(name)
    other = dataclasses.replace(PLACEMENTS[name], name="other")
    return trained(PLACEMENTS[name], config, seed=1), trained(other, config, seed=2)


def of(adapter: Adapter, name: str) -> dict[str, np.ndarray]:
    return changes(adapter, backbone(config_for(name)))


@pytest.mark.parametrize(("how", "name"), [(how, name) for how in EVERY_WAY for name in SETTINGS if _means(how, name)])
def test_one_adapter_at_weight_one_is_itself(how, name):
    adapter, params = pair(name)[0], backbone(config_for(name))
    result = combine([adapter], [1.0], how, backbone=params, **EVERY_WAY[how])
    assert_same_changes(of(result, name), of(adapter, name), 2e-6)
    if how in ("cat", "linear") and name not in (*DORA, "pissa"):
        assert result.plan == adapter.plan
        for path, leaf in names.flatten(adapter.params).items():
            np.testing.assert_array_equal(names.flatten(result.params)[path], leaf)


def test_one_adapter_at_weight_one_gives_the_same_features():
    for name in ("rslora", "dora", "biases"):
        adapter = pair(name)[0]
        result = combine([adapter], [1.0], "svd", backbone=backbone())
        ours, theirs = (features(CONFIG, backbone(), one) for one in (result, adapter))
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", SETTINGS)
def test_cat_is_the_weighted_sum_of_updates(name):
    one, other = pair(name)
    result = combine([one, other], [0.7, -0.4], backbone=backbone(config_for(name)))
    assert_same_changes(of(result, name), weighted([0.7, -0.4], of(one, name), of(other, name)))
    assert result.plan.placements[0].name == PLACEMENTS[name].name
    described = [Placement.from_description(row) for row in result.plan.describe()]
    assert place(described, config_for(name).towers) == result.plan  # what a checkpoint would say of it
    shapes = {path: leaf.shape for path, leaf in names.flatten(result.plan.shapes()).items()}
    assert {path: leaf.shape for path, leaf in names.flatten(result.params).items()} == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype("float32")}
    assert sum(np.prod(shape) for shape in shapes.values()) == result.plan.parameter_count()


def test_ranks_add_up_by_place_and_never_beyond_a_map():
    one, other = pair("lora_ranks")
    result = combine([one, other, one], [1.0, 1.0, 1.0])
    ranks = {(group.site.tower, group.site.slot, group.layers[0]): group.method.rank for group in result.plan.groups}
    assert ranks[("vision", "attn_q", (0, 2))] == 9
    assert ranks[("vision", "attn_q", (1,))] == 6
    result = combine([one] * 9, [0.1] * 9)  # 18 and 27 of 16 and 12
    assert all(group.method.rank == min(group.site.widths) for group in result.plan.groups)
    assert_same_changes(of(result, "lora_ranks"), weighted([0.9], of(one, "lora_ranks")))


def test_ranks_are_told_apart_where_maps_or_adapters_make_them_differ():
    one, other = pair("lora_everywhere")
    result = combine([one, other], [1.0, 1.0], "ties", density=1.0, rank=11)  # the projection has but 10
    ranks = {(group.site.tower, group.site.slot): group.method.rank for group in result.plan.groups}
    assert ranks[("vision", "projection")] == 10
    assert ranks[("vision", "attn_q")] == 11
    one = trained(LORA["lora_ranks"])
    plain = trained(Placement(LoRA(rank=2), slots=("attn_q", "mlp_fc1")), seed=2)
    for adapters in ((plain, one), (one, plain)):
        result = combine(adapters, [1.0, 2.0])
        expected = weighted([1.0, 2.0], *(of(adapter, "lora_ranks") for adapter in adapters))
        assert_same_changes(of(result, "lora_ranks"), expected)


def test_adapters_of_other_ranks_scales_and_kinds_of_scale_add_up():
    method = LoRA(rank=4, alpha=7.0, rank_stabilised=True, dropout=0.2)
    one = trained(LORA["lora"])
    other = trained(Placement(method, "other", slots=("attn_q", "attn_v")), seed=2)
    for first, second in ((one, other), (other, one)):
        result = combine([first, second], [2.0, 0.5])
        assert_same_changes(of(result, "lora"), weighted([2.0, 0.5], of(first, "lora"), of(second, "lora")))
        assert result.plan.groups[0].method == dataclasses.replace(first.plan.groups[0].method, rank=6)


@pytest.mark.parametrize("name", [name for name in (*LORA, *DORA, *TIED) if _means("svd", name)])
def test_svd_at_full_rank_is_cat(name):
    one, other = pair(name)
    params = backbone(config_for(name))
    ways = [
        combine([one, other], [0.7, -0.4], how, backbone=params, **settings)
        for how, settings in (("cat", {}), ("svd", {"rank": FULL_RANK}))
    ]
    assert_same_changes(of(ways[1], name), of(ways[0], name))


@pytest.mark.parametrize("name", ["lora_everywhere", "rslora"])
def test_svd_is_the_nearest_of_its_rank(name):
    one, other = pair(name)
    for rank in (1, 3):
        result = of(combine([one, other], [0.7, -0.4], "svd", rank=rank), name)
        for label, exact in weighted([0.7, -0.4], of(one, name), of(other, name)).items():
            if "kernel" in label:
                tail = np.linalg.svd(exact, compute_uv=False)[rank:]
                assert np.linalg.norm(result[label] - exact) == pytest.approx(np.sqrt(np.sum(tail**2)), rel=1e-4)
                assert np.linalg.matrix_rank(result[label], tol=1e-4) == rank
    assert combine([one, other], [1.0, 1.0], "svd").plan.groups[0].method.rank == one.plan.groups[0].method.rank


@pytest.mark.parametrize("how", ["cat", "svd", "linear", "ties", "magnitude_prune"])
@pytest.mark.parametrize("name", ["lora", "biases", "ia3"])
def test_the_order_of_adapters_does_not_matter(how, name):
    one, other = pair(name)
    third = trained(PLACEMENTS[name], seed=3)
    settings = {"density": 0.4} if how in ("ties", "magnitude_prune") else {}
    result = of(combine([one, other, third], [0.5, -1.0, 2.0], how, **settings), name)
    turned = of(combine([third, one, other], [2.0, 0.5, -1.0], how, **settings), name)
    assert_same_changes(turned, result)


@pytest.mark.parametrize("name", ["lora_everywhere", "dora", "ia3", "lora_tied"])
def test_the_named_operations_are_weighted_sums(name):
    one, other = pair(name)
    given = {"backbone": backbone(config_for(name))}
    first, second = of(one, name), of(other, name)
    for result, weights in (
        (add(one, other, **given), (1, 1)),
        (average(one, other, **given), (0.5, 0.5)),
        (interpolate(one, other, 0.25, **given), (0.75, 0.25)),
        (interpolate(one, other, 1.5, **given), (-0.5, 1.5)),
        (scale(one, 2.5, **given), (2.5, 0)),
        (negate(one, **given), (-1, 0)),
        (add(one, add(other, negate(one, **given), **given), **given), (0, 1)),
        (scale(scale(one, 4.0, **given), 0.25, **given), (1, 0)),
        (average(one, one, **given), (1, 0)),
    ):
        assert_same_changes(of(result, name), weighted(weights, first, second), 1e-5)
    nothing = of(add(one, negate(one, **given), **given), name)
    assert max(np.abs(change).max() for change in nothing.values()) < 2e-6
    assert scale(one, 2.5, **given).plan == one.plan
    assert add(one, other, name="sum", **given).plan.placements[0].name == "sum"
    if name == "lora_everywhere":
        assert {group.method.rank for group in add(one, other, rank=3).plan.groups} == {3}


def test_scaling_keeps_what_is_shared_shared():
    for name in ("lora_tied", "lora_shared_a"):
        one, other = pair(name)
        result = combine([one, other], [0.7, -0.4])
        assert set(result.plan.leaves()) == set(one.plan.leaves())
    with pytest.raises(UserError, match=r"shares some of its factors .*; svd would find factors of its own "):
        combine([one, other], [0.7, -0.4], "svd")


def test_merging_a_sum_is_merging_one_after_the_other():
    one, other = pair("lora_everywhere")
    at_once = merge(backbone(), add(one, other)).params
    in_turn = merge(merge(backbone(), one).params, other).params
    for name, leaf in names.flatten(at_once).items():
        np.testing.assert_allclose(leaf, names.flatten(in_turn)[name], rtol=0, atol=1e-6)


def test_several_placements_are_combined_each_with_its_like():
    placements = [LORA["lora"], dataclasses.replace(AFFINE["ia3"], slots=("attn_k", "mlp_hidden"))]
    one, other = trained(placements), trained(placements, seed=2)
    result = combine([one, other], [0.3, 0.9])
    assert [p.name for p in result.plan.placements] == ["adapter", "ia3"]
    assert_same_changes(of(result, "lora"), weighted([0.3, 0.9], of(one, "lora"), of(other, "lora")))
    with pytest.raises(UserError, match=r"name 'sum' is for one adapter, and 2 are combined .*: adapter, ia3"):
        combine([one, other], [1.0, 1.0], name="sum")


def test_tasks_of_one_adapter_are_combined_once_selected():
    adapter = trained(dataclasses.replace(LORA["lora"], tasks=("counting", "colours")))
    one, other = select_task(adapter, "counting"), select_task(adapter, "colours")
    assert_same_changes(of(add(one, other), "lora"), weighted([1, 1], of(one, "lora"), of(other, "lora")))
    leaf = adapter.params["adapter"]["vision"]["attn_q"]["a"]
    np.testing.assert_array_equal(other.params["adapter"]["vision"]["attn_q"]["a"], leaf[:, 1])
    with pytest.raises(UserError, match="'adapter' has weights for 2 tasks; name the one that is meant"):
        add(adapter, adapter)


def test_the_mean_of_parameters_is_taken_for_any_method():
    placement = Placement(Bottleneck(rank=2), "mine", slots=("mlp_out",), tasks=("a", "b"))
    one, other = trained(placement), trained(dataclasses.replace(placement, name="theirs"), seed=2)
    result = combine([one, other], [0.25, 0.75], "parameters", name="both")
    assert result.plan == place(dataclasses.replace(placement, name="both"), CONFIG.towers)
    first, second = names.flatten(one.params), names.flatten(other.params)
    for path, leaf in names.flatten(result.params).items():
        below = path.removeprefix("both/")
        expected = 0.25 * np.asarray(first[f"mine/{below}"]) + 0.75 * np.asarray(second[f"theirs/{below}"])
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7)
    itself = combine([one], [1.0], "parameters")
    assert itself.plan == one.plan
    for path, leaf in names.flatten(itself.params).items():
        np.testing.assert_array_equal(leaf, first[path])
    with pytest.raises(UserError, match=r"weights that add up to one; these add up to 2\.0"):
        combine([one, other], [1.0, 1.0], "parameters")
    with pytest.raises(UserError, match="the mean of parameters is for adapters of one plan"):
        combine([one, trained(dataclasses.replace(placement, layers="0"))], [0.5, 0.5], "parameters")


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_dora_is_refused_where_its_combination_has_no_meaning(how):
    one, other = pair("dora")
    with pytest.raises(UserError, match=rf"at vision/attn_v/0 is DoRA, .*; {how} has no meaning for it, cat and svd"):
        combine([one, other], [0.5, 0.5], how, backbone=backbone(), **EVERY_WAY[how])


def test_a_column_that_dora_took_away_stays_away():
    one, other = pair("dora")
    path = "adapter/vision/attn_v/magnitude"
    off = names.flatten(one.params)[path].at[:, 3].set(0.0)
    one = Adapter(one.plan, names.unflatten(names.flatten(one.params) | {path: off}))
    assert_same_changes(of(combine([one], [1.0], backbone=backbone()), "dora"), of(one, "dora"))
    result = combine([one, other], [0.5, 0.5], backbone=backbone())
    assert_same_changes(of(result, "dora"), weighted([0.5, 0.5], of(one, "dora"), of(other, "dora")))


def test_dora_needs_the_backbone():
    one, other = pair("dora")
    with pytest.raises(UserError, match="is DoRA, whose update depends on the frozen weights; give the backbone"):
        add(one, other)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Placement(LoRA(rank=2), slots=("attn_q",)), "one adapter sits at vision/attn_v/0 and another"),
        (
            Placement(LoRA(rank=2), slots=("attn_q", "attn_v", "attn_k")),
            "one adapter sits at vision/attn_k/0 and another",
        ),
        (Placement(LoRA(rank=2, decomposed=True), slots=("attn_q", "attn_v")), "differ in more than rank and scale"),
        (
            Placement(Affine(), slots=("attn_q", "attn_v")),
            r"\(lora\) at .* and .* \(affine\) at .* differ in more than",
        ),
        (
            Placement(LoRA(rank=2), slots=("attn_q", "attn_v"), sharing=(Share("a", ("layers",)),)),
            "'adapter' and 'adapter' share their parameters differently",
        ),
    ],
)
def test_adapters_that_are_not_alike_are_refused(second, message):
    with pytest.raises(UserError, match=message):
        combine([trained(LORA["lora"]), trained(second)], [1.0, 1.0], backbone=backbone())


def test_adapters_of_another_backbone_are_refused():
    wider = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, width=20))
    with pytest.raises(UserError, match="differ in more than rank and scale"):
        add(trained(LORA["lora"]), trained(LORA["lora"], wider))


def test_what_is_not_linear_is_refused():
    adapter = trained(Placement(Bottleneck(rank=2), "mine", slots=("mlp_out",)))
    with pytest.raises(UserError, match=r"'mine' \(bottleneck\) at vision/mlp_out/0 cannot be .*relu"):
        add(adapter, adapter)


def test_updates_that_do_not_add_up_are_refused():
    adapter = trained([LORA["lora"], AFFINE["ia3"]])  # both at attn_v
    with pytest.raises(UserError, match=r"'ia3' \(affine\) at .*attn_v/0 rescales the map that .*'adapter' \(lora\)"):
        add(adapter, adapter)


def test_linear_refuses_factors_that_do_not_correspond():
    one, other = trained(LORA["lora"]), trained(dataclasses.replace(LORA["lora"], method=LoRA(rank=3)))
    with pytest.raises(UserError, match=r"those of .* have ranks 2, 3; use cat or svd"):
        combine([one, other], [1.0, 1.0], "linear")
    with pytest.raises(UserError, match=r"those of .* start from singular vectors"):
        combine(pair("pissa"), [1.0, 1.0], "linear")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "cta"}, "unknown way to combine 'cta'; did you mean 'cat'"),
        ({"weights": [1.0]}, "give one weight for each adapter, and at least one; got 2 and 1"),
        ({"weights": [1.0, float("nan")]}, "weights must be finite, got 1.0, nan"),
        ({"rank": 2}, "cat does not use rank; leave it out"),
        ({"how": "svd", "rank": 0}, "rank must be at least 1, got 0"),
        ({"how": "svd", "density": 0.5}, "svd does not use density"),
        ({"how": "ties"}, "ties needs density"),
        ({"how": "ties", "density": 0.0}, "above 0 and at most 1; got 0.0"),
        ({"how": "ties", "density": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"how": "dare_ties", "density": 0.5}, "dare_ties needs key"),
        ({"how": "ties", "density": 0.5, "key": jax.random.key(0)}, "ties does not use key"),
    ],
)
def test_settings_without_meaning_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        combine(pair("lora"), **({"weights": [1.0, 1.0]} | arguments))


def test_nothing_cannot_be_combined():
    with pytest.raises(UserError, match="give one weight for each adapter, and at least one; got 0 and 0"):
        average()
    with pytest.raises(UserError, match="there is nothing to combine"):
        combine([Adapter(place((), CONFIG.towers), {})], [1.0])
