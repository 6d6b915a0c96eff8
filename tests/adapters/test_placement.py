from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import ALL, CONFIG, drawn, shape_for, site

from vla_jax import names
from vla_jax.adapters import Bottleneck, Fusion, LoRA, Placement, place
from vla_jax.adapters.base import method_from_description, methods
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOWERS = CONFIG.towers  # vision: 4 blocks of width 32; text: 2 blocks of width 24
EQUAL = {"vision": TowerShape(6, 32, 64), "text": TowerShape(6, 32, 64)}


def towers(vision: int, text: int) -> dict[str, TowerShape]:
    return {"vision": TowerShape(vision, 32, 64), "text": TowerShape(text, 32, 64)}


def shapes(placements, shape=TOWERS) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in names.flatten(place(placements, shape).shapes()).items()}


def test_parameters_are_named_and_stacked_as_documented():
    assert shapes(
        Placement(LoRA(rank=2), "mine", slots=("attn_q", "mlp_fc1"), layers="-1,0,2", towers=("vision",))
    ) == {
        "mine/vision/attn_q/a": (3, 32, 2),
        "mine/vision/attn_q/b": (3, 2, 32),
        "mine/vision/mlp_fc1/a": (3, 32, 2),
        "mine/vision/mlp_fc1/b": (3, 2, 64),
    }


def test_tasks_add_an_axis_behind_the_layers():
    plain = shapes(Placement(Bottleneck(rank=2), slots=("mlp_out",)))
    stacked = shapes(Placement(Bottleneck(rank=2), slots=("mlp_out",), tasks=("x", "y", "z")))
    assert stacked == {name: (shape[0], 3, *shape[1:]) for name, shape in plain.items()}
    assert {name.split("/")[1]: shape[0] for name, shape in plain.items()} == {"vision": 4, "text": 2}


def test_tied_towers_have_one_set_of_weights():
    tied = shapes(Placement(LoRA(rank=2), slots=("attn_v",), tied=True), EQUAL)
    assert tied == {"adapter/shared/attn_v/a": (6, 32, 2), "adapter/shared/attn_v/b": (6, 2, 32)}


def test_tied_towers_may_differ_in_depth_where_the_layers_are_counted_alike():
    groups = place(Placement(LoRA(rank=2), slots=("attn_v",), layers="last 2", tied=True), towers(6, 3)).groups
    assert [(group.towers, group.layers) for group in groups] == [(("vision",), ((4, 5),)), (("text",), ((1, 2),))]
    assert groups[0].leaves == groups[1].leaves


def test_the_embedding_is_one_place_a_tower_whatever_the_layers():
    assert {shape[0] for shape in shapes(Placement(Bottleneck(rank=2), slots=("embed",), layers="0,1")).values()} == {1}
    tied = Placement(Bottleneck(rank=2), slots=("embed",), tied=True)
    assert {shape[0] for shape in shapes(tied, towers(6, 3)).values()} == {1}


def test_new_parameters_differ_by_layer_task_slot_tower_and_adapter():
    same = {"slots": ("attn_q", "attn_v"), "tasks": ("x", "y"), "layers": "first 2"}
    placements = [Placement(LoRA(rank=3), name, **same) for name in ("one", "two")]
    plan = place(placements, EQUAL)
    flat = names.flatten(jax.jit(plan.init)(jax.random.key(0)))
    draws = np.concatenate([leaf.reshape(4, -1) for name, leaf in flat.items() if name.endswith("/a")])
    assert len(draws) == 2 * 2 * 2 * 4
    assert len(np.unique(draws[:, 0])) == len(draws)
    # A placement draws the same whether or not others stand beside it, so that comparisons share their start.
    alone = jax.jit(place(placements[1], EQUAL).init)(jax.random.key(0))
    for name, leaf in names.flatten(alone).items():
        np.testing.assert_array_equal(leaf, flat[name])


