"""Presets of the parameter table on real shapes: closed and published counts, and LoRA+ against peft's optimiser."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax import names
from vla_jax.adapters import LoRA, Placement, place
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.loading import load_config
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import GROUPS, PRESETS, preset
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.training.table import ParameterTable

TOWERS = CLIPConfig.preset("vit_b_16").towers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Six maps and two LayerNorms a block, and what stands outside the blocks: two LayerNorms and one.
        ("bitfit", 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 2 * 768 + 12 * (4 * 512 + 2048 + 512 + 2 * 512) + 512),
        ("layer_norm", (2 * 12 + 2) * 2 * 768 + (2 * 12 + 1) * 2 * 512),
        ("projection", 768 * 512 + 512 * 512),
        ("full", 149_620_737),
        # Without the text tower (63,428,096 with its projection) and the temperature.
        ("image_tower", 86_192_640),
        ("adapters", 0),
        ("lora_plus", 0),
        ("linear_probe", 0),
    ],
)
def test_counts_on_vit_b_16(name, expected):
    table = ParameterTable(preset(name)).resolve({"backbone": abstract_params(CLIPConfig.preset("vit_b_16"))})
    assert table.trained == expected
    assert table.total == 149_620_737


def bart_base():
    """The shapes of BART-base's blocks and LayerNorms under names like ours."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731

    def linear(into, out):
        return {"kernel": leaf(6, into, out), "bias": leaf(6, out)}

    def norm(*lead):
        return {"scale": leaf(*lead, 768), "bias": leaf(*lead, 768)}

    def blocks(attentions):
        maps = {"mlp": {"fc1": linear(768, 3072), "fc2": linear(3072, 768)}, "norm_mlp": norm(6)}
        for attention in attentions:
            maps[attention] = {name: linear(768, 768) for name in ("q", "k", "v", "out")}
            maps[f"norm_{attention}"] = norm(6)
        return {"embedding_norm": norm(), "blocks": maps}

    return {"backbone": {"encoder": blocks(["attn"]), "decoder": blocks(["attn", "cross"])}}


def test_published_counts_of_biases_and_layer_norms():
    # VL-Adapter (Sung et al. 2022) trains these on BART-base, LayerNorms' biases among the biases.
    biases, norms = (ParameterTable(preset(name)).resolve(bart_base()).trained for name in ("bitfit", "layer_norm"))
    assert (biases, norms) == (125_952, 49_152)
    # Its table says 1.21 % for BitFit: biases and the visual embedding, of the whole model.
    always = 1_582_848
    assert round(100 * (biases + always) / (139_420_416 + 200 * 768 + always), 2) == 1.21


@pytest.mark.parametrize("shape", ["vit_b_32", "tiny"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_rule_for_the_backbone_finds_something_there(name, shape):
    # Optional rules would let a parameter that was renamed lose what they say of it in silence.
    config = load_config("tiny") if shape == "tiny" else CLIPConfig.preset(shape)
    leaves = names.flatten({"backbone": abstract_params(config)})
    for rule in preset(name):
        if not rule.pattern.startswith(("adapters", "(adapters", "heads")):
            assert any(re.fullmatch(rule.pattern, leaf) for leaf in leaves), rule


def test_every_product_of_the_blocks_is_cut_along_both_axes():
    tree = {"backbone": abstract_params(CLIPConfig.preset("vit_b_32"))}
    shardings = names.flatten(ParameterTable(preset("full")).resolve(tree).shardings(make_mesh(MeshConfig(2, 2, 2))))
    uncut = {}
    for leaf, sharding in shardings.items():
        axes = {axis for axis in sharding.spec if axis}
        if len(names.flatten(tree)[leaf].shape) > 1 and "norm" not in leaf and axes != {"fsdp", "tensor"}:
            uncut[leaf.removeprefix("backbone/")] = axes
    # What is left is small: a product before the blocks, one behind them, positions, and the blocks' biases.
    biases = {f"{tower}/blocks/{part}/bias" for tower in ("vision", "text") for part in ("attn/out", "mlp/fc2")}
    first = ("attn/q", "attn/k", "attn/v", "mlp/fc1")
    halves = {f"{tower}/blocks/{part}/bias" for tower in ("vision", "text") for part in first}
    expected = {leaf: set() for leaf in biases} | {leaf: {"tensor"} for leaf in halves}
    expected |= {f"{tower}/projection/kernel": {"fsdp"} for tower in ("vision", "text")}
    expected |= {f"{tower}/position_embedding": set() for tower in ("vision", "text")}
    expected |= {"vision/patch_embedding/kernel": set()}
    assert uncut == expected


# The attention of AdapterFusion is not optional, and this tree has none.
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "adapter_fusion"])
def test_what_an_adapter_took_off_is_never_trained(name):
    plan = place(Placement(LoRA(rank=2, init="pissa", decomposed=True), slots=("attn_q",)), TOWERS)
    table = ParameterTable(preset(name)).resolve({"adapters": plan.shapes()})
    trained = {row.name.rsplit("/", 1)[-1] for row in table.rows if row.train}
    assert trained == (set() if name == "linear_probe" else {"a", "b", "magnitude"})
    assert not any(row.train for row in table.rows if "/frozen/" in row.name)
    # Vectors that multiply a map must not be pulled to zero.
    assert {row.name.rsplit("/", 1)[-1] for row in table.rows if not row.decay} == {"magnitude"}


