"""Random CLIPs of transformers, for tests that compare with them; imported by the tests beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def small_settings(**changes: Any) -> dict[str, Any]:
    """A config.json of a CLIP with towers of unequal width and depth; ``text_`` and ``vision_`` keys go to a tower."""
    settings: dict[str, Any] = {
        "model_type": "clip",
        "projection_dim": 24,
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 50,
            "max_position_embeddings": 12,
            "eos_token_id": 49,
            "hidden_act": "quick_gelu",
        },
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 32,
            "patch_size": 8,
            "hidden_act": "quick_gelu",
        },
    }
    for key, value in changes.items():
        tower, _, rest = key.partition("_")
        if tower in ("text", "vision"):
            settings[f"{tower}_config"][rest] = value
        else:
            settings[key] = value
    return settings


def random_clip(settings: dict[str, Any], seed: int = 0) -> Any:
    """transformers' CLIPModel with random weights, norms and biases among them, that keep activations of size one.

    transformers' own initialisation leaves biases at zero and norms at one, so that swapping two of them or dropping
    one would go unseen.
    """
    model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                parameter.fill_(3.1)
            elif "norm" in name:  # also matches the hub's "layrnorm"
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif "embedding" in name and "patch" not in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)  # one over the square root of the fan-in
    return model


def save_clip(model: Any, folder: Path, **options: Any) -> Path:
    """Writes a model as the hub keeps it."""
    model.save_pretrained(folder, **options)
    return folder


def random_images(size: int, batch: int = 2, seed: int = 1) -> np.ndarray:
    """``[batch, size, size, 3]`` float32."""
    return np.random.default_rng(seed).standard_normal((batch, size, size, 3)).astype(np.float32)


def random_texts(
    vocabulary: int, length: int, eos: int, lengths: tuple[int, ...], pad: int, seed: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask ``[batch, length]``; each text ends with its only ``eos`` and is padded with ``pad``."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, vocabulary - 1, (len(lengths), length))
    tokens = np.where(tokens == eos, eos + 1, tokens)
    mask = np.arange(length)[None] < np.asarray(lengths)[:, None]
    tokens[np.arange(len(lengths)), np.asarray(lengths) - 1] = eos
    return np.where(mask, tokens, pad).astype(np.int32), mask
