"""Heads of several tasks in one batch: stacked, padded to the largest, and picked by each example's route.

The tasks of a batch may have any numbers of classes. Their heads lie in one array, as wide as the largest, and a logit
of minus infinity stands where a task has no such class: its probability is exactly zero, and so is its gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vla_jax.backbones.clip import CLIPOutput
from vla_jax.errors import UserError
from vla_jax.names import Tree
from vla_jax.tasks.heads import apply_linear, linear_head, masked_mean, pair_features


@dataclasses.dataclass(frozen=True)
class RoutedClassification:
    """Linear classifiers of several tasks on both towers' features.

    A batch says in ``route`` which task each example belongs to. Examples routed to -1 have no head: they count neither
    in the loss nor as right. A route beyond the last task makes the loss NaN, as it does in adapters.

    Every example's own head is gathered, ``[batch, features, largest number of classes]``, so that the cost does not
    grow with the number of tasks.

    Attributes:
        name: the heads' name, ``heads/<name>/classifier``.
        classes: number of classes of each task, in the order of routes. For a bank whose tasks come and go it is that
            of each place; the batch then carries ``classes``, int32 ``[batch]``, the number of classes of each
            example's task, and a task with fewer than its place has room for recompiles nothing.
    """

    name: str
    classes: tuple[int, ...]

    def __post_init__(self):
        if not self.classes:
            raise UserError(f"heads {self.name!r} need the number of classes of at least one task")
        for task, count in enumerate(self.classes):
            if count < 2:
                raise UserError(f"classification needs at least 2 classes, got {count} for task {task}")

    @property
    def largest(self) -> int:
        """The number of classes that all heads are padded to."""
        return max(self.classes)

    def init(self, features: int) -> dict[str, Tree]:
        """The heads for this many features, ``[tasks, features, largest]``; all start at zero."""
        head = linear_head(features, self.largest)
        return {"classifier": jax.tree.map(lambda a: jnp.tile(a, (len(self.classes),) + (1,) * a.ndim), head)}

    def select_task(self, head: Tree, task: int) -> dict[str, Tree]:
        """One task's head without its padding, as :class:`~vla_jax.tasks.classification.Classification` has it."""
        count = self.classes[self._checked(task)]
        return {"classifier": jax.tree.map(lambda a: a[task, ..., :count], head["classifier"])}

    def set_task(self, head: Tree, task: int, own: Tree) -> dict[str, Tree]:
        """The heads with one task's replaced; a head of fewer classes than the place has room for is padded with zero.

        Raises:
            UserError: for a task that does not exist, or a head that does not fit.
        """
        given, stacked = own["classifier"], head["classifier"]
        width, count = given["kernel"].shape
        if width != stacked["kernel"].shape[1] or count > self.classes[self._checked(task)]:
            raise UserError(
                f"a head of {width} features and {count} classes does not fit heads {self.name!r}: task {task} has "
                f"{stacked['kernel'].shape[1]} features and room for {self.classes[task]} classes"
            )
        rest = self.largest - count

        def replaced(stack: jax.Array, new: jax.Array) -> jax.Array:
            return stack.at[task].set(jnp.pad(new, [(0, 0)] * (new.ndim - 1) + [(0, rest)]))

        return {"classifier": {name: replaced(stack, given[name]) for name, stack in stacked.items()}}

    def logits(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> Float[Array, "batch largest"]:
        """Each example's logits by its own task's head; minus infinity where that has no such class, or there is none.

        Args:
            head: as :meth:`init` gives it.
            output: the towers' features.
            batch: ``route`` int32 ``[batch]``, and ``classes`` int32 ``[batch]`` where classes come and go.
        """
        features, route = pair_features(output), batch["route"]
        chosen = jnp.maximum(route, 0)
        own = jax.tree.map(lambda a: a.at[chosen].get(mode="fill", fill_value=jnp.nan), head["classifier"])
        logits = jax.vmap(lambda h, f: apply_linear(h, f[None])[0])(own, features)
        return jnp.where(jnp.arange(self.largest) < self._counts(batch)[:, None], logits, -jnp.inf)

    def loss(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> tuple[Float[Array, ""], dict]:
        """Mean cross-entropy over the examples of the global batch that have a task, and accuracy.

        A label that an example's task has no class for makes the loss infinite.
        """
        logits, label = self.logits(head, output, batch), batch["label"]
        routed = batch["route"] >= 0
        valid = routed & batch["valid"] if "valid" in batch else routed
        # Where all logits are minus infinity there is nothing to take a softmax of, nor a gradient to pass on.
        losses = optax.softmax_cross_entropy_with_integer_labels(jnp.where(valid[:, None], logits, 0.0), label)
        right = (jnp.argmax(logits, -1) == label).astype(jnp.float32)
        return masked_mean(jnp.where(valid, losses, 0.0), valid), {"accuracy": masked_mean(right, valid)}

    def predict(self, head: Tree, output: CLIPOutput, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """``correct`` bool ``[batch]`` and ``prediction`` int32 ``[batch]``, -1 for an example without a task."""
        prediction = jnp.argmax(self.logits(head, output, batch), -1)
        prediction = jnp.where(batch["route"] >= 0, prediction, -1).astype(jnp.int32)
        return {"prediction": prediction, "correct": (prediction == batch["label"]) & (batch["route"] >= 0)}

    def _counts(self, batch: Mapping[str, jax.Array]) -> Int[Array, "batch"]:
        """How many classes each example has; none without a task, and all of its NaN logits beyond the last."""
        route = batch["route"]
        places = jnp.asarray(self.classes, jnp.int32)
        counts = places.at[jnp.maximum(route, 0)].get(mode="fill", fill_value=self.largest)
        if "classes" in batch:
            counts = jnp.minimum(batch["classes"], counts)
        return jnp.where(route >= 0, counts, 0)

    def _checked(self, task: int) -> int:
        if not 0 <= task < len(self.classes):
            raise UserError(f"heads {self.name!r} have tasks 0 to {len(self.classes) - 1}, got {task}")
        return task
