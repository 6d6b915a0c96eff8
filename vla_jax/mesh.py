"""The axes of the device mesh, how processes share a batch on it, and the one hint that models give the compiler."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from vla_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def keep_batch_cut(x: jax.Array) -> jax.Array:
    """Keeps an activation cut along its batch, and whole in every other dimension, over the mesh that is set.

    To be called where a block begins. Without it the compiler may follow the weights instead: under ``fsdp`` it then
    cuts the width and sums activations in every block, where it should gather one layer's weights; and under
    ``tensor`` it may leave a cut behind the pair of products that needs it.

    Args:
        x: [batch, ...].

    Returns:
        The same values. Where no mesh with these axes is set (:func:`jax.set_mesh`), or where they do not divide the
        batch, the array itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names) or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def as_read(sharding: Sharding) -> Sharding:
    """How a batch lies while each process holds the rows that it has read itself, no row in two processes.

    That is how steps take it, unless the mesh's axis ``tensor``, along which a batch is whole, reaches over processes:
    then the rows are cut along those processes too, on the same devices in the same order.

    Args:
        sharding: how steps take a batch.

    Raises:
        UserError: if processes have unequal parts of that axis.
    """
    if not isinstance(sharding, NamedSharding) or sharding.mesh.axis_names != AXES:
        return sharding
    mesh = sharding.mesh
    tensor = mesh.shape["tensor"]
    rows = [[device.process_index for device in row] for row in mesh.devices.reshape(-1, tensor)]
    if all(len(set(row)) == 1 for row in rows):
        return sharding
    over = len(set(rows[0]))
    within = tensor // over
    processes = [row[start] for row in rows for start in range(0, tensor, within)]  # one of each run of devices
    even = [process for row in rows for process in row] == [process for process in processes for _ in range(within)]
    if not even or len(set(processes)) < len(processes):
        raise UserError(
            f"mesh axis 'tensor' is {tensor}, and a process has {len(mesh.local_devices)} devices: some processes "
            "would have more parts of it than others. Choose a divisor or a multiple of a process's devices"
        )
    axes = (*BATCH_AXES, "process", "tensor")
    devices = mesh.devices.reshape(*mesh.devices.shape[:2], over, within)
    cut = Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))
    return NamedSharding(cut, PartitionSpec(axes[:3]))
