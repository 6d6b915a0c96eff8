"""Similarity: does the text belong to the picture, judged by the cosine of both towers' features alone?

The pairwise loss of SigLIP (Zhai et al. 2023, equation 1) on pairs that are given with their labels, instead of all
pairs of a batch. Where the towers do not meet this is a dual encoder: its features can be indexed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.backbones.clip import CLIPOutput, normalise
from vla_jax.errors import UserError
from vla_jax.names import Tree
from vla_jax.tasks.matching import Matching


@dataclasses.dataclass(frozen=True)
class Similarity(Matching):
    """A judge of pairs whose head is two numbers, a scale and a bias; they change no order of scores.

    Attributes:
        name: the head's name, ``heads/<name>/log_scale`` and ``.../bias``.
        scale: where the factor on the cosine starts.
        threshold: the cosine at which a new head finds both answers equally likely.
    """

    name: str = "similarity"
    scale: float = 10.0
    threshold: float = 0.5

    def __post_init__(self):
        if not self.scale > 0:
            raise UserError(f"scale must be positive, got {self.scale}")

    def init(self, features: int) -> dict[str, jax.Array]:
        """The head, which does not depend on the features' width."""
        del features
        return {"log_scale": jnp.log(jnp.float32(self.scale)), "bias": jnp.float32(-self.scale * self.threshold)}

    def logits(
        self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array] | None = None
    ) -> Float[Array, "batch"]:
        """Positive where the pair matches.

        Raises:
            UserError: for a model that is shown the picture or the text alone.
        """
        del batch
        if output.image_features is None or output.text_features is None:
            raise UserError(
                "a similarity needs a picture and a text; train a model that is shown one of them with Matching"
            )
        image, text = (normalise(f.astype(jnp.float32)) for f in (output.image_features, output.text_features))
        return jnp.exp(head["log_scale"]) * jnp.sum(image * text, axis=-1) + head["bias"]