# Names that do not exist


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": ("mlp_uot",)}, "unknown slot 'mlp_uot'; did you mean 'mlp_out'"),
        ({"slots": ("attn_q",)}, "bottleneck cannot sit in slot 'attn_q'; it may sit in .*mlp_out"),
        ({"slots": ("mlp_out", "mlp_fc1")}, "bottleneck cannot sit in slot 'mlp_fc1'"),
        ({"slots": ()}, "needs slots; it may sit in .*block_out"),
        ({"slots": ("mlp_out", "mlp_out")}, "slots of adapter 'adapter' name something twice: mlp_out, mlp_out"),
        ({"towers": ()}, "names no tower"),
        ({"towers": ("text", "text")}, "towers of adapter 'adapter' name something twice"),
        ({"tasks": ("vqa", "gqa", "vqa")}, "tasks of adapter 'adapter' name something twice"),
        ({"name": ""}, "adapter name '' must be made of letters"),
        ({"name": "a/b"}, "adapter name 'a/b' must be made of letters"),
        ({"pairs": ((0, 0),)}, "pairs are for joint methods; bottleneck takes layers"),
        ({"ranks": ((".*", 0),)}, "rank 0 for '.\\*' must be at least 1"),
        ({"ranks": (("(", 2),)}, r"rank pattern '\(' is not a regular expression"),
    ],
)
def test_placements_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Placement(Bottleneck(rank=4), **({"slots": ("mlp_out",)} | settings))


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(LoRA(), slots=("attn_q",), towers=("visoin",)), "unknown tower 'visoin'; did you mean 'vision'"),
        (Placement(LoRA(), slots=("attn_q",), layers="3"), "layer 3 does not exist: the text tower has 2 layers"),
        (Placement(LoRA(), slots=("attn_q",), layers="4", towers=("vision",)), "the vision tower has 4 layers, 0 to 3"),
        (Placement(Fusion(rank=4), layers="2"), "layer 2 does not exist: the joined towers has 2 layers"),
        (Placement(Fusion(rank=4), towers=("vision",)), "fusion joins the vision and the text tower"),
        (Placement(LoRA(), slots=("attn_q",), layers="last 2", tied=True), "shared/attn_q/a' is shared by vision/"),
        (Placement(Bottleneck(rank=2), slots=("embed",), tied=True), r"which need it as \(32, 2\) and \(24, 2\)"),
        (Placement(LoRA(), slots=("attn_q",), tied=True), "have 4 and 2 layers with adapters; choose equally many"),
        (Placement(Bottleneck(reduction=30), slots=("mlp_out",)), "reduction 30 leaves nothing of a width of 24"),
    ],
)
def test_what_the_towers_do_not_have_is_refused(placement, message):
    with pytest.raises(UserError, match=message):
        place(placement, TOWERS)


def test_two_adapters_of_one_name_are_refused():
    one = Placement(LoRA(), slots=("attn_q",))
    with pytest.raises(UserError, match="two adapters are named 'adapter'"):
        place([one, dataclasses.replace(one, slots=("attn_v",))], TOWERS)


def test_tying_a_joint_method_is_refused():
    with pytest.raises(UserError, match="by its own setting, shared"):
        Placement(Fusion(rank=4), tied=True)


# Ranks


def test_the_first_pattern_that_matches_a_whole_site_sets_its_rank():
    ranks = ((r"vision/mlp_out/[02]", 2), (r"vision/.*", 3), (r".*/mlp_out/1", 5))
    assert shapes(Placement(LoRA(rank=7), slots=("attn_q", "mlp_fc2"), ranks=((r"text/.*/0", 1),)))[
        "adapter/text/mlp_fc2/rank_1/a"
    ] == (1, 48, 1)
    found = shapes(Placement(Bottleneck(rank=4), slots=("mlp_out",), ranks=ranks))
    assert {name: shape for name, shape in found.items() if name.endswith("down/kernel")} == {
        "adapter/vision/mlp_out/rank_2/down/kernel": (2, 32, 2),
        "adapter/vision/mlp_out/rank_3/down/kernel": (2, 32, 3),
        "adapter/text/mlp_out/rank_4/down/kernel": (1, 24, 4),
        "adapter/text/mlp_out/rank_5/down/kernel": (1, 24, 5),
    }


def test_a_rank_common_to_all_layers_needs_no_name():
    found = shapes(Placement(Bottleneck(rank=4), slots=("mlp_out",), ranks=((r"text/.*", 2),)))
    assert found["adapter/text/mlp_out/down/kernel"] == (2, 24, 2)
    assert found["adapter/vision/mlp_out/down/kernel"] == (4, 32, 4)


@pytest.mark.parametrize("method", [Bottleneck(rank=4), LoRA(rank=4)], ids=lambda method: method.kind)
def test_a_rank_table_that_says_what_the_method_says_changes_nothing(method):
    slot = method.slots[-1]
    plain = Placement(method, slots=(slot,))
    for ranks in (((r"vision/.*/0", 4),), ((r".*", 4),)):
        plan = place(dataclasses.replace(plain, ranks=ranks), TOWERS)
        assert [(g.path, g.layers) for g in plan.groups] == [(g.path, g.layers) for g in place(plain, TOWERS).groups]


def test_every_layer_has_one_group_and_every_group_a_path_of_its_own():
    ranks = ((r".*/mlp_out/0", 2), (r".*/mlp_out/[13]", 4), (r".*/block_out/2", 6))
    plan = place(Placement(Bottleneck(rank=4), slots=("mlp_out", "block_out"), ranks=ranks), TOWERS)
    assert len({group.path for group in plan.groups}) == len(plan.groups)
    sites = sorted((g.site.tower, g.site.slot, layer) for g in plan.groups for layer in g.layers[0])
    assert sites == sorted((t, s, k) for t, d in plan.depths for s in ("mlp_out", "block_out") for k in range(d))


