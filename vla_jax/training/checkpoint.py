"""Checkpoints that hold what was trained and nothing else, and loading that never guesses.

A run's checkpoint is ``folder/STEP`` with three items: ``adapters`` (the trained leaves: adapters, heads, and backbone
leaves only where those were trained), ``optimizer``, and ``data`` (where each process stood in its data). Its metadata
says what the leaves belong to. The metadata is compared before any array is read, so every mismatch is named; and every
file is compared with its checksum, so nothing that was damaged is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from vla_jax import distributed, names
from vla_jax.errors import UserError
from vla_jax.training import checksums
from vla_jax.training.checkpoint_folder import absolute, check_size, check_whole, context, find, read_metadata, steps
from vla_jax.training.checkpoint_metadata import Identity, Metadata, check, leaves_of
from vla_jax.training.data_state import data_state_text, own_data_state
from vla_jax.training.metrics import package_version
from vla_jax.training.step import TrainState


class Restored(NamedTuple):
    """A checkpoint as :meth:`Checkpointer.restore` returns it."""

    state: TrainState
    data_state: Any
    metadata: Metadata


class SaveError(UserError):
    """A checkpoint could not be saved; those before it are as they were."""


class Checkpointer:
    """The checkpoints of one run: saved in the background or at once, the newest ``keep`` of them kept.

    Use it as a context manager: leaving it waits for the last save, unless one of several processes failed. All of
    them call every method, and the folder is one they share.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: Identity, *, every: int, keep: int = 2, wait: bool = False
    ):
        """Opens the folder, makes it if missing and removes what a killed process left half-written.

        Args:
            folder: where the checkpoints go, a path or ``gs://`` address.
            identity: what the leaves belong to.
            every: :meth:`save` saves at multiples of this many steps.
            keep: how many of the newest checkpoints stay.
            wait: whether :meth:`save` returns when the checkpoint is complete on disk. A process that is killed has
                then lost ``every`` steps at most; in the background, also those that ran while it was being saved.

        Raises:
            UserError: if ``every`` or ``keep`` is not positive, or the folder cannot be used.
        """
        if every < 1 or keep < 1:
            raise UserError(f"checkpoints need every >= 1 and keep >= 1; given every={every}, keep={keep}")
        self.folder = absolute(folder)
        self.identity = identity
        self._every, self._keep, self._wait = every, keep, wait
        self._latest: int | None = None
        self._told: dict[str, Any] = {}
        self._orbax: ocp.training.Checkpointer | None = None
        self._open()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # With an error on its way another process may be gone, and a save in progress would wait for it.
        if kind is None or issubclass(kind, SystemExit) or not distributed.several():
            self.close()

    def close(self) -> None:
        """Waits for the save in progress and lets go of the folder.

        Raises:
            SaveError: if that save failed.
        """
        if self._orbax is not None:
            try:
                self._orbax.close()
            except Exception as error:
                raise self._failed_here(self._latest, error) from error

    def wait(self) -> None:
        """Waits until the save in progress, if any, is complete on disk.

        Raises:
            SaveError: on every process, if that save failed on one of them.
        """
        if self._orbax is None:
            return
        problem, cause = "", None
        try:
            self._orbax.wait()
        except Exception as error:  # whatever the file system, Orbax or TensorStore make of it
            problem, cause = _shown(error), error
        if found := next(filter(None, distributed.gather(problem)), None):
            raise self._failed(self._latest, found) from cause

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, one that is being saved included, or None."""
        return self._latest

    def should_save(self, step: int) -> bool:
        """Whether :meth:`save` would save at this step without being forced to."""
        return step % self._every == 0 and step != self._latest

    def save(self, step: int, state: TrainState, data_state: Any = None, *, force: bool = False) -> bool:
        """Saves if it is time to; the state's buffers may be given away when the call returns.

        Args:
            step: the number of steps taken.
            state: the training state.
            data_state: where the data stood after this step on this process: bytes or JSON-able. What it has under
                ``position``, if that is the same on all processes, lets another number of processes go on from it.
            force: save although it is not time to. A step that is already saved is not saved twice.

        Returns:
            Whether a save began; with ``wait``, whether it was made.

        Raises:
            SaveError: if the save before this one failed, or this one cannot begin; with ``wait``, also if it failed.
                The next call tries anew.
            UserError: likewise, where one of several processes cannot begin.
        """
        if not (self.should_save(step) or (force and step != self._latest)):
            return False
        self.wait()
        if self._orbax is None:
            self._open()
        metadata = Metadata(
            self.identity, step, package_version(), leaves_of(state.trainable), leaves_of(state.optimizer)
        )
        items = {"adapters": state.trainable, "data": {"processes": distributed.gather(data_state_text(data_state))}}
        if metadata.optimizer:  # Plain SGD keeps nothing, and Orbax takes no empty item.
            items["optimizer"] = state.optimizer
        self._latest, self._told = step, metadata.to_json()
        try:
            self._orbax.save_checkpointables_async(step, items, force=True, custom_metadata=self._told)
        except Exception as error:
            raise self._failed_here(step, error) from error
        if self._wait:
            self.wait()
        return True

    def _open(self) -> None:
        made = context()
        made.asynchronous.post_finalization_callback = lambda: self._write_checksums()  # Orbax copies a method's object
        # Where a folder cannot be made, threads that were to fill it would wait for it, and the process for them.
        made.asynchronous.create_directories_asynchronously = False
        made.asynchronous.timeout_secs = 600  # for which processes wait for one that failed to save
        try:
            self._orbax = ocp.training.Checkpointer(
                self.folder,
                context=made,
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        except (OSError, ValueError) as error:  # the latter of metadata that are none
            raise SaveError(f"checkpoints cannot be kept in {self.folder}: {error}; choose another folder") from error
        self._look()

    def _look(self) -> None:
        """Sees which checkpoint is the newest, as the first process sees it."""
        self._latest = json.loads(
            distributed.from_first(lambda: json.dumps(max(steps(self.folder), default=None)).encode())
        )

    def _write_checksums(self) -> None:
        """Called by Orbax on one process when all files are written, before the checkpoint gets its name."""
        unnamed = self.folder / f"{self._latest}.orbax-checkpoint-tmp"
        checksums.write(unnamed if unnamed.exists() else self.folder / str(self._latest), self._told)

    def _failed_here(self, step: int | None, error: Exception) -> UserError:
        """What to raise where one of several processes fails and cannot tell the others, which wait for it."""
        if distributed.several():
            return UserError(f"the checkpoint of step {step} could not be saved in {self.folder}: {_shown(error)}")
        return self._failed(step, _shown(error))

    def _failed(self, step: int | None, problem: str) -> SaveError:
        """What to raise where all processes know of the failure; makes the next save possible.

        Orbax would raise an old failure again.
        """
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = None
        # On a full disk what was written in vain would be in the way.
        distributed.remove_folder(self.folder / f"{step}.orbax-checkpoint-tmp")
        self._look()
        kept = "there is none before it" if self._latest is None else f"that of step {self._latest} is still good"
        return SaveError(
            f"the checkpoint of step {step} could not be saved in {self.folder}: {problem}; {kept}. Make room there, "
            "or mend the folder"
        )

    def restore(self, abstract_state: TrainState, step: int | None = None) -> Restored:
        """Reads a checkpoint onto the devices and in the dtypes of ``abstract_state``.

        Args:
            abstract_state: a state of arrays or of ``jax.ShapeDtypeStruct``; its shardings need not be those in
                which the checkpoint was saved.
            step: which checkpoint; the newest if left out.

        Returns:
            The state, this process's data state, and the metadata. Where another number of processes saved it, the data
            state is ``{"position": ...}``, what they had there.

        Raises:
            UserError: if there is no such checkpoint, a file of it is damaged, or it does not fit; every leaf or field
                that differs is named.
        """
        folder = find(self.folder, step)
        check_whole(folder)
        metadata = read_metadata(folder)
        check(folder, metadata, self.identity, leaves_of(abstract_state.trainable), leaves_of(abstract_state.optimizer))
        abstract = {"adapters": _abstract(abstract_state.trainable), "data": None}
        if metadata.optimizer:
            abstract["optimizer"] = _abstract(abstract_state.optimizer)
        with context():
            items = ocp.load_checkpointables(folder, abstract)
        taken = _abstract(abstract_state.step)
        state = dataclasses.replace(
            abstract_state,
            step=jax.device_put(np.asarray(metadata.step, taken.dtype), taken.sharding),
            trainable=items["adapters"],
            optimizer=items.get("optimizer", abstract_state.optimizer),
        )
        return Restored(state, own_data_state(folder, items["data"]["processes"]), metadata)


def save_adapters(folder: str | os.PathLike[str], trainable: names.Tree, identity: Identity, step: int) -> None:
    """Writes the trained leaves alone, in the format that :func:`load_adapters` reads, and waits for it.

    Args:
        folder: the checkpoint's own folder; one that exists is replaced.
        trainable: the trained leaves.
        identity: what they belong to.
        step: the number of training steps behind them.
    """
    metadata = Metadata(identity, step, package_version(), leaves_of(trainable), {})
    folder = absolute(folder)
    told = metadata.to_json()
    with context():
        ocp.save_checkpointables(folder, {"adapters": trainable}, overwrite=True, custom_metadata=told)
    if distributed.is_first():
        checksums.write(folder, told)


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
        UserError: if there is no such checkpoint, a file of it is damaged, or it does not fit; every leaf or field that
            differs is named.
    """
    found = find(absolute(folder), step)
    check_whole(found, ("adapters",))
    metadata = read_metadata(found)
    check_size(found, metadata)
    check(found, metadata, identity, None if expected is None else leaves_of(expected), None)
    placed = names.flatten(shardings) if isinstance(shardings, Mapping) else dict.fromkeys(metadata.leaves, shardings)
    if missing := sorted(metadata.leaves.keys() - placed.keys()):
        raise UserError(f"no sharding for {missing} of {found}; give one sharding, or one for every leaf")

    def target(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        cast = dtype is not None and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if cast else leaf.dtype, sharding=placed[name])

    abstract = names.unflatten({name: target(name, leaf) for name, leaf in metadata.leaves.items()})
    try:
        with context():
            return ocp.load_checkpointables(found, {"adapters": _abstract(abstract)})["adapters"], metadata
    except Exception as error:  # of Orbax and TensorStore, where what is stored is not what the metadata say
        raise UserError(f"the arrays of the checkpoint {found} cannot be read: {_shown(error)}") from error


def _abstract(tree: Any) -> Any:
    """Shapes with dtypes and shardings; the default device where a leaf has no sharding."""

    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(of, tree)


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) > 400:  # what TensorStore tried to do stands at the beginning, and why it could not at the end
        text = f"{text[:200]} ... {text[-180:]}"
    return f"{type(error).__name__}: {text}"
