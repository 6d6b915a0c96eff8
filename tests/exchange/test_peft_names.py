from __future__ import annotations

import pytest
from exchanged_clip import CONFIG

from vla_jax.algebra.places import Place
from vla_jax.backbones.convert import parameter_shapes
from vla_jax.errors import UserError
from vla_jax.exchange.peft_names import Modules, is_feedforward, pattern_value, saved_whole, targeted

MODULES = Modules.of(CONFIG.towers)


def test_every_linear_map_has_a_slot():
    shapes = parameter_shapes(CONFIG)
    blocks = sum(6 * tower.depth for tower in CONFIG.towers.values())
    assert len(MODULES.places) == blocks + 2 == len(set(MODULES.places.values()))
    for name, at in MODULES.places.items():
        row, _ = MODULES.tensors[f"{name}.weight"]
        into, out = CONFIG.towers[at.tower].widths(at.slot)
        assert row.tensor_shape(shapes[row.ours]) == (out, into)
        assert MODULES.at(at) == name
    assert MODULES.places["text_model.encoder.layers.1.self_attn.out_proj"] == Place(0, "text", "attn_out", 1)
    assert MODULES.places["visual_projection"] == Place(0, "vision", "projection", 0)
    assert MODULES.at(Place(0, "vision", "mlp_out", 0)) is None


@pytest.mark.torch
def test_modules_are_those_of_transformers(tmp_path):
    from exchanged_clip import write_backbone
    from hub_side import clip_model, torch

    model = clip_model(write_backbone(tmp_path))
    theirs = {name: module for name, module in model.named_modules() if name}
    # What has no weights of its own or below it (activations) can be no target either.
    weighted = [name for name, module in theirs.items() if any(True for _ in module.parameters())]
    assert set(MODULES.names) == set(weighted)
    assert set(MODULES.places) == {name for name in theirs if isinstance(theirs[name], torch.nn.Linear)}


TARGETS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["vision_model.encoder.layers.1.mlp.fc1", "text_projection"]},
    {"target_modules": ["layer_norm1", "mlp"]},
    {"target_modules": r".*fc\d"},
    {"target_modules": r"fc1"},
    {"target_modules": r"text_model\.encoder\.layers\.(0|1)\.self_attn\.[qk]_proj"},
    {"target_modules": ["fc1"], "layers_to_transform": 1},
    {"target_modules": ["fc1", "visual_projection"], "layers_to_transform": [0, 2]},
    {"target_modules": ["fc1"], "layers_to_transform": []},
    {"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": "vision_model.encoder.layers"},
    {"target_modules": ["fc1", "fc2"], "exclude_modules": ["layers.0.mlp.fc1"]},
    {"target_modules": ["fc1", "fc2"], "exclude_modules": "text.*fc2"},
    {"target_modules": ["fc1", "visual_projection"], "modules_to_save": ["visual_projection"]},
    {"target_modules": ["fc1", "q_proj"], "modules_to_save": ["mlp"]},
]


@pytest.mark.torch
@pytest.mark.parametrize("settings", TARGETS, ids=str)
def test_targets_are_those_of_peft(settings):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(**settings)
    theirs = [name for name in MODULES.names if check_target_module_exists(config, name)]
    if theirs:
        assert targeted(MODULES.names, settings, MODULES.places) == theirs
    else:
        with pytest.raises(UserError, match="name no module of this CLIP"):
            targeted(MODULES.names, settings, MODULES.places)


def test_all_linear():
    assert targeted(MODULES.names, {"target_modules": "all-linear"}, MODULES.places) == sorted(
        MODULES.places, key=MODULES.names.index
    )


@pytest.mark.torch
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"fc1": 2},
        {r"layers\.1\.mlp\.fc1": 2, "fc1": 3},
        {r"vision_model.*": 4, "q_proj": 5},
        {"^text_model.encoder.layers.0.mlp.fc2": 6},
        {r".*\.[01]\.self_attn\.(k|v)_proj": 7},
        {"c1": 8},
    ],
    ids=str,
)
def test_patterns_are_those_of_peft(patterns):
    pytest.importorskip("peft", reason="peft is not installed")
    from peft.utils.other import get_pattern_key

    for name in MODULES.places:
        theirs = patterns.get(get_pattern_key(patterns.keys(), name), 1)
        assert pattern_value(patterns, name, 1, "rank_pattern") == theirs


def test_saved_modules_hold_what_is_below_them():
    assert saved_whole(MODULES.names, ["projection"]) == ["visual_projection", "text_projection"]
    assert saved_whole(MODULES.names, ["layers.1.mlp", "fc1"]) == [
        "vision_model.encoder.layers.0.mlp.fc1",
        "vision_model.encoder.layers.1.mlp",
        "vision_model.encoder.layers.2.mlp.fc1",
        "text_model.encoder.layers.0.mlp.fc1",
        "text_model.encoder.layers.1.mlp",
    ]
    assert MODULES.below("text_model.encoder.layers.1.mlp") == [
        f"text_model.encoder.layers.1.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]


def test_feedforward_modules():
    assert is_feedforward("a.mlp.fc2", ["fc2"])
    assert not is_feedforward("a.mlp.fc2", [])
    assert is_feedforward("a.mlp.fc2", r".*\.fc\d")
    assert not is_feedforward("a.mlp.fc2", "fc2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "target_modules is missing, and peft has no default for CLIP"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["query"]}, r"target_modules \['query'\] name no module of this CLIP"),
        ({"target_modules": "(q"}, r"target_modules '\(q' is not a regular expression"),
        ({"target_modules": ["fc1"], "exclude_modules": "("}, r"exclude_modules '\(' is not a regular"),
        ({"target_modules": ["fc1"], "layers_to_transform": 0, "layers_pattern": "("}, r"layers_pattern '\(' is not"),
        ({"target_modules": ["fc1"], "modules_to_save": ["("]}, r"modules_to_save '\(' is not"),
    ],
)
def test_patterns_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        targeted(MODULES.names, settings, MODULES.places)
    with pytest.raises(UserError, match=r"rank_pattern '\*' is not a regular expression"):
        pattern_value({"*": 1}, "fc1", 1, "rank_pattern")
