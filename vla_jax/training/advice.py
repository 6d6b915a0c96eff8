"""Says, once each, what usually makes a run slow: waiting for data, compiling again, padding, replicated weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vla_jax import names
from vla_jax.training import compilations
from vla_jax.training.step import Batch

_log = logging.getLogger(__name__)

_WAITED = 0.2  # share of the time spent on waiting for data from which it is worth saying,
_WAITED_SECONDS = 30.0  # and how long that must have been in all: a run of seconds needs no advice
_PADDED = 0.5  # share of a text's places that even the longest text leaves empty
_LOOKS = 3  # logged batches before texts are judged
_HELD = 0.5  # share of a device's memory taken by frozen weights that fsdp would cut


class Advice:
    """Watches a run, at the steps that are logged, for the usual mistakes; each is told once."""

    def __init__(self, start: int = 0) -> None:
        """Args:
        start: the step behind which the run begins.
        """
        self._told: set[str] = set()
        self._compiled = 0
        self._shapes: dict[str | None, Mapping[str, tuple[int, ...]]] = {}
        self._longest, self._looks = 0, 0
        self._waited, self._last_logged = 0.0, start

    def frozen(self, frozen: names.Tree, limit: int | None = None) -> None:
        """Looks at what each device holds of the frozen weights, before training.

        Args:
            frozen: the frozen leaves, placed.
            limit: a device's memory in bytes; asked of the device if None, and nothing is said if it does not know.
        """
        leaves = [leaf for leaf in jax.tree.leaves(frozen) if isinstance(leaf, jax.Array)]
        devices = max((len(leaf.sharding.device_set) for leaf in leaves), default=1)
        if devices == 1:
            return
        stats = jax.local_devices()[0].memory_stats() or {}
        limit = limit or stats.get("bytes_limit")
        held = sum(_held_bytes(leaf) for leaf in leaves)
        whole = sum(leaf.nbytes for leaf in leaves if leaf.sharding.is_fully_replicated)
        if limit and held > _HELD * limit and whole > held / 2:
            self._tell(
                "replicated",
                f"frozen weights take {held / 2**30:.1f} of {limit / 2**30:.1f} GiB on every device, and all "
                f"{devices} devices hold the same; mesh.fsdp={devices} would leave {held / devices / 2**30:.1f} GiB",
            )

    def before_step(self) -> None:
        """Remembers how much was compiled until now."""
        self._compiled = compilations.compiled().total()

    def after_step(self, step: int, batch: Batch) -> None:
        """Looks at whether a step was compiled again; batches of several tasks may each have a program of their own."""
        shapes = {name: array.shape for name, array in batch.items()}
        known = self._shapes.setdefault(getattr(batch, "task", None), shapes)
        if known is shapes or compilations.compiled().total() == self._compiled:
            return
        changed = [
            f"{name} {list(known[name])} and {list(shapes[name])}" for name in known if known[name] != shapes[name]
        ]
        if changed:
            why = f"batches differ in shape ({'; '.join(changed)}); pad them to one"
        else:
            why = "shapes are as before, so that dtypes or placements of what the step is given differ"
        self._tell("recompiled", f"step {step} was compiled again, which takes as long as many steps: {why}")

    def logged(self, step: int, record: Mapping[str, Any], batch: Batch) -> None:
        """Looks at a logged step: the share of waiting, and the batch's texts."""
        share = record.get("data_wait_share", 0.0)
        if share > _WAITED:
            self._waited += share * record["seconds_per_step"] * (step - self._last_logged)
        self._last_logged = step
        if self._waited > _WAITED_SECONDS:
            streams = "" if "image_stream" in batch else "keep what frozen blocks compute of the data (streams), "
            self._tell(
                "waiting",
                f"until step {step} the device waited {self._waited:.0f} s for data, of late {100 * share:.0f} % of "
                f"the time; give the pipeline worker processes, {streams}or make pictures smaller on disk",
            )
        if "text_mask" not in batch:
            return
        mask = batch["text_mask"]
        rows = [np.asarray(shard.data) for shard in mask.addressable_shards] if isinstance(mask, jax.Array) else [mask]
        self._longest = max([self._longest, *(int(part.sum(-1).max(initial=0)) for part in rows)])
        self._looks += 1
        room = mask.shape[-1]
        if self._looks >= _LOOKS and self._longest <= (1 - _PADDED) * room:
            self._tell(
                "padding",
                f"the longest of the texts looked at until step {step} has {self._longest} of {room} tokens; a text "
                f"length of {math.ceil(1.25 * self._longest)} would save most of what is computed for padding",
            )

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("%s", text)


def _held_bytes(leaf: jax.Array) -> int:
    """Bytes of a leaf on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
