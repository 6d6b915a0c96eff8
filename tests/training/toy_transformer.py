"""A few thousand weights with the project's parameter names: a transformer scanned over stacked blocks, a bag of words.

The text tower has no blocks, because a second scan would double the time that every test spends in the compiler.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.mesh import keep_batch_cut

WIDTH, DEPTH, HEADS, HIDDEN, RANK = 32, 3, 4, 64, 4
VOCABULARY, TOKENS, PATCHES, PATCH, CLASSES, PROJECTION = 40, 6, 9, 12, 5, 16


def make_params(seed: int = 0) -> dict[str, Any]:
    """Backbone, adapters and head with random float32 values; no bias and no up-projection is zero."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.1) -> jax.Array:
        return jnp.asarray(draw.normal(0, scale, shape), jnp.float32)

    def linear(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": normal(*shape, scale=shape[-2] ** -0.5), "bias": normal(*shape[:-2], shape[-1])}

    def norm(*shape: int) -> dict[str, jax.Array]:
        return {"scale": 1 + normal(*shape), "bias": normal(*shape)}

    return {
        "backbone": {
            "vision": {
                "patch_embedding": {"kernel": normal(PATCH, WIDTH)},
                "blocks": {
                    "norm1": norm(DEPTH, WIDTH),
                    "norm2": norm(DEPTH, WIDTH),
                    "attn": {name: linear(DEPTH, WIDTH, WIDTH) for name in ("q", "k", "v", "out")},
                    "mlp": {"fc1": linear(DEPTH, WIDTH, HIDDEN), "fc2": linear(DEPTH, HIDDEN, WIDTH)},
                },
                "post_norm": norm(WIDTH),
                "projection": {"kernel": normal(WIDTH, PROJECTION)},
            },
            "text": {
                "token_embedding": normal(VOCABULARY, WIDTH, scale=1.0),
                "post_norm": norm(WIDTH),
                "projection": {"kernel": normal(WIDTH, PROJECTION)},
            },
            "logit_scale": jnp.asarray(1.0),
        },
        "adapters": {
            "main": {"vision": {"mlp_out": {"down": linear(DEPTH, WIDTH, RANK), "up": linear(DEPTH, RANK, WIDTH)}}}
        },
        "heads": {"classify": linear(2 * PROJECTION, CLASSES)},
    }


def make_batch(size: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of flattened patches, tokens and labels."""
    draw = np.random.default_rng(seed)
    return {
        "image": draw.normal(size=(size, PATCHES, PATCH)).astype(np.float32),
        "tokens": draw.integers(0, VOCABULARY, (size, TOKENS)).astype(np.int32),
        "label": draw.integers(0, CLASSES, size).astype(np.int32),
    }


def apply_linear(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def apply_norm(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def run_blocks(params: dict[str, Any], adapter: dict[str, Any], x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """The blocks over [batch, tokens, width], with dropout inside the adapter."""

    def body(x: jax.Array, layer: tuple[Any, Any, jax.Array]) -> tuple[jax.Array, None]:
        block, adapter, key = layer
        x = keep_batch_cut(x)
        y = apply_norm(block["norm1"], x)
        q, k, v = (
            apply_linear(block["attn"][name], y).reshape(*y.shape[:2], HEADS, WIDTH // HEADS)
            for name in ("q", "k", "v")
        )  # [batch, tokens, heads, dim]
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5)
        x = x + apply_linear(block["attn"]["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
        y = apply_linear(block["mlp"]["fc1"], apply_norm(block["norm2"], x))
        y = apply_linear(block["mlp"]["fc2"], jax.nn.gelu(y))
        h = jax.nn.relu(apply_linear(adapter["down"], y))
        if rate:
            h = h * jax.random.bernoulli(key, 1 - rate, h.shape) / (1 - rate)
        return x + y + apply_linear(adapter["up"], h), None

    return jax.lax.scan(body, x, (params["blocks"], adapter, jax.random.split(key, DEPTH)))[0]


def features(
    params: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array]:
    """The projected image and text features, [batch, projection] each."""
    vision, text = params["backbone"]["vision"], params["backbone"]["text"]
    x = batch["image"] @ vision["patch_embedding"]["kernel"]
    x = run_blocks(vision, params["adapters"]["main"]["vision"]["mlp_out"], x, key, rate)
    y = text["token_embedding"][batch["tokens"]]
    return tuple(
        apply_norm(tower["post_norm"], z.mean(1)) @ tower["projection"]["kernel"]
        for tower, z in ((vision, x), (text, y))
    )


def classification_loss(
    params: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array, rate: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of the head over both features, and the accuracy."""
    return classify(params, batch, *features(params, batch, key, rate))


def mixed_loss(
    params: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array, rate: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classification plus the symmetric contrastive loss over the whole global batch."""
    image, text = features(params, batch, key, rate)
    loss, metrics = classify(params, batch, image, text)
    image, text = (f / jnp.linalg.norm(f, axis=-1, keepdims=True) for f in (image, text))
    logits = jnp.exp(params["backbone"]["logit_scale"]) * image @ text.T  # [batch, batch]
    own = jnp.sum(image * text, -1) * jnp.exp(params["backbone"]["logit_scale"])
    both = 2 * own - jax.nn.logsumexp(logits, 0) - jax.nn.logsumexp(logits, 1)
    return loss - both.mean() / 2, metrics


def classify(
    params: dict[str, Any], batch: dict[str, jax.Array], image: jax.Array, text: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits = apply_linear(params["heads"]["classify"], jnp.concatenate([image, text], -1))
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], -1)
    return -right.mean(), {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}
