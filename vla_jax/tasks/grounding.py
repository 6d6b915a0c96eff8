"""Grounding: which region of the picture does a phrase mean?

:class:`RegionScoring` chooses among given boxes, :class:`BoxPrediction` says where the box is. Both read the picture's
patches in the space that it shares with texts, and both are judged by the intersection over union with the annotated
box, in shares of the square that the model is shown; what the centre crop cut off cannot be found, and counts.

Batches carry ``box`` and, to choose from, ``boxes`` and ``boxes_mask``, as :mod:`vla_jax.data.boxes` makes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from vla_jax.backbones.clip import CLIPOutput
from vla_jax.errors import UserError
from vla_jax.names import Tree
from vla_jax.tasks.heads import masked_mean
from vla_jax.tasks.regions import centres, contains, coverage, overlaps

Batch = Mapping[str, jax.Array]

RIGHT = 0.5
"""From which intersection over union on a box counts as found."""


def heat_map(output: CLIPOutput) -> Float[Array, "batch patches"]:
    """The cosine of each patch with the text beside it, row by row of the grid."""
    if output.patch_features is None or output.text_features is None:
        raise UserError("grounding compares patches with a phrase; show the model both modalities")
    return jnp.einsum("bnp,bp->bn", _unit(output.patch_features), _unit(output.text_features))


@dataclasses.dataclass(frozen=True)
class RegionScoring:
    """Candidate boxes compared with the phrase by the cosine of their patches' mean feature; adapters learn the rest.

    A patch counts in a box's mean as far as the box covers it.

    Attributes:
        name: the head's name, ``heads/<name>/log_scale``: the logarithm of a factor on the backbone's scale.
    """

    name: str = "regions"

    def init(self, features: int) -> dict[str, jax.Array]:
        """The head, which does not depend on the features' width."""
        del features
        return {"log_scale": jnp.zeros((), jnp.float32)}

    def logits(self, head: Tree, output: CLIPOutput, batch: Batch) -> Float[Array, "batch boxes"]:
        """One logit a candidate; minus infinity where there is none."""
        heat_map(output)  # refuses a model that is shown one modality
        patches, text = _unit(output.patch_features), _unit(output.text_features)
        shares = coverage(batch["boxes"], _grid(patches))  # [batch, boxes, patches]
        pooled = _unit(jnp.einsum("bkn,bnp->bkp", shares, patches))
        scores = self._factor(head, output) * jnp.einsum("bkp,bp->bk", pooled, text)
        return jnp.where(batch["boxes_mask"], scores, -jnp.inf)

    def _factor(self, head: Tree, output: CLIPOutput) -> Float[Array, ""]:
        return jnp.exp(head["log_scale"]) * output.scale

    def loss(self, head: Tree, output: CLIPOutput, batch: Batch) -> tuple[Float[Array, ""], dict]:
        """Mean cross-entropy of the candidate nearest the annotated box, over examples that have one near enough."""
        logits, overlap = self.logits(head, output, batch), _overlap(batch)
        near = overlap.max(-1) >= RIGHT
        trained = near if "valid" not in batch else near & batch["valid"]
        right = _chosen(logits, overlap, self._factor(head, output))
        # Without a candidate at all there is nothing to take a softmax of, nor a gradient to pass on.
        logits = jnp.where(trained[:, None], logits, 0.0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(overlap, -1))
        metrics = {"accuracy": masked_mean(right.astype(jnp.float32), batch.get("valid"))}
        return masked_mean(jnp.where(trained, losses, 0.0), trained), metrics

    def predict(self, head: Tree, output: CLIPOutput, batch: Batch) -> dict[str, jax.Array]:
        """The best candidate and how it fits.

        Returns:
            ``prediction`` int32, its place; ``box`` float32 ``[batch, 4]``; ``iou`` float32 with the annotated box;
            ``correct`` bool, whether a candidate with an IoU of 0.5 scores strictly above all others without; and
            ``pointed`` bool, whether the hottest patch lies in the annotated box.
        """
        logits, overlap = self.logits(head, output, batch), _overlap(batch)
        best = jnp.argmax(logits, -1).astype(jnp.int32)
        return {
            "prediction": best,
            "box": jnp.take_along_axis(batch["boxes"], best[:, None, None], axis=1)[:, 0],
            "iou": jnp.take_along_axis(overlap, best[:, None], axis=1)[:, 0],
            "correct": _chosen(logits, overlap, self._factor(head, output)),
            "pointed": pointed(heat_map(output), batch["box"]),
        }

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The predictions themselves: each stands for its own example."""
        return dict(found)


@dataclasses.dataclass(frozen=True)
class BoxPrediction:
    """A box from all patches: each says how much it is meant and how far the box reaches from its middle.

    With u a patch's feature, v the phrase's, both of length sqrt(width)::

        h = gelu(W1 [u ; u * v] + b1)
        a, d = W2 h + b2                        1 weight and 4 distances a patch
        box = sum_n softmax(a)_n (middle_n +- softplus(d_n) / 4)

    as in detectors without anchors (Tian et al. 2019, FCOS), with a weighted mean in place of a choice, which has a
    gradient. Box and annotated box are compared where the model can see, in the square.

    Attributes:
        name: the head's name, ``heads/<name>/hidden`` and ``.../boxes``.
        width: of h.
        distance_weight: of the mean distance of the corners in the loss, and
        overlap_weight: of one minus the generalised IoU; the weights of Carion et al. 2020 (DETR).
    """

    name: str = "boxes"
    width: int = 256
    distance_weight: float = 5.0
    overlap_weight: float = 2.0

    def __post_init__(self):
        if self.width < 1:
            raise UserError(f"the width of a box head must be at least 1, got {self.width}")
        if min(self.distance_weight, self.overlap_weight) < 0 or not self.distance_weight + self.overlap_weight:
            raise UserError(
                "the weights of a box's loss must not be negative, and one must be positive; got "
                f"{self.distance_weight} and {self.overlap_weight}"
            )

    def init(self, features: int) -> dict[str, Tree]:
        """The head for models shown both modalities: ``features`` is four times the width of the common space.

        The first map is drawn once and for all (He et al. 2015); the second starts at zero, where every patch counts
        alike and the box has its middle in that of the square.
        """
        inputs = 2 * (features // 4)
        drawn = np.random.default_rng(0).standard_normal((inputs, self.width)) * math.sqrt(2 / inputs)
        hidden = {"kernel": jnp.asarray(drawn, jnp.float32), "bias": jnp.zeros((self.width,), jnp.float32)}
        boxes = {"kernel": jnp.zeros((self.width, 5), jnp.float32), "bias": jnp.zeros((5,), jnp.float32)}
        return {"hidden": hidden, "boxes": boxes}

    def boxes(self, head: Tree, output: CLIPOutput) -> tuple[Float[Array, "batch 4"], Float[Array, "batch patches"]]:
        """The predicted boxes, in shares of the square's side, and the patches' weights."""
        heat_map(output)  # refuses a model that is shown one modality
        u = _unit(output.patch_features) * output.patch_features.shape[-1] ** 0.5
        v = _unit(output.text_features)[:, None] * output.text_features.shape[-1] ** 0.5
        joint = jnp.concatenate([u, u * v], axis=-1)
        hidden = jax.nn.gelu(joint @ head["hidden"]["kernel"] + head["hidden"]["bias"])
        found = hidden @ head["boxes"]["kernel"] + head["boxes"]["bias"]  # [batch, patches, 5]
        weights = jax.nn.softmax(found[..., 0], axis=-1)
        reach = jax.nn.softplus(found[..., 1:]) / 4
        middle = centres(_grid(u))
        corners = jnp.concatenate([middle - reach[..., :2], middle + reach[..., 2:]], axis=-1)
        return jnp.einsum("bn,bnc->bc", weights, corners), weights

    def loss(self, head: Tree, output: CLIPOutput, batch: Batch) -> tuple[Float[Array, ""], dict]:
        """Distance of corners and generalised IoU with what the square shows of the annotated box, and accuracy.

        Examples whose box the square does not show are left out of the loss.
        """
        box, _ = self.boxes(head, output)
        truth = jnp.clip(batch["box"], 0, 1)
        seen = (truth[:, 2:] - truth[:, :2] > 0).all(-1)
        # Something with an area stands where nothing is seen, so that no gradient is NaN.
        truth = jnp.where(seen[:, None], truth, jnp.array([0.0, 0.0, 1.0, 1.0]))
        losses = self.distance_weight * jnp.abs(box - truth).mean(-1)
        losses = losses + self.overlap_weight * (1 - overlaps(box, truth)[1])
        valid = batch.get("valid")
        trained = seen if valid is None else seen & valid
        iou = overlaps(box, batch["box"])[0]
        metrics = {"iou": masked_mean(iou, valid), "accuracy": masked_mean((iou >= RIGHT).astype(jnp.float32), valid)}
        return masked_mean(losses, trained), metrics

    def predict(self, head: Tree, output: CLIPOutput, batch: Batch) -> dict[str, jax.Array]:
        """The box and how it fits.

        Returns:
            ``box`` float32 ``[batch, 4]``; ``iou`` float32 with the annotated box; ``correct`` bool, whether that is
            0.5 or more; and ``pointed`` bool, whether the patch of the largest weight lies in the annotated box.
        """
        box, weights = self.boxes(head, output)
        iou = overlaps(box, batch["box"])[0]
        return {"box": box, "iou": iou, "correct": iou >= RIGHT, "pointed": pointed(weights, batch["box"])}

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The predictions themselves: each stands for its own example."""
        return dict(found)


