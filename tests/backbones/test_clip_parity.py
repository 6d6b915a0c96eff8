"""CLIP against transformers' CLIPModel in float32: random weights, published shapes, files in the hub's format."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hub_clip import random_clip, random_images, random_texts, save_clip, small_settings, torch

from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.loading import load_backbone

pytestmark = pytest.mark.torch

TOLERANCE = 1e-5  # of the norm of the difference over the norm of the reference


def settings_of(
    vision: tuple[int, int, int], text: tuple[int, int, int], patch: int, projection: int, act: str, **more: Any
) -> dict[str, Any]:
    """A config.json by (width, depth, heads) of each tower, at 224 pixels; MLPs are four times the width."""
    changes = {"projection_dim": projection, "vision_patch_size": patch, "vision_image_size": 224}
    for tower, (width, depth, heads) in (("vision", vision), ("text", text)):
        changes |= {
            f"{tower}_hidden_size": width,
            f"{tower}_intermediate_size": 4 * width,
            f"{tower}_num_hidden_layers": depth,
            f"{tower}_num_attention_heads": heads,
            f"{tower}_hidden_act": act,
        }
    return small_settings(**(changes | {"text_max_position_embeddings": 77} | more))


def assert_parity(folder: Any, model: Any, *, padded: bool, image_size: int | None = None) -> None:
    """Compares every layer's hidden states, pooled states, both features and the logits."""
    backbone = load_backbone(folder, image_size=image_size)
    config, text = backbone.config, model.config.text_config
    length = config.context_length
    lengths = (length, length - 3, 4) if padded else (length, length, length)
    eos = text.vocab_size - 1 if config.pooling == "largest_id" else text.eos_token_id
    # Padding with the end-of-text token is what CLIP's tokenizer does, so the first of several must be taken.
    tokens, mask = random_texts(text.vocab_size, length, eos, lengths, pad=eos)
    images = random_images(config.image_size)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
            attention_mask=torch.tensor(mask, dtype=torch.long) if padded else None,
            output_hidden_states=True,
            interpolate_pos_encoding=image_size is not None,
        )
    forward = jax.jit(lambda params, *batch: CLIP(config).apply({"params": params}, *batch, hidden_states=True))
    ours = forward(backbone.params, images, tokens, mask if padded else None)
    vision_states, text_states = theirs.vision_model_output, theirs.text_model_output
    pairs = {
        "logits": (ours.logits, theirs.logits_per_image),
        "image features": (ours.image_features, vision_states.pooler_output),
        "text features": (ours.text_features, text_states.pooler_output),
        "text tokens": (ours.text_tokens, text_states.last_hidden_state),
    }
    for name, hidden, reference in (
        ("image", ours.image_hidden, vision_states.hidden_states),
        ("text", ours.text_hidden, text_states.hidden_states),
    ):
        assert len(hidden) == len(reference)
        pairs |= {f"{name} hidden {i}": pair for i, pair in enumerate(zip(hidden, reference, strict=True))}
    for name, (mine, reference) in pairs.items():
        reference = reference.numpy()
        assert mine.shape == reference.shape, name
        assert 0.02 < np.std(reference) < 50, f"{name}: weights that give no realistic activations test nothing"
        error = np.linalg.norm(np.asarray(mine) - reference) / np.linalg.norm(reference)
        assert error <= TOLERANCE, f"{name}: {error:.2e}"


# An end-of-text id below others, so that the two rules of pooling read different tokens.
FIRST_EOS, LARGEST_ID = 7, 2


@pytest.mark.parametrize(
    ("act", "eos_token_id", "padded"),
    [
        ("quick_gelu", FIRST_EOS, True),
        ("quick_gelu", LARGEST_ID, False),
        ("gelu", FIRST_EOS, False),
        ("gelu", LARGEST_ID, True),
    ],
)
def test_activations_pooling_and_padding_at_a_small_shape(tmp_path, act, eos_token_id, padded):
    model = random_clip(small_settings(text_hidden_act=act, vision_hidden_act=act, text_eos_token_id=eos_token_id))
    assert_parity(save_clip(model, tmp_path), model, padded=padded)


@pytest.mark.parametrize("image_size", [48, 24], ids=["larger", "smaller"])
def test_interpolated_image_size_at_a_small_shape(tmp_path, image_size):
    model = random_clip(small_settings())
    assert_parity(save_clip(model, tmp_path), model, padded=False, image_size=image_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "padded", "eos_token_id"), [("quick_gelu", True, 2), ("gelu", False, 49407)], ids=["openai", "openclip"]
)
def test_b_32_at_full_width_depth_and_vocabulary(tmp_path, act, padded, eos_token_id):
    settings = settings_of(
        (768, 12, 12), (512, 12, 8), 32, 512, act, text_vocab_size=49408, text_eos_token_id=eos_token_id
    )
    model = random_clip(settings)
    assert_parity(save_clip(model, tmp_path), model, padded=padded)


@pytest.mark.slow
def test_b_16_at_full_width(tmp_path):
    model = random_clip(settings_of((768, 2, 12), (512, 2, 8), 16, 512, "gelu", text_eos_token_id=FIRST_EOS))
    assert_parity(save_clip(model, tmp_path), model, padded=True)


@pytest.mark.slow
def test_l_14_at_full_width(tmp_path):
    model = random_clip(settings_of((1024, 2, 16), (768, 2, 12), 14, 768, "quick_gelu", text_eos_token_id=2))
    assert_parity(save_clip(model, tmp_path), model, padded=True)


@pytest.mark.slow
def test_b_32_at_another_image_size(tmp_path):
    model = random_clip(settings_of((768, 2, 12), (512, 2, 8), 32, 512, "quick_gelu"))
    assert_parity(save_clip(model, tmp_path), model, padded=False, image_size=288)
