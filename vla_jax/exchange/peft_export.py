"""Placements and trained leaves as a checkpoint that peft loads onto transformers' CLIPModel.

The counterpart of :mod:`vla_jax.exchange.peft_import`; what peft has no form for is refused, never left out.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vla_jax.adapters import Affine, LoRA
from vla_jax.adapters.base import Method
from vla_jax.algebra import combine
from vla_jax.algebra.places import Occupant, occupants
from vla_jax.errors import UserError
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.peft_config import CONFIG_NAME
from vla_jax.exchange.peft_names import (
    FEEDFORWARD_SLOTS,
    FINGERPRINT,
    PREFIX,
    WEIGHTS_NAME,
    Modules,
    is_feedforward,
    saved_whole,
    targeted,
)
from vla_jax.exchange.sites import adapter_of, tower_shapes
from vla_jax.names import Tree
from vla_jax.slots import LINEAR_SLOTS


def export_peft(folder: str | os.PathLike[str], saved: SavedAdapter, *, backbone: Tree | None = None) -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``; files of these names are replaced.

    ``peft.PeftModel.from_pretrained(clip, folder)`` gives the same features. Heads are written as modules
    ``heads.<task>...``, which peft loads into a model that has them and passes over in a plain CLIPModel. PiSSA becomes
    LoRA of twice the rank, since in peft as here what it started from is taken off.

    Args:
        folder: where to write; made if it does not exist.
        saved: what to write.
        backbone: the tree below ``backbone/``; needed for PiSSA alone.

    Returns:
        The folder.

    Raises:
        UserError: peft has no form for a method, a slot, a combination or a trained leaf; the message names it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot export into {folder}: it is a file; give a folder")
    modules = Modules.of(tower_shapes(saved))
    occupied = _occupants(saved, backbone)
    tensors, whole = _whole_modules(modules, saved.leaves)
    heads, head_modules = _heads(saved.leaves)
    settings: dict[str, Any]
    if occupied:
        own, settings = _adapters(modules, occupied)
        both = sorted(set(whole) & {name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in own})
        if both:
            raise UserError(
                f"{both[0]} is both trained itself and adapted, and peft adapts no module that it saves whole; merge "
                "the adapter, or train one of them"
            )
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()} | own
        beside = _short(whole, lambda ends: saved_whole(modules.names, ends)) + head_modules
    elif whole:
        settings = {"peft_type": "LN_TUNING", "target_modules": _targets(modules, whole)}
        tensors = {_tuned_name(whole, name): tensor for name, tensor in tensors.items()}
        beside = head_modules
    else:
        raise UserError("there is nothing that peft has a form for: no adapter and no trained module of the backbone")
    settings["modules_to_save"] = beside or None
    shared = {"base_model_name_or_path": saved.backbone, "task_type": None, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(shared | settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    metadata = {"format": "pt"} | ({FINGERPRINT: saved.fingerprint} if saved.fingerprint else {})
    # safetensors writes the memory as it lies, so a transposed view must be copied first.
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in (tensors | heads).items()}
    save_file(arrays, folder / WEIGHTS_NAME, metadata=metadata)
    return folder


def _occupants(saved: SavedAdapter, backbone: Tree | None) -> list[Occupant]:
    """What sits at each place, which must be one thing."""
    if not saved.adapters.get("placements") and not any(name.startswith("adapters/") for name in saved.leaves):
        return []
    adapter = adapter_of(saved, backbone)
    if any(getattr(group.method, "from_singular_vectors", False) for group in adapter.plan.groups):
        adapter = combine([adapter], [1.0], backbone=backbone)
    found: dict[str, Occupant] = {}
    for at, occupant in occupants(adapter).items():
        other = found.setdefault(str(at), occupant)
        if other is not occupant:
            raise UserError(
                f"adapters {other.adapter!r} and {occupant.adapter!r} both sit at {at}, and peft has one there; choose "
                "one of them"
            )
    return list(found.values())


def _adapters(modules: Modules, occupied: list[Occupant]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    kinds = sorted({occupant.method.kind for occupant in occupied})
    if len(kinds) > 1:
        raise UserError(f"a checkpoint of peft holds one method, got {', '.join(kinds)}; choose adapters of one")
    if kinds == [LoRA.kind]:
        return _low_rank(modules, occupied)
    if kinds == [Affine.kind]:
        return _scales(modules, occupied)
    raise UserError(
        f"peft has no form for {kinds[0]!r} on CLIP; supported: {LoRA.kind}, {Affine.kind} without shift, trained "
        "LayerNorms and other whole modules of the backbone"
    )


def _low_rank(modules: Modules, occupied: list[Occupant]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    by_module = {modules.at(occupant.place): occupant for occupant in occupied}
    methods: dict[str, Method] = {name: occupant.method for name, occupant in by_module.items()}
    for field in ("dropout", "rank_stabilised", "decomposed"):
        values = {getattr(method, field) for method in methods.values()}
        if len(values) > 1:
            raise UserError(
                f"peft has one {field} for a whole checkpoint, got {', '.join(map(str, sorted(values)))}; choose "
                "adapters that agree"
            )
    tensors = {}
    for name, occupant in by_module.items():
        own = {"lora_A.weight": occupant.leaves["a"].T, "lora_B.weight": occupant.leaves["b"].T}
        if occupant.method.decomposed:
            own["lora_magnitude_vector"] = occupant.leaves["magnitude"]
        tensors |= {f"{PREFIX}{name}.{end}": tensor for end, tensor in own.items()}
    rank, ranks = _usual({name: method.rank for name, method in methods.items()})
    alpha, alphas = _usual({name: _number(method.alpha) for name, method in methods.items()})
    first = next(iter(methods.values()))
    return tensors, {
        "peft_type": "LORA",
        "target_modules": _targets(modules, list(methods)),
        "r": rank,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilised,
        "use_dora": first.decomposed,
        "bias": "none",
    }


def _scales(modules: Modules, occupied: list[Occupant]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    maps = {hidden: slot for slot, hidden in FEEDFORWARD_SLOTS.items()}
    tensors, feedforward = {}, []
    for occupant in occupied:
        at = occupant.place
        if occupant.method.shift or not occupant.method.scale:
            raise UserError(f"peft scales and does not shift; give {occupant} scale=True, shift=False")
        inner = at.slot in maps
        name = modules.at(at._replace(slot=maps[at.slot]) if inner else at)
        if name is None:
            raise UserError(
                f"peft scales what goes into or comes out of one linear map, and {occupant} does neither; supported: "
                f"{', '.join((*LINEAR_SLOTS, *maps))}"
            )
        if f"{PREFIX}{name}.ia3_l" in tensors:
            raise UserError(f"peft scales either what goes into {name} or what comes out of it, not both")
        scale = occupant.leaves["scale"]
        tensors[f"{PREFIX}{name}.ia3_l"] = scale[None] if inner else scale[:, None]
        feedforward += [name] if inner else []
    names = [tensor.removeprefix(PREFIX).removesuffix(".ia3_l") for tensor in tensors]
    # peft wants every entry of the second list among those of the first.
    targets = _targets(modules, names)
    inner = sorted({name.rsplit(".", 1)[-1] for name in feedforward})
    if targets is not names and [n for n in names if is_feedforward(n, inner)] == feedforward:
        return tensors, {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": inner}
    return tensors, {"peft_type": "IA3", "target_modules": names, "feedforward_modules": feedforward}


def _whole_modules(modules: Modules, leaves: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The hub's tensors of trained backbone leaves, and the modules that they make up."""
    tensors = {}
    for name, (row, layer) in modules.tensors.items():
        if f"backbone/{row.ours}" in leaves:
            leaf = leaves[f"backbone/{row.ours}"]
            tensors[name] = row.to_theirs(leaf if layer is None else leaf[layer])
    whole = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    for module in whole:
        lacking = [name for name in modules.below(module) if name not in tensors]
        if not module or lacking:
            trained = next(name for name in tensors if name.rpartition(".")[0] == module)
            raise UserError(
                f"peft saves modules whole, and of {module or 'the model'} only {trained} was trained; train "
                f"{', '.join(lacking) or 'whole modules'} too, or keep this checkpoint in a file of our own"
            )
    return tensors, whole


