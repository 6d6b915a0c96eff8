"""CLIP in NumPy in double precision, one example at a time, with tokens inserted and prefixes put in front by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax import names
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.transformer import TowerConfig

Prompts = Mapping[int, np.ndarray]
"""By block, tokens ``[n, width]``: 0 inserts them, others take their place in front of that block."""

Prefixes = Mapping[int, Sequence[np.ndarray]]
"""By block, keys and values ``[n, width]`` in front of its own."""


class ByHand(NamedTuple):
    """What a tower makes of one example, without the tokens that were inserted.

    Attributes:
        hidden: ``[1 + depth, tokens, width]``, the embeddings and every block's output.
        feature: ``[projection]``.
    """

    hidden: np.ndarray
    feature: np.ndarray


def image_by_hand(
    params: Mapping[str, Any], config: CLIPConfig, pixels: np.ndarray, prompts: Prompts, prefixes: Prefixes
) -> ByHand:
    """The image tower of one ``[size, size, 3]`` image, prompts behind its patches."""
    tower, size = _double(params["vision"]), config.patch_size
    rows = [tower["class_embedding"]]
    for top in range(0, config.image_size, size):
        for left in range(0, config.image_size, size):
            patch = np.asarray(pixels, np.float64)[top : top + size, left : left + size]
            rows.append(np.tensordot(patch, tower["patch_embedding/kernel"], 3))
    plain = list(np.array(rows) + tower["position_embedding"])
    added = list(prompts.get(0, ()))
    stream = _norm(tower, "pre_norm", np.array(plain + added))
    inserted = slice(len(plain), len(plain) + len(added))
    visible = np.ones((len(stream), len(stream)), bool)
    states = _run(tower, config.vision, stream, visible, inserted, prompts, prefixes)
    feature = _norm(tower, "post_norm", states[-1][:1])[0] @ tower["projection/kernel"]
    return ByHand(_without(states, inserted), feature)


def text_by_hand(
    params: Mapping[str, Any],
    config: CLIPConfig,
    tokens: np.ndarray,
    mask: np.ndarray | None,
    prompts: Prompts,
    prefixes: Prefixes,
) -> ByHand:
    """The text tower of one ``[length]`` text, prompts behind its start token."""
    tower = _double(params["text"])
    words = [int(token) for token in tokens]
    added = list(prompts.get(0, ()))
    # Each token of the stream: its id, or None for an inserted one; its embedding; whether it is seen.
    ids = [words[0], *[None] * len(added), *words[1:]]
    embedded = [tower["token_embedding"][words[0]], *added, *tower["token_embedding"][words[1:]]]
    own = [True] * len(words) if mask is None else [bool(word) for word in mask]
    seen = [own[0], *[True] * len(added), *own[1:]]
    stream = np.array([row + tower["position_embedding"][place] for place, row in enumerate(embedded)])
    visible = np.array([[key <= query and seen[key] for key in range(len(ids))] for query in range(len(ids))])
    inserted = slice(1, 1 + len(added))
    states = _run(tower, config.text, stream, visible, inserted, prompts, prefixes)
    if config.pooling == "largest_id":
        last = max((place for place in range(len(ids)) if ids[place] is not None), key=lambda place: ids[place])
    else:
        last = ids.index(config.eos_token_id)
    feature = _norm(tower, "post_norm", states[-1][last : last + 1])[0] @ tower["projection/kernel"]
    return ByHand(_without(states, inserted), feature)


def _run(
    tower: Mapping[str, np.ndarray],
    config: TowerConfig,
    stream: np.ndarray,
    visible: np.ndarray,
    inserted: slice,
    prompts: Prompts,
    prefixes: Prefixes,
) -> list[np.ndarray]:
    states = [stream]
    for layer in range(config.depth):
        if layer > 0 and layer in prompts:
            stream = stream.copy()
            stream[inserted] = prompts[layer]
        weights = {name[7:]: leaf[layer] for name, leaf in tower.items() if name.startswith("blocks/")}
        stream = _block(weights, config, stream, visible, prefixes.get(layer))
        states.append(stream)
    return states


def _block(
    weights: Mapping[str, np.ndarray],
    config: TowerConfig,
    stream: np.ndarray,
    visible: np.ndarray,
    prefix: Sequence[np.ndarray] | None,
) -> np.ndarray:
    """One block, token by token and head by head."""
    head_width = config.width // config.heads
    x = _norm(weights, "norm1", stream)
    query, key, value = (x @ weights[f"attn/{n}/kernel"] + weights[f"attn/{n}/bias"] for n in "qkv")
    mixed = np.zeros_like(stream)
    for token in range(len(stream)):
        keys, values = key[visible[token]], value[visible[token]]
        if prefix is not None:
            keys, values = np.concatenate([prefix[0], keys]), np.concatenate([prefix[1], values])
        for head in range(config.heads):
            part = slice(head * head_width, (head + 1) * head_width)
            scores = np.exp(keys[:, part] @ query[token, part] / math.sqrt(head_width))
            mixed[token, part] = scores @ values[:, part] / scores.sum()
    stream = stream + mixed @ weights["attn/out/kernel"] + weights["attn/out/bias"]
    hidden = _norm(weights, "norm2", stream) @ weights["mlp/fc1/kernel"] + weights["mlp/fc1/bias"]
    if config.activation == "quick_gelu":
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
    else:
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    return stream + hidden @ weights["mlp/fc2/kernel"] + weights["mlp/fc2/bias"]


def _norm(weights: Mapping[str, np.ndarray], name: str, rows: np.ndarray) -> np.ndarray:
    rows = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    return rows * weights[f"{name}/scale"] + weights[f"{name}/bias"]


def _double(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(tree).items()}


def _without(states: Sequence[np.ndarray], inserted: slice) -> np.ndarray:
    return np.delete(np.array(states), np.arange(inserted.start, inserted.stop), axis=1)
