"""Matching: does the text belong to, or state the truth about, the picture? Binary cross-entropy on one logit.

:class:`PairMatching` asks the same of a text and two pictures (NLVR2, Suhr et al. 2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from vla_jax.backbones.clip import CLIPOutput
from vla_jax.names import Tree
from vla_jax.tasks.heads import apply_linear, linear_head, masked_mean, pair_features


@dataclasses.dataclass(frozen=True)
class Matching:
    """A linear judge of pairs; its logit is also the pair's score.

    Attributes:
        name: the head's name, ``heads/<name>/classifier``.
    """

    name: str = "matching"

    def init(self, features: int) -> dict[str, Tree]:
        """The head for this many features."""
        return {"classifier": linear_head(features, 1)}

    def logits(
        self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array] | None = None
    ) -> Float[Array, "batch"]:
        """Positive where the pair matches."""
        del batch
        return apply_linear(head["classifier"], pair_features(output))[:, 0]

    def loss(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> tuple[Float[Array, ""], dict]:
        """Mean binary cross-entropy over the global batch, and accuracy."""
        logits, label = self.logits(head, output, batch), batch["label"]
        losses = optax.sigmoid_binary_cross_entropy(logits, label.astype(jnp.float32))
        right = ((logits > 0) == (label > 0)).astype(jnp.float32)
        valid = batch.get("valid")
        return masked_mean(losses, valid), {"accuracy": masked_mean(right, valid)}

    def predict(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """``correct`` bool ``[batch]`` and ``score`` float32 ``[batch]``; a score of exactly zero counts as false."""
        score = self.logits(head, output, batch)
        return {"score": score, "correct": (score > 0) == (batch["label"] > 0)}

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The predictions themselves: each stands for its own example."""
        return dict(found)


@dataclasses.dataclass(frozen=True)
class PairMatching(Matching):
    """A linear judge of a sentence on two pictures.

    The batch's ``image`` is ``[batch, 2, size, size, 3]``. Each picture goes through the tower by itself, and with the
    text makes the features of a pair, f and g; the head sees f, g, f * g and |f - g|.
    """

    name: str = "pair_matching"

    def init(self, features: int) -> dict[str, Tree]:
        """The head for this many features of each pair."""
        return {"classifier": linear_head(4 * features, 1)}

    def logits(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> Float[Array, "batch"]:
        """Positive where the sentence is true of the two pictures."""
        features = pair_features(output)
        features = features.reshape(len(batch["label"]), -1, features.shape[-1])
        # A model that is shown the text alone has one row an example.
        first, second = features[:, 0], features[:, -1]
        joint = jnp.concatenate([first, second, first * second, jnp.abs(first - second)], axis=-1)
        return apply_linear(head["classifier"], joint)[:, 0]
