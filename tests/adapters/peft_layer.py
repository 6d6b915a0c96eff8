"""One linear map as peft adapts it; imported by the tests of the methods that peft has too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def peft_linear(config: dict[str, Any], kernel: np.ndarray, bias: np.ndarray | None, kind: str = "LoraConfig"):
    """peft's layer around a map with these weights, ``[in, out]`` and ``[out]`` or None; skips without peft."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(*kernel.shape, bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(kernel.T.copy()))
        if bias is not None:
            linear.bias.copy_(torch.tensor(bias))
    settings = getattr(peft, kind)(target_modules=["linear"], **config)
    layer = peft.get_peft_model(torch.nn.ModuleDict({"linear": linear}), settings).base_model.model["linear"]
    return layer.eval()


def assign(parameter, array: np.ndarray) -> None:
    """Sets a parameter of peft's."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        parameter.copy_(torch.tensor(np.array(array)))


def run(layer, x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """The layer's output, once the gradients of ``sum(output * slope)`` are in its parameters."""
    torch = pytest.importorskip("torch")
    output = layer(torch.tensor(x))
    (output * torch.tensor(slope)).sum().backward()
    return output.detach().numpy()


def close(ours, theirs, tolerance: float = 1e-6) -> None:
    """Within a relative distance, as wholes."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)
