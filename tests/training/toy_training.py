"""A training of four numbers an example: its data, its step, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vla_jax.training.checkpoint import Checkpointer
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.step import TrainState, init_state, make_train_step
from vla_jax.training.trainer import Fitted

IDENTITY = Identity("toy", "abc", {"method": "linear"})
FROZEN = {"backbone": {"kernel": jnp.linspace(-1, 1, 32).reshape(4, 8)}}
CLOCK = {
    "first_step_seconds",
    "seconds_per_step",
    "examples_per_second",
    "data_wait_share",
    "peak_memory_bytes",
}


class Numbers:
    """Batches that follow from their position alone; ``hook`` is called with the position of each batch drawn."""

    def __init__(self, end: int = 1000, hook: Callable[[int], None] = lambda position: None):
        self.position, self.end, self.hook = 0, end, hook

    def __next__(self) -> dict[str, jax.Array]:
        if self.position == self.end:
            raise StopIteration
        self.hook(self.position)
        rng = np.random.default_rng(self.position)
        self.position += 1
        image = rng.normal(size=(6, 4)).astype(np.float32)
        return {"image": jnp.asarray(image), "label": jnp.asarray(image.sum(1) > 0, jnp.int32)}

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


def loss_function(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    kept = jax.random.bernoulli(key, 0.8, (6, 4))  # Dropout, so that the keys must resume too.
    features = jnp.tanh((batch["image"] * kept) @ (params["backbone"]["kernel"] + params["adapters"]["kernel"]))
    logits = features @ params["heads"]["kernel"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.05, 40)))
STEP = make_train_step(loss_function, OPTIMIZER, seed=3)


def new_state() -> TrainState:
    key = jax.random.key(1)
    tree = {"adapters": {"kernel": jnp.zeros((4, 8))}, "heads": {"kernel": jax.random.normal(key, (8, 2))}}
    return init_state(tree, OPTIMIZER)


def new_checkpointer(folder: Path, every: int = 4, *, wait: bool = False) -> Checkpointer:
    return Checkpointer(folder / "checkpoints", IDENTITY, every=every, wait=wait)


def values(fitted: Fitted | list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The history by step, without what the clock says."""
    history = fitted.history if isinstance(fitted, Fitted) else fitted
    return {record["step"]: {k: v for k, v in record.items() if k not in CLOCK} for record in history}


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
