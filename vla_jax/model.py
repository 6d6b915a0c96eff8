"""One model from its parts: a backbone, what sits in its slots, and a task's head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from vla_jax.adapters import Placement, Plan, place
from vla_jax.adapters.adapter_fusion import value_penalty
from vla_jax.adapters.drop import check_robust, draw
from vla_jax.backbones.clip import CLIP, CLIPOutput, Prefix
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.errors import UserError, unknown
from vla_jax.names import Tree

MODALITIES = ("image", "text")
Batch = Mapping[str, jax.Array]


class Task(Protocol):
    """A head, a loss and predictions; see :mod:`vla_jax.tasks`."""

    name: str

    def init(self, features: int) -> Tree:
        """New head parameters, the tree below ``heads/<name>/``."""
        ...

    def loss(self, head: Tree, output: CLIPOutput, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss over the global batch, and scalar metrics."""
        ...

    def predict(self, head: Tree, output: CLIPOutput, batch: Batch) -> dict[str, jax.Array]:
        """Per-example results, ``[batch, ...]`` each."""
        ...

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the results of a whole split say; ``correct`` bool ``[examples]`` is among it."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A backbone with adapters and one task's head.

    Attributes:
        backbone: the loaded backbone.
        task: what is learnt.
        placements: what sits in the slots; empty for the plain backbone.
        compute: how the backbone is run.
        modalities: what the model is shown; one of them alone makes the control that cannot see the other.
        robust_drop: in training, each batch goes without the adapters of the first n blocks of every tower, n drawn
            from 0 to this number, both included (:mod:`vla_jax.adapters.drop`); evaluation has all of them.
    """

    backbone: Backbone
    task: Task
    placements: Sequence[Placement] = ()
    compute: Compute = dataclasses.field(default_factory=Compute)
    modalities: tuple[str, ...] = MODALITIES
    robust_drop: int = 0
    plan: Plan = dataclasses.field(init=False)

    def __post_init__(self):
        for modality in self.modalities:
            if modality not in MODALITIES:
                raise unknown("modality", modality, MODALITIES)
        if not self.modalities:
            raise UserError("a model needs at least one modality: image, text or both")
        object.__setattr__(self, "plan", place(tuple(self.placements), self.backbone.config.towers))
        check_robust(self.plan, self.robust_drop)

    @property
    def clip(self) -> CLIP:
        """The backbone's module."""
        return CLIP(self.backbone.config, self.compute)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """All parameters: ``backbone`` as loaded, ``adapters`` and ``heads`` new."""
        return {"backbone": self.backbone.params} | self._added(key)

    def shapes(self) -> dict[str, Any]:
        """The shapes and dtypes of :meth:`init`; nothing is computed, and the backbone may be shapes itself."""
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
        backbone = jax.tree.map(shape, dict(self.backbone.params))
        adapters = {"adapters": self.plan.shapes()} if self.plan.groups else {}
        return {"backbone": backbone} | jax.eval_shape(self._heads) | adapters

    def _heads(self) -> dict[str, Any]:
        width = self.backbone.config.projection * (4 if len(self.modalities) == 2 else 1)
        return {"heads": {self.task.name: self.task.init(width)}}

    def _added(self, key: jax.Array) -> dict[str, Any]:
        return self._heads() | ({"adapters": self.plan.init(key, self.backbone.params)} if self.plan.groups else {})

    def description(self) -> dict[str, Any]:
        """What tells this model's trained leaves from another's, JSON-able."""
        task = {"kind": type(self.task).__name__} | dataclasses.asdict(self.task)
        return {"placements": self.plan.describe(), "task": task, "modalities": list(self.modalities)}

    def apply(self, params: Tree, batch: Batch, key: jax.Array | None = None) -> CLIPOutput:
        """Runs the backbone and what sits in it on a batch, or on the streams of a batch that a prefix was cached for.

        Args:
            params: the merged tree.
            batch: the batch contract's arrays; or ``image_stream`` and ``text_stream`` instead of ``image``, as
                :meth:`prefix` returned them.
            key: the step's key, for dropout and the drop of layers; None for evaluation.
        """
        after = dropped = None
        if key is not None and self.robust_drop:
            dropped = draw(key, self.robust_drop)
        if "image_stream" in batch:
            at = self.plan.first_layers()
            after = Prefix(batch["image_stream"], batch["text_stream"], at["vision"], at["text"])
        shown = {modality: modality in self.modalities for modality in MODALITIES}
        return self.clip.apply(
            {"params": params["backbone"]},
            batch["image"] if shown["image"] and after is None else None,
            batch["tokens"] if shown["text"] else None,
            batch["text_mask"] if shown["text"] else None,
            adapters=self.plan.bind(params["adapters"], dropped) if self.plan.groups else None,
            route=batch["route"] if any(group.tasks for group in self.plan.groups) else None,
            key=key,
            after=after,
        )

    def loss(self, params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The task's loss, and AdapterFusion's penalty; see :func:`vla_jax.training.step.make_train_step`."""
        loss, metrics = self.task.loss(params["heads"][self.task.name], self.apply(params, batch, key), batch)
        return loss + value_penalty(params.get("adapters", {})), metrics

    def predict(self, params: Tree, batch: Batch, task: Task | None = None) -> dict[str, jax.Array]:
        """The task's per-example results, or those of another task that needs no trained head."""
        output = self.apply(params, batch)
        if task is not None:
            return task.predict({}, output, batch)
        return self.task.predict(params["heads"][self.task.name], output, batch)

    def prefix(self, params: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Both streams where the first adapter meets them, of the plain backbone."""
        at = self.plan.first_layers()
        prefix = self.clip.apply(
            {"params": params["backbone"]},
            batch["image"],
            batch["tokens"],
            batch["text_mask"],
            image_layers=at["vision"],
            text_layers=at["text"],
            method="prefix",
        )
        return {"image_stream": prefix.image, "text_stream": prefix.text}
