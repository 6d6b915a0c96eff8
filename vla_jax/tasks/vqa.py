"""Visual question answering as classification: which of a vocabulary's answers would the annotators give?

The target of an answer is the share of it that annotators vouch for, min(count / 3, 1), and the loss is the sum of the
answers' binary cross-entropies (Teney et al. 2018, section 3.5). Where a question has fewer than three annotators, all
of them make a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vla_jax.backbones.clip import CLIPOutput
from vla_jax.errors import UserError
from vla_jax.names import Tree
from vla_jax.tasks.heads import apply_linear, linear_head, masked_mean, pair_features

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class AnswerClassification:
    """A linear classifier on both towers' features, with soft targets.

    Batches carry ``answer_ids`` and ``answer_counts``, as :class:`vla_jax.data.answers.AnswerCounts` makes them.

    Attributes:
        name: the head's name, ``heads/<name>/classifier``.
        answers: answers in the vocabulary.
    """

    name: str
    answers: int

    def __post_init__(self):
        if self.answers < 2:
            raise UserError(f"answer classification needs at least 2 answers, got {self.answers}")

    def init(self, features: int) -> dict[str, Tree]:
        """The head for this many features."""
        return {"classifier": linear_head(features, self.answers)}

    def logits(self, head: Tree, output: CLIPOutput) -> Float[Array, "batch answers"]:
        """One logit an answer."""
        return apply_linear(head["classifier"], pair_features(output))

    def loss(self, head: Tree, output: CLIPOutput, batch: Batch) -> tuple[Float[Array, ""], dict]:
        """The binary cross-entropies, summed over answers; their mean over the global batch, and the accuracy."""
        logits = self.logits(head, output)
        losses = optax.sigmoid_binary_cross_entropy(logits, self._targets(batch)).sum(-1)
        accuracy = answer_accuracy(jnp.argmax(logits, -1), batch)
        valid = batch.get("valid")
        return masked_mean(losses, valid), {"accuracy": masked_mean(accuracy, valid)}

    def predict(self, head: Tree, output: CLIPOutput, batch: Batch) -> dict[str, jax.Array]:
        """The likeliest answer and what it is worth.

        Returns:
            ``prediction`` int32 ``[batch]``, a place in the vocabulary; ``accuracy`` float32 ``[batch]``, that of
            :mod:`vla_jax.evaluation.vqa` with all answers in their normal form; ``correct`` bool ``[batch]``, whether
            annotators gave it and none gave another one more often.
        """
        prediction = jnp.argmax(self.logits(head, output), -1).astype(jnp.int32)
        agreed = _agreed(prediction, batch)
        return {
            "prediction": prediction,
            "accuracy": answer_accuracy(prediction, batch),
            "correct": (agreed > 0) & (agreed == batch["answer_counts"].max(-1)),
        }

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The predictions themselves: each stands for its own example."""
        return dict(found)

    def _targets(self, batch: Batch) -> Float[Array, "batch answers"]:
        counts = batch["answer_counts"].astype(jnp.float32)
        enough = jnp.minimum(3.0, jnp.maximum(counts.sum(-1, keepdims=True), 1.0))
        worth = jnp.minimum(counts / enough, 1.0)
        # An answer outside the vocabulary has no class: it is put beyond the last one, which drops it.
        place = jnp.where(batch["answer_ids"] < 0, self.answers, batch["answer_ids"])
        rows = jnp.arange(len(place))[:, None]
        return jnp.zeros((len(place), self.answers)).at[rows, place].add(worth, mode="drop")


def _agreed(prediction: Int[Array, "batch"], batch: Batch) -> Int[Array, "batch"]:
    """How many annotators gave the predicted answer."""
    return jnp.where(batch["answer_ids"] == prediction[:, None], batch["answer_counts"], 0).sum(-1)


def answer_accuracy(prediction: Int[Array, "batch"], batch: Batch) -> Float[Array, "batch"]:
    """The mean over annotators left out of min(others who gave the answer / 3, 1); see evaluation/vqa.py.

    Args:
        prediction: which answer, by the numbers of ``answer_ids``.
        batch: ``answer_ids`` and ``answer_counts`` ``[batch, answers]``.
    """
    count = _agreed(prediction, batch).astype(jnp.float32)
    everybody = jnp.maximum(batch["answer_counts"].sum(-1), 1).astype(jnp.float32)
    without_one, without_another = jnp.minimum((count - 1) / 3, 1), jnp.minimum(count / 3, 1)
    mean = (count * without_one + (everybody - count) * without_another) / everybody
    return jnp.where(everybody > 1, mean, count)
