"""Plans: which parameters the adapters of one backbone have, how they are stacked, shared and begin."""

from __future__ import annotations

import dataclasses
import functools
import operator
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.adapters.base import Method
from vla_jax.adapters.binding import BoundAdapters
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import LINEAR_MAPS, SINGLE_SLOTS, LinearWeights, Site


class Leaf(NamedTuple):
    """One parameter of a group.

    Attributes:
        name: within the method's module.
        path: below ``adapters/``; groups that share a parameter name the same one.
        by_layer: whether it has an axis of layers, which then comes first.
        by_task: whether it has an axis of tasks.
    """

    name: str
    path: str
    by_layer: bool
    by_task: bool

    @property
    def task_axis(self) -> int | None:
        """Where the axis of tasks stands; None for a parameter without one."""
        return int(self.by_layer) if self.by_task else None


class Group(NamedTuple):
    """One method at one slot of one tower, stacked over the layers it serves.

    Attributes:
        path: its own name, the first parts of the names of the parameters that it shares with nobody.
        method: what sits in these layers.
        site: the place.
        layers: by tower, the layers served, ascending; for a joint method the k-th of both towers make a pair.
        tasks: how many tasks have weights of their own, 0 for weights without a task axis.
        leaves: its parameters.
    """

    path: tuple[str, ...]
    method: Method
    site: Site
    layers: tuple[tuple[int, ...], ...]
    tasks: int
    leaves: tuple[Leaf, ...]

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers served."""
        return ("vision", "text") if self.method.joint else (self.site.tower,)

    @property
    def depth(self) -> int:
        """How many layers it serves."""
        return len(self.layers[0])

    def init(self, key: jax.Array, weights: LinearWeights | None) -> dict[str, Any]:
        """New parameters by path, those included that other groups share.

        Args:
            key: of the whole plan.
            weights: the frozen maps at the layers served, each ``[layers, ...]``; for a method that uses them.
        """
        own = jax.random.fold_in(key, zlib.crc32("/".join(self.path).encode()))
        keys = jax.random.split(own, (self.depth, max(1, self.tasks)))
        new = {}
        # What is shared is drawn once: a network that makes the weights of all layers and tasks is large.
        for by_layer, by_task in sorted({(leaf.by_layer, leaf.by_task) for leaf in self.leaves}):
            drawn = self._draw(keys if by_layer else keys[0], weights, by_layer, by_task)
            alike = [leaf for leaf in self.leaves if (leaf.by_layer, leaf.by_task) == (by_layer, by_task)]
            new |= {leaf.path: drawn[leaf.name] for leaf in alike}
        return {leaf.path: new[leaf.path] for leaf in self.leaves}

    def _draw(
        self, keys: jax.Array, weights: LinearWeights | None, by_layer: bool, by_task: bool
    ) -> dict[str, jax.Array]:
        """Parameters by name, with an axis of layers, of tasks, of both or of none; keys ``[(layers,) tasks]``."""
        module = self.method.module(self.site)

        def init(key: jax.Array, weights: LinearWeights | None) -> dict[str, jax.Array]:
            return flatten(module.init(key, *example(self.method, self.site, weights))["params"])

        if by_task:
            init = jax.vmap(init, in_axes=(0, None))
        else:
            keys = keys[..., 0]
        if by_layer:
            return jax.vmap(init)(keys, weights)
        return init(keys, jax.tree.map(lambda a: a[0], weights))

    def above(self, dropped: Mapping[str, int]) -> Group | None:
        """The group without what sits in the first so many blocks of a tower; None if nothing is left of it.

        An adapter that joins two blocks goes with either. What a tower has once belongs to no block and stays.
        """
        if self.site.slot in SINGLE_SLOTS:
            return self
        first = [dropped.get(tower, 0) for tower in self.towers]
        kept = [column for column in zip(*self.layers, strict=True) if all(map(operator.ge, column, first))]
        return self._replace(layers=tuple(zip(*kept, strict=True))) if kept else None

    def places(self) -> Iterator[tuple[str, int]]:
        """The (tower, layer) of every place served."""
        for tower, served in zip(self.towers, self.layers, strict=True):
            yield from ((tower, layer) for layer in served)


class Plan(NamedTuple):
    """Every group of every placement on one backbone; hashable, so that it is a static part of a compiled program.

    Attributes:
        placements: what was asked for.
        groups: what it comes to, in the order in which adapters of one slot act.
        depths: by tower, how many blocks it has.
    """

    placements: tuple[Placement, ...]
    groups: tuple[Group, ...]
    depths: tuple[tuple[str, int], ...]

    def init(self, key: jax.Array, backbone: Tree | None = None) -> dict[str, Any]:
        """New parameters, the tree that stands below ``adapters/``.

        Args:
            key: everything is drawn from it; a group's draw depends on its name alone.
            backbone: the tree below ``backbone/``; only methods that use the frozen weights need it.

        Raises:
            UserError: where a method needs the backbone and there is none.
        """
        flat: dict[str, Any] = {}
        for group in self._owners():
            new = group.init(key, _weights(group, backbone) if group.method.uses_weights else None)
            flat |= {path: value for path, value in new.items() if path not in flat}
        return unflatten(flat)

    def shapes(self) -> dict[str, Any]:
        """The shapes and dtypes of :meth:`init`, of which nothing is computed."""
        flat: dict[str, Any] = {}
        for group in self._owners():
            new = jax.eval_shape(group.init, jax.random.key(0), _abstract_weights(group))
            flat |= {path: value for path, value in new.items() if path not in flat}
        return unflatten(flat)

    def bind(self, params: Tree, dropped: jax.Array | None = None, inspect: bool = False) -> BoundAdapters:
        """Parameters and plan together: what a backbone takes as its ``adapters`` argument.

        Args:
            params: the tree below ``adapters/``.
            dropped: ``int32 []``, the adapters in the first so many blocks of every tower are switched off, as
                :meth:`Group.above` tells them (AdapterDrop; Rücklé et al. 2021); an argument of the compiled program,
                so that every batch may have its own.
            inspect: whether modules hand out what they sow; those that make tokens or join two towers do not.
        """
        return BoundAdapters(params, dropped, self, inspect)

    def parameter_count(self) -> int:
        """Parameters of all groups, from the methods' closed formulas."""
        counts: dict[str, int] = {}
        for group in self.groups:
            own = group.method.parameter_counts(group.site)
            for leaf in group.leaves:
                times = (group.depth if leaf.by_layer else 1) * (group.tasks if leaf.by_task else 1)
                counts[leaf.path] = own[leaf.name] * times
        return sum(counts.values())

    def leaves(self) -> dict[str, Leaf]:
        """Every parameter by its path; of a shared one, as the first group has it."""
        found: dict[str, Leaf] = {}
        for group in self.groups:
            for leaf in group.leaves:
                found.setdefault(leaf.path, leaf)
        return found

    def single(self) -> Plan:
        """The same plan for one task alone."""
        placements = tuple(dataclasses.replace(placement, tasks=()) for placement in self.placements)
        groups = tuple(
            group._replace(tasks=0, leaves=tuple(leaf._replace(by_task=False) for leaf in group.leaves))
            for group in self.groups
        )
        return self._replace(placements=placements, groups=groups)

    def select_task(self, params: Tree, task: int) -> dict[str, Any]:
        """One task's parameters, as :meth:`single` takes them; what tasks share is among them.

        Raises:
            UserError: for a task that the parameters do not have.
        """
        leaves = self.leaves()
        chosen = {}
        for path, value in flatten(params).items():
            axis = leaves[path].task_axis
            _check_task(task, value, axis)
            chosen[path] = value if axis is None else value[(slice(None),) * axis + (task,)]
        return unflatten(chosen)

    def set_task(self, params: Tree, task: int, own: Tree) -> dict[str, Any]:
        """The parameters with one task's replaced by ``own``; what tasks share stays as it is.

        Raises:
            UserError: for a task that the parameters do not have.
        """
        leaves, given = self.leaves(), flatten(own)
        changed = {}
        for path, value in flatten(params).items():
            axis = leaves[path].task_axis
            _check_task(task, value, axis)
            at = (slice(None),) * (axis or 0) + (task,)
            changed[path] = value if axis is None else jnp.asarray(value).at[at].set(given[path])
        return unflatten(changed)

    def first_layers(self) -> dict[str, int]:
        """By tower, how many blocks a forward pass goes through before it meets the first adapter."""
        first = dict(self.depths)
        for group in self.groups:
            if group.site.slot == "projection":
                continue
            for tower, layer in group.places():
                # A joint meets the stream after its block, every other adapter within it.
                first[tower] = min(first[tower], layer + group.method.joint)
        return first

    @property
    def needs_pairs(self) -> bool:
        """Whether the features of one modality depend on what of the other stands beside it."""
        return any(group.method.joint or group.method.conditioned for group in self.groups)

    @property
    def inserts_tokens(self) -> bool:
        """Whether adapters put tokens into a stream, which then has to be run from its embeddings on."""
        return any(group.site.slot == "tokens" for group in self.groups)

    def describe(self) -> list[dict[str, Any]]:
        """The placements as JSON-able values, for a checkpoint's metadata."""
        return [placement.describe() for placement in self.placements]

    def _owners(self) -> Iterator[Group]:
        """The groups that have a parameter which no group before them has."""
        seen: set[str] = set()
        for group in self.groups:
            paths = {leaf.path for leaf in group.leaves}
            if paths - seen:
                yield group
            seen |= paths


