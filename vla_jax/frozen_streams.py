"""What no trained weight touches of a model, computed once for a whole data set instead of once a step.

The blocks below the first adapter of a frozen backbone make the same of a picture, and of a text, every time. Their
streams are computed once a picture and once a text, however many examples share it, and kept in memory or on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vla_jax.data.cached import ArraySource, Chosen, as_rows, evaluate
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.stages import Source, Transform
from vla_jax.data.stream_store import StreamStore, digests, digests_of_rows, fingerprint
from vla_jax.model import AdaptedModel
from vla_jax.training.sharding import batch_sharding, place, replicated
from vla_jax.variants import TaskData

# What of a batch the image stream stands for, and what a pass over the new source gives anew.
_REPLACED = ("image", "valid", "index")


def frozen_streams(
    model: AdaptedModel, data: TaskData, batch_size: int, mesh: jax.sharding.Mesh, **reading: Any
) -> dict[str, ArraySource]:
    """Every split's streams where the model's first adapter meets them, and the other fields of its batches.

    Args:
        model: the model; what it has in its slots decides how far streams go.
        data: the data; streams are kept in ``data.streams`` if that is a folder and one process runs alone.
        batch_size: examples computed at a time.
        mesh: where.
        reading: how pictures are read: ``workers`` and ``max_bad_share`` of :class:`vla_jax.data.pipeline.Pipeline`.

    Returns:
        By split, the examples that can be read: ``image_stream`` and ``text_stream`` ``[tokens, width]`` (what the
        model is shown of them), what else ``data.transform`` gives, and ``position``, their places in the split.
    """
    computing = _Computing(model, data.transform, batch_size, mesh, reading)
    folder = data.streams if jax.process_count() == 1 else None
    stores = {tower: StreamStore(folder and folder / computing.name(tower)) for tower in model.streamed_towers}
    return {split: computing.streams(split, source, stores) for split, source in data.splits.items()}


class _Computing:
    """One model's blocks below its first adapter, compiled."""

    def __init__(
        self,
        model: AdaptedModel,
        transform: Transform,
        batch_size: int,
        mesh: jax.sharding.Mesh,
        reading: Mapping[str, Any],
    ):
        self._model, self._transform, self._batch_size, self._reading = model, transform, batch_size, reading
        self._sharding = batch_sharding(mesh)
        self._params = place(model.backbone.params, replicated(mesh))
        self._programs = {
            tower: jax.jit(lambda backbone, batch, tower=tower: model.prefix({"backbone": backbone}, batch, (tower,)))
            for tower in model.streamed_towers
        }

    def name(self, tower: str) -> str:
        """What a tower's streams depend on, beside the pictures and the tokens."""
        backbone = self._model.backbone
        described = {
            "backbone": backbone.fingerprint,
            "image_size": backbone.config.image_size,
            "storage": str(jax.tree.leaves(backbone.params)[0].dtype),
            "compute": dataclasses.asdict(self._model.compute),
            "tower": tower,
            "layers": self._model.plan.first_layers()[tower],
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
        if tower == "text":
            return fingerprint(described)
        return fingerprint(described, getattr(self._transform, "preprocess", self._transform))

    def streams(self, split: str, source: Source, stores: Mapping[str, StreamStore]) -> ArraySource:
        """A split's rows, after what the stores lack of it has been computed."""
        rows = self._evaluated(
            source, self._transform, lambda b: {k: a for k, a in b.items() if k not in _REPLACED}, f"reading {split}"
        )
        readable = rows.pop("index")
        found = {}
        if "vision" in stores:
            fields = getattr(self._transform, "image_fields", None) or sorted(source[0])
            keys = digests(Chosen(source, readable), fields)
            stores["vision"].fill(
                keys, lambda places: self._computed("vision", Chosen(source, readable[places]), self._transform, places)
            )
            found["image_stream"] = stores["vision"].rows(keys)
        if "text" in stores:
            keys = digests_of_rows(rows["tokens"], rows["text_mask"])
            texts = ArraySource({name: rows[name] for name in ("tokens", "text_mask")})
            stores["text"].fill(keys, lambda places: self._computed("text", Chosen(texts, places), as_rows, places))
            found["text_stream"] = stores["text"].rows(keys)
        return ArraySource(found | rows | {"position": readable})

    def _computed(
        self, tower: str, source: Source, transform: Transform, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The streams of chosen examples, as :meth:`StreamStore.fill` asks for them."""
        program = self._programs[tower]
        rows = self._evaluated(source, transform, lambda b: program(self._params, b), f"frozen {tower} tower")
        (stream,) = (rows[name] for name in rows if name != "index")
        return places[rows["index"]], stream

    def _evaluated(
        self, source: Source, transform: Transform, compute: Callable[[Any], Any], description: str
    ) -> dict[str, np.ndarray]:
        reading = {} if transform is as_rows else self._reading
        pipeline = Pipeline(source, transform, self._batch_size, training=False, **reading)
        return evaluate(pipeline, compute, self._sharding, description=description)
