"""The presets' whole settings, written out from the papers: a default that changed would otherwise go unnoticed."""

from __future__ import annotations

import dataclasses

import pytest

from vla_jax.adapters import adapter_plus, clip_lora, compacter, houlsby, parallel, pfeiffer, vl_adapter

BOTH = ("attn_sublayer", "mlp_out")

# Every field is given, those too that a method has for the sake of others.
SETTINGS = {
    # A sixteenth of the width, swish, N(0, 0.01) cut at two deviations (Houlsby et al. 2019, section 3).
    houlsby: (
        BOTH,
        {
            "rank": None,
            "reduction": 16,
            "activation": "swish",
            "parallel": False,
            "scale": 1.0,
            "init": "truncated",
            "layer_norm": False,
            "channel_scale": False,
            "drop_path": 0.0,
        },
    ),
    # A sixteenth of the width, relu, once a block, without a LayerNorm of its own.
    pfeiffer: (
        ("mlp_out",),
        {
            "rank": None,
            "reduction": 16,
            "activation": "relu",
            "parallel": False,
            "scale": 1.0,
            "init": "zero_up",
            "layer_norm": False,
            "channel_scale": False,
            "drop_path": 0.0,
        },
    ),
    # Beside the MLP, half the width, relu, s = 4, an up-projection of zero (He et al. 2022).
    parallel: (
        ("mlp_out",),
        {
            "rank": None,
            "reduction": 2,
            "activation": "relu",
            "parallel": True,
            "scale": 4.0,
            "init": "zero_up",
            "layer_norm": False,
            "channel_scale": False,
            "drop_path": 0.0,
        },
    ),
    # A ninety-sixth of the width, gelu, learned factors, Houlsby's initial values, stochastic depth of 0.1.
    adapter_plus: (
        ("block_out",),
        {
            "rank": None,
            "reduction": 96,
            "activation": "gelu",
            "parallel": False,
            "scale": 1.0,
            "init": "truncated",
            "layer_norm": False,
            "channel_scale": True,
            "drop_path": 0.1,
        },
    ),
    # An eighth of the width, gelu by tanh, both kernels from N(0, 0.02) (the code of Sung et al. 2022).
    vl_adapter: (
        BOTH,
        {
            "rank": None,
            "reduction": 8,
            "activation": "gelu_tanh",
            "parallel": False,
            "scale": 1.0,
            "init": "normal",
            "layer_norm": False,
            "channel_scale": False,
            "drop_path": 0.0,
        },
    ),
    # A thirty-second of the width, gelu by tanh, four products, factors of rank one, one rule, all kernels drawn.
    compacter: (
        BOTH,
        {
            "rank": None,
            "reduction": 32,
            "n": 4,
            "factorised": True,
            "factor_rank": 1,
            "shared_rule": True,
            "activation": "gelu_tanh",
            "init": "glorot",
        },
    ),
    # Rank 2, alpha 1, dropout 0.25; their code divides alpha by the root of the rank.
    clip_lora: (
        ("attn_q", "attn_k", "attn_v"),
        {
            "rank": 2,
            "alpha": 1.0,
            "dropout": 0.25,
            "rank_stabilised": True,
            "decomposed": False,
            "init": "default",
        },
    ),
}


@pytest.mark.parametrize("preset", SETTINGS, ids=lambda preset: preset.__name__)
def test_a_preset_is_what_its_paper_says(preset):
    slots, method = SETTINGS[preset]
    placement = preset()
    assert dataclasses.asdict(placement.method) == method
    # In every layer of both towers, each with weights of its own; nothing set apart by a table.
    assert {field.name: getattr(placement, field.name) for field in dataclasses.fields(placement)} == {
        "method": placement.method,
        "name": preset.__name__,
        "towers": ("vision", "text"),
        "slots": slots,
        "layers": "all",
        "pairs": (),
        "tied": False,
        "sharing": (),
        "tasks": (),
        "ranks": (),
        "alphas": (),
        "dropped": (),
    }


@pytest.mark.parametrize(
    ("preset", "width"),
    [(houlsby, 48), (pfeiffer, 48), (parallel, 384), (adapter_plus, 8), (vl_adapter, 96), (compacter, 24)],
)
def test_the_bottlenecks_width_in_a_stream_of_768(preset, width):
    assert preset().method.rank_for(768) == width
    assert preset().method.kind == ("phm" if preset is compacter else "bottleneck")


def test_the_low_rank_updates_scale():
    assert clip_lora().method.kind == "lora"
    assert clip_lora().method.scale == pytest.approx(2**-0.5)
