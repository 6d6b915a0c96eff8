"""Safetensors files of one folder, read a tensor at a time, and the fingerprint of what was read."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from vla_jax.errors import UserError, unknown
from vla_jax.foreign import MOST_JSON_BYTES, is_file, open_safetensors, parse_json, plain_name, read_bytes, shown

MOST_FILES = 1024
"""That an index may name; each stays open while the weights are read."""

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
STORAGE_DTYPES = ("float32", "bfloat16", "float16")
_FLOATING = ("F32", "F16", "BF16")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def storage_dtype(dtype: Any) -> np.dtype:
    """The dtype that weights are to be kept in; None is float32, anything but a float of 32 or 16 bits an error."""
    try:
        storage = jnp.dtype("float32" if dtype is None else dtype)
    except TypeError:
        storage = None
    if storage is None or storage.name not in STORAGE_DTYPES:
        raise unknown("storage dtype", str(dtype), STORAGE_DTYPES)
    return storage


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes; a :class:`UserError` names the file that is no such thing."""
    try:
        content = parse_json(read_bytes(path, most), finite=True)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def conversion_command(folder: Path, pickled: list[Path], name: str = WEIGHTS_NAME) -> str:
    """The shell command that rewrites pickled weights as safetensors in the same folder (needs PyTorch)."""
    files, target = json.dumps([str(path) for path in pickled]), json.dumps(str(folder / name))
    program = (
        "import torch; from safetensors.torch import save_file; "
        f"save_file({{name: tensor.contiguous().clone() for path in {files} "
        'for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items()}, '
        f'{target}, metadata={{"format": "pt"}})'
    )
    # The names are those of somebody's files, and the line is meant to be copied into a shell.
    return shlex.join(["python", "-c", program])


class Fingerprint:
    """SHA-256 over what weights are worth, whatever files they came in.

    Every tensor gives a digest of its name, its shape and its values as little-endian float32; the fingerprint is the
    digest of those in the order of the names. So it does not depend on how a model is sharded over files, nor on the
    order of reading, and a float16 or bfloat16 file has the fingerprint of its float32 copy (widening is exact).
    Rounding a float32 file to 16 bits gives another one, because it changes the values.
    """

    def __init__(self):
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Takes in one tensor; float32, any layout."""
        digest = hashlib.sha256(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.asarray(tensor, dtype="<f4", order="C").data)
        self._digests[name] = digest.digest()

    def hexdigest(self) -> str:
        """The fingerprint of all tensors so far, 64 hexadecimal digits."""
        whole = hashlib.sha256()
        for _, digest in sorted(self._digests.items()):
            whole.update(digest)
        return whole.hexdigest()


class Weights:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` lists.

    Opening reads the headers alone; :meth:`read` maps one tensor. Raises :class:`UserError` for a folder without
    safetensors (with the command that converts pickled weights, which may run code when loaded and are never opened),
    for a broken file, and for an index that does not fit its files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / WEIGHTS_NAME).is_file():
            file = self._open(folder / WEIGHTS_NAME)
            self._files = dict.fromkeys(file.keys(), file)
            self._paths = dict.fromkeys(file.keys(), folder / WEIGHTS_NAME)
        elif (folder / INDEX_NAME).is_file():
            self._files = self._open_sharded(folder / INDEX_NAME)
        else:
            raise self._without_safetensors()

    def _open(self, path: Path) -> Any:
        try:
            return open_safetensors(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}); fetch or copy the file again") from error

    def _open_sharded(self, index: Path) -> dict[str, Any]:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index} has no 'weight_map' of tensor names to files; fetch the file again")
        if strange := [place for place in places.values() if not plain_name(place)]:
            raise UserError(f"{index} names {shown(strange[0])}, which is no file beside it; weights lie in one folder")
        if len(set(places.values())) > MOST_FILES:
            raise UserError(f"{index} names {len(set(places.values())):,} files, and {MOST_FILES:,} are the most")
        absent = sorted({place for place in places.values() if not is_file(self.folder / place)})
        if absent:
            raise UserError(f"{index} lists {', '.join(absent)}, which {self.folder} lacks; fetch the missing files")
        files = {place: self._open(self.folder / place) for place in sorted(set(places.values()))}
        held = {place: set(file.keys()) for place, file in files.items()}
        for name, place in places.items():
            if name not in held[place]:
                raise UserError(f"{index} places tensor {name!r} in {place}, which does not hold it; fetch both again")
        self._paths = {name: self.folder / place for name, place in places.items()}
        return {name: files[place] for name, place in places.items()}

    def _without_safetensors(self) -> UserError:
        pickled = sorted(path for pattern in _PICKLED for path in self.folder.glob(pattern))
        if pickled:
            return UserError(
                f"{self.folder} holds pickled weights only ({', '.join(path.name for path in pickled)}), which can run "
                "code when they are loaded and are never opened here. Convert them once, where PyTorch is installed:\n"
                f"  {conversion_command(self.folder, pickled)}"
            )
        return UserError(
            f"{self.folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}; give a folder in the hub's format, as "
            "transformers' save_pretrained writes it"
        )

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32; :class:`UserError` unless it is float32, float16 or bfloat16."""
        kind = self._files[name].get_slice(name).get_dtype()
        if kind not in _FLOATING:
            raise UserError(f"tensor {name!r} in {self.folder} is {kind}; allowed: {', '.join(_FLOATING)}")
        try:
            # Mapped anew for each tensor: the pages of a mapping count as the process's own until it is gone.
            with self._open(self._paths[name]) as file:
                return np.asarray(file.get_tensor(name), dtype=np.float32)
        except (ValueError, SafetensorError) as error:  # dimensions that NumPy cannot have
            raise UserError(f"tensor {name!r} in {self.folder} cannot be read: {error}; fetch it again") from error
