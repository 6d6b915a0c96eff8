"""Adapters bound to a batch: parameters travel through the scan with the blocks, routes pick each example's own.

Every method goes through the one :func:`apply`: a module written for one example and one layer, mapped over the batch.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

from vla_jax.errors import UserError
from vla_jax.names import Tree
from vla_jax.slots import Joint, Occupancy, Segment, Slot, empty_slot

if TYPE_CHECKING:
    from vla_jax.adapters.plan import Group, Plan


@flax.struct.dataclass
class BoundAdapters:
    """A plan's parameters, as a backbone takes them.

    Attributes:
        params: the tree below ``adapters/``.
        plan: where they belong; static.
    """

    params: Tree
    plan: Plan = flax.struct.field(pytree_node=False)

    def occupy(self, route: jax.Array | None, key: jax.Array | None) -> Occupancy:
        """Binds the adapters to a batch; see :class:`vla_jax.slots.Adapters`."""
        members = [_Member(group, _at(self.params, group.path), _layer_keys(group, key)) for group in self.plan.groups]
        embed, segments = {}, {}
        for tower, depth in self.plan.depths:
            own = [member for member in members if tower in member.group.towers and not member.group.method.joint]
            at_start = [member for member in own if member.group.slot == "embed"]
            in_blocks = [member for member in own if member.group.slot != "embed"]
            first = _tree(at_start, tower, 0, 1)
            embed[tower] = _fill(at_start, route)(jax.tree.map(lambda a: a[0], first)) if at_start else empty_slot
            segments[tower] = _segments(in_blocks, tower, depth, route)
        joints = [
            Joint(vision, text, functools.partial(_join, member, index, route))
            for member in members
            if member.group.method.joint
            for index, (vision, text) in enumerate(zip(*member.group.layers, strict=True))
        ]
        # Stable, so that joints of one pair act in the order of their placements.
        joints.sort(key=lambda joint: (joint.vision_layer, joint.text_layer))
        return Occupancy(embed, segments, tuple(joints))


class _Member:
    """A group with its parameters and its dropout keys, both stacked over its layers."""

    def __init__(self, group: Group, params: Any, keys: jax.Array | None):
        self.group = group
        self.tree = {"params": params} | ({} if keys is None else {"keys": keys})

    def index(self, tower: str, layer: int) -> int | None:
        """Where in the stack a tower's layer stands; None where the group does not serve it."""
        served = self.group.layers[self.group.towers.index(tower)]
        return served.index(layer) if layer in served else None


def apply(
    call: Callable[..., Any],
    params: Any,
    arrays: Sequence[Any],
    outputs: Any,
    route: jax.Array | None,
    stacked: bool,
    key: jax.Array | None,
) -> Any:
    """Applies a module written for one example to a batch.

    Args:
        call: ``call(params, key, *example) -> output``.
        params: one layer's parameters; ``[tasks, ...]`` where ``stacked``.
        arrays: the module's inputs, ``[batch, ...]``.
        outputs: what comes back, unchanged, for examples routed to -1.
        route: ``int32 [batch]``, or None. A route beyond the last task turns the example's output into NaN, which a
            training loop stops at, instead of borrowing another task's weights.
        stacked: whether the parameters have a task axis.
        key: the layer's dropout key, or None; each example gets its own, so that sharding the batch changes nothing.
    """
    if stacked and route is None:
        raise UserError("adapters stacked over tasks need a route, int32 [batch]: each example's task, -1 for none")
    batch = jax.tree.leaves(arrays)[0].shape[0]
    keys = None if key is None else jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(batch))
    if stacked:
        chosen = jnp.maximum(route, 0)
        params = jax.tree.map(lambda a: a.at[chosen].get(mode="fill", fill_value=jnp.nan), params)
    axes = (0 if stacked else None, None if keys is None else 0) + (0,) * len(arrays)
    result = jax.vmap(call, in_axes=axes)(params, keys, *arrays)
    if route is None:
        return result
    if jax.tree.map(jnp.shape, result) != jax.tree.map(jnp.shape, outputs):
        raise UserError("an adapter that adds tokens cannot be routed: the examples it is off for lack them")
    on = lambda a: (route >= 0).reshape((-1,) + (1,) * (a.ndim - 1))  # noqa: E731
    return jax.tree.map(lambda new, old: jnp.where(on(new), new, old), result, outputs)


def _call(group: Group) -> Callable[..., Any]:
    module = group.method.module()

    def call(params: Any, key: jax.Array | None, *example: jax.Array) -> Any:
        return module.apply({"params": params}, *example, rngs=None if key is None else {"dropout": key})

    return call


def _fill(members: Sequence[_Member], route: jax.Array | None) -> Callable[[Any], Slot]:
    """What makes a block's slots from its layer's slice of :func:`_tree`."""
    calls = [_call(member.group) for member in members]

    def fill(tree: Any) -> Slot:
        def slot(name: str, x: jax.Array, y: Any) -> Any:
            for member, call, layer in zip(members, calls, tree, strict=True):
                if member.group.slot == name:
                    stacked = member.group.tasks > 0
                    y = apply(call, layer["params"], (x, y), y, route, stacked, layer.get("keys"))
            return y

        return slot

    return fill


def _segments(members: Sequence[_Member], tower: str, depth: int, route: jax.Array | None) -> tuple[Segment, ...]:
    """Cuts a tower where the set of groups that serve a layer changes."""
    serving = [tuple(m for m in members if m.index(tower, layer) is not None) for layer in range(depth)]
    cuts = [0] + [k for k in range(1, depth) if serving[k] != serving[k - 1]] + [depth]
    return tuple(
        Segment(start, stop, _tree(serving[start], tower, start, stop), _fill(serving[start], route))
        for start, stop in itertools.pairwise(cuts)
    )


def _tree(members: Sequence[_Member], tower: str, start: int, stop: int) -> tuple[Any, ...]:
    """The members' parameters and keys for consecutive layers of a tower, sliced only where they must be."""
    trees = []
    for member in members:
        first, count = member.index(tower, start), stop - start
        cut = slice(first, first + count)
        tree = member.tree if count == member.group.depth else jax.tree.map(lambda a, cut=cut: a[cut], member.tree)
        if "keys" in tree:
            # Tied towers share weights, never the places that dropout picks.
            salt = zlib.crc32(tower.encode())
            tree = tree | {"keys": jax.vmap(lambda k, salt=salt: jax.random.fold_in(k, salt))(tree["keys"])}
        trees.append(tree)
    return tuple(trees)


def _join(
    member: _Member, index: int, route: jax.Array | None, image: jax.Array, text: jax.Array, words: jax.Array
) -> tuple[jax.Array, jax.Array]:
    layer = jax.tree.map(lambda a: a[index], member.tree)
    arrays, stacked = (image, text, words), member.group.tasks > 0
    return apply(_call(member.group), layer["params"], arrays, (image, text), route, stacked, layer.get("keys"))


def _layer_keys(group: Group, key: jax.Array | None) -> jax.Array | None:
    """One dropout key a layer, or None where the method or the pass uses none."""
    if key is None or not group.method.uses_dropout:
        return None
    return jax.random.split(jax.random.fold_in(key, zlib.crc32("/".join(group.path).encode())), group.depth)


def _at(tree: Tree, path: Sequence[str]) -> Any:
    return functools.reduce(lambda node, part: node[part], path, tree)
