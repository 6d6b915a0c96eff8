"""Retrieval: images find their texts and texts their images, by the contrastive loss that CLIP was trained with.

Which example stands beside which decides how hard it is: results are over galleries of consecutive examples, the same
for every model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.backbones.clip import CLIPOutput, normalise
from vla_jax.errors import UserError
from vla_jax.names import Tree
from vla_jax.tasks.contrastive import info_nce, matched_first


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Features compared by their cosine; the head is one number, the logarithm of a factor on the backbone's scale.

    Attributes:
        name: the head's name, ``heads/<name>/log_scale``.
        gallery: how many consecutive examples are candidates for each other.
    """

    name: str = "retrieval"
    gallery: int = 256

    def __post_init__(self):
        if self.gallery < 2:
            raise UserError(f"a gallery needs at least 2 examples, got {self.gallery}")

    def init(self, features: int) -> dict[str, jax.Array]:
        """The head, which does not depend on the features' width."""
        del features
        return {"log_scale": jnp.zeros((), jnp.float32)}

    def loss(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> tuple[Float[Array, ""], dict]:
        """Symmetric InfoNCE over the global batch's valid pairs, and the shares that find their partner among them."""
        logits, valid = jnp.exp(head["log_scale"]) * output.logits, batch.get("valid")
        return info_nce(logits, valid), matched_first(logits, valid)

    def predict(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """``image_feature`` and ``text_feature`` float32 ``[batch, projection]``, of length one."""
        del head, batch
        return {"image_feature": normalise(output.image_features), "text_feature": normalise(output.text_features)}

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What all predictions together say.

        Args:
            found: by name ``[examples, ...]``, as :meth:`predict` made them of a whole split.

        Returns:
            ``image_to_text`` and ``text_to_image`` bool ``[examples]``, whether the example's own partner scores
            strictly highest in its gallery; ``correct``, the former again; and all other fields. A last gallery that
            would be smaller fills itself from the one before.
        """
        rest = {name: rows for name, rows in found.items() if name not in ("image_feature", "text_feature")}
        image, text = found["image_feature"], found["text_feature"]
        right = {name: np.zeros(len(image), bool) for name in ("image_to_text", "text_to_image")}
        for start in range(0, len(image), self.gallery):
            stop = min(start + self.gallery, len(image))
            first = max(0, stop - self.gallery)
            scores = image[first:stop] @ text[first:stop].T  # [images, texts]
            matched = np.diagonal(scores)
            others = np.where(np.eye(len(scores), dtype=bool), -np.inf, scores)
            right["image_to_text"][start:stop] = (matched > others.max(1))[start - first :]
            right["text_to_image"][start:stop] = (matched > others.max(0))[start - first :]
        return rest | right | {"correct": right["image_to_text"]}


@dataclasses.dataclass(frozen=True)
class PairFeatures:
    """No comparison yet: the features of pictures and texts, for galleries that hold all of them.

    See :mod:`vla_jax.evaluation.retrieval`, which compares any number of them, several captions a picture too.
    """

    name: str = "pair_features"

    def init(self, features: int) -> dict[str, jax.Array]:
        """A head without parameters."""
        del features
        return {}

    def loss(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> tuple[Float[Array, ""], dict]:
        """There is nothing to be trained."""
        raise UserError("features are not trained; train for retrieval")

    def predict(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """As :meth:`Retrieval.predict`."""
        return Retrieval().predict(head, output, batch)

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The features themselves."""
        return dict(found)
