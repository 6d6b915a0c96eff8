"""A checkpoint of peft on transformers' CLIPModel, as placements and trained leaves.

=====================  ================================================================================
peft                   here
=====================  ================================================================================
LoRA, rsLoRA, DoRA     ``LoRA`` at the linear slots; rank and alpha patterns become the placement's tables
(IA)^3                 ``Affine`` without shift: at a map's slot, or at ``mlp_hidden`` (``mlp_in``) where a
                       feedforward module fc2 (fc1) has its input scaled
LayerNorm tuning       trained leaves below ``backbone/``, as the parameter table's ``layer_norm`` has them
modules_to_save        trained leaves below ``backbone/``; below ``heads/`` what no CLIP has
=====================  ================================================================================

Prompt and prefix tuning are not among them: peft wraps a CLIPModel with them and cannot run it, because it hands the
model embeddings instead of token ids, or a decoder's cached keys, and CLIPModel takes neither (peft 0.21, transformers
5.23).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vla_jax import patterns
from vla_jax.adapters import Affine, LoRA
from vla_jax.adapters.base import Method
from vla_jax.algebra.places import Place
from vla_jax.backbones.convert import parameter_shapes
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.weights import conversion_command
from vla_jax.errors import UserError, nearest
from vla_jax.exchange.adapter_file import SavedAdapter, read_tensors
from vla_jax.exchange.peft_config import CONFIG_NAME, read_config
from vla_jax.exchange.peft_names import (
    FEEDFORWARD_SLOTS,
    FINGERPRINT,
    PICKLED_NAME,
    PREFIX,
    WEIGHTS_NAME,
    Modules,
    is_feedforward,
    pattern_value,
    saved_whole,
    targeted,
)
from vla_jax.exchange.sites import Occupied, assemble, saved_as
from vla_jax.names import flatten

_SHOWN = 5  # Tensors of one kind named in one error; the rest are counted.


class _Source(NamedTuple):
    """What a place is to have: its method, and for each parameter the tensor and the shape that tensor must have."""

    method: Method
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def import_peft(folder: str | os.PathLike[str], backbone: Backbone, *, name: str = "adapter") -> SavedAdapter:
    """Reads ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: what ``save_pretrained`` of a peft model wrote.
        backbone: the CLIP that the checkpoint was trained on.
        name: what the adapter is to be called.

    Returns:
        The trained leaves, float32, with the placements that they belong to.

    Raises:
        UserError: the files are missing, pickled or broken, a field of the configuration is not supported, or the
            tensors are not those that the configuration asks for on this backbone.
    """
    folder = Path(folder)
    settings, tensors = _read(folder, backbone)
    with patterns.limited():
        return _imported(folder, settings, tensors, backbone, name)


def _imported(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], backbone: Backbone, name: str
) -> SavedAdapter:
    modules = Modules.of(backbone.config.towers)
    kind = settings["peft_type"]
    whole = {f"{PREFIX}{tensor}": tensor for tensor in _saved_tensors(modules, settings)}
    sources: dict[Place, _Source] = {}
    if kind == "LN_TUNING":
        whole |= _tuned_layer_norms(modules, settings)
    else:
        sources = (_low_rank if kind == "LORA" else _scales)(modules, settings, backbone)
    heads = {tensor: leaf for tensor in tensors if (leaf := _head_leaf(tensor, settings, modules)) is not None}
    expected = {tensor: shape for source in sources.values() for tensor, shape in source.tensors.values()}
    expected |= {tensor: _hub_shape(modules, own, backbone) for tensor, own in whole.items()}
    _check(folder, backbone, expected, {tensor: t.shape for tensor, t in tensors.items() if tensor not in heads})

    leaves = _backbone_leaves(modules, {own: tensors[tensor] for tensor, own in whole.items()}, backbone)
    leaves |= {leaf: tensors[tensor].T for tensor, leaf in heads.items()}
    saved = SavedAdapter(
        leaves=leaves,
        adapters={"placements": []},
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        towers={tower: shape._asdict() for tower, shape in backbone.config.towers.items()},
    )
    if not sources:
        return saved
    places = {
        at: Occupied(source.method, {leaf: _ours(leaf, tensors[own]) for leaf, (own, _) in source.tensors.items()})
        for at, source in sources.items()
    }
    return saved_as(saved, assemble(places, backbone.config.towers, name))


def _read(folder: Path, backbone: Backbone) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Both files of a checkpoint; the tensors as float32."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give what save_pretrained of a peft model wrote")
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} has no {CONFIG_NAME}; give what save_pretrained of a peft model wrote")
    settings = read_config(folder / CONFIG_NAME)
    if (folder / PICKLED_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{folder} holds pickled weights only ({PICKLED_NAME}), which can run code when they are loaded and are "
            "never opened here. Convert them once, where PyTorch is installed:\n  "
            + conversion_command(folder, [folder / PICKLED_NAME], WEIGHTS_NAME)
        )
    tensors, metadata = read_tensors(folder / WEIGHTS_NAME)
    trained_on = metadata.get(FINGERPRINT, backbone.fingerprint)
    if trained_on != backbone.fingerprint:
        raise UserError(
            f"{folder} was trained on a backbone with fingerprint {trained_on}, and {backbone.name!r} has "
            f"{backbone.fingerprint}; give the backbone it was trained on"
        )
    return settings, {tensor: value.astype(np.float32) for tensor, value in tensors.items()}


def _low_rank(modules: Modules, settings: Mapping[str, Any], backbone: Backbone) -> dict[Place, _Source]:
    sources = {}
    for module in targeted(modules.names, settings, modules.places):
        at = _linear(modules, module)
        into, out = backbone.config.towers[at.tower].widths(at.slot)
        rank = pattern_value(settings.get("rank_pattern") or {}, module, settings.get("r", 8), "rank_pattern")
        alpha = pattern_value(
            settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha", 8), "alpha_pattern"
        )
        method = LoRA(
            rank=rank,
            alpha=float(alpha),
            dropout=float(settings.get("lora_dropout", 0.0)),
            rank_stabilised=bool(settings.get("use_rslora", False)),
            decomposed=bool(settings.get("use_dora", False)),
        )
        tensors = {"a": ("lora_A.weight", (rank, into)), "b": ("lora_B.weight", (out, rank))}
        if method.decomposed:
            tensors["magnitude"] = ("lora_magnitude_vector", (out,))
        named = {leaf: (f"{PREFIX}{module}.{end}", shape) for leaf, (end, shape) in tensors.items()}
        sources[at] = _Source(method, named)
    return sources


def _scales(modules: Modules, settings: Mapping[str, Any], backbone: Backbone) -> dict[Place, _Source]:
    if settings.get("feedforward_modules") is None:
        raise UserError(
            "adapter_config.json: feedforward_modules is missing, and peft has no default for CLIP; supported: a list "
            "of module names, or a regular expression"
        )
    sources = {}
    for module in targeted(modules.names, settings, modules.places):
        at = _linear(modules, module)
        into, out = backbone.config.towers[at.tower].widths(at.slot)
        shape = (out, 1)
        if is_feedforward(module, settings["feedforward_modules"]):
            if at.slot not in FEEDFORWARD_SLOTS:
                raise UserError(
                    f"adapter_config.json: feedforward_modules choose {module}, whose input also goes elsewhere or has "
                    "no slot; supported: fc1 and fc2"
                )
            at, shape = at._replace(slot=FEEDFORWARD_SLOTS[at.slot]), (1, into)
        method = Affine(scale=True, shift=False)
        sources[at] = _Source(method, {"scale": (f"{PREFIX}{module}.ia3_l", shape)})
    return sources


def _linear(modules: Modules, module: str) -> Place:
    if module not in modules.places:
        raise UserError(
            f"adapter_config.json: target_modules choose {module}, which is no linear map of CLIP; supported: q_proj, "
            "k_proj, v_proj, out_proj, fc1, fc2, visual_projection and text_projection"
        )
    return modules.places[module]


def _tuned_layer_norms(modules: Modules, settings: Mapping[str, Any]) -> dict[str, str]:
    """The hub's tensors that LayerNorm tuning replaces, by the names it saves them under."""
    replaced = {}
    for module in targeted(modules.names, settings, modules.places):
        for tensor in modules.below(module):
            replaced[f"{PREFIX}{module}.ln_tuning_layers.{tensor.removeprefix(f'{module}.')}"] = tensor
    return replaced


