"""What peft and PyTorch compute, for the tests that compare with them; they are skipped where either is missing."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchanged_clip import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers")


@functools.cache
def _loaded(folder: Path) -> Any:
    return transformers.CLIPModel.from_pretrained(folder).eval()


def clip_model(folder: Path) -> Any:
    """transformers' CLIPModel in evaluation mode, a new one each time: peft changes what it wraps."""
    return copy.deepcopy(_loaded(folder))


def with_adapter(backbone: Path, adapter: Path) -> Any:
    """The model with a checkpoint that peft loads; tensors that it misses are an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        return peft.PeftModel.from_pretrained(clip_model(backbone), adapter).eval()


def hub_features(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both features ``[batch, projection]``, not normalised."""
    images, tokens, mask = inputs()
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        image = base.visual_projection(base.vision_model(pixels).pooler_output)
        text = base.text_model(torch.tensor(tokens, dtype=torch.long), torch.tensor(mask)).pooler_output
        return image.numpy(), base.text_projection(text).numpy()


def trained(model: Any, settings: Any, seed: int = 3) -> Any:
    """A model that peft wraps, with what it would train moved away from where it starts."""
    wrapped = peft.get_peft_model(model, settings).eval()
    generator = torch.Generator().manual_seed(seed)
    moved = 0
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                moved += 1
    assert moved
    return wrapped