def pointed(heat: Float[Array, "batch patches"], boxes: Float[Array, "batch 4"]) -> Bool[Array, "batch"]:
    """Whether the middle of the hottest patch lies in the box (the pointing game of Zhang et al. 2016).

    Of several equally hot patches all must: a map without a peak points nowhere.
    """
    hottest = heat >= heat.max(-1, keepdims=True)
    grid = math.isqrt(heat.shape[-1])
    inside = contains(boxes[:, None], jnp.broadcast_to(centres(grid), (*heat.shape, 2)))
    return (inside | ~hottest).all(-1)


def _unit(features: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Features of length one, in float32; what is zero, such as the mean over no patch, stays so."""
    features = features.astype(jnp.float32)
    square = jnp.sum(features**2, axis=-1, keepdims=True)
    return features * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _grid(patches: Float[Array, "batch patches width"]) -> int:
    return math.isqrt(patches.shape[1])


def _overlap(batch: Batch) -> Float[Array, "batch boxes"]:
    """Each candidate's IoU with the annotated box; -1 where there is none."""
    return jnp.where(batch["boxes_mask"], overlaps(batch["boxes"], batch["box"][:, None])[0], -1.0)


def _chosen(
    logits: Float[Array, "batch boxes"], overlap: Float[Array, "batch boxes"], factor: Float[Array, ""]
) -> Bool[Array, "batch"]:
    """Whether a candidate near enough scores above all that are not, by more than rounding (of cosines in float32)."""
    near = overlap >= RIGHT
    best_of = lambda which: jnp.where(which, logits, -jnp.inf).max(-1)  # noqa: E731
    return best_of(near) > best_of(~near) + 1e-6 * factor
