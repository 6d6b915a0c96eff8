"""One way to read and write an adapter, whatever it is kept in: our checkpoint, our file, or peft's folder."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vla_jax import names
from vla_jax.backbones.loading import Backbone, load_backbone, load_config
from vla_jax.backbones.weights import read_json
from vla_jax.errors import UserError, unknown
from vla_jax.exchange.adapter_file import HEADER, SavedAdapter, read_adapter_file, read_header, write_adapter_file
from vla_jax.exchange.peft_config import CONFIG_NAME, MOST_CONFIG_BYTES
from vla_jax.exchange.peft_export import export_peft
from vla_jax.exchange.peft_import import import_peft
from vla_jax.exchange.peft_names import PICKLED_NAME, WEIGHTS_NAME
from vla_jax.foreign import shown
from vla_jax.names import Tree
from vla_jax.training.checkpoint import load_adapters, save_adapters
from vla_jax.training.checkpoint_folder import absolute, read_metadata
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.metrics import package_version

Form = Literal["file", "folder", "peft"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Our single file, the folder that a run's checkpoints are, peft's folder."""

_COMPLETE = "_CHECKPOINT_METADATA"


class Summary(NamedTuple):
    """What is found of an adapter without reading its arrays.

    Attributes:
        path: where it lies.
        form: what it is kept in.
        methods: what it is made of.
        parameters: how many numbers were trained.
        backbone: the name of the backbone it was trained on.
        step: the number of training steps, None where that is not kept.
    """

    path: Path
    form: Form
    methods: tuple[str, ...]
    parameters: int
    backbone: str
    step: int | None


def form_of(path: str | os.PathLike[str]) -> Form:
    """What an adapter is kept in.

    Raises:
        UserError: there is nothing there, or nothing of the three forms.
    """
    path = Path(path)
    if path.is_file():
        return "file"
    if not path.is_dir():
        raise UserError(f"there is no {path}; give an adapter's file, a checkpoint's folder or a folder of peft")
    if any((path / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME)):
        return "peft"
    return "folder"


def read_adapter(path: str | os.PathLike[str], backbone: str | None = None) -> SavedAdapter:
    """Reads an adapter in any form.

    Args:
        path: the file or folder; of a run's checkpoints the newest.
        backbone: the backbone's name or folder. If left out, the name that the adapter keeps is taken; a file of our
            own needs none.

    Raises:
        UserError: the adapter cannot be read, the backbone is not found, or is not the one it was trained on.
    """
    path, form = Path(path), form_of(path)
    if form == "peft":
        name = backbone or _recorded(path)
        if not name:
            raise UserError(f"{path} does not say which backbone it was trained on; give it (--backbone)")
        return import_peft(path, load_backbone(name))
    if form == "file":
        adapter = read_adapter_file(path)
    else:
        tree, metadata = load_adapters(path)
        identity = metadata.identity
        adapter = SavedAdapter(
            leaves={name: np.asarray(leaf) for name, leaf in names.flatten(tree).items()},
            adapters=identity.adapters,
            backbone=identity.backbone,
            fingerprint=identity.fingerprint,
            towers=_towers(backbone or identity.backbone, path),
            step=metadata.step,
            version=metadata.version,
        )
    if backbone is not None:
        load_backbone_of(adapter, backbone)
    return adapter


def load_backbone_of(saved: SavedAdapter, name: str | None = None) -> Backbone:
    """The backbone that an adapter was trained on.

    Args:
        saved: the adapter.
        name: the backbone's name or folder; the name that the adapter keeps if left out.

    Raises:
        UserError: there is no such backbone, or it is another one.
    """
    backbone = load_backbone(name or saved.backbone)
    if saved.fingerprint != backbone.fingerprint:
        raise UserError(
            f"the adapter was trained on {saved.backbone!r} with fingerprint {saved.fingerprint}, and "
            f"{backbone.name!r} has {backbone.fingerprint}; give the backbone it was trained on"
        )
    return backbone


def write_adapter(
    path: str | os.PathLike[str], adapter: SavedAdapter, form: Form, backbone: Tree | None = None
) -> Path:
    """Writes an adapter in one of :data:`FORMS`; what is there in that form is replaced.

    Args:
        path: the file or folder.
        adapter: what to write.
        form: how to keep it.
        backbone: the tree below ``backbone/``; needed for PiSSA in peft's form alone.

    Raises:
        UserError: the form does not exist, cannot say what the adapter is, or the place cannot be written to.
    """
    path = Path(path)
    if form == "file":
        return write_adapter_file(path, dataclasses.replace(adapter, version=package_version()))
    if form == "peft":
        return export_peft(path, adapter, backbone=backbone)
    if form != "folder":
        raise unknown("form of an adapter", form, FORMS)
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write a checkpoint to {path}: it is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / _COMPLETE).exists():
        raise UserError(f"{path} holds something that is no checkpoint; give a new folder")
    identity = Identity(adapter.backbone, adapter.fingerprint, adapter.adapters)
    save_adapters(path, names.unflatten(dict(adapter.leaves)), identity, adapter.step)
    return path


def find_adapters(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Every adapter at or below a folder, in the order of the paths; what a killed process left is passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders.sort()
        if _COMPLETE in files or CONFIG_NAME in files:
            folders.clear()  # what lies within belongs to it
            yield here
            continue
        folders[:] = [name for name in folders if not name.endswith("-tmp")]
        for file in sorted(files):
            if file.endswith(".safetensors") and HEADER in read_header(here / file)[1]:
                yield here / file


def summary(path: str | os.PathLike[str]) -> Summary:
    """What an adapter is, without its arrays.

    Raises:
        UserError: it cannot be read.
    """
    path, form = Path(path), form_of(path)
    if form == "peft":
        kind = shown(read_json(path / CONFIG_NAME, MOST_CONFIG_BYTES).get("peft_type")).strip("'")
        shapes = read_header(path / WEIGHTS_NAME)[0]
        return Summary(path, form, (kind,), sum(map(math.prod, shapes.values())), _recorded(path), None)
    if form == "file":
        adapter = read_adapter_file(path)
        parameters = sum(leaf.size for leaf in adapter.leaves.values())
        return Summary(path, form, _methods(adapter.adapters), parameters, adapter.backbone, adapter.step)
    metadata = read_metadata(absolute(path))
    identity, parameters = metadata.identity, sum(leaf.size for leaf in metadata.leaves.values())
    return Summary(path, form, _methods(identity.adapters), parameters, identity.backbone, metadata.step)


def _methods(described: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(str(placement["method"]["kind"]) for placement in described.get("placements", ())))
    except (KeyError, TypeError) as error:
        raise UserError(f"the placements of the checkpoint cannot be read: {error!r}; write it again") from error


def _recorded(folder: Path) -> str:
    """The backbone that a checkpoint of peft names."""
    name = read_json(folder / CONFIG_NAME, MOST_CONFIG_BYTES).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def _towers(backbone: str, where: Path) -> dict[str, dict[str, int | None]]:
    try:
        towers = load_config(backbone).towers
    except UserError as error:
        raise UserError(
            f"the layers of {where} cannot be told without its backbone, {backbone!r}: {error}; give the backbone "
            "(--backbone)"
        ) from error
    return {name: shape._asdict() for name, shape in towers.items()}
