"""Adapters bound to a batch: parameters travel through the scan with the blocks, routes pick each example's own.

Every method goes through the one :func:`apply`: a module written for one example and one layer, mapped over the batch.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import (
    SINGLE_SLOTS,
    Inserted,
    Joint,
    KeysValues,
    LinearWeights,
    Occupancy,
    Segment,
    Slot,
    empty_slot,
)

if TYPE_CHECKING:
    from vla_jax.adapters.plan import Group, Plan

Readings = dict[str, jax.Array]


@flax.struct.dataclass
class BoundAdapters:
    """A plan's parameters, as a backbone takes them.

    Attributes:
        params: the tree below ``adapters/``.
        dropped: ``int32 []``, adapters of the first so many layers are switched off; or None.
        plan: where they belong; static.
        inspect: whether modules hand out what they sow; static.
    """

    params: Tree
    dropped: jax.Array | None
    plan: Plan = flax.struct.field(pytree_node=False)
    inspect: bool = flax.struct.field(pytree_node=False, default=False)

    def occupy(self, route: jax.Array | None, key: jax.Array | None) -> Occupancy:
        """Binds the adapters to a batch; see :class:`vla_jax.slots.Adapters`."""
        flat = flatten(self.params)
        _check_route(route, self.plan)
        batch = _Batch(route, self.dropped, self.inspect)
        members = [_Member(group, flat, batch, key) for group in self.plan.groups]
        insert, embed, segments, side, projection = {}, {}, {}, {}, {}
        for tower, depth in self.plan.depths:
            own = [member for member in members if member.group.site.tower == tower]
            single = {slot: [m for m in own if m.group.site.slot == slot] for slot in SINGLE_SLOTS}
            if single["tokens"]:
                insert[tower] = functools.partial(_insert, single["tokens"])
            if single["side"]:
                side[tower] = _Beside(single["side"])
            embed[tower] = _single(single["embed"])
            projection[tower] = _single(single["projection"])
            in_blocks = [member for member in own if member.group.site.slot not in SINGLE_SLOTS]
            segments[tower] = _segments(in_blocks, depth)
        joints = [
            Joint(vision, text, functools.partial(_join, member, index))
            for member in members
            if member.group.method.joint
            for index, (vision, text) in enumerate(zip(*member.group.layers, strict=True))
        ]
        # Stable, so that joints of one pair act in the order of their placements.
        joints.sort(key=lambda joint: (joint.vision_layer, joint.text_layer))
        conditioned = any(group.method.conditioned for group in self.plan.groups)
        return Occupancy(insert, embed, segments, tuple(joints), side, projection, conditioned)


def _check_route(route: jax.Array | None, plan: Plan) -> None:
    """Refuses tasks that no adapter has where the route is known; in a compiled program such examples become NaN."""
    counts = [group.tasks for group in plan.groups if group.tasks]
    if route is None or not counts or isinstance(route, jax.core.Tracer) or route.ndim != 1:
        return
    strange = np.setdiff1d(np.asarray(route), np.arange(-1, max(counts)))
    if strange.size:
        raise UserError(
            f"the route names task {strange[0]}; allowed: -1 (the bare backbone) to {max(counts) - 1} of these adapters"
        )


class _Batch:
    """What all adapters of one forward pass have in common."""

    def __init__(self, route: jax.Array | None, dropped: jax.Array | None, inspect: bool):
        self.route, self.dropped, self.inspect = route, dropped, inspect

    def on(self, layer: jax.Array | None, batch: int) -> jax.Array | None:
        """For which examples an adapter of a layer acts, ``bool [batch]``; None for all of them."""
        on = None if self.route is None else _acting(self.route)
        if layer is None:
            return on
        kept = jnp.broadcast_to(layer >= self.dropped, (batch,))
        return kept if on is None else on & kept


class _Member:
    """A group with what it needs of one forward pass.

    Attributes:
        group: the group.
        shared: parameters by name that all of its layers share.
        tree: what belongs to one layer, stacked over the group's layers: parameters, and with dropout their keys, and
            their number where some layers may be switched off.
    """

    def __init__(self, group: Group, flat: Mapping[str, jax.Array], batch: _Batch, key: jax.Array | None):
        self.group, self.batch = group, batch
        self.shared = {leaf.name: flat[leaf.path] for leaf in group.leaves if not leaf.by_layer}
        self.tree: dict[str, Any] = {"params": {leaf.name: flat[leaf.path] for leaf in group.leaves if leaf.by_layer}}
        if key is not None and group.method.uses_dropout:
            own = jax.random.fold_in(key, zlib.crc32("/".join(group.path).encode()))
            self.tree["keys"] = jax.random.split(own, group.depth)
        # What a tower has once belongs to none of its blocks; what joins two blocks goes with either.
        if batch.dropped is not None and group.site.slot not in SINGLE_SLOTS:
            self.tree["layers"] = jnp.array([min(column) for column in zip(*group.layers, strict=True)])
        self.by_task = {leaf.name: leaf.by_task for leaf in group.leaves}

    def slice(self, start: int, stop: int) -> Any:
        """What belongs to consecutive layers of the tower, sliced only where it must be."""
        first, count = self.group.layers[0].index(start), stop - start
        if count == self.group.depth:
            return self.tree
        return jax.tree.map(lambda a: a[first : first + count], self.tree)

    def at(self, index: int) -> Any:
        """What belongs to the index-th layer served."""
        return jax.tree.map(lambda a: a[index], self.tree)

    def apply(self, layer: Any, arrays: tuple[Any, ...], weights: LinearWeights | None) -> tuple[Any, Readings]:
        """What the module of one layer makes of a batch, and what it sows.

        Args:
            layer: the layer's slice of the tree.
            arrays: the module's inputs, ``[batch, ...]``.
            weights: the frozen map at the slot, for a method that uses it.
        """
        group, inspect = self.group, self.batch.inspect
        module = group.method.module(group.site)
        given = (weights,) if group.method.uses_weights else ()

        def call(params: Any, key: jax.Array | None, *example: Any) -> tuple[Any, Readings]:
            rngs = None if key is None else {"dropout": key}
            variables = {"params": unflatten(params)}
            if not inspect:
                return module.apply(variables, *example, *given, rngs=rngs), {}
            result, sown = module.apply(variables, *example, *given, rngs=rngs, mutable=["intermediates"])
            return result, {f"{'/'.join(group.path)}/{name}": value for name, value in _sown(sown).items()}

        params = self.shared | layer["params"]
        return apply(call, params, self.by_task, arrays, self.batch.route, layer.get("keys"))

    def on(self, layer: Any, batch: int) -> jax.Array | None:
        """For which examples the layer acts; None for all of them."""
        return self.batch.on(layer.get("layers"), batch)


def apply(
    call: Callable[..., Any],
    params: Mapping[str, jax.Array],
    by_task: Mapping[str, bool],
    arrays: Sequence[Any],
    route: jax.Array | None,
    key: jax.Array | None,
) -> Any:
    """Applies a module written for one example to a batch.

    Args:
        call: ``call(params, key, *example) -> output``.
        params: one layer's parameters by name.
        by_task: by name, whether a parameter has a leading axis of tasks.
        arrays: the module's inputs, ``[batch, ...]``.
        route: ``int32 [batch]``, or None. A route beyond the last task turns the example's output into NaN, which a
            training loop stops at, instead of borrowing another task's weights. Or ``float [batch, tasks]``, the
            weights with which all tasks' outputs are mixed.
        key: the layer's dropout key, or None; each example gets its own, so that sharding the batch changes nothing.
    """
    if any(by_task.values()) and route is None:
        raise UserError("adapters stacked over tasks need a route, int32 [batch]: each example's task, -1 for none")
    if route is not None and route.ndim == 2 and any(by_task.values()):
        return _mixed(call, params, by_task, arrays, route, key)
    batch = jax.tree.leaves(arrays)[0].shape[0]
    keys = None if key is None else jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(batch))
    if any(by_task.values()):
        chosen = jnp.maximum(route, 0)
        params = {
            name: a.at[chosen].get(mode="fill", fill_value=jnp.nan) if by_task[name] else a
            for name, a in params.items()
        }
    axes = ({name: 0 if by_task[name] else None for name in params}, None if keys is None else 0)
    return jax.vmap(call, in_axes=(*axes, *[0] * len(arrays)))(params, keys, *arrays)


def _mixed(
    call: Callable[..., Any],
    params: Mapping[str, jax.Array],
    by_task: Mapping[str, bool],
    arrays: Sequence[Any],
    weights: jax.Array,
    key: jax.Array | None,
) -> Any:
    """:func:`apply` for all tasks, and the mean of their outputs with each example's weights.

    Outputs are mixed, not parameters: the mean of two sets of low-rank factors is not the mean of what they do. Since
    the weights of an example that adapters act on are made to sum to one, what the adapters leave alone stays as it is.
    """
    stacked = {name: a for name, a in params.items() if by_task[name]}
    tasks = next(iter(stacked.values())).shape[0]
    if weights.shape[1] != tasks:
        raise UserError(f"weights of a mixture are [batch, {tasks} tasks] for these adapters; given {weights.shape}")
    shared = {name: a for name, a in params.items() if not by_task[name]}
    alone = lambda own: apply(call, shared | own, dict.fromkeys(params, False), arrays, None, key)  # noqa: E731
    outputs = jax.vmap(alone)(stacked)  # [tasks, batch, ...]
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return jax.tree.map(lambda a: jnp.einsum("tb...,bt->b...", a, weights).astype(a.dtype), outputs)


def _acting(route: jax.Array) -> jax.Array:
    """Which examples adapters act on, ``bool [batch]``: those with a task, or with a weight in a mixture."""
    return route >= 0 if route.ndim == 1 else route.sum(-1) > 0


def where_on(on: jax.Array | None, new: Any, old: Any) -> Any:
    """New values for the examples that an adapter acts on, old ones for the others."""
    if on is None:
        return new
    shaped = lambda a: on.reshape((-1,) + (1,) * (a.ndim - 1))  # noqa: E731
    return jax.tree.map(lambda a, b: jnp.where(shaped(a), a, b), new, old)


class _FilledSlot:
    """The slots of one block, or one of those that a tower has once, with what sits there."""

    def __init__(self, members: Sequence[_Member], tree: Any):
        self._members, self._tree = members, tree
        self.readings: Readings = {}

    def __call__(self, name: str, x: jax.Array, y: Any, weights: LinearWeights | None = None) -> Any:
        for member, layer in zip(self._members, self._tree, strict=True):
            if member.group.site.slot != name:
                continue
            if name == "attn_kv":
                y = self._put_in_front(member, layer, x, y)
                continue
            new, readings = member.apply(layer, (x, y), weights)
            if new.shape != y.shape:
                raise UserError(
                    f"adapter {'/'.join(member.group.path)} made {new.shape[1:]} of {y.shape[1:]}; only the slots "
                    "tokens and attn_kv may change the number of tokens"
                )
            y = where_on(member.on(layer, x.shape[0]), new, y)
            self.readings |= readings
        return y

    def _put_in_front(self, member: _Member, layer: Any, x: jax.Array, y: KeysValues) -> KeysValues:
        """Keys and values with what an adapter puts in front, unseen by the examples that it is off for."""
        old = (y.keys, y.values)
        (keys, values), readings = member.apply(layer, (x, old), None)
        self.readings |= readings
        on, added = member.on(layer, x.shape[0]), keys.shape[1] - y.keys.shape[1]
        if on is not None:
            tail = where_on(on, (keys[:, added:], values[:, added:]), old)
            keys, values = (jnp.concatenate([a[:, :added], b], 1) for a, b in zip((keys, values), tail, strict=True))
        return KeysValues(keys, values, _seen(on, added, y.seen, y.keys.shape[1] - x.shape[1], x.shape[0], front=True))


def _seen(
    on: jax.Array | None, added: int, before: jax.Array | None, count: int, batch: int, front: bool
) -> jax.Array | None:
    """Who sees tokens that were added to ``count`` others, of which ``before`` says who sees them."""
    if on is None and before is None:
        return None
    new = jnp.ones((batch, added), bool) if on is None else jnp.broadcast_to(on[:, None], (batch, added))
    old = jnp.ones((batch, count), bool) if before is None else before
    return jnp.concatenate([new, old] if front else [old, new], axis=1)


def _single(members: Sequence[_Member]) -> Slot:
    return _FilledSlot(members, [member.at(0) for member in members]) if members else empty_slot


def _insert(
    members: Sequence[_Member], embedded: jax.Array, image: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The tokens that a tower's adapters insert; see :data:`vla_jax.slots.Insert`."""
    inserted, batch = Inserted(0, 0), embedded.shape[0]
    tokens = embedded[:, :0]
    for member in members:
        layer = member.at(0)
        arrays = (embedded, tokens, image) if member.group.method.conditioned else (embedded, tokens)
        new, _ = member.apply(layer, arrays, None)
        on, count = member.on(layer, batch), inserted.count
        new = jnp.concatenate([where_on(on, new[:, :count], tokens), new[:, count:]], axis=1).astype(embedded.dtype)
        seen = _seen(on, new.shape[1] - count, inserted.seen, count, batch, front=False)
        tokens, inserted = new, Inserted(0, new.shape[1], seen)
    return tokens, inserted.seen