def test_ranks_are_given_to_pairs_by_their_vision_layer():
    plan = place(Placement(Fusion(rank=4), ranks=((r"joint/block_out/3", 8),)), TOWERS)
    assert {group.method.rank: group.layers for group in plan.groups} == {4: ((1,), (0,)), 8: ((3,), (1,))}


@pytest.mark.parametrize("pattern", ["vision/mlp_out/4", "mlp_out/0", "vision/mlp_out", "visio/mlp_out/0"])
def test_a_rank_pattern_that_matches_no_site_is_refused_with_the_sites(pattern):
    ranks = ((".*/0", 2), (pattern, 3))
    with pytest.raises(
        UserError, match=r"unknown pattern of ranks or alphas .*vision/mlp_out/3.*must match the whole"
    ) as error:
        place(Placement(Bottleneck(rank=4), slots=("mlp_out",), ranks=ranks), TOWERS)
    assert repr(pattern) in str(error.value)


# Pairs of blocks


def joints(vision: int, text: int, **settings):
    (group,) = place(Placement(Fusion(rank=4), **settings), towers(vision, text)).groups
    return list(zip(*group.layers, strict=True))


@pytest.mark.parametrize(
    ("vision", "text", "expected"),
    [
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
        (4, 2, [(1, 0), (3, 1)]),
        (2, 4, [(0, 1), (1, 3)]),
        (24, 12, [(2 * k + 1, k) for k in range(12)]),
        (32, 24, [(-(-4 * (k + 1) // 3) - 1, k) for k in range(24)]),
        (5, 3, [(1, 0), (3, 1), (4, 2)]),
        (6, 1, [(5, 0)]),
    ],
)
def test_pairs_are_spread_evenly_and_end_with_the_last_blocks(vision, text, expected):
    assert joints(vision, text) == expected


@pytest.mark.parametrize("vision", range(1, 9))
def test_pairs_ascend_and_no_gap_is_wider_than_need_be(vision):
    for text in range(1, 9):
        pairs = joints(vision, text)
        assert len(pairs) == min(vision, text)
        assert pairs[-1] == (vision - 1, text - 1)
        for column, depth in zip(zip(*pairs, strict=True), (vision, text), strict=True):
            gaps = np.diff([-1, *column])
            assert set(gaps) <= {depth // len(pairs), -(-depth // len(pairs))}


def test_layers_of_a_joint_method_count_pairs():
    assert joints(8, 4, layers="early") == [(1, 0), (3, 1)]
    assert joints(8, 4, layers="late") == [(5, 2), (7, 3)]
    assert joints(8, 4, layers="-1,0") == [(1, 0), (7, 3)]


def test_pairs_can_be_named():
    assert joints(8, 4, pairs=((0, 0), (6, 2))) == [(0, 0), (6, 2)]
    assert joints(8, 4, pairs=((0, 0), (6, 2)), towers=("text", "vision")) == [(0, 0), (6, 2)]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((8, 0),), "pair names vision layer 8; the vision tower has layers 0 to 7"),
        (((0, 4),), "pair names text layer 4; the text tower has layers 0 to 3"),
        (((-1, 0),), "pair names vision layer -1"),
        (((3, 0), (1, 1)), "pairs must ascend in both towers; the vision layers are 3, 1"),
        (((1, 2), (3, 0)), "pairs must ascend in both towers; the text layers are 2, 0"),
        (((1, 0), (3, 0)), "pairs must ascend in both towers; the text layers are 0, 0"),
    ],
)
def test_pairs_that_cannot_be_met_in_step_are_refused(pairs, message):
    with pytest.raises(UserError, match=message):
        joints(8, 4, pairs=pairs)


def test_pairs_of_two_adapters_that_cross_are_refused():
    one, two = (Placement(Fusion(rank=4), name, pairs=(pair,)) for name, pair in (("one", (2, 0)), ("two", (1, 1))))
    with pytest.raises(UserError, match=r"\(1, 1\) and \(2, 0\) cross"):
        place([one, two], TOWERS)
    # Meeting one tower at the same block is no crossing.
    three = Placement(Fusion(rank=4), "three", pairs=((1, 0),))
    assert len(place([one, three, dataclasses.replace(one, name="four")], TOWERS).groups) == 3


# What a forward pass meets first


@pytest.mark.parametrize(
    ("placements", "expected"),
    [
        ((), (4, 2)),
        (Placement(LoRA(), slots=("attn_q",)), (0, 0)),
        (Placement(LoRA(), slots=("attn_q",), layers="-1"), (3, 1)),
        (Placement(LoRA(), slots=("attn_q",), layers="-1", towers=("text",)), (4, 1)),
        (Placement(Bottleneck(rank=2), slots=("embed", "mlp_out"), layers="-1", towers=("vision",)), (0, 2)),
        (Placement(Fusion(rank=4)), (2, 1)),
        (Placement(Fusion(rank=4), layers="late"), (4, 2)),
        ([Placement(Fusion(rank=4)), Placement(LoRA(), "b", slots=("attn_q",), layers="-1")], (2, 1)),
        ([Placement(Fusion(rank=4), layers="late"), Placement(LoRA(), "b", slots=("attn_q",), layers="-1")], (3, 1)),
    ],
)
def test_first_layers(placements, expected):
    assert place(placements, TOWERS).first_layers() == dict(zip(("vision", "text"), expected, strict=True))


def test_published_count_of_clip_lora():
    # r = 2 on queries, keys and values of every layer of both towers of a B/16 (Zanella and Ben Ayed 2024).
    b_16 = {"vision": TowerShape(12, 768, 3072), "text": TowerShape(12, 512, 2048)}
    placement = Placement(LoRA(rank=2, alpha=1.0, dropout=0.25), slots=("attn_q", "attn_k", "attn_v"))
    assert place(placement, b_16).parameter_count() == 184_320
    assert sum(np.prod(shape) for shape in shapes(placement, b_16).values()) == 184_320


# Order


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_in_one_slot_act_in_the_order_of_their_placements(order):
    placements = [
        Placement(Bottleneck(rank=2), "one", slots=("mlp_out",), layers="0", towers=("vision",)),
        Placement(Bottleneck(rank=2, parallel=True, scale=2.0), "two", slots=("mlp_out",), towers=("vision",)),
    ]
    placements = [placements[i] for i in order]
    plan = place(placements, TOWERS)
    params = drawn(plan.shapes(), 1, 0.5)
    generator = np.random.default_rng(2)
    x, y = (jnp.asarray(generator.standard_normal((2, 3, 32)), jnp.float32) for _ in range(2))

    @jax.jit
    def through_the_slot(params):
        segment = plan.bind(params).occupy(None, None).segments["vision"][0]
        assert (segment.start, segment.stop) == (0, 1)
        return segment.fill(jax.tree.map(lambda a: a[0], segment.tree))("mlp_out", x, y)

    @jax.jit
    def one_after_the_other(params):
        result = y
        for placement in placements:
            own = jax.tree.map(lambda a: a[0], params[placement.name]["vision"]["mlp_out"])
            module = placement.method.module(site("mlp_out", 32, 32))
            result = jax.vmap(functools.partial(module.apply, {"params": own}))(x, result)
        return result

    np.testing.assert_allclose(through_the_slot(params), one_after_the_other(params), rtol=1e-5, atol=1e-5)


# Descriptions


@pytest.mark.parametrize("name", ALL)
def test_a_description_survives_json(name):
    placement = dataclasses.replace(ALL[name], name="other", tasks=("x", "y"))
    description = json.loads(json.dumps(placement.describe()))
    again = Placement.from_description(description)
    assert again == placement
    assert place(again, shape_for(name).towers) == place(placement, shape_for(name).towers)
    assert hash(again) == hash(placement)


def test_pairs_survive_a_description():
    placement = Placement(Fusion(rank=4), pairs=((0, 0), (3, 1)))
    assert Placement.from_description(json.loads(json.dumps(placement.describe()))) == placement


def test_what_a_description_leaves_out_has_its_default():
    assert Placement.from_description({"method": {"kind": "fusion", "rank": 4}}) == Placement(Fusion(rank=4))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"kind": "botleneck"}, "unknown adapter method 'botleneck'; did you mean 'bottleneck'"),
        ({"rank": 4}, "unknown adapter method 'None'; allowed: affine, average, bottleneck"),
        ({"kind": "lora", "rnak": 4}, "unknown setting of lora 'rnak'; did you mean 'rank'"),
        ({"kind": "lora", "rank": 0}, "rank must be at least 1"),
    ],
)
def test_descriptions_that_no_method_gave_are_refused(description, message):
    with pytest.raises(UserError, match=message):
        method_from_description(description)


def test_a_description_with_an_unknown_field_is_refused():
    with pytest.raises(UserError, match="unknown field of a placement 'layer'; did you mean 'layers'"):
        Placement.from_description({"method": {"kind": "fusion", "rank": 4}, "layer": "all"})


def test_methods_are_found_by_looking_through_the_package():
    found = methods()
    assert {"bottleneck": Bottleneck, "fusion": Fusion, "lora": LoRA}.items() <= found.items()
    # What the list of properties does not test is not there.
    assert set(found) == {placement.method.kind for placement in ALL.values()}
