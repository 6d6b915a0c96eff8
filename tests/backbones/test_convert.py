from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hub_clip import random_clip, small_settings, torch, transformers

from vla_jax.backbones import convert
from vla_jax.backbones.clip_config import PRESETS
from vla_jax.backbones.positions import interpolate_positions, resize_matrix
from vla_jax.errors import UserError
from vla_jax.names import unflatten

# openai/clip-vit-base-patch32 on the hub, as far as it shapes the model.
OPENAI_B_32 = {
    "model_type": "clip",
    "projection_dim": 512,
    "text_config": {"bos_token_id": 0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 512},
    "text_config_dict": None,
    "vision_config": {"hidden_size": 768, "patch_size": 32, "intermediate_size": 3072},
    "vision_config_dict": None,
}


def small_params(settings):
    """A small CLIP of transformers with its tensors stacked by hand, independently of the table's transforms."""
    state = {name: tensor.numpy() for name, tensor in random_clip(settings).state_dict().items()}
    flat = {}
    for row in convert.TABLE:
        names = [name for name in state if row.theirs.replace("{layer}", "") == "".join(_without_layer(name))]
        if not row.stacked:
            names = [row.theirs]
        tensors = [state[name] for name in sorted(names, key=_layer)]
        if row.ours.endswith("patch_embedding/kernel"):
            tensors = [np.moveaxis(tensor, (0, 1), (3, 2)) for tensor in tensors]
        elif row.ours.endswith("kernel"):
            tensors = [tensor.T for tensor in tensors]
        flat[row.ours] = np.stack(tensors) if row.stacked else tensors[0]
    return state, unflatten(flat)


def _layer(name):
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _without_layer(name):
    return ".".join("" if part.isdigit() else part for part in name.split("."))


def test_the_table_names_every_tensor_and_every_parameter_once():
    settings = small_settings()
    config = convert.config_from_hub(settings)
    shapes = convert.parameter_shapes(config)
    theirs = [name for row in convert.TABLE for name in row.names(shapes[row.ours])]
    assert len(theirs) == len(set(theirs))
    assert set(theirs) == set(random_clip(settings).state_dict())
    assert sorted(row.ours for row in convert.TABLE) == sorted(shapes)


def test_parameters_become_the_hubs_tensors_unchanged():
    settings = small_settings()
    state, params = small_params(settings)
    tensors = dict(convert.hub_tensors(params, convert.config_from_hub(settings)))
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, state[name], err_msg=name)
        assert tensor.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("row", convert.TABLE, ids=lambda row: row.ours)
def test_each_row_is_undone_by_its_inverse(row):
    ours_shape = {0: (), 1: (2,), 2: (2, 3), 4: (2, 3, 4, 5)}[len(row.axes or (0,))]
    tensor = np.arange(np.prod(ours_shape, dtype=int)).reshape(ours_shape)
    np.testing.assert_array_equal(row.to_theirs(row.to_ours(tensor)), tensor)
    stacked = (7, *row.to_ours(tensor).shape) if row.stacked else row.to_ours(tensor).shape
    assert row.tensor_shape(stacked) == tensor.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["vision"].pop("class_embedding"), "vision/class_embedding"),
        (lambda p: p["text"].update(post_norms=np.zeros(3)), "did you mean 'text/post_norm"),
        (lambda p: p.update(logit_scale=np.zeros(1)), r"'logit_scale' has shape \(1,\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_tree_that_does_not_fit_is_named(change, message):
    settings = small_settings()
    _, params = small_params(settings)
    change(params)
    with pytest.raises(UserError, match=message):
        dict(convert.hub_tensors(params, convert.config_from_hub(settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        OPENAI_B_32,
        small_settings(),
        small_settings(text_eos_token_id=2, vision_hidden_act="gelu", text_layer_norm_eps=1e-6),
        {
            "text_config": {"hidden_size": 64, "eos_token_id": 2},
            "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        },
    ],
    ids=["empty", "openai", "small", "mixed", "both kinds of tower section"],
)
def test_missing_keys_are_read_as_transformers_reads_them(settings):
    theirs = transformers.CLIPConfig.from_dict(settings)
    ours = convert.config_from_hub(settings)
    for tower, section in ((ours.vision, theirs.vision_config), (ours.text, theirs.text_config)):
        assert dataclasses.astuple(tower) == (
            section.hidden_size,
            section.num_hidden_layers,
            section.num_attention_heads,
            section.intermediate_size,
            section.hidden_act,
            section.layer_norm_eps,
        )
    assert (ours.image_size, ours.patch_size) == (theirs.vision_config.image_size, theirs.vision_config.patch_size)
    text = theirs.text_config
    assert (ours.vocabulary_size, ours.context_length) == (text.vocab_size, text.max_position_embeddings)
    assert ours.projection == theirs.projection_dim
    assert ours.pooling == ("largest_id" if text.eos_token_id == 2 else "first_eos")
    assert ours.eos_token_id == (text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id)


def test_a_published_configuration_is_its_preset():
    assert convert.config_from_hub(OPENAI_B_32) == PRESETS["vit_b_32"]


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_configurations_survive_the_hubs_format(config):
    settings = convert.config_to_hub(config)
    assert convert.config_from_hub(settings) == config
    transformers.CLIPConfig.from_dict(settings)  # its own validation


def test_a_square_given_by_two_sides_is_a_size():
    assert convert.config_from_hub(small_settings(vision_image_size=[64, 64])).image_size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, "'siglip'.*only 'clip'"),
        ({"vision_hidden_act": "gelu_new"}, "did you mean .*'gelu'"),
        ({"vision_num_channels": 1}, "num_channels is 1"),
        ({"vision_image_size": [32, 64]}, r"image_size is \[32, 64\]"),
        ({"text_eos_token_id": [2, 49]}, r"eos_token_id is \[2, 49\]"),
        ({"text_hidden_size": "wide"}, "text_config.hidden_size is 'wide'"),
        ({"projection_dim": None}, "projection_dim is None"),
        ({"text_num_attention_heads": 5}, "32 .*5 heads"),
        ({"text_config": [1]}, "text_config must be an object"),
    ],
)
def test_what_this_clip_cannot_do_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        convert.config_from_hub(small_settings() | changes if "text_config" in changes else small_settings(**changes))


def test_a_rule_of_pooling_that_the_format_cannot_say_is_refused():
    config = dataclasses.replace(convert.config_from_hub(small_settings()), eos_token_id=2, pooling="first_eos")
    with pytest.raises(UserError, match="eos_token_id 2"):
        convert.config_to_hub(config)


@pytest.mark.parametrize(("old", "new"), [(7, 12), (16, 24), (14, 7), (4, 5), (1, 3)])
def test_positions_are_resized_as_pytorch_does(old, new):
    table = np.random.default_rng(0).standard_normal((1 + old * old, 6)).astype(np.float32)
    grid = torch.tensor(table[1:]).reshape(1, old, old, 6).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid.double(), (new, new), mode="bicubic", align_corners=False)
    ours = interpolate_positions(table, old, new)
    np.testing.assert_array_equal(ours[0], table[0])
    np.testing.assert_allclose(ours[1:], theirs[0].permute(1, 2, 0).reshape(-1, 6).numpy(), rtol=1e-6, atol=1e-6)


def test_resizing_keeps_constants_and_the_same_size():
    np.testing.assert_allclose(resize_matrix(7, 11).sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(resize_matrix(7, 7), np.eye(7), atol=1e-15)
