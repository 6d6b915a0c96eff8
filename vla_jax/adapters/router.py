"""A learned router: which task's adapter an example needs, told from frozen features where nobody says it.

A small classifier gives each example a distribution over tasks; :mod:`vla_jax.adapters.router_training` trains it.
From the distribution comes a route, as every routed adapter takes it, or weights with which the tasks' contributions
are mixed. Where the top probability lies below a threshold the router abstains, and the example gets the bare backbone.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vla_jax.adapters.features import AnyArray, Labelled, checked_features, checked_labels, unit
from vla_jax.errors import UserError


def router_features(
    image: Float[AnyArray, "images image_width"] | None = None, text: Float[AnyArray, "texts text_width"] | None = None
) -> Float[Array, "batch width"]:
    """What a router looks at: the features of image, text or both, one behind the other.

    Each is normalised and scaled by the root of its width, so that entries are of the order of one.

    Raises:
        UserError: if neither is given, or they belong to different numbers of examples.
    """
    given = [unit(features) * features.shape[-1] ** 0.5 for features in (image, text) if features is not None]
    if not given:
        raise UserError("a router needs features of the image, of the text or of both; none are given")
    if len({len(features) for features in given}) > 1:
        raise UserError(f"features of {len(image)} images and of {len(text)} texts do not belong to the same examples")
    return jnp.concatenate(given, axis=-1)


@flax.struct.dataclass
class Router:
    """A trained router. A pytree, to be given to compiled functions: another threshold compiles nothing anew.

    Attributes:
        params: ``{"hidden": {"kernel", "bias"}, "out": {"kernel", "bias"}}``; without "hidden" the router is linear.
        threshold: float32 ``[]``; below this top probability the router abstains. 0 never does.
        tasks: the tasks' names, in the order of the classes; static.
    """

    params: dict[str, dict[str, jax.Array]]
    threshold: jax.Array
    tasks: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @property
    def width(self) -> int:
        """The width of the features that it takes."""
        return self.params.get("hidden", self.params["out"])["kernel"].shape[0]

    def logits(self, features: Float[AnyArray, "batch width"]) -> Float[Array, "batch tasks"]:
        """One logit a task.

        Args:
            features: as :func:`router_features` gives them.

        Raises:
            UserError: for features of another width than the router was trained on.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise UserError(f"this router takes features [batch, {self.width}]; given {features.shape}")
        hidden = features.astype(jnp.float32)
        if "hidden" in self.params:
            hidden = jax.nn.relu(hidden @ self.params["hidden"]["kernel"] + self.params["hidden"]["bias"])
        return hidden @ self.params["out"]["kernel"] + self.params["out"]["bias"]

    def probabilities(self, features: Float[AnyArray, "batch width"]) -> Float[Array, "batch tasks"]:
        """The distribution over tasks, whatever the threshold."""
        return jax.nn.softmax(self.logits(features), axis=-1)

    def route(self, features: Float[AnyArray, "batch width"]) -> Int[Array, "batch"]:
        """The likeliest task of each example, int32; -1 where its probability is below the threshold."""
        probabilities = self.probabilities(features)
        return jnp.where(self._sure(probabilities), jnp.argmax(probabilities, -1), -1).astype(jnp.int32)

    def mix(self, features: Float[AnyArray, "batch width"]) -> Float[Array, "batch tasks"]:
        """The weights of the tasks' contributions: the distribution, or zero throughout where the router abstains."""
        probabilities = self.probabilities(features)
        return jnp.where(self._sure(probabilities)[:, None], probabilities, 0.0)

    def _sure(self, probabilities: jax.Array) -> jax.Array:
        return probabilities.max(-1) >= self.threshold


class Calibration(NamedTuple):
    """What came of choosing a threshold.

    Attributes:
        router: with the threshold.
        accuracy: on the validation examples that it routes.
        coverage: which share of them it routes.
    """

    router: Router
    accuracy: float
    coverage: float


def calibrate(router: Router, validation: Labelled, accuracy: float) -> Calibration:
    """Chooses the threshold that keeps an accuracy on the examples that are routed, and routes as many as it can.

    Without task labels, the task whose adapter loses least on an example can stand for its label.

    Args:
        router: the trained router; its own threshold is not looked at.
        validation: what the threshold is chosen on.
        accuracy: the accuracy to keep, above 0 and at most 1.

    Raises:
        UserError: if no threshold reaches the accuracy, or for data that do not fit the router.
    """
    if not 0 < accuracy <= 1:
        raise UserError(f"the accuracy that a threshold is to keep is above 0 and at most 1; got {accuracy}")
    what = "the validation examples"
    features = checked_features(what, validation.features, router.width)
    labels = np.asarray(checked_labels(what, validation.labels, len(features), len(router.tasks), "the tasks"))
    probabilities = np.asarray(router.probabilities(features))
    top, right = probabilities.max(1), probabilities.argmax(1) == labels

    order = np.argsort(-top, kind="stable")  # from the surest down
    ends = np.flatnonzero(np.append(np.diff(top[order]) != 0, True))  # equally sure examples are routed together
    levels, routed = top[order][ends], ends + 1
    accuracies = np.cumsum(right[order])[ends] / routed
    kept = np.flatnonzero(accuracies >= accuracy)
    if not kept.size:
        best = accuracies.argmax()
        raise UserError(
            f"no threshold keeps an accuracy of {accuracy:g} on {what}: the best, {accuracies[best]:.4f}, is that of "
            f"the {routed[best]} surest of {len(top)}; ask for less, or train the router further"
        )
    lowest = kept[-1]
    threshold = np.float32(0)
    if lowest + 1 < len(levels):
        # Between the last level that is routed and the next: another program may round a little otherwise.
        threshold = (levels[lowest] + levels[lowest + 1]) / 2
        if threshold == levels[lowest + 1]:
            threshold = levels[lowest]
    calibrated = router.replace(threshold=jnp.asarray(threshold))
    return Calibration(calibrated, float(accuracies[lowest]), float(routed[lowest] / len(top)))
