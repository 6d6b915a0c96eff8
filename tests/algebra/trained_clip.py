"""A small CLIP, adapters on it as training might leave them, and what they do to its weights by definition."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax import names
from vla_jax.adapters import Affine, LoRA, Placement, Share, ia3, place
from vla_jax.algebra import Adapter
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.transformer import TowerConfig

CONFIG = CLIPConfig(
    vision=TowerConfig(width=16, depth=3, heads=2, mlp_width=24),
    text=TowerConfig(width=12, depth=2, heads=2, mlp_width=20, activation="gelu"),
    image_size=16,
    patch_size=8,
    vocabulary_size=40,
    context_length=7,
    projection=10,
    eos_token_id=39,
)
EQUAL_TOWERS = dataclasses.replace(CONFIG, text=CONFIG.vision)
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_out")

LORA = {
    "lora": Placement(LoRA(rank=2, alpha=6.0), slots=("attn_q", "attn_v")),
    "lora_everywhere": Placement(LoRA(rank=2, alpha=3.0), slots=(*ATTENTION, "mlp_fc1", "mlp_fc2", "projection")),
    "rslora": Placement(LoRA(rank=3, alpha=2.0, rank_stabilised=True), slots=("attn_k", "mlp_fc2")),
    "lora_ranks": Placement(
        LoRA(rank=2),
        slots=("attn_q", "mlp_fc1"),
        ranks=(("vision/attn_q/[02]", 3),),
        alphas=((".*/mlp_fc1/1", 5.0),),
    ),
    "lora_dropout": Placement(LoRA(rank=2, dropout=0.5), slots=("attn_out",), layers="last 1"),
    "lora_shared_a": Placement(LoRA(rank=2), slots=("attn_q", "attn_k"), sharing=(Share("a", ("layers", "slots")),)),
    "lora_dropped": Placement(LoRA(rank=2), slots=("attn_q", "projection"), dropped=(("vision", 1),)),
    "pissa": Placement(LoRA(rank=2, alpha=3.0, init="pissa"), slots=("attn_q", "projection")),
}
TIED = {"lora_tied": Placement(LoRA(rank=2), slots=("attn_q", "mlp_fc1"), tied=True)}
DORA = {
    "dora": Placement(LoRA(rank=2, decomposed=True), slots=("attn_v", "mlp_fc2", "projection")),
    "dora_pissa": Placement(LoRA(rank=2, decomposed=True, init="pissa"), slots=("attn_q",), layers="0"),
}
AFFINE = {
    "ia3": ia3(),
    "biases": Placement(Affine(scale=False, shift=True), slots=("attn_q", "mlp_fc1")),
    "scale_and_shift": Placement(Affine(shift=True), slots=("attn_in", "attn_sublayer", "mlp_in", "mlp_out")),
}
PLACEMENTS = LORA | TIED | DORA | AFFINE


def config_for(name: str) -> CLIPConfig:
    """The CLIP that a setting is tested on."""
    return EQUAL_TOWERS if name in TIED else CONFIG


@functools.cache
def backbone(config: CLIPConfig = CONFIG) -> dict:
    """Random weights in which no bias is zero and no LayerNorm is trivial."""
    draw, flat = np.random.default_rng(0).standard_normal, {}
    for name, leaf in names.flatten(abstract_params(config)).items():
        flat[name] = jnp.asarray(0.3 * draw(leaf.shape) + name.endswith("scale"), jnp.float32)
    return names.unflatten(flat)


def trained(placements: Placement | list[Placement], config: CLIPConfig = CONFIG, seed: int = 1) -> Adapter:
    """Adapters of which no parameter is where it started; scales and magnitudes are around one."""
    placements = (placements,) if isinstance(placements, Placement) else tuple(placements)
    return _trained(placements, config, seed)


@functools.cache
def _trained(placements: tuple[Placement, ...], config: CLIPConfig, seed: int) -> Adapter:
    plan = place(placements, config.towers)
    draw, flat = np.random.default_rng(seed).standard_normal, {}
    for path, leaf in names.flatten(plan.shapes()).items():
        centre = path.endswith(("scale", "magnitude"))
        flat[path] = jnp.asarray(centre + 0.3 * draw(leaf.shape), jnp.float32)
    return Adapter(plan, names.unflatten(flat))


def inputs(config: CLIPConfig) -> tuple[np.ndarray, np.ndarray]:
    """Images and tokens without padding."""
    generator = np.random.default_rng(2)
    images = generator.standard_normal((3, config.image_size, config.image_size, 3)).astype(np.float32)
    tokens = generator.integers(1, 39, (3, 6)).astype(np.int32)
    tokens[:, -1] = 39
    return images, tokens


def features(config: CLIPConfig, params: dict, adapter: Adapter | None = None, route=None) -> np.ndarray:
    """Both features of the inputs, ``[2, batch, projection]``."""
    images, tokens = inputs(config)
    bound = None if adapter is None else adapter.plan.bind(adapter.params)
    with jax.disable_jit():  # single operations are compiled once for all adapters, whole programs once for each
        out = CLIP(config).apply({"params": params}, images, tokens, None, adapters=bound, route=route)
    return np.asarray([out.image_features, out.text_features])


@functools.cache
def plain_features(config: CLIPConfig) -> np.ndarray:
    """The features of the backbone alone."""
    return features(config, backbone(config))


def changes(adapter: Adapter, params: dict) -> dict[str, np.ndarray]:
    """By parameter and layer, what adapters at the outputs of linear maps add to it by definition, in float64.

    Adapters of one map must be plain LoRA, of which the changes add up.
    """
    maps = {"attn_q": "attn/q", "attn_k": "attn/k", "attn_v": "attn/v", "attn_out": "attn/out"}
    maps |= {"mlp_fc1": "mlp/fc1", "mlp_fc2": "mlp/fc2", "mlp_hidden": "mlp/fc2"}
    weights, flat, found = names.flatten(params), names.flatten(adapter.params), {}
    for group in adapter.plan.groups:
        tower, slot, method = group.site.tower, group.site.slot, group.method
        for column, layer in enumerate(group.layers[0]):
            own = {}
            for leaf in group.leaves:
                value = np.asarray(flat[leaf.path], np.float64)
                own[leaf.name] = value[column] if leaf.by_layer else value
            at = (lambda a: a) if slot == "projection" else (lambda a, k=layer: a[k])
            name = f"{tower}/projection" if slot == "projection" else f"{tower}/blocks/{maps[slot]}"
            kernel = np.asarray(at(weights[f"{name}/kernel"]), np.float64)
            bias = np.asarray(at(weights[f"{name}/bias"]), np.float64) if f"{name}/bias" in weights else None
            new_kernel, new_bias = _changed(method, slot, own, kernel, bias)
            for part, new, old in (("kernel", new_kernel, kernel), ("bias", new_bias, bias)):
                if new is not None:
                    label = f"{name}/{part}/{layer}"
                    found[label] = found.get(label, 0.0) + new - old
    return found


def _changed(method, slot, own, kernel, bias):
    if isinstance(method, Affine):
        scale, shift = own.get("scale", 1.0), own.get("shift", 0.0)
        if slot == "mlp_hidden":  # h -> scale * h + shift on the way into the map
            return np.diag(scale) @ kernel, bias + shift * np.ones(len(kernel)) @ kernel
        return kernel @ np.diag(scale * np.ones(kernel.shape[1])), scale * bias + shift
    new = kernel + method.scale * own["a"] @ own["b"]
    if method.init == "pissa":
        new = new - method.scale * own["frozen/a"] @ own["frozen/b"]
    if method.decomposed:
        columns = [own["magnitude"][j] * new[:, j] / np.sqrt(np.sum(new[:, j] ** 2)) for j in range(new.shape[1])]
        new = np.stack(columns, axis=1)
    return new, bias


def assert_same_changes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Changes agree as a whole; parameters that one side leaves alone may be absent on the other."""
    error = size = 0.0
    for name in ours | theirs:
        one, other = ours.get(name, 0.0), theirs.get(name, 0.0)
        error, size = error + np.sum((one - other) ** 2), size + np.sum(np.square(other))
    assert np.sqrt(error) <= tolerance * np.sqrt(size), np.sqrt(error / size)


def weighted(weights, *every) -> dict[str, np.ndarray]:
    """The weighted sum of changes."""
    return {name: sum(w * one[name] for w, one in zip(weights, every, strict=True)) for name in every[0]}
