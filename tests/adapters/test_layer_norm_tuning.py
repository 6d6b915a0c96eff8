"""LayerNorm tuning: what is trained of a CLIP, and how it learns, against peft's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_layer import close
from settings import BATCH, CONFIG, backbone, inputs, model

from vla_jax import names
from vla_jax.backbones.export import export_backbone
from vla_jax.training.presets import preset
from vla_jax.training.table import ParameterTable

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Ours, and what transformers calls it; {} is the layer.
THEIRS = {
    "vision/pre_norm": "vision_model.pre_layrnorm",
    "vision/post_norm": "vision_model.post_layernorm",
    "text/post_norm": "text_model.final_layer_norm",
    **{
        f"{tower}/blocks/norm{n}": f"{tower}_model.encoder.layers.{{}}.layer_norm{n}"
        for tower in ("vision", "text")
        for n in (1, 2)
    },
}
PARTS = {"scale": "weight", "bias": "bias"}


@pytest.mark.torch
def test_outputs_and_gradients_equal_pefts(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    params, (images, tokens, mask) = backbone(CONFIG), inputs(CONFIG)
    generator = np.random.default_rng(4)
    slopes = [generator.standard_normal((BATCH, CONFIG.projection)).astype(np.float32) for _ in range(2)]

    export_backbone(params, CONFIG, tmp_path)
    targets = ["layer_norm1", "layer_norm2", "pre_layrnorm", "post_layernorm", "final_layer_norm"]
    wrapped = peft.get_peft_model(
        transformers.CLIPModel.from_pretrained(tmp_path), peft.LNTuningConfig(target_modules=targets)
    ).eval()
    clip = wrapped.get_base_model()
    pixels = torch.tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())
    words = torch.tensor(np.asarray(tokens), dtype=torch.long)
    features = [
        clip.visual_projection(clip.vision_model(pixels).pooler_output),
        clip.text_projection(clip.text_model(words, torch.tensor(np.asarray(mask))).pooler_output),
    ]
    sum((feature * torch.tensor(slope)).sum() for feature, slope in zip(features, slopes, strict=True)).backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): parameter.grad.numpy()
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }

    trainable, frozen = ParameterTable(preset("layer_norm")).resolve({"backbone": params}).split({"backbone": params})

    @jax.jit
    def run(trainable, frozen):
        def loss(trainable):
            whole = names.merge(trainable, frozen)["backbone"]
            out = model(CONFIG).apply({"params": whole}, images, tokens, mask)
            ours = out.image_features, out.text_features
            return sum(jnp.sum(feature * slope) for feature, slope in zip(ours, slopes, strict=True)), ours

        (_, ours), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        return ours, gradient

    ours, gradient = run(trainable, frozen)
    for feature, theirs in zip(ours, features, strict=True):
        close(feature, theirs.detach().numpy(), 1e-5)
    compared = set()
    for name, value in names.flatten(gradient["backbone"]).items():
        norm, part = name.rsplit("/", 1)
        tensor = f"{THEIRS[norm]}.{PARTS[part]}"
        layers = [tensor.format(layer) for layer in range(len(value))] if "blocks" in norm else [tensor]
        for layer, theirs in enumerate(layers):
            close(value[layer] if "blocks" in norm else value, expected[theirs], 1e-5)
            compared.add(theirs)
    # Neither trains a parameter that the other leaves alone.
    assert compared == set(expected)
