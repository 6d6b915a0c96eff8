"""The device mesh: its axes, the shardings of batches and trees, and putting arrays there.

One code path serves a laptop and a pod: :func:`jax.jit` over a mesh with the axes ``data``, ``fsdp`` and ``tensor``,
all of them Auto, so that the compiler places the collectives and every loss stays a plain function of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vla_jax.errors import UserError
from vla_jax.mesh import AXES, BATCH_AXES, as_read


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; one axis may be -1, which takes the devices that are left.

    Attributes:
        data: copies of the model, each with its own part of the batch.
        fsdp: parts that parameters and batch are both cut into; parameters are gathered where they are used.
        tensor: parts that the products inside a block are cut into; the batch is not cut along it.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size != -1 and size < 1:
                raise UserError(f"mesh axis {axis!r} is {size}; allowed: a positive number, or -1 for what is left")
        free = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(free) > 1:
            raise UserError(f"mesh axes {' and '.join(free)} are all -1; only one of them can take what is left")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """The sizes of the three axes on so many devices.

        Raises:
            UserError: if the sizes do not multiply to the number of devices.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        given = math.prod(size for size in sizes if size != -1)
        shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        if -1 in sizes:
            if devices % given:
                raise UserError(
                    f"mesh {shown} does not fit {devices} devices: the given axes multiply to {given}, which does not "
                    f"divide {devices}; choose sizes whose product is one of {_divisors(devices)}"
                )
            sizes[sizes.index(-1)] = devices // given
        elif given != devices:
            raise UserError(
                f"mesh {shown} holds {given} devices, but there are {devices}; set one axis to -1 to take what is "
                f"left, or let the process see only {given} of them"
            )
        return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration, with Auto axes named ``data``, ``fsdp`` and ``tensor``.

    Args:
        config: the size of each axis.
        devices: the devices to use; all devices of all processes if left out.

    Raises:
        UserError: if the axes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the first axis cut over ``data`` and ``fsdp``, whole along ``tensor``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Checks that a global batch can be cut into equal parts.

    Raises:
        UserError: if it cannot; the message names the nearest sizes that can. Or if processes cannot share a batch on
            this mesh, see :func:`vla_jax.mesh.as_read`.
    """
    as_read(batch_sharding(mesh))
    parts = batch_parts(mesh)
    if batch_size < 1 or batch_size % parts:
        below = max(batch_size, 0) // parts * parts
        near = [size for size in (below, below + parts) if size > 0]
        axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
        raise UserError(
            f"batch size {batch_size} cannot be cut into {parts} equal parts (mesh {axes}); "
            f"nearest sizes that can: {' and '.join(map(str, near))}"
        )


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays where their shardings say.

    Every process must hold the same values; of an array on the host each device receives only its own part.

    Args:
        tree: arrays, of NumPy or JAX.
        shardings: one sharding for all, or a tree of the same structure.

    Returns:
        The tree as JAX arrays. An array that is there already is handed back as it is, without a copy.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        # What this process holds whole needs no other process: device_put would compare the values of all of them.
        own = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
        if isinstance(leaf, jax.Array) and (sharding.is_fully_addressable or not own):
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
