"""One model from its parts: a backbone, what sits in its slots, and a task's head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.adapters import Placement, Plan, place
from vla_jax.adapters.adapter_fusion import value_penalty
from vla_jax.adapters.drop import check_robust, draw
from vla_jax.backbones.clip import CLIP, CLIPOutput, Prefix
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.errors import UserError, unknown
from vla_jax.names import Tree
from vla_jax.pairing import Pairing

MODALITIES = ("image", "text")
ENCODED_TEXTS = "encoded_texts"  # beside backbone, adapters and heads in the frozen tree that a step is given
Batch = Mapping[str, jax.Array]


class Task(Protocol):
    """A head, a loss and predictions; see :mod:`vla_jax.tasks`.

    A task may also have ``texts``: tokens int32 and mask bool ``[texts, length]`` of texts that are the same for every
    example, such as names of classes. They are encoded in place of the batch's.

    And it may have ``from_examples``, which makes the head that training starts from, in place of :meth:`init`'s, of
    the training pictures' features ``[examples, width]`` and their labels int ``[examples]``.
    """

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

    def apply(
        self,
        params: Tree,
        batch: Batch,
        key: jax.Array | None = None,
        fixed: tuple[np.ndarray, np.ndarray] | None = None,
        encoded: Tree | None = None,
    ) -> CLIPOutput:
        """Runs the backbone and what sits in it on a batch, or on the streams of a batch that a prefix was cached for.

        Args:
            params: the merged tree.
            batch: the batch contract's arrays; or ``image_stream`` and ``text_stream`` instead of ``image``, as
                :meth:`prefix` returned them. Examples may have several pictures or several texts, on an axis after the
                batch; what comes out then has one row a pair (:mod:`vla_jax.pairing`).
            key: the step's key, for dropout and the drop of layers; None for evaluation.
            fixed: tokens and mask ``[texts, length]`` of texts that are every example's, in place of the batch's. They
                are encoded once and come out as they are; where adapters need pairs, or pick weights by example, one
                row a pair comes out.
            encoded: what has been made of the fixed texts before, as :meth:`encoded_texts` returned it: nothing of it
                is computed again.
        """
        encoded = encoded or {}
        dropped = after = None
        if key is not None and self.robust_drop:
            dropped = draw(key, self.robust_drop)
        shown = {modality: modality in self.modalities for modality in MODALITIES}
        streams = "image_stream" in batch
        shown_as = "image_stream" if streams else "image"
        image = batch[shown_as] if shown["image"] else None
        routed = any(group.tasks for group in self.plan.groups)
        # A route is an example's and holds for both towers, so that both then need as many rows.
        repeat = routed or self.plan.needs_pairs

        def for_each(text: Any) -> Any:
            """A fixed text's rows, once an example where pairs are run."""
            if fixed is None or not repeat:
                return text
            return jnp.broadcast_to(text, (len(batch[shown_as]), *text.shape))

        tokens = mask = None
        if shown["text"] and "features" not in encoded:
            tokens, mask = map(for_each, (batch["tokens"], batch["text_mask"]) if fixed is None else fixed)
        pairing = Pairing.of(image, 3 if streams else 4, tokens)
        image = pairing.images(image, repeat=repeat)
        if streams:
            at = self.plan.first_layers()
            stream = None
            if tokens is not None and fixed is None:
                stream = batch["text_stream"]
            elif tokens is not None:
                stream = for_each(encoded["stream"] if "stream" in encoded else self._text_stream(params, fixed))
            after = Prefix(image, pairing.text(stream, repeat=repeat), at["vision"], at["text"])
        route = batch.get("mixture", batch.get("route")) if routed else None
        output = self.clip.apply(
            {"params": params["backbone"]},
            None if streams else image,
            pairing.text(tokens, repeat=repeat),
            pairing.text(mask, repeat=repeat),
            adapters=self.plan.bind(params["adapters"], dropped) if self.plan.groups else None,
            route=None if route is None else jnp.repeat(route, pairing.each, axis=0) if pairing.each > 1 else route,
            key=key,
            after=after,
        )
        if "features" in encoded:
            output = output.replace(text_features=encoded["features"])
        return output if repeat else pairing.repeated(output)

    def check_room(self, text_length: int) -> None:
        """Refuses texts that leave no room in the context for the tokens that adapters insert; computes nothing.

        Args:
            text_length: tokens a text.

        Raises:
            UserError: if there is too little.
        """
        if not self.plan.inserts_tokens:
            return
        size = self.backbone.config.image_size
        batch = {
            "image": jax.ShapeDtypeStruct((1, size, size, 3), np.float32),
            "tokens": jax.ShapeDtypeStruct((1, text_length), np.int32),
            "text_mask": jax.ShapeDtypeStruct((1, text_length), bool),
        }
        jax.eval_shape(self.apply, self.shapes(), batch)

    def loss(self, params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The task's loss, and AdapterFusion's penalty; see :func:`vla_jax.training.step.make_train_step`."""
        output = self.apply(params, batch, key, fixed_texts(self.task), params.get(ENCODED_TEXTS))
        loss, metrics = self.task.loss(params["heads"][self.task.name], output, batch)
        return loss + value_penalty(params.get("adapters", {})), metrics

    def predict(self, params: Tree, batch: Batch, task: Task | None = None) -> dict[str, jax.Array]:
        """The task's per-example results, or those of another task that needs no trained head."""
        if task is not None:
            return task.predict({}, self.apply(params, batch, fixed=fixed_texts(task)), batch)
        output = self.apply(params, batch, fixed=fixed_texts(self.task), encoded=params.get(ENCODED_TEXTS))
        return self.task.predict(params["heads"][self.task.name], output, batch)

    def prefix(self, params: Tree, batch: Batch, towers: Sequence[str] | None = None) -> dict[str, jax.Array]:
        """The streams where the first adapter meets them, of the plain backbone.

        Args:
            params: the whole tree, or its ``backbone`` alone.
            batch: ``image`` for the vision tower, ``tokens`` and ``text_mask`` for the text tower.
            towers: which; :attr:`streamed_towers` if None.

        Returns:
            ``image_stream`` and ``text_stream``, ``[batch, tokens, width]``, with an axis more after the batch where
            examples have several pictures or texts.
        """
        at = self.plan.first_layers()
        towers = self.streamed_towers if towers is None else towers
        image = batch["image"] if "vision" in towers else None
        tokens, mask = (batch["tokens"], batch["text_mask"]) if "text" in towers else (None, None)
        pairing = Pairing.of(image, 4, tokens)
        prefix = self.clip.apply(
            {"params": params["backbone"]},
            pairing.images(image, repeat=False),
            pairing.text(tokens, repeat=False),
            pairing.text(mask, repeat=False),
            image_layers=at["vision"] if image is not None else 0,
            text_layers=at["text"] if tokens is not None else 0,
            method="prefix",
        )
        streams = {}
        if image is not None:
            streams["image_stream"] = prefix.image.reshape(*_lead(image, 4), *prefix.image.shape[1:])
        if tokens is not None:
            streams["text_stream"] = prefix.text.reshape(*_lead(tokens, 2), *prefix.text.shape[1:])
        return streams

    @property
    def streamed_towers(self) -> tuple[str, ...]:
        """The towers whose streams are made of the batch: not of what is not shown, nor of texts of a task's own."""
        vision = ("vision",) if "image" in self.modalities else ()
        return (*vision, "text") if "text" in self.modalities and fixed_texts(self.task) is None else vision

    def encoded_as(self, trained: Sequence[str]) -> str | None:
        """What can be made of the task's own texts once for a whole run, if anything: ``features`` or ``stream``.

        Args:
            trained: names of the trained leaves. Nothing can be made where one is in the text tower, nor where features
                depend on the picture beside the text or on the example's route; where adapters sit in the text tower,
                it is the stream below the first one, which batches of pictures that come as streams go on from.
        """
        groups = self.plan.groups
        if "text" not in self.modalities or fixed_texts(self.task) is None or self.plan.needs_pairs:
            return None
        if any(name.startswith("backbone/text/") for name in trained):
            return None
        if not any(group.tasks for group in groups) and all(
            tower != "text" for group in groups for tower, _ in group.places()
        ):
            return "features"
        touched = any(name.startswith("backbone/") for name in trained) or self.plan.inserts_tokens
        below = self.plan.first_layers()["text"]
        return "stream" if below and not touched and "image" in self.modalities else None

    def encoded_texts(self, params: Tree, kind: str) -> dict[str, jax.Array]:
        """What the backbone makes of the task's own texts, to be merged into the tree as ``encoded_texts``.

        Args:
            params: the whole tree, or its ``backbone`` alone.
            kind: what :meth:`encoded_as` says.

        Returns:
            ``features`` ``[texts, projection]``, or ``stream`` ``[texts, length, width]``.
        """
        texts = fixed_texts(self.task)
        if kind == "stream":
            return {"stream": self._text_stream(params, texts)}
        return {"features": self.clip.apply({"params": params["backbone"]}, None, *texts).text_features}

    def _text_stream(self, params: Tree, texts: tuple[np.ndarray, np.ndarray]) -> jax.Array:
        """The stream of fixed texts where the first adapter meets it."""
        layers = self.plan.first_layers()["text"]
        variables = {"params": params["backbone"]}
        return self.clip.apply(variables, None, *texts, image_layers=0, text_layers=layers, method="prefix").text


def fixed_texts(task: Task) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and mask of the texts that a task has of its own, in place of the batch's; None for most tasks."""
    return getattr(task, "texts", None)


def _lead(rows: jax.Array, plain: int) -> tuple[int, ...]:
    """The axes in front of those of a picture, or a text: the batch, and how many an example has if several."""
    return rows.shape[: rows.ndim - plain + 1]