def _saved_tensors(modules: Modules, settings: Mapping[str, Any]) -> list[str]:
    saved = saved_whole(modules.names, settings.get("modules_to_save") or [])
    return [tensor for module in saved for tensor in modules.below(module)]


def _head_leaf(tensor: str, settings: Mapping[str, Any], modules: Modules) -> str | None:
    """The leaf below ``heads/`` for a tensor of ``modules_to_save`` that is not CLIP's; None for all other tensors."""
    module, _, parameter = tensor.removeprefix(PREFIX).rpartition(".")
    leaf = {"weight": "kernel", "bias": "bias"}.get(parameter)
    saved = settings.get("modules_to_save") or []
    if leaf is None or module in modules.names or not any(module.endswith(end) for end in saved):
        return None
    return "/".join(["heads", *module.removeprefix("heads.").split("."), leaf])


def _hub_shape(modules: Modules, tensor: str, backbone: Backbone) -> tuple[int, ...]:
    row = modules.tensors[tensor].row
    return row.tensor_shape(parameter_shapes(backbone.config)[row.ours])


def _ours(leaf: str, tensor: np.ndarray) -> np.ndarray:
    # (IA)^3's vectors lie in matrices, upright or not; LoRA's matrices are [out, in].
    return tensor.reshape(-1) if leaf == "scale" else tensor.T


def _backbone_leaves(modules: Modules, tensors: Mapping[str, np.ndarray], backbone: Backbone) -> dict[str, np.ndarray]:
    """The hub's tensors as our leaves; layers that were not trained are the backbone's own."""
    leaves: dict[str, np.ndarray] = {}
    frozen = flatten(backbone.params)
    for name, tensor in tensors.items():
        row, layer = modules.tensors[name]
        leaf = f"backbone/{row.ours}"
        if leaf not in leaves:
            leaves[leaf] = np.array(frozen[row.ours], np.float32)
        leaves[leaf][... if layer is None else layer] = row.to_ours(tensor)
    return leaves


def _check(
    folder: Path, backbone: Backbone, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Every tensor that the configuration asks for on this backbone, no other, and in its shape."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    shapes = [name for name in expected if name in found and found[name] != expected[name]]
    problems = []
    if missing:
        problems.append(f"missing: {_listed(missing, extra)}")
    if extra:
        problems.append(f"extra: {_listed(extra, missing)}")
    if shapes:
        problems.append(
            "of another shape: " + _listed([f"{name} {found[name]}, not {expected[name]}" for name in shapes], [])
        )
    if problems:
        raise UserError(
            f"the tensors in {folder} are not those that its {CONFIG_NAME} asks for on backbone {backbone.name!r}; "
            f"{'; '.join(problems)}. Give the backbone it was trained on, and the checkpoint as peft wrote it"
        )


def _listed(names: list[str], others: list[str]) -> str:
    shown = []
    for name in names[:_SHOWN]:
        near = nearest(name, others, 1)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
