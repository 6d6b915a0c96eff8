"""Shapes: the published ones, and those without a meaning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from small_clip import CONFIG

from vla_jax.adapters import LoRA, Placement, place
from vla_jax.backbones.clip_config import PRESETS, CLIPConfig
from vla_jax.backbones.convert import parameter_shapes
from vla_jax.backbones.transformer import Compute
from vla_jax.errors import UserError


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("vit_b_32", 151_277_313),
        ("vit_b_16", 149_620_737),
        ("vit_l_14", 427_616_513),
        ("vit_l_14_336", 427_944_193),
        ("openclip_b_32", 151_277_313),
        ("openclip_b_16", 149_620_737),
        ("openclip_l_14", 427_616_513),
        ("openclip_h_14", 986_109_441),
    ],
)
def test_published_parameter_counts(preset, count):
    shapes = parameter_shapes(CLIPConfig.preset(preset))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


@pytest.mark.parametrize(("preset", "millions"), [("openclip_g_14", 1366.68), ("openclip_bigg_14", 2539.57)])
def test_published_parameter_counts_in_millions(preset, millions):
    # Open CLIP's own profile of its models, which counts no logit scale.
    shapes = parameter_shapes(CLIPConfig.preset(preset))
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6, 2) == millions


def test_presets_know_their_towers():
    towers = CLIPConfig.preset("vit_b_16").towers
    assert towers == {"vision": (12, 768, 3072, 512), "text": (12, 512, 2048, 512)}
    placement = Placement(LoRA(rank=2, alpha=1.0), slots=("attn_q", "attn_k", "attn_v"))
    assert place(placement, towers).parameter_count() == 184_320  # CLIP-LoRA on B/16
    assert {name: config.grid for name, config in PRESETS.items() if name.startswith("vit")} == {
        "vit_b_32": 7,
        "vit_b_16": 14,
        "vit_l_14": 16,
        "vit_l_14_336": 24,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, "image_size 10 is not a positive multiple of patch_size 4"),
        ({"image_size": 0}, "image_size 0 is not a positive multiple"),
        ({"patch_size": 0}, "is not a positive multiple of patch_size 0"),
        ({"pooling": "eos"}, "unknown text pooling 'eos'.*first_eos"),
        ({"eos_token_id": 40}, "eos_token_id 40 is outside the vocabulary of 40"),
        ({"eos_token_id": -1}, "eos_token_id -1 is outside the vocabulary of 40"),
    ],
)
def test_shapes_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "width 16 does not divide into 5 heads"),
        ({"depth": 0}, "must be positive"),
        ({"mlp_width": -1}, "must be positive"),
        ({"heads": 0}, "must be positive"),
        ({"activation": "relu"}, "unknown activation 'relu'.*quick_gelu"),
    ],
)
def test_towers_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG.vision, **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "unknown compute dtype 'float16'; did you mean .*bfloat16"),
        ({"unroll": 0}, "unroll must be at least 1, got 0"),
        ({"remat": "ful"}, "unknown remat policy 'ful'; did you mean 'full'"),
    ],
)
def test_ways_of_running_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Compute(**settings)


def test_a_preset_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="unknown CLIP shape 'vit_b_33'; did you mean 'vit_b_32'"):
        CLIPConfig.preset("vit_b_33")
