"""The parameter table: which rule wins, what is an error, what the presets choose."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from rich.console import Console
from toy_transformer import make_params

from vla_jax import names
from vla_jax.errors import UserError
from vla_jax.training.presets import DEFAULT_SHARDING, PRESETS, preset
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.training.table import ParameterTable, Rule


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREE = {
    "backbone": {"vision": {"fc": {"kernel": leaf(6, 8), "bias": leaf(8)}, "norm1": {"scale": leaf(6)}}},
    "adapters": {"main": {"down": {"kernel": leaf(8, 2)}}},
    "heads": {"classify": {"kernel": leaf(8, 3), "bias": leaf(3)}},
}
FROZEN = Rule(r".*", train=False, sharding=())
HEAD_TRAIN, HEAD_SHARDING = Rule("head/.*", train=True, optional=True), Rule("head/.*", sharding=(), optional=True)


def test_the_first_rule_that_sets_a_column_wins_for_that_column_alone():
    rules = (
        Rule(r"heads/.*", group="fast"),
        Rule(r".*/bias", decay=False, group="slow"),
        Rule(r"(heads|adapters)/.*", train=True, group="late"),
        Rule(r".*/kernel", decay=True),
        Rule(r".*", train=False, sharding=(), decay=False),
    )
    table = ParameterTable(rules).resolve(TREE)
    found = {row.name: (row.train, row.group, row.decay) for row in table.rows}
    assert found == {
        "backbone/vision/fc/kernel": (False, "default", True),
        "backbone/vision/fc/bias": (False, "slow", False),
        "backbone/vision/norm1/scale": (False, "default", False),
        "adapters/main/down/kernel": (True, "late", True),
        "heads/classify/kernel": (True, "fast", True),
        "heads/classify/bias": (True, "fast", False),
    }
    assert table.row("heads/classify/bias").rule == rules[2]


def test_a_pattern_must_match_the_whole_name():
    with pytest.raises(UserError, match=r"'heads' matches no parameter.*heads/classify"):
        ParameterTable((Rule("heads", train=True), FROZEN)).resolve(TREE)


def test_a_pattern_that_matches_nothing_names_what_is_near():
    with pytest.raises(UserError, match=r"'adaptrs/.\*' matches no parameter.*Nearest names: adapters/main"):
        ParameterTable((Rule("adaptrs/.*", train=True), FROZEN)).resolve(TREE)
    with pytest.raises(UserError, match=r"Nearest names: (backbone/vision/fc|heads/classify)/bias"):
        ParameterTable((Rule(".*/biass", train=True), FROZEN)).resolve(TREE)


def test_an_optional_rule_may_match_nothing():
    table = ParameterTable((Rule("adaptrs/.*", train=True, optional=True), FROZEN)).resolve(TREE)
    assert table.trained == 0


@pytest.mark.parametrize(
    ("column", "rules"),
    [
        ("train", (Rule(".*", sharding=()), Rule("(adapters|backbone)/.*", train=True), HEAD_TRAIN)),
        ("sharding", (Rule(".*", train=True), Rule("(adapters|backbone)/.*", sharding=()), HEAD_SHARDING)),
    ],
)
def test_an_uncovered_parameter_is_named_with_the_nearest_patterns(column: str, rules: tuple[Rule, ...]):
    with pytest.raises(UserError, match=rf"'heads/classify/kernel' \(8, 3\).*sets {column}.*patterns.*: 'head/\.\*'"):
        ParameterTable(rules).resolve(TREE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "*/bias", "train": True}, r"'\*/bias' is not a regular expression"),
        ({"pattern": ".*"}, "sets nothing"),
        ({"pattern": ".*", "group": ""}, "empty group"),
        ({"pattern": ".*", "sharding": ("fsdpp",)}, "unknown mesh axis 'fsdpp'; did you mean 'fsdp'"),
        ({"pattern": ".*", "sharding": ("fsdp", "fsdp")}, "cuts two dimensions"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        Rule(**arguments)


def test_a_sharding_longer_than_the_parameter_is_refused():
    rules = (Rule(".*/norm1/scale", sharding=(None, "fsdp")), Rule(".*", train=True, sharding=()))
    with pytest.raises(UserError, match=r"longer than parameter 'backbone/vision/norm1/scale' has dimensions: \(6,\)"):
        ParameterTable(rules).resolve(TREE)


def test_shardings_follow_the_rules_and_indivisible_dimensions_are_refused_or_left_whole():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    rules = (Rule(".*/fc/kernel", sharding=("fsdp", "tensor")), FROZEN)
    shardings = names.flatten(ParameterTable(rules).resolve(TREE).shardings(mesh))
    assert shardings["backbone/vision/fc/kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings["heads/classify/bias"].spec == PartitionSpec()

    strict = ParameterTable((Rule(".*/fc/kernel", sharding=("tensor", "fsdp")), FROZEN)).resolve(TREE)
    with pytest.raises(UserError, match=r"dimension 0 of parameter 'backbone/vision/fc/kernel' .*'tensor' of 4"):
        strict.shardings(mesh)

    optional = Rule(".*/fc/kernel", sharding=("tensor", "fsdp"), optional=True)
    shardings = names.flatten(ParameterTable((optional, FROZEN)).resolve(TREE).shardings(mesh))
    assert shardings["backbone/vision/fc/kernel"].spec == PartitionSpec(None, "fsdp")


def test_split_labels_and_decay_mask_have_the_trees_own_structure():
    rules = (
        Rule("heads/.*", group="head"),
        Rule(".*/bias", decay=False),
        Rule("(heads|adapters)/.*", train=True),
        FROZEN,
    )
    table = ParameterTable(rules).resolve(TREE)
    trainable, frozen = table.split(TREE)
    assert set(trainable) == {"adapters", "heads"}
    assert set(frozen) == {"backbone"}
    assert names.merge(trainable, frozen) == TREE
    assert table.labels(trainable) == {
        "adapters": {"main": {"down": {"kernel": "default"}}},
        "heads": {"classify": {"kernel": "head", "bias": "head"}},
    }
    assert table.decay_mask(trainable)["heads"] == {"classify": {"kernel": True, "bias": False}}
    with pytest.raises(UserError, match=r"unknown parameter 'heads/other/bias'.*heads/classify/bias"):
        table.split({"heads": {"other": {"bias": leaf(3)}}})


def test_presets_train_what_they_say():
    params = make_params()
    flat = names.flatten(params)
    vision = [
        f"backbone/vision/blocks/{module}"
        for module in ("attn/q", "attn/k", "attn/v", "attn/out", "mlp/fc1", "mlp/fc2")
    ]
    norms = ["backbone/vision/blocks/norm1", "backbone/vision/blocks/norm2", "backbone/vision/post_norm"]
    norms.append("backbone/text/post_norm")
    heads = {name for name in flat if name.startswith("heads/")}
    added = heads | {name for name in flat if name.startswith("adapters/")}
    expected = {
        "adapters": added,
        "full": set(flat),
        "image_tower": added | {name for name in flat if name.startswith("backbone/vision/")},
        "linear_probe": heads,
        "bitfit": added | {f"{module}/bias" for module in vision + norms},
        "layer_norm": added | {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")},
        "projection": added | {f"backbone/{tower}/projection/kernel" for tower in ("vision", "text")},
        "lora_plus": added,
    }
    assert set(expected) == set(PRESETS) - {"adapter_fusion"}  # it wants an attention, which this tree lacks
    for name, trained in expected.items():
        table = ParameterTable(preset(name)).resolve(params)
        assert {row.name for row in table.rows if row.train} == trained, name
        undecayed = {row.name for row in table.rows if not row.decay}
        assert undecayed == {n for n in flat if n.endswith(("bias", "scale"))}, name


def test_presets_need_neither_adapters_nor_heads_and_own_rules_go_in_front():
    backbone = {"backbone": make_params()["backbone"]}
    assert ParameterTable(preset("linear_probe")).resolve(backbone).trained == 0
    own = (Rule("backbone/logit_scale", train=True, group="temperature"),)
    table = ParameterTable(own + preset("adapters")).resolve(backbone)
    assert [row.name for row in table.rows if row.train] == ["backbone/logit_scale"]
    with pytest.raises(UserError, match="unknown parameter preset 'bitft'; did you mean 'bitfit'"):
        preset("bitft")


def test_default_shardings_cut_products_in_pairs_and_replicate_what_is_small():
    table = ParameterTable((Rule(".*", train=True), *DEFAULT_SHARDING)).resolve(make_params())
    found = {row.name: row.sharding for row in table.rows if row.sharding}
    blocks = "backbone/vision/blocks"
    columns = [f"{blocks}/attn/{name}" for name in "qkv"] + [f"{blocks}/mlp/fc1"]
    assert found == {
        **{f"{name}/kernel": (None, "fsdp", "tensor") for name in columns},
        **{f"{name}/bias": (None, "tensor") for name in columns},
        **{f"{blocks}/{name}/kernel": (None, "tensor", "fsdp") for name in ("attn/out", "mlp/fc2")},
        "backbone/text/token_embedding": ("tensor", "fsdp"),
        "backbone/text/projection/kernel": ("fsdp",),
        "backbone/vision/projection/kernel": ("fsdp",),
    }


def test_summary_counts_and_shares():
    table = ParameterTable(preset("adapters")).resolve(TREE)
    assert (table.trained, table.total, table.backbone) == (16 + 27, 62 + 16 + 27, 62)
    assert table.share_of_total == pytest.approx(100 * 43 / 105)
    assert table.share_of_backbone == pytest.approx(100 * 43 / 62)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table.summary())
    text = console.export_text()
    assert "trained: 43 = 40.95 % of all 105 parameters, 69.35 % of the backbone's 62; frozen: 62" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [
        ["backbone/.*", "frozen", "", "", "replicated", "3", "62"],
        ["(adapters|heads)/.*", "trained", "default", "yes", "replicated", "2", "40"],
        ["(adapters|heads)/.*", "trained", "default", "no", "replicated", "1", "3"],
    ]
