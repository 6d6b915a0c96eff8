"""Parameter trees as names: nested dicts to and from ``{"a/b/c": leaf}``, and trees cut in two and put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from vla_jax.errors import UserError

Tree = Mapping[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict by name, in the tree's own order; empty dicts leave no trace."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat |= flatten(value, name)
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of named leaves; the inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise UserError(f"parameter {name!r} lies below another parameter's name")
        if isinstance(node.get(last), dict):
            raise UserError(f"parameter {name!r} stands above another parameter's name")
        node[last] = leaf
    return tree


def split(tree: Tree, keep: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cuts a tree into the leaves whose name ``keep`` accepts and the rest, both nested."""
    flat = flatten(tree)
    chosen = {name: leaf for name, leaf in flat.items() if keep(name)}
    rest = {name: leaf for name, leaf in flat.items() if name not in chosen}
    return unflatten(chosen), unflatten(rest)


def merge(*trees: Tree) -> dict[str, Any]:
    """Puts trees with different leaves together; a leaf that stands in two of them is an error."""
    flat: dict[str, Any] = {}
    for tree in trees:
        for name, leaf in flatten(tree).items():
            if name in flat:
                raise UserError(f"parameter {name!r} stands in two of the trees to be merged")
            flat[name] = leaf
    return unflatten(flat)


def count(tree: Any) -> int:
    """The number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def size_in_bytes(tree: Any) -> int:
    """The bytes that a tree's arrays, or arrays of its shapes and dtypes, hold."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