class _Beside:
    """What runs beside a tower; see :class:`vla_jax.slots.Side`."""

    def __init__(self, members: Sequence[_Member]):
        self._members = members
        self.readings: Readings = {}

    def __call__(self, states: jax.Array, stream: jax.Array, seen: jax.Array) -> jax.Array:
        batch = stream.shape[0]
        # The frozen tower is read, never trained through: this is what makes a side network cheap.
        by_example = jax.lax.stop_gradient(states).swapaxes(0, 1)  # [batch, states, tokens, width]
        seen = jnp.broadcast_to(seen, (batch, *seen.shape[1:]))
        for member in self._members:
            layer = member.at(0)
            new, readings = member.apply(layer, (by_example, stream, seen), None)
            stream = where_on(member.on(layer, batch), new, stream)
            self.readings |= readings
        return stream


def _segments(members: Sequence[_Member], depth: int) -> tuple[Segment, ...]:
    """Cuts a tower where the set of groups that serve a layer changes."""
    serving = [tuple(m for m in members if layer in m.group.layers[0]) for layer in range(depth)]
    cuts = [0] + [k for k in range(1, depth) if serving[k] != serving[k - 1]] + [depth]
    return tuple(
        Segment(
            start,
            stop,
            tuple(member.slice(start, stop) for member in serving[start]),
            functools.partial(_FilledSlot, serving[start]),
        )
        for start, stop in itertools.pairwise(cuts)
    )


def _join(
    member: _Member, index: int, image: jax.Array, text: jax.Array, words: jax.Array
) -> tuple[jax.Array, jax.Array]:
    layer = member.at(index)
    new, _ = member.apply(layer, (image, text, words), None)
    return where_on(member.on(layer, image.shape[0]), new, (image, text))


def _sown(collections: Tree) -> dict[str, jax.Array]:
    """What a module sowed, by name; a module that runs several times in one call has an axis of these in front."""
    sown = flatten(collections.get("intermediates", {}))
    return {name: values[0] if len(values) == 1 else jnp.stack(values) for name, values in sown.items()}
