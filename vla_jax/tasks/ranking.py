"""Ranking of texts: which of several texts belongs to the picture, such as which answer to a question on it.

The candidates are texts, so that they need not be known in training: the vocabulary is open. Batches carry ``tokens``
and ``text_mask`` with an axis for candidates, as :class:`vla_jax.data.candidate_texts.CandidateTexts` makes them.
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
from vla_jax.tasks.vqa import answer_accuracy

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TextRanking:
    """A pair's score is its scaled cosine and a linear map of both features; new heads score by the cosine alone.

    Attributes:
        name: the head's name, ``heads/<name>/classifier`` and ``.../log_scale``.
    """

    name: str = "ranking"

    def init(self, features: int) -> dict[str, Tree]:
        """The head for this many features."""
        return {"classifier": linear_head(features, 1), "log_scale": jnp.zeros((), jnp.float32)}

    def logits(self, head: Tree, output: CLIPOutput, batch: Batch) -> Float[Array, "batch candidates"]:
        """One logit a candidate."""
        scores = jnp.exp(head["log_scale"]) * output.pair_logits
        scores = scores + apply_linear(head["classifier"], pair_features(output))[:, 0]
        return scores.reshape(len(batch["label"]), -1)

    def loss(self, head: Tree, output: CLIPOutput, batch: Batch) -> tuple[Float[Array, ""], dict]:
        """Mean cross-entropy over examples whose right text is among the candidates (label not -1), and accuracy."""
        logits, label = self.logits(head, output, batch), batch["label"]
        valid = label >= 0 if "valid" not in batch else (label >= 0) & batch["valid"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        right = (jnp.argmax(logits, -1) == label).astype(jnp.float32)
        return masked_mean(losses, valid), {"accuracy": masked_mean(right, valid)}

    def predict(self, head: Tree, output: CLIPOutput, batch: Batch) -> dict[str, jax.Array]:
        """The best candidate and whether it is right.

        Returns:
            ``prediction`` int32 ``[batch]``, which candidate it is (by the batch's ``candidates``, or by its place);
            ``correct`` bool ``[batch]``, whether the right one scores strictly highest. Where batches say what all
            annotators answered (``answer_ids`` and ``answer_counts``, by the numbers of ``candidates``), any of their
            most frequent answers is right, and there is ``accuracy`` float32 ``[batch]``, that of
            :mod:`vla_jax.evaluation.vqa` for the best candidate.
        """
        logits, label = self.logits(head, output, batch), batch["label"]
        best = jnp.argmax(logits, -1)
        own = jnp.arange(logits.shape[-1]) == label[:, None]  # nowhere for a label of -1
        if "candidates" in batch:
            best = jnp.take_along_axis(batch["candidates"], best[:, None], axis=-1)[:, 0]
        found = {"prediction": best.astype(jnp.int32)}
        if "answer_counts" in batch:
            given = batch["candidates"][:, :, None] == batch["answer_ids"][:, None]  # [batch, candidates, answers]
            counts = jnp.where(given, batch["answer_counts"][:, None], 0).sum(-1)
            own = (counts > 0) & (counts == batch["answer_counts"].max(-1, keepdims=True))
            found["accuracy"] = answer_accuracy(best, batch)
        right = jnp.where(own, logits, -jnp.inf).max(-1) > jnp.where(own, -jnp.inf, logits).max(-1)
        return found | {"correct": right & own.any(-1)}

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The predictions themselves: each stands for its own example."""
        return dict(found)