def _heads(leaves: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors of linear heads, and the modules they belong to."""
    tensors, modules = {}, {}
    for name, leaf in leaves.items():
        if not name.startswith("heads/"):
            continue
        *path, last = name.split("/")
        if last not in ("kernel", "bias") or leaf.ndim != (2 if last == "kernel" else 1):
            raise UserError(f"peft has no form for head leaf {name!r}; supported: the kernel and bias of linear maps")
        module = ".".join(path)
        modules[module] = None
        tensors[f"{PREFIX}{module}.{'weight' if last == 'kernel' else 'bias'}"] = leaf.T
    return tensors, list(modules)


def _targets(modules: Modules, wanted: list[str]) -> list[str]:
    """``target_modules`` that choose exactly these modules: the last parts of their names where those do."""
    return _short(wanted, lambda ends: targeted(modules.names, {"target_modules": ends}, modules.places))


def _short(wanted: list[str], choose: Callable[[list[str]], list[str]]) -> list[str]:
    ends = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    return ends if wanted and set(choose(ends)) == set(wanted) else wanted


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most modules have, and those of the others."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    return usual, {name: value for name, value in values.items() if value != usual}


def _number(value: float) -> int | float:
    """peft writes whole alphas without a point."""
    return int(value) if float(value).is_integer() else value


def _tuned_name(modules: Sequence[str], tensor: str) -> str:
    module = next(name for name in modules if tensor.startswith(f"{name}."))
    return f"{PREFIX}{module}.ln_tuning_layers.{tensor.removeprefix(f'{module}.')}"
