"""Checkpoints that hold what was trained and nothing else, and loading that never guesses.

A run's checkpoint is ``folder/STEP`` with three items: ``adapters`` (the trained leaves: adapters, heads, and backbone
leaves only where those were trained), ``optimizer``, and ``data`` (where each process stood in its data). Its metadata
says what the leaves belong to. The metadata is compared before any array is read, so every mismatch is named.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from vla_jax import names
from vla_jax.errors import UserError
from vla_jax.training.checkpoint_metadata import Identity, Metadata, check, leaves_of
from vla_jax.training.metrics import package_version
from vla_jax.training.step import TrainState


class Restored(NamedTuple):
    """A checkpoint as :meth:`Checkpointer.restore` returns it."""

    state: TrainState
    data_state: Any
    metadata: Metadata


class Checkpointer:
    """The checkpoints of one run: saved in the background, the newest ``keep`` of them kept.

    Use it as a context manager: leaving it waits for the last save. In a run of several processes all of them call
    every method, and the folder is one they share.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Identity, *, every: int, keep: int = 2):
        """Opens the folder, makes it if missing and removes what a killed process left half-written.

        Args:
            folder: where the checkpoints go, a path or ``gs://`` address.
            identity: what the leaves belong to.
            every: :meth:`save` saves at multiples of this many steps, and on preemption.
            keep: how many of the newest checkpoints stay.

        Raises:
            UserError: if ``every`` or ``keep`` is not positive.
        """
        if every < 1 or keep < 1:
            raise UserError(f"checkpoints need every >= 1 and keep >= 1; given every={every}, keep={keep}")
        self.folder = _path(folder)
        self.identity = identity
        self._every = every
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            context=_context(),
            save_decision_policy=ocp.training.save_decision_policies.PreemptionCheckpointingPolicy(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save in progress and lets go of the folder."""
        self._orbax.close()

    def wait(self) -> None:
        """Waits until the save in progress, if any, is complete on disk."""
        self._orbax.wait()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, one that is being saved included, or None."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def should_save(self, step: int) -> bool:
        """Whether :meth:`save` would save at this step without being forced to."""
        # Asking Orbax takes about a millisecond, and a process alone is told of no preemption.
        due = step % self._every == 0 or (jax.process_count() > 1 and self._orbax.should_save(step))
        return due and step != self.latest_step()

    def save(self, step: int, state: TrainState, data_state: Any = None, *, force: bool = False) -> bool:
        """Saves in the background if it is time to; the state's buffers may be given away when the call returns.

        Args:
            step: the number of steps taken.
            state: the training state.
            data_state: where the data stood after this step on this process: bytes or JSON-able.
            force: save although it is not time to. A step that is already saved is not saved twice.

        Returns:
            Whether a save began.
        """
        if not (self.should_save(step) or (force and step != self.latest_step())):
            return False
        metadata = Metadata(
            self.identity, step, package_version(), leaves_of(state.trainable), leaves_of(state.optimizer)
        )
        items = {"adapters": state.trainable, "data": {"processes": _gather(_encode(data_state))}}
        if metadata.optimizer:  # Plain SGD keeps nothing, and Orbax takes no empty item.
            items["optimizer"] = state.optimizer
        self._orbax.save_checkpointables_async(step, items, force=True, custom_metadata=metadata.to_json())
        return True

    def restore(self, abstract_state: TrainState, step: int | None = None) -> Restored:
        """Reads a checkpoint onto the devices and in the dtypes of ``abstract_state``.

        Args:
            abstract_state: a state of arrays or of ``jax.ShapeDtypeStruct``; its shardings need not be those in
                which the checkpoint was saved.
            step: which checkpoint; the newest if left out.

        Returns:
            The state, this process's data state, and the metadata.

        Raises:
            UserError: if there is no such checkpoint or it does not fit; every leaf or field that differs is named.
        """
        folder = _find(self.folder, self.latest_step() if step is None else step)
        metadata = _read_metadata(folder)
        check(folder, metadata, self.identity, leaves_of(abstract_state.trainable), leaves_of(abstract_state.optimizer))
        abstract = {"adapters": _abstract(abstract_state.trainable), "data": None}
        if metadata.optimizer:
            abstract["optimizer"] = _abstract(abstract_state.optimizer)
        with _context():
            items = ocp.load_checkpointables(folder, abstract)
        states = items["data"]["processes"]
        if len(states) != jax.process_count():
            raise UserError(
                f"{folder} was saved by {len(states)} processes and is resumed by {jax.process_count()}, which would "
                f"read other data; resume with {len(states)} processes, or load only its adapters with load_adapters"
            )
        taken = _abstract(abstract_state.step)
        state = dataclasses.replace(
            abstract_state,
            step=jax.device_put(np.asarray(metadata.step, taken.dtype), taken.sharding),
            trainable=items["adapters"],
            optimizer=items.get("optimizer", abstract_state.optimizer),
        )
        return Restored(state, _decode(states[jax.process_index()]), metadata)


def save_adapters(folder: str | os.PathLike[str], trainable: names.Tree, identity: Identity, step: int) -> None:
    """Writes the trained leaves alone, in the format that :func:`load_adapters` reads, and waits for it.

    Args:
        folder: the checkpoint's own folder; one that exists is replaced.
        trainable: the trained leaves.
        identity: what they belong to.
        step: the number of training steps behind them.
    """
    metadata = Metadata(identity, step, package_version(), leaves_of(trainable), {})
    with _context():
        ocp.save_checkpointables(
            _path(folder), {"adapters": trainable}, overwrite=True, custom_metadata=metadata.to_json()
        )


def load_adapters(
    folder: str | os.PathLike[str],
    *,
    step: int | None = None,
    identity: Identity | None = None,
    expected: names.Tree | None = None,
    shardings: Sharding | names.Tree | None = None,
    dtype: Any = None,
) -> tuple[dict[str, Any], Metadata]:
    """Reads the trained leaves alone, without optimiser and data, on any mesh and in any dtype.

    Args:
        folder: what :func:`save_adapters` wrote, one step of a run, or a run's checkpoints.
        step: which of a run's checkpoints; the newest if left out.
        identity: what the leaves must belong to; not compared if left out.
        expected: the leaves that must be there, no more and no fewer, as arrays or shapes; not compared if left out.
        shardings: one sharding for all leaves or a nested dict with one for each; the default device if left out.
        dtype: the dtype of floating leaves; as saved if left out.

    Returns:
        The trained leaves as a nested dict, and the metadata.

    Raises:
        UserError: if there is no such checkpoint or it does not fit; every leaf or field that differs is named.
    """
    found = _find(_path(folder), step)
    metadata = _read_metadata(found)
    check(found, metadata, identity, None if expected is None else leaves_of(expected), None)
    placed = names.flatten(shardings) if isinstance(shardings, Mapping) else dict.fromkeys(metadata.leaves, shardings)
    if missing := sorted(metadata.leaves.keys() - placed.keys()):
        raise UserError(f"no sharding for {missing} of {found}; give one sharding, or one for every leaf")

    def target(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        cast = dtype is not None and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if cast else leaf.dtype, sharding=placed[name])

    abstract = names.unflatten({name: target(name, leaf) for name, leaf in metadata.leaves.items()})
    with _context():
        return ocp.load_checkpointables(found, {"adapters": _abstract(abstract)})["adapters"], metadata


def _context() -> ocp.Context:
    """Orbax's settings: its defaults (zarr 3 in one OCDBT file, compressed), and the data item as plain JSON."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _path(folder: str | os.PathLike[str]) -> epath.Path:
    return epath.Path(folder).expanduser().absolute()


def _find(folder: epath.Path, step: int | None) -> epath.Path:
    """The folder of one complete checkpoint: of ``step``, the newest, or ``folder`` itself if it is one."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a run's checkpoints or of one of them")
    if step is None and _is_complete(folder):
        return folder
    # A save that was cut off leaves "STEP.orbax-checkpoint-tmp", whose name is no number.
    complete = {int(f.name): f for f in folder.iterdir() if f.name.isdecimal() and _is_complete(f)}
    if not complete or (step is not None and step not in complete):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{folder} holds no complete {wanted}; it has steps {sorted(complete) or 'none'}")
    return complete[max(complete) if step is None else step]


def _is_complete(folder: epath.Path) -> bool:
    # Not ocp.is_orbax_checkpoint, which also accepts an empty folder.
    return (folder / "_CHECKPOINT_METADATA").exists()


def _read_metadata(folder: epath.Path) -> Metadata:
    with _context():
        content = ocp.checkpointables_metadata(folder).custom_metadata
    if not content or "leaves" not in content:
        raise UserError(f"{folder} was not written by this package: it does not say what it holds")
    return Metadata.from_json(content)


def _abstract(tree: Any) -> Any:
    """Shapes with dtypes and shardings; the default device where a leaf has no sharding."""

    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(of, tree)


def _encode(state: Any) -> str:
    return json.dumps({"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"json": state})


def _decode(text: str) -> Any:
    content = json.loads(text)
    return base64.b64decode(content["base64"]) if "base64" in content else content["json"]


def _gather(text: str) -> list[str]:
    """Every process's text, in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(own.size))  # [processes]
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: own.size] = own
    return [bytes(row[:n]).decode() for row, n in zip(multihost_utils.process_allgather(padded), lengths, strict=True)]
