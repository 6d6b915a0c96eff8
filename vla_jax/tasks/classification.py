"""Classification: one of several classes, such as the answer to a question on a picture, by softmax cross-entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from vla_jax.backbones.clip import CLIPOutput
from vla_jax.errors import UserError
from vla_jax.names import Tree
from vla_jax.tasks.heads import apply_linear, linear_head, masked_mean, pair_features


@dataclasses.dataclass(frozen=True)
class Classification:
    """A linear classifier on both towers' features.

    Attributes:
        name: the head's name, ``heads/<name>/classifier``.
        classes: number of classes.
    """

    name: str
    classes: int

    def __post_init__(self):
        if self.classes < 2:
            raise UserError(f"classification needs at least 2 classes, got {self.classes}")

    def init(self, features: int) -> dict[str, Tree]:
        """The head for this many features."""
        return {"classifier": linear_head(features, self.classes)}

    def logits(self, head: Tree, output: CLIPOutput) -> Float[Array, "batch classes"]:
        """One logit a class."""
        return apply_linear(head["classifier"], pair_features(output))

    def loss(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> tuple[Float[Array, ""], dict]:
        """Mean cross-entropy over the global batch, and accuracy."""
        logits = self.logits(head, output)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
        valid = batch.get("valid")
        return masked_mean(losses, valid), {"accuracy": masked_mean(right, valid)}

    def predict(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """``correct`` bool ``[batch]`` and ``prediction`` int32 ``[batch]``."""
        prediction = jnp.argmax(self.logits(head, output), -1)
        return {"prediction": prediction, "correct": prediction == batch["label"]}

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The predictions themselves: each stands for its own example."""
        return dict(found)
