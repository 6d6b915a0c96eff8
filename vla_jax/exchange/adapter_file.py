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
from types import MappingProxyType
from typing import Any

import ml_dtypes  # makes bfloat16 known to NumPy
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vla_jax.errors import UserError
from vla_jax.foreign import open_safetensors, parse_json, printable, shown

HEADER = "vla_jax"
FORMAT = 1
MOST_OF_A_TOWER: Mapping[str, int] = MappingProxyType(
    {"depth": 1024, "width": 1 << 16, "mlp_width": 1 << 18, "features": 1 << 16}
)
"""What a file may say of a tower, some ten times what any model has: places and shapes are made of it."""

_LONGEST_NAME = 1024

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

    def __post_init__(self):
        for name in self.leaves:
            parts = name.split("/")
            if len(name) > _LONGEST_NAME or not printable(name) or any(part in ("", ".", "..") for part in parts):
                raise UserError(f"a leaf is named {shown(name)}, which is no path of names below each other")

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
        description = parse_json(metadata[HEADER], finite=True)
        if (found := description.pop("format")) != FORMAT:
            raise UserError(f"{path} has format {shown(found)}, this version reads {FORMAT}; update the package")
        adapter = SavedAdapter(leaves=tensors, **description)
        _check_description(adapter)
        return adapter
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the description in the header of {path} cannot be read: {error!r}; write it again") from error


def _check_description(adapter: SavedAdapter) -> None:
    """Whether everything that an adapter says of itself is of its kind; what its placements say is looked at later."""
    texts = {name: getattr(adapter, name) for name in ("backbone", "fingerprint", "version")}
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > _LONGEST_NAME or not printable(text):
            raise TypeError(f"{name} is {shown(text)}, not a short text")
    if isinstance(adapter.step, bool) or not isinstance(adapter.step, int) or not 0 <= adapter.step < 1 << 62:
        raise TypeError(f"step is {shown(adapter.step)}, not a number of steps")
    for name in ("adapters", "towers"):
        if not isinstance(getattr(adapter, name), dict):
            raise TypeError(f"{name} is {shown(getattr(adapter, name))}, not an object")
    for tower, shape in adapter.towers.items():
        needed = MOST_OF_A_TOWER.keys() - {"features"}
        if not isinstance(shape, dict) or not needed <= shape.keys() <= MOST_OF_A_TOWER.keys():
            raise TypeError(f"the tower {shown(tower)} is {shown(shape)}; it has {', '.join(MOST_OF_A_TOWER)}")
        for field, value in shape.items():
            if value is None and field == "features":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_OF_A_TOWER[field]:
                raise TypeError(f"{field} of the tower {shown(tower)} is {shown(value)}")


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a safetensors file and its header's metadata.

    Raises:
        UserError: there is no such file, or it is not safetensors, or not the whole of it.
    """
    path = Path(path)
    with _opened(path) as file:
        tensors = {}
        for name in file.keys():  # noqa: SIM118, it is no dict
            try:
                tensors[name] = file.get_tensor(name)
            # A dtype that NumPy lacks, or dimensions it cannot have though there is nothing in them.
            except (AttributeError, TypeError, ValueError, OverflowError, SafetensorError) as error:
                raise UserError(f"tensor {name!r} of {path} cannot be read: {error}; write the file again") from error
            if tensors[name].dtype.kind != "f" and tensors[name].dtype != ml_dtypes.bfloat16:
                raise UserError(
                    f"tensor {name!r} in {path} is {tensors[name].dtype}; allowed: float32, float16, bfloat16, float64"
                )
        return tensors, dict(file.metadata() or {})


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
        return open_safetensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); it is another kind of file, or was cut off: fetch or "
            "copy it again"
        ) from error
