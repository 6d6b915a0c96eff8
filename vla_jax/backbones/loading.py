"""``load_backbone``: a hub name, a folder, ``tiny`` or random weights, as named arrays placed in their shardings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import convert
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.picture_settings import read_picture_settings
from vla_jax.backbones.positions import interpolate_positions
from vla_jax.backbones.sources import RANDOM, find_folder
from vla_jax.backbones.weights import Fingerprint, Weights, read_json, storage_dtype
from vla_jax.errors import UserError, nearest, unknown
from vla_jax.names import flatten, unflatten

_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_TOKENIZER_PARTS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

MOST_TOKENIZER_BYTES = 1 << 27
"""Of a file of a tokenizer; that of 256,000 words has 34 million."""

Shardings = Callable[[str], jax.sharding.Sharding] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A loaded backbone.

    Attributes:
        name: the name or folder as it was asked for.
        config: shape of the model as loaded, with ``image_size`` as asked for.
        params: the tree below ``backbone/``.
        fingerprint: 64 hexadecimal digits that stand for the weights as stored, see
            :class:`vla_jax.backbones.weights.Fingerprint`. Storage dtype, sharding and image size do not change it.
        folder: where configuration, tokenizer and image processor lie; None for random weights.
    """

    name: str
    config: CLIPConfig
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    fingerprint: str
    folder: Path | None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers that lies in the folder; :class:`UserError` if none does."""
        if self.folder is None:
            raise UserError(f"backbone {self.name!r} has no tokenizer; load a folder or a hub name that has one")
        # Without its files transformers would make up an empty tokenizer instead of failing.
        if not any(all((self.folder / file).is_file() for file in files) for files in _TOKENIZER_FILES):
            raise UserError(f"{self.folder} has no tokenizer; put the model's tokenizer.json there")
        for file in self.folder.iterdir():
            if file.name in _TOKENIZER_PARTS and file.stat().st_size > MOST_TOKENIZER_BYTES:
                raise UserError(f"{file} has over {MOST_TOKENIZER_BYTES:,} bytes; fetch the tokenizer again")
        from transformers import AutoTokenizer  # takes seconds, and many runs need no tokenizer

        try:
            # Left open, the setting lets the folder ask at the terminal whether to run code that it names.
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the tokenizers' own errors have no type of their own
            raise UserError(
                f"the tokenizer in {self.folder} cannot be loaded ({error}); fetch tokenizer.json and "
                "tokenizer_config.json of the model again"
            ) from error

    @functools.cached_property
    def image_processor(self) -> Any:
        """The image processor of transformers for the folder's ``preprocessor_config.json``, without PyTorch.

        Its attributes are the settings (``image_mean``, ``image_std``, ``resample``, ``size``, ``crop_size``, ...):
        the folder's, or CLIP's own where it has none. If they crop to another size than the backbone's image size,
        pictures are resized and cropped to that instead.
        """
        from transformers import CLIPImageProcessorPil

        settings: dict[str, Any] = {}
        if self.folder is not None and (self.folder / "preprocessor_config.json").is_file():
            settings = read_picture_settings(self.folder / "preprocessor_config.json")
        processor = CLIPImageProcessorPil(**settings)
        crop = {"height": self.config.image_size, "width": self.config.image_size}
        if dict(processor.crop_size) == crop:
            return processor
        # A processor that squeezes pictures into a square goes on doing so; the others fit the shorter edge.
        size = {"shortest_edge": self.config.image_size} if processor.size.shortest_edge else crop
        return CLIPImageProcessorPil(**{**settings, "size": size, "crop_size": crop})


def load_config(name_or_folder: str | Path, *, image_size: int | None = None) -> CLIPConfig:
    """The configuration that :func:`load_backbone` would give, weights unread (a hub model is still fetched whole)."""
    return _read(str(name_or_folder), image_size)[2]


def abstract_backbone(name_or_folder: str | Path) -> Backbone:
    """The backbone as shapes alone: what can be checked and counted without reading weights."""
    name = str(name_or_folder)
    folder, _, shape = _read(name, None)
    return Backbone(name, shape, convert.abstract_params(shape), "", folder)


def load_backbone(
    name_or_folder: str | Path,
    *,
    dtype: Any = None,
    image_size: int | None = None,
    shardings: Shardings | None = None,
) -> Backbone:
    """Loads a CLIP backbone; needs no PyTorch.

    Args:
        name_or_folder: a local folder in the hub's format; a hub name such as ``openai/clip-vit-large-patch14``,
            with ``@revision`` if wanted; ``tiny``, the backbone that comes with this package; or ``random:<preset>``,
            such as ``random:vit_b_32``, the same random weights each time.
        dtype: storage dtype of the parameters: ``float32`` (also what None means, whatever the file holds),
            ``bfloat16`` or ``float16``.
        image_size: pixels along a side of the square input, a multiple of the patch size; position embeddings are
            interpolated if it is not the stored one. None keeps the stored one.
        shardings: where each array goes: a function from a leaf's full name (``backbone/vision/...``) to its sharding,
            or a tree of shardings shaped like the parameters (:func:`vla_jax.backbones.convert.abstract_params` of
            :func:`load_config` gives their shapes beforehand). None puts all on the default device.

    Returns:
        The backbone. At most one parameter, with its layers stacked, is on the host at a time.

    Raises:
        UserError: nothing by that name, no safetensors, a tensor unused, a parameter unfilled, a wrong shape or an
            unsupported configuration; the message says which and how to mend it.
    """
    name = str(name_or_folder)
    storage = storage_dtype(dtype)
    folder, stored, config = _read(name, image_size)
    placement = _placement(shardings)
    if folder is None:
        return _random(name, config, storage, placement)
    weights = Weights(folder)
    _check(weights, convert.parameter_shapes(stored))
    shapes = convert.parameter_shapes(config)
    fingerprint = Fingerprint()
    flat = {}
    for row in convert.TABLE:
        parameter = np.empty(shapes[row.ours], storage)
        for layer, tensor_name in enumerate(row.names(parameter.shape)):
            tensor = weights.read(tensor_name)
            fingerprint.add(tensor_name, tensor)
            tensor = row.to_ours(tensor)
            if row.ours == "vision/position_embedding":
                tensor = interpolate_positions(tensor, stored.grid, config.grid)
            _store(parameter, layer if row.stacked else ..., tensor, tensor_name)
        flat[row.ours] = _place(parameter, placement(f"backbone/{row.ours}"))
    return Backbone(name, config, unflatten(flat), fingerprint.hexdigest(), folder)


def _store(parameter: np.ndarray, index: Any, tensor: np.ndarray, name: str) -> None:
    try:
        with np.errstate(over="raise"):
            parameter[index] = tensor
    except FloatingPointError:
        raise UserError(
            f"tensor {name!r} does not fit into {parameter.dtype}; store it as bfloat16 or float32"
        ) from None


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    # Each device gets its own part of the host's array; none ever holds the whole of a sharded one.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _placement(shardings: Shardings | None) -> Callable[[str], jax.sharding.Sharding | None]:
    if shardings is None:
        return lambda name: None
    if callable(shardings):
        return shardings
    flat = {f"backbone/{name}": sharding for name, sharding in flatten(shardings).items()}
    rows = [f"backbone/{row.ours}" for row in convert.TABLE]
    for name in flat:
        if name not in rows:
            raise unknown("backbone parameter in shardings", name, rows)
    missing = [name for name in rows if name not in flat]
    if missing:
        raise UserError(f"shardings say nothing about {', '.join(missing)}")
    return flat.__getitem__


def _read(name: str, image_size: int | None) -> tuple[Path | None, CLIPConfig, CLIPConfig]:
    """The folder of a name (None for random weights), the stored shape, and that for the image size asked for."""
    if name.startswith(RANDOM):
        folder, stored = None, CLIPConfig.preset(name.removeprefix(RANDOM))
    else:
        folder = find_folder(name)
        stored = _stored_config(folder)
    return folder, stored, stored if image_size is None else dataclasses.replace(stored, image_size=image_size)


def _stored_config(folder: Path) -> CLIPConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a folder in the hub's format, as save_pretrained writes it")
    return convert.config_from_hub(read_json(folder / "config.json"))


def _random(
    name: str, config: CLIPConfig, storage: np.dtype, placement: Callable[[str], jax.sharding.Sharding | None]
) -> Backbone:
    # Drawn on the host, not by the modules' initialisers: those take longer to compile than a forward pass, and a
    # sharded model too large for one device could not be drawn array by array.
    generator = np.random.default_rng(0)
    flat = {
        leaf: _place(_draw(leaf, shape, generator).astype(storage), placement(f"backbone/{leaf}"))
        for leaf, shape in convert.parameter_shapes(config).items()
    }
    # Name and shape determine the weights.
    fingerprint = hashlib.sha256(f"{name} {config}".encode()).hexdigest()
    return Backbone(name, config, unflatten(flat), fingerprint, None)


def _draw(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Random float32 weights that keep activations of size one: kernels with variance 1 / fan-in, norms as identity."""
    if name == "logit_scale":
        return np.asarray(-math.log(0.07), np.float32)  # Radford et al. 2021, section 2.5
    kind = name.rsplit("/", 1)[-1]
    if kind in ("scale", "bias"):
        return np.full(shape, float(kind == "scale"), np.float32)
    inputs = shape[1:-1] if "/blocks/" in name else shape[:-1]
    deviation = math.prod(inputs) ** -0.5 if kind == "kernel" else 0.02
    return deviation * generator.standard_normal(shape, np.float32)


def _check(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor used, every parameter filled, every shape as the configuration says; before anything is read."""
    stored = [name for name in weights.names if not convert.IGNORED.fullmatch(name)]
    expected = {
        name: row.tensor_shape(shapes[row.ours]) for row in convert.TABLE for name in row.names(shapes[row.ours])
    }
    missing = sorted(expected.keys() - set(stored))
    extra = [name for name in stored if name not in expected]
    if missing or extra:
        parts = [f"the weights in {weights.folder} do not fit its config.json."]
        if missing:
            parts.append(f"Parameters without a tensor: {_listed(missing, extra)}.")
        if extra:
            parts.append(f"Tensors without a parameter: {_listed(extra, list(expected))}.")
        raise UserError(" ".join([*parts, "Check the towers' depths in config.json, and that both are of one model."]))
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"tensor {name!r} in {weights.folder} has shape {weights.shape(name)}, and config.json asks for "
                f"{shape}; correct config.json or give the weights that belong to it"
            )


def _listed(names: list[str], others: list[str], most: int = 10) -> str:
    shown = []
    for name in names[:most]:
        near = nearest(name, others, 1)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (f", and {len(names) - most} more" if len(names) > most else "")
