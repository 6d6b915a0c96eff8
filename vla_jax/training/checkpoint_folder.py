"""The folders of checkpoints: which one is meant, whether it is whole, what it says about itself."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from etils import epath
from orbax.checkpoint import v1 as ocp

from vla_jax.distributed import from_first
from vla_jax.errors import UserError
from vla_jax.training import checksums
from vla_jax.training.checkpoint_metadata import Metadata

ALWAYS_READ = 1 << 28
"""Bytes of leaves that are read however small the checkpoint is: new adapters are zeros in half of their leaves."""

MOST_COMPRESSED = 64
"""Bytes of leaves for each that is stored, beyond :data:`ALWAYS_READ`."""


def context() -> ocp.Context:
    """Orbax's settings: its defaults (zarr 3 in one OCDBT file, compressed), and the data item as plain JSON."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    made = ocp.Context()
    made.checkpointables.registry = registry
    return made


def absolute(folder: str | os.PathLike[str]) -> epath.Path:
    """A folder as Orbax takes it; a path or ``gs://`` address."""
    return epath.Path(folder).expanduser().absolute()


def steps(folder: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder, whole or not, in order.

    A save that was cut off leaves ``STEP.orbax-checkpoint-tmp``, whose name is no number.
    """
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdecimal()) if folder.is_dir() else []


def find(folder: epath.Path, step: int | None) -> epath.Path:
    """The folder of one checkpoint: of ``step``, the newest, or ``folder`` itself if it is one; as the first process
    sees it.

    Raises:
        UserError: if there is none.
    """
    return epath.Path(from_first(lambda: str(_find(folder, step)).encode()).decode())


def _find(folder: epath.Path, step: int | None) -> epath.Path:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a run's checkpoints or of one of them")
    if step is None and (folder / checksums.METADATA).exists():
        return folder
    found = steps(folder)
    if not found or (step is not None and step not in found):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{folder} holds no complete {wanted}; it has steps {found or 'none'}")
    return folder / str(found[-1] if step is None else step)


def check_whole(folder: epath.Path, items: tuple[str, ...] | None = None) -> None:
    """Compares a checkpoint's files with their checksums.

    Args:
        folder: the checkpoint.
        items: the items that are to be read; all if None.

    Raises:
        UserError: on every process, if one differs; it is named, and the newest whole checkpoint before is offered.
    """
    from_first(lambda: _check_whole(folder, items))


def _check_whole(folder: epath.Path, items: tuple[str, ...] | None) -> bytes:
    found = checksums.problem(folder, items)
    if found is None:
        return b""
    before = []
    if folder.name.isdecimal():
        before = [step for step in steps(folder.parent) if step < int(folder.name)]
    whole = (step for step in reversed(before) if checksums.problem(folder.parent / str(step)) is None)
    if (step := next(whole, None)) is not None:
        offer = f"The checkpoint of step {step} before it is whole: to go on from there, delete {folder}"
    else:
        offer = "There is no whole checkpoint before it; to start anew, delete it, or use another work directory"
    raise UserError(f"the checkpoint {folder} is damaged, nothing was loaded: {found}. {offer}")


def read_metadata(folder: epath.Path) -> Metadata:
    """What a checkpoint says about itself.

    Raises:
        UserError: if it does not.
    """
    try:
        checksums.read(folder / checksums.METADATA)  # within bounds, before Orbax reads it without
        with context():
            content = ocp.checkpointables_metadata(folder).custom_metadata
    except UserError:
        raise
    except Exception as error:  # what Orbax makes of metadata that it did not write
        raise UserError(f"{folder} cannot be read as a checkpoint: {error}") from error
    if not content or not isinstance(content, Mapping) or "leaves" not in content:
        raise UserError(f"{folder} was not written by this package: it does not say what it holds")
    try:
        return Metadata.from_json(content)
    except ValueError as error:
        raise UserError(f"{folder} says of itself what cannot be read: {error}; use another checkpoint") from error


def check_size(folder: epath.Path, metadata: Metadata) -> None:
    """Refuses leaves that would take far more memory than the checkpoint has bytes.

    An array of which nothing is stored is read as zeros, so that a few bytes could ask for all memory there is.

    Raises:
        UserError: if they would.
    """
    asked = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in metadata.leaves.values())
    if asked <= ALWAYS_READ:
        return
    stored = checksums.size(folder)
    if asked > ALWAYS_READ + MOST_COMPRESSED * stored:
        raise UserError(
            f"the checkpoint {folder} has {stored:,} bytes and says that its leaves take {asked:,}; no trained weights "
            "can be compressed like that"
        )
