"""Trained leaves in one safetensors file, with what they belong to as JSON in the file's header.

Nothing here imports JAX, and nothing of this package is needed to read such a file (where a leaf is bfloat16, ``import
ml_dtypes`` first):

    with safetensors.safe_open("adapter.safetensors", "numpy") as file:
        description = json.loads(file.metadata()["vla_jax"])
        leaves = {name: file.get_tensor(name) for name in file.keys()}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401, makes bfloat16 known to NumPy
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vla_jax.errors import UserError

HEADER = "vla_jax"
FORMAT = 1
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True, eq=False)
class SavedAdapter:
    """What was trained, as arrays of the host, and what it belongs to.

    Attributes:
        leaves: the trained leaves by their full names, such as ``adapters/lora/vision/attn_q/a``.
        adapters: the configuration, JSON-able; its ``placements`` say what sits where.
        backbone: the backbone's name, for people to read.
        fingerprint: the fingerprint of the backbone's weights, which decides; empty where it is not known, as in
            checkpoints of peft.
        towers: by name, the depth and the widths of the backbone's towers
            (:class:`vla_jax.slots.TowerShape` as a dict), with which the placements become layers.
        step: the number of training steps behind it.
        version: the version of this package that wrote it.
    """

    leaves: Mapping[str, np.ndarray]
    adapters: Mapping[str, Any]
    backbone: str
    fingerprint: str
    towers: Mapping[str, Mapping[str, int | None]]
    step: int = 0
    version: str = ""

    @property
    def description(self) -> dict[str, Any]:
        """Everything but the leaves, as it stands in a file's header."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "leaves"}
        return {"format": FORMAT} | fields


def write_adapter_file(path: str | os.PathLike[str], adapter: SavedAdapter) -> Path:
    """Writes the file; one of that name is replaced once the new one is whole.

    Raises:
        UserError: the place cannot be written to, there is no leaf, or the configuration is not JSON-able.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"an adapter's file ends in .safetensors, got {path}; try {path.with_suffix('.safetensors')}")
    if not adapter.leaves:
        raise UserError("there is nothing to write: the adapter has no trained leaf")
    try:
        header = json.dumps(adapter.description)
    except TypeError as error:
        raise UserError(
            f"the adapter configuration cannot be written as JSON: {error}; use numbers, texts, lists, dicts"
        ) from None
    # safetensors writes the memory as it lies.
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in adapter.leaves.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={HEADER: header})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path} cannot be written: {error}") from error
    return path


def read_adapter_file(path: str | os.PathLike[str]) -> SavedAdapter:
    """Reads what :func:`write_adapter_file` wrote.

    Raises:
        UserError: there is no such file, it is no whole safetensors file, or not one of an adapter.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if HEADER not in metadata:
        raise UserError(
            f"{path} does not say what it holds: its header has no {HEADER!r}. Give a file that "
            "`vla-adapter convert ADAPTER FILE --to file` wrote, or the folder of a checkpoint of peft"
        )
    try:
        description = json.loads(metadata[HEADER])
        if (found := description.pop("format")) != FORMAT:
            raise UserError(f"{path} has format {found}, this version reads {FORMAT}; update the package")
        return SavedAdapter(leaves=tensors, **description)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the description in the header of {path} cannot be read: {error!r}; write it again") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a safetensors file and its header's metadata.

    Raises:
        UserError: there is no such file, or it is not safetensors, or not the whole of it.
    """
    with _opened(Path(path)) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Every tensor's shape and the metadata of a safetensors file, its tensors unread; see :func:`read_tensors`."""
    with _opened(Path(path)) as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}, dict(file.metadata() or {})


def _opened(path: Path) -> Any:
    if path.suffix in PICKLED:
        raise UserError(
            f"{path} may be pickled, which can run code when it is loaded and is never opened here; give the "
            "safetensors file"
        )
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); it is another kind of file, or was cut off: fetch or "
            "copy it again"
        ) from error
