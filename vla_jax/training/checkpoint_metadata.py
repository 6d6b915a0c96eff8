"""What a checkpoint says about itself, and how that is compared with what is expected, leaf by leaf, field by field."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vla_jax.errors import UserError, nearest
from vla_jax.foreign import printable, shown

_DTYPE = re.compile(r"[a-z][a-z0-9_]{0,30}")
_SHOWN = 8  # Mismatches of one kind named in one error; the rest are counted.

Leaves = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Identity:
    """What trained leaves belong to; a checkpoint with another identity is refused.

    Attributes:
        backbone: the backbone's name, for people to read: the same weights may lie elsewhere under another name.
        fingerprint: the fingerprint of the backbone's weights, which decides.
        adapters: the configuration of adapters and heads (methods, placements, ranks), as JSON.
    """

    backbone: str
    fingerprint: str
    adapters: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            # Through JSON and back, so that a tuple given equals the list that a checkpoint returns.
            object.__setattr__(self, "adapters", json.loads(json.dumps(self.adapters)))
        except TypeError as error:
            raise UserError(
                f"the adapter configuration cannot be kept in a checkpoint: {error}; use numbers, texts, lists, dicts"
            ) from error


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about itself.

    Attributes:
        identity: what the trained leaves belong to.
        step: the number of training steps behind them.
        version: the version of this package that wrote them.
        leaves: shape and dtype of every trained leaf by name.
        optimizer: shape and dtype of every array of the optimiser's state by name; empty for adapters saved alone.
    """

    identity: Identity
    step: int
    version: str
    leaves: Leaves
    optimizer: Leaves

    def to_json(self) -> dict[str, Any]:
        """The metadata as Orbax keeps it beside the items."""
        return {
            "backbone": self.identity.backbone,
            "fingerprint": self.identity.fingerprint,
            "adapters": self.identity.adapters,
            "step": self.step,
            "version": self.version,
            "leaves": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in self.leaves.items()},
            "optimizer": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in self.optimizer.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Metadata:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: if something is missing, or of another kind than what is written there.
        """
        try:
            step, texts = content["step"], [content[name] for name in ("backbone", "fingerprint", "version")]
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 62:
                raise ValueError(f"step is {shown(step)}")
            if not all(isinstance(text, str) and printable(text) for text in texts):
                raise ValueError(f"backbone, fingerprint and version are {shown(texts)}")
            if not isinstance(content["adapters"], Mapping):
                raise ValueError(f"adapters is {shown(content['adapters'])}")
            return cls(
                identity=Identity(texts[0], texts[1], content["adapters"]),
                step=step,
                version=texts[2],
                leaves=_table(content["leaves"]),
                optimizer=_table(content["optimizer"]),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _table(entries: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    found = {}
    for name, (shape, dtype) in entries.items():
        # A truth value would count as 0 or 1.
        sizes = isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)
        if not sizes or len(shape) > 32 or math.prod(shape) >= 1 << 48 or not isinstance(dtype, str):
            raise ValueError(f"the array {shown(name)} is {shown([shape, dtype])}")
        if not _DTYPE.fullmatch(dtype):  # NumPy would take it for the beginning of a program
            raise ValueError(f"the array {shown(name)} holds {shown(dtype)}, which is no number")
        kind = jax.numpy.dtype(dtype)
        if not (jax.numpy.issubdtype(kind, jax.numpy.number) or kind == np.bool_):
            raise ValueError(f"the array {shown(name)} holds {shown(dtype)}, which is no number")
        found[name] = jax.ShapeDtypeStruct(tuple(shape), kind)
    return found


def leaves_of(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of any pytree by its path's keys, joined with ``/``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in flat
    }


def check(
    folder: str | os.PathLike[str],
    metadata: Metadata,
    identity: Identity | None,
    leaves: Leaves | None,
    optimizer: Leaves | None,
) -> None:
    """Compares a checkpoint with what is expected of it.

    Args:
        folder: the checkpoint, for the message.
        metadata: what the checkpoint says about itself.
        identity: what its leaves must belong to; None is not compared.
        leaves: the trained leaves that must be there, no more and no fewer; None is not compared. Dtypes may differ.
        optimizer: the same for the optimiser's state.

    Raises:
        UserError: if anything differs; the one message names all that does.
    """
    problems: list[str] = []
    if identity is not None:
        problems += _compare_identities(metadata.identity, identity)
    if leaves is not None:
        problems += _compare_leaves(
            "parameter", metadata.leaves, leaves, "give the adapters and heads the configuration they were saved with"
        )
    # The optimiser's state mirrors the parameters, so it would only repeat what is wrong with those.
    if optimizer is not None and not problems:
        problems += _compare_leaves(
            "optimizer state", metadata.optimizer, optimizer, "use the optimiser and parameter table it was saved with"
        )
    if problems:
        raise UserError(
            f"{folder} does not fit, nothing was loaded:\n  " + "\n  ".join(problems) + "\n"
            "To start anew instead, use another work directory."
        )


def _compare_identities(saved: Identity, expected: Identity) -> list[str]:
    problems = []
    if saved.fingerprint != expected.fingerprint:
        problems.append(
            f"backbone fingerprint: the checkpoint has {saved.fingerprint} ({saved.backbone}), expected "
            f"{expected.fingerprint} ({expected.backbone}); load the backbone that it was trained on"
        )
    has, wants = (_fields(side.adapters) for side in (saved, expected))
    pairs = {field: (has.get(field, "nothing"), wants.get(field, "nothing")) for field in dict.fromkeys([*has, *wants])}
    differing = [field for field, (one, other) in pairs.items() if one != other]
    for field in differing[:_SHOWN]:
        one, other = pairs[field]
        problems.append(
            f"adapter configuration {field}: the checkpoint has {one}, expected {other}; set it to what it has"
        )
    return problems + _rest(differing, "adapter configuration fields")


def _compare_leaves(kind: str, saved: Leaves, expected: Leaves, mend: str) -> list[str]:
    missing = [name for name in expected if name not in saved]
    extra = [name for name in saved if name not in expected]
    shapes = [name for name in expected if name in saved and saved[name].shape != expected[name].shape]
    problems = []
    for name in missing[:_SHOWN]:
        near = nearest(name, extra, 1)
        problems.append(
            f"missing {kind} {name}: the checkpoint has {near[0] if near else 'nothing'} instead, expected "
            f"{_describe(expected[name])}; {mend}"
        )
    for name in extra[:_SHOWN]:
        problems.append(f"extra {kind} {name}: the checkpoint has {_describe(saved[name])}, expected none; {mend}")
    for name in shapes[:_SHOWN]:
        what = "head size" if name.startswith("heads/") else "shape"
        problems.append(
            f"{what} of {kind} {name}: the checkpoint has {_describe(saved[name])}, expected "
            f"{_describe(expected[name])}; {mend}"
        )
    return problems + [line for group in (missing, extra, shapes) for line in _rest(group, f"{kind}s")]


def _rest(group: list[str], kind: str) -> list[str]:
    return [f"and {len(group) - _SHOWN} more {kind}"] if len(group) > _SHOWN else []


def _describe(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _fields(content: Any, prefix: str = "") -> dict[str, str]:
    """Nested JSON as ``{"vision.rank": "8"}``; list entries by their index."""
    if not isinstance(content, Mapping | list) or not content:
        return {prefix: json.dumps(content)}
    fields: dict[str, str] = {}
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        fields |= _fields(value, f"{prefix}.{key}" if prefix else str(key))
    return fields
