"""The hub's CLIP format and ours: one table of tensors, read in both directions, and ``config.json`` both ways."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.transformer import ACTIVATIONS, TowerConfig
from vla_jax.errors import UserError, unknown
from vla_jax.foreign import shown
from vla_jax.names import flatten, unflatten

SAME = None
LINEAR = (1, 0)  # [out, in] -> [in, out]
CONVOLUTION = (2, 3, 1, 0)  # [out, in, patch, patch] -> [patch, patch, in, out]


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter and the tensor, or the tensors of every layer, that the hub's format keeps it in.

    Attributes:
        ours: name of our parameter within the backbone; stacked ``[depth, ...]`` where ``theirs`` holds ``{layer}``.
        theirs: name of the hub's tensor.
        axes: the permutation that turns the hub's tensor into ours; None leaves it as it is.
    """

    ours: str
    theirs: str
    axes: tuple[int, ...] | None = SAME

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor a layer."""
        return "{layer}" in self.theirs

    def names(self, shape: Sequence[int]) -> list[str]:
        """The hub's tensor names for our parameter of this shape, first layer first."""
        return [self.theirs.format(layer=layer) for layer in range(shape[0])] if self.stacked else [self.theirs]

    def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each of the hub's tensors for our parameter of this shape."""
        one = tuple(shape[1:] if self.stacked else shape)
        return one if self.axes is None else tuple(one[axis] for axis in np.argsort(self.axes))

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One of the hub's tensors in our order of axes (a view)."""
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def to_theirs(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_ours`."""
        return tensor if self.axes is None else tensor.transpose(np.argsort(self.axes))


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def _linear(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{theirs}.weight", LINEAR), Row(f"{ours}/bias", f"{theirs}.bias")]


def _blocks(ours: str, theirs: str) -> list[Row]:
    rows = []
    for name, their_name in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        rows += _norm(f"{ours}/{name}", f"{theirs}.{{layer}}.{their_name}")
    for name in ("q", "k", "v", "out"):
        rows += _linear(f"{ours}/attn/{name}", f"{theirs}.{{layer}}.self_attn.{name}_proj")
    for name in ("fc1", "fc2"):
        rows += _linear(f"{ours}/mlp/{name}", f"{theirs}.{{layer}}.mlp.{name}")
    return rows


TABLE: tuple[Row, ...] = (
    Row("vision/patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight", CONVOLUTION),
    Row("vision/class_embedding", "vision_model.embeddings.class_embedding"),
    Row("vision/position_embedding", "vision_model.embeddings.position_embedding.weight"),
    *_norm("vision/pre_norm", "vision_model.pre_layrnorm"),  # the hub's own spelling
    *_blocks("vision/blocks", "vision_model.encoder.layers"),
    *_norm("vision/post_norm", "vision_model.post_layernorm"),
    Row("vision/projection/kernel", "visual_projection.weight", LINEAR),
    Row("text/token_embedding", "text_model.embeddings.token_embedding.weight"),
    Row("text/position_embedding", "text_model.embeddings.position_embedding.weight"),
    *_blocks("text/blocks", "text_model.encoder.layers"),
    *_norm("text/post_norm", "text_model.final_layer_norm"),
    Row("text/projection/kernel", "text_projection.weight", LINEAR),
    Row("logit_scale", "logit_scale"),
)

# Older exports carry the integers 0, 1, 2, ... as a buffer; they are no weights.
IGNORED = re.compile(r"(vision|text)_model\.embeddings\.position_ids")


@functools.cache
def parameter_shapes(config: CLIPConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter, by its name within the backbone; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, config.context_length), jnp.int32)
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0), image, tokens)["params"]
    return types.MappingProxyType({name: tuple(leaf.shape) for name, leaf in flatten(params).items()})


def abstract_params(config: CLIPConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The tree below ``backbone/`` as shapes in a storage dtype."""
    shapes = parameter_shapes(config)
    return unflatten({name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()})


def hub_tensors(params: Mapping[str, Any], config: CLIPConfig) -> Iterator[tuple[str, np.ndarray]]:
    """A backbone's parameters as the hub's tensors, one at a time.

    Args:
        params: the tree below ``backbone/``, of arrays that this process can read whole.
        config: the shape of the backbone.

    Yields:
        Name and tensor, in the parameters' own dtypes.

    Raises:
        UserError: the tree lacks a parameter, has one that the format has no place for, or one of another shape.
    """
    flat = flatten(params)
    shapes = parameter_shapes(config)
    for name, leaf in flat.items():
        if name not in shapes:
            raise unknown("CLIP parameter", name, shapes, "Export the backbone alone, without adapters and heads.")
        if leaf.shape != shapes[name]:
            raise UserError(f"parameter {name!r} has shape {leaf.shape}, and the configuration asks for {shapes[name]}")
    missing = [name for name in shapes if name not in flat]
    if missing:
        raise UserError(f"the backbone to export lacks {', '.join(missing)}")
    for row in TABLE:
        leaf = np.asarray(flat[row.ours])
        for name, tensor in zip(row.names(leaf.shape), leaf if row.stacked else [leaf], strict=True):
            # safetensors writes the memory as it lies, so a transposed view must be copied first.
            yield name, np.asarray(row.to_theirs(tensor), order="C")


# What transformers assumes where config.json is silent (CLIPTextConfig, CLIPVisionConfig), as far as it shapes a model.
_TEXT_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
_PROJECTION_DEFAULT = 512
# The end-of-text id that stands in OpenAI's configurations by mistake, and selects the rule that needs no id.
_LARGEST_ID = 2


MOST: Mapping[str, int] = types.MappingProxyType(
    {
        "num_hidden_layers": 1024,
        "num_attention_heads": 1024,
        "hidden_size": 1 << 16,
        "intermediate_size": 1 << 18,
        "projection_dim": 1 << 16,
        "image_size": 1 << 14,
        "patch_size": 1 << 14,
        "vocab_size": 1 << 24,
        "max_position_embeddings": 1 << 20,
        "eos_token_id": 1 << 24,
    }
)
"""What a configuration may say, some ten times what any published model has: names and shapes of all tensors are made
of it before the weights show whether it is true."""


def _integer(settings: Mapping[str, Any], key: str, where: str) -> int:
    value = settings[key]
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]  # [224, 224] is a square image
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"config.json: {where}.{key} is {shown(value)}; this CLIP needs one whole number")
    least = 0 if key == "eos_token_id" else 1
    if not least <= value <= MOST[key]:
        raise UserError(f"config.json: {where}.{key} is {shown(value)}; allowed: {least} to {MOST[key]:,}")
    return value


def _tower(settings: Mapping[str, Any], where: str) -> TowerConfig:
    activation, epsilon = settings["hidden_act"], settings["layer_norm_eps"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        given = activation if isinstance(activation, str) else shown(activation)
        raise unknown(f"activation in config.json ({where}.hidden_act)", given, ACTIVATIONS)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon <= 1:
        raise UserError(f"config.json: {where}.layer_norm_eps is {shown(epsilon)}; it is a small number, such as 1e-5")
    return TowerConfig(
        width=_integer(settings, "hidden_size", where),
        depth=_integer(settings, "num_hidden_layers", where),
        heads=_integer(settings, "num_attention_heads", where),
        mlp_width=_integer(settings, "intermediate_size", where),
        activation=activation,
        norm_epsilon=float(epsilon),
    )


def _section(settings: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    # Old exports hold the towers twice; where "..._config_dict" is given, transformers lets it win, completed by the
    # defaults, so that nothing of the other remains.
    given = settings.get(f"{key}_dict")
    if given is None:
        given = settings.get(key) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"config.json: {key} must be an object, got {shown(given)}")
    return {**defaults, **{name: value for name, value in given.items() if name in defaults}}


def config_from_hub(settings: Mapping[str, Any]) -> CLIPConfig:
    """Reads the contents of a ``config.json`` of ``model_type`` ``clip``.

    Missing keys have transformers' defaults. Dropout and initialisation keys are not read: a frozen backbone uses
    neither.

    Args:
        settings: the parsed file.

    Returns:
        The configuration. ``eos_token_id == 2`` selects pooling at the largest token id, which then is the end-of-text
        token.

    Raises:
        UserError: the file describes another kind of model, or a value that this CLIP does not have.
    """
    kind = settings.get("model_type", "clip")
    if kind != "clip":
        raise UserError(
            f"config.json describes a model of type {shown(kind)}; only 'clip' (both towers, as transformers' "
            "CLIPModel saves it) can be loaded"
        )
    text = _section(settings, "text_config", _TEXT_DEFAULTS)
    vision = _section(settings, "vision_config", _VISION_DEFAULTS)
    channels = vision["num_channels"]
    if channels != 3:
        raise UserError(f"config.json: vision_config.num_channels is {shown(channels)}; only 3 is supported")
    vocabulary_size = _integer(text, "vocab_size", "text_config")
    eos_token_id = _integer(text, "eos_token_id", "text_config")
    largest_id = eos_token_id == _LARGEST_ID
    return CLIPConfig(
        vision=_tower(vision, "vision_config"),
        text=_tower(text, "text_config"),
        image_size=_integer(vision, "image_size", "vision_config"),
        patch_size=_integer(vision, "patch_size", "vision_config"),
        vocabulary_size=vocabulary_size,
        context_length=_integer(text, "max_position_embeddings", "text_config"),
        projection=_integer({"projection_dim": _PROJECTION_DEFAULT, **settings}, "projection_dim", "(top level)"),
        eos_token_id=vocabulary_size - 1 if largest_id else eos_token_id,
        pooling="largest_id" if largest_id else "first_eos",
    )


def _tower_to_hub(tower: TowerConfig, model_type: str, projection: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.norm_epsilon,
        "projection_dim": projection,
    }


def config_to_hub(config: CLIPConfig) -> dict[str, Any]:
    """The contents of a ``config.json`` that transformers' ``CLIPConfig`` reads; inverse of :func:`config_from_hub`.

    Raises:
        UserError: the format cannot say the configuration's rule of pooling, since there ``eos_token_id == 2`` alone
            decides between the two.
    """
    eos_token_id = _LARGEST_ID if config.pooling == "largest_id" else config.eos_token_id
    if config.pooling == "first_eos" and eos_token_id == _LARGEST_ID:
        raise UserError(
            "the hub's format reads eos_token_id 2 as 'pool at the largest token id', so pooling 'first_eos' with "
            "eos_token_id 2 cannot be written; give the end-of-text token another id"
        )
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection,
        "text_config": {
            **_tower_to_hub(config.text, "clip_text_model", config.projection),
            "vocab_size": config.vocabulary_size,
            "max_position_embeddings": config.context_length,
            "eos_token_id": eos_token_id,
        },
        "vision_config": {
            **_tower_to_hub(config.vision, "clip_vision_model", config.projection),
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": 3,
        },
    }