@pytest.mark.parametrize("rate", [1e-3, 2e-2])
def test_the_first_step_of_b_is_the_ratio_times_that_of_a(rate):
    placement = Placement(LoRA(rank=2, decomposed=True), slots=("attn_q",), ranks=(("text/attn_q/0", 4),))
    shapes = {"adapters": place(placement, TOWERS).shapes(), "heads": {"b": jax.ShapeDtypeStruct((), jnp.float32)}}
    table = ParameterTable(preset("lora_plus")).resolve(shapes)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    config = OptimizerConfig(rate, "constant", weight_decay=0.0, clip_norm=None, groups=GROUPS["lora_plus"])
    optimizer = make_optimizer(config, table, params, steps=2)
    gradient = jax.tree.map(lambda leaf: jnp.full(leaf.shape, -0.5), params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    steps = {name: np.unique(leaf) for name, leaf in names.flatten(updates).items()}
    assert sum(name.endswith("/b") for name in steps) == 4
    for name, step in steps.items():
        # Adam's first step is the learning rate, whatever the gradient.
        faster = name.startswith("adapters/") and name.endswith("/b")
        np.testing.assert_allclose(step, 16 * rate if faster else rate, rtol=1e-5, err_msg=name)


@pytest.mark.torch
def test_lora_plus_equals_pefts_optimiser():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    settings = peft.LoraConfig(r=3, target_modules=["linear"])
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"linear": torch.nn.Linear(5, 6)}), settings)
    generator = np.random.default_rng(0)
    draw = lambda: {"a": generator.standard_normal((5, 3)), "b": generator.standard_normal((3, 6))}  # noqa: E731
    start, *gradients = (draw() for _ in range(4))
    tensors = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    first, second = (next(p for name, p in tensors.items() if f"lora_{which}" in name) for which in "AB")
    with torch.no_grad():
        first.copy_(torch.tensor(start["a"].T))
        second.copy_(torch.tensor(start["b"].T))
    # Moments whose decay is exact in binary: 1 - 0.999 in float32 is wrong by some 1e-5.
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.05, betas=(0.5, 0.75)
    )
    for gradient in gradients:
        first.grad, second.grad = (torch.tensor(gradient[name].T, dtype=torch.float32) for name in "ab")
        optimizer.step()

    def tree(leaves):
        return {"adapters": {"lora": {"vision": {"attn_q": jax.tree.map(jnp.float32, leaves)}}}}

    params = tree(start)
    table = ParameterTable(preset("lora_plus")).resolve(params)
    config = OptimizerConfig(
        0.01, "constant", weight_decay=0.05, b1=0.5, b2=0.75, clip_norm=None, groups=GROUPS["lora_plus"]
    )
    ours = make_optimizer(config, table, params, steps=len(gradients))
    state = ours.init(params)
    for gradient in gradients:
        updates, state = ours.update(tree(gradient), state, params)
        params = optax.apply_updates(params, updates)
    leaves = params["adapters"]["lora"]["vision"]["attn_q"]
    np.testing.assert_allclose(leaves["a"], first.detach().numpy().T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(leaves["b"], second.detach().numpy().T, rtol=1e-5, atol=1e-6)