def example(method: Method, site: Site, weights: LinearWeights | None = None, tokens: int = 1) -> tuple[Any, ...]:
    """What a module of a method at a site is called with: zeros for so many tokens.

    Args:
        method: the method.
        site: the place.
        weights: the frozen map there, for a method that uses it.
        tokens: how many.
    """
    first, second = (jnp.zeros((tokens, width)) for width in site.widths)
    if method.joint:
        return first, second, jnp.ones((tokens,), bool)
    if site.slot == "side":
        states = jnp.zeros((1 + site.depth, tokens, site.widths[0]))
        return states, second, jnp.ones((tokens, tokens), bool)
    if site.slot == "attn_kv":
        return first, (second, second)
    if site.slot == "tokens":
        second = second[:0]
    if method.uses_weights:
        return first, second, weights
    return (first, second, jnp.zeros(site.features)) if method.conditioned else (first, second)


@functools.lru_cache(maxsize=1024)
def leaf_shapes(method: Method, site: Site) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of one layer."""
    weights = _zero_weights(site, ()) if method.uses_weights else None
    module = method.module(site)
    init = lambda key, *example: module.init(key, *example)["params"]  # noqa: E731
    shapes = flatten(jax.eval_shape(init, jax.random.key(0), *example(method, site, weights)))
    return {name: leaf.shape for name, leaf in shapes.items()}


def _zero_weights(site: Site, lead: tuple[int, ...]) -> LinearWeights:
    bias = None if site.slot == "projection" else jax.ShapeDtypeStruct((*lead, site.widths[1]), jnp.float32)
    return LinearWeights(jax.ShapeDtypeStruct((*lead, *site.widths), jnp.float32), bias)


def _abstract_weights(group: Group) -> LinearWeights | None:
    return _zero_weights(group.site, (group.depth,)) if group.method.uses_weights else None


def _weights(group: Group, backbone: Tree | None) -> LinearWeights:
    """The frozen maps at a group's layers."""
    if backbone is None:
        raise UserError(
            f"{group.method.kind} at {'/'.join(group.path)} starts from the frozen weights; give the backbone's "
            "parameters to Plan.init"
        )
    name = f"{group.site.tower}/{LINEAR_MAPS[group.site.slot]}"
    node = functools.reduce(lambda tree, part: tree[part], name.split("/"), backbone)
    weights = LinearWeights(node["kernel"], node.get("bias"))
    if group.site.slot in SINGLE_SLOTS:
        return jax.tree.map(lambda a: a[None], weights)
    served = jnp.array(group.layers[0])
    return jax.tree.map(lambda a: a[served], weights)


def _check_task(task: int, value: jax.Array, axis: int | None) -> None:
    """Refuses a task outside its range: indexing would take the last one instead, and setting would do nothing."""
    if axis is not None and not 0 <= task < value.shape[axis]:
        raise UserError(f"there is no task {task}; allowed: 0 to {value.shape[axis] - 1}")
