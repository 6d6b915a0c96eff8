"""Random features of both towers, as a backbone would hand them to a task, and the loops that tasks are held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax.backbones.clip import CLIPOutput

BATCH, WIDTH = 16, 6


def output(seed: int = 0, *, image: bool = True, text: bool = True, batch: int = BATCH) -> CLIPOutput:
    """An output with features alone."""
    generator = np.random.default_rng(seed)
    drawn = [jnp.asarray(generator.normal(0, 3, (batch, WIDTH)), jnp.float32) for _ in range(2)]
    fields = dict.fromkeys(
        ("image_pooled", "text_pooled", "image_tokens", "text_tokens", "image_hidden", "text_hidden", "readings")
    )
    return CLIPOutput(
        image_features=drawn[0] if image else None,
        text_features=drawn[1] if text else None,
        scale=jnp.float32(1),
        **fields,
    )


def head(features: int, outputs: int, seed: int = 1) -> dict[str, dict[str, jax.Array]]:
    """A head that is not zero."""
    generator = np.random.default_rng(seed)
    kernel = jnp.asarray(generator.normal(0, 0.5, (features, outputs)), jnp.float32)
    return {"classifier": {"kernel": kernel, "bias": jnp.asarray(generator.normal(size=outputs), jnp.float32)}}


def expected_features(given: CLIPOutput) -> np.ndarray:
    """u, v, u * v and |u - v|, number by number, in float64."""
    towers = [np.asarray(f, np.float64) for f in (given.image_features, given.text_features) if f is not None]
    rows = []
    for example in zip(*towers, strict=True):
        scaled = [np.sqrt(WIDTH) * f / np.sqrt(sum(x * x for x in f)) for f in example]
        row = [*scaled[0]]
        if len(scaled) == 2:
            u, v = scaled
            row += [*v, *(a * b for a, b in zip(u, v, strict=True)), *(abs(a - b) for a, b in zip(u, v, strict=True))]
        rows.append(row)
    return np.array(rows)


def expected_logits(params: dict[str, dict[str, jax.Array]], given: CLIPOutput) -> np.ndarray:
    """The head on those, in float64."""
    kernel, bias = (np.asarray(params["classifier"][name], np.float64) for name in ("kernel", "bias"))
    return expected_features(given) @ kernel + bias


def assert_sharded_equals_one_device(task, params, batch) -> None:
    """Loss, metrics and gradient of a batch cut over eight devices are those of one, padding rows and all."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    given = output()

    def loss_of(params, image, text, batch):
        return task.loss(params, given.replace(image_features=image, text_features=text), batch)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    arguments = (params, given.image_features, given.text_features, batch)
    sharded = jax.jit(gradient, in_shardings=(whole, cut, cut, cut))(*arguments)
    alone = gradient(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sharded, alone)
