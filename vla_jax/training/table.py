"""The parameter table: one ordered list of patterns over parameter names that decides everything about a parameter.

What is trained, which optimiser group it has, whether its weight decays, how it is sharded, and with that what is saved
and what is counted, all come from here.
"""

from __future__ import annotations

import difflib
import heapq
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.markup import escape
from rich.table import Table

from vla_jax import names
from vla_jax.errors import UserError, unknown
from vla_jax.mesh import AXES

DEFAULT_GROUP = "default"


@dataclass(frozen=True)
class Rule:
    """What holds for the parameters whose whole name a pattern matches; a column left at None is left to later rules.

    Attributes:
        pattern: a regular expression that must match the whole name, such as ``adapters/.*``.
        train: whether they are trained.
        group: their optimiser group.
        decay: whether weight decay acts on them.
        sharding: a mesh axis or None (not cut) for each dimension; dimensions after the last are not cut, and ``()`` is
            replicated.
        optional: whether the rule may match nothing, and whether a dimension that its mesh axis does not divide is left
            whole; both are errors otherwise. Presets are optional, since they serve trees of any content and width.
    """

    pattern: str
    train: bool | None = None
    group: str | None = None
    decay: bool | None = None
    sharding: tuple[str | None, ...] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"pattern {self.pattern!r} is not a regular expression ({error}); for any characters write '.*', "
                "and put a backslash before a character that stands for itself"
            ) from error
        if all(value is None for value in (self.train, self.group, self.decay, self.sharding)):
            raise UserError(f"rule {self.pattern!r} sets nothing; set train, group, decay or sharding")
        if self.group == "":
            raise UserError(f"rule {self.pattern!r} has an empty group; give it a name or None")
        axes = [axis for axis in self.sharding or () if axis is not None]
        for axis in axes:
            if axis not in AXES:
                near = difflib.get_close_matches(str(axis), AXES, n=1)
                raise UserError(
                    f"rule {self.pattern!r}: unknown mesh axis {axis!r}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                    + f" Allowed: {', '.join(AXES)}, or None for a dimension that is not cut."
                )
            if axes.count(axis) > 1:
                raise UserError(
                    f"rule {self.pattern!r}: mesh axis {axis!r} cuts two dimensions of {self.sharding}; use it once"
                )

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the whole of a parameter's name."""
        return re.fullmatch(self.pattern, name) is not None


@dataclass(frozen=True)
class ParameterRow:
    """One parameter and what the table says of it; ``rule`` and ``sharding_rule`` are the rules that said it."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    train: bool
    group: str
    decay: bool
    sharding: tuple[str | None, ...]
    rule: Rule
    sharding_rule: Rule

    @property
    def size(self) -> int:
        """The number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ResolvedTable:
    """The table for one parameter tree: a row for every parameter, in the tree's order."""

    rows: tuple[ParameterRow, ...]

    @cached_property
    def by_name(self) -> dict[str, ParameterRow]:
        """The rows by parameter name."""
        return {row.name: row for row in self.rows}

    def row(self, name: str) -> ParameterRow:
        """The row of a parameter; UserError if there is none."""
        if name not in self.by_name:
            raise unknown("parameter", name, self.by_name)
        return self.by_name[name]

    def trainable(self, name: str) -> bool:
        """Whether a parameter is trained."""
        return self.row(name).train

    def split(self, params: names.Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        """The trained and the frozen leaves of a tree with these parameters or some of them, both nested."""
        return names.split(params, self.trainable)

    def labels(self, trainable: names.Tree) -> dict[str, Any]:
        """The optimiser group of every leaf of a tree, a tree of strings."""
        return names.unflatten({name: self.row(name).group for name in names.flatten(trainable)})

    def decay_mask(self, trainable: names.Tree) -> dict[str, Any]:
        """Whether weight decay acts on every leaf of a tree, a tree of booleans."""
        return names.unflatten({name: self.row(name).decay for name in names.flatten(trainable)})

    def shardings(self, mesh: Mesh) -> dict[str, Any]:
        """The sharding of every parameter, a nested dict.

        Raises:
            UserError: if an axis does not divide the dimension that a rule cuts along it; a dimension that an optional
                rule cuts is left whole instead.
        """
        return names.unflatten({row.name: NamedSharding(mesh, _specification(row, mesh)) for row in self.rows})

    @property
    def trained(self) -> int:
        """The number of trained scalars."""
        return sum(row.size for row in self.rows if row.train)

    @property
    def total(self) -> int:
        """The number of scalars of all parameters."""
        return sum(row.size for row in self.rows)

    @property
    def backbone(self) -> int:
        """The number of scalars of the backbone, trained or not."""
        return sum(row.size for row in self.rows if row.name.startswith("backbone/"))

    @property
    def share_of_total(self) -> float:
        """Trained scalars in per cent of all parameters: backbone, adapters and heads."""
        return 100 * self.trained / self.total

    @property
    def share_of_backbone(self) -> float:
        """Trained scalars in per cent of the backbone's parameters; not a number without a backbone."""
        return 100 * self.trained / self.backbone if self.backbone else math.nan

    def summary(self) -> Table:
        """The table to print: one line for every rule and treatment, and the totals below."""
        lines: dict[tuple[str, ...], list[ParameterRow]] = {}
        for row in self.rows:
            # What only an optimiser reads is not shown of a frozen parameter, and does not part its rule's line.
            trained = ("trained", row.group, "yes" if row.decay else "no") if row.train else ("frozen", "", "")
            sharding = ", ".join(axis or "-" for axis in row.sharding) or "replicated"
            lines.setdefault((row.rule.pattern, *trained, sharding), []).append(row)
        share = f"{self.share_of_total:.2f} % of all {self.total:,} parameters"
        if self.backbone:
            share += f", {self.share_of_backbone:.2f} % of the backbone's {self.backbone:,}"
        table = Table(
            title="Parameters",
            caption=f"trained: {self.trained:,} = {share}; frozen: {self.total - self.trained:,}",
        )
        for column in ("rule", "", "group", "decay", "sharding"):
            table.add_column(column, overflow="fold")
        for column in ("arrays", "parameters"):
            table.add_column(column, justify="right")
        for line, rows in lines.items():
            table.add_row(*map(escape, line), str(len(rows)), f"{sum(row.size for row in rows):,}")
        return table


@dataclass(frozen=True)
class ParameterTable:
    """An ordered table of rules; for each column the first rule wins that matches a name and sets the column.

    A group that no rule sets is ``default``, and decay that no rule sets is on; whether a parameter is trained and how
    it is sharded must be said.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))

    def resolve(self, params: names.Tree) -> ResolvedTable:
        """The table for one tree.

        Args:
            params: a nested dict of arrays or of their shapes.

        Raises:
            UserError: if a pattern matches nothing, a parameter is not covered, or a sharding has more entries than its
                parameter has dimensions.
        """
        flat = names.flatten(params)
        for rule in self.rules:
            if not rule.optional and not any(rule.matches(name) for name in flat):
                near = _nearest(flat, lambda name, pattern=rule.pattern: _likeness(pattern, name))
                raise UserError(
                    f"pattern {rule.pattern!r} matches no parameter; it must match a whole name. Nearest names: "
                    f"{', '.join(near) or 'none, since the tree is empty'}"
                )
        return ResolvedTable(tuple(self._row(name, leaf) for name, leaf in flat.items()))

    def _row(self, name: str, leaf: Any) -> ParameterRow:
        matching = [rule for rule in self.rules if rule.matches(name)]

        def first(column: str) -> Rule | None:
            return next((rule for rule in matching if getattr(rule, column) is not None), None)

        train, group, decay, sharding = (first(column) for column in ("train", "group", "decay", "sharding"))
        for column, rule in (("train", train), ("sharding", sharding)):
            if rule is None:
                setting = [rule.pattern for rule in self.rules if getattr(rule, column) is not None]
                near = _nearest(setting, lambda pattern: _likeness(pattern, name))
                raise UserError(
                    f"parameter {name!r} {tuple(leaf.shape)} is covered by no rule that sets {column}; add one. "
                    f"Nearest patterns that set it: {', '.join(map(repr, near)) or 'none'}"
                )
        if len(sharding.sharding) > len(leaf.shape):
            raise UserError(
                f"sharding {sharding.sharding} of rule {sharding.pattern!r} is longer than parameter {name!r} has "
                f"dimensions: {tuple(leaf.shape)}; shorten it, or put a rule for this parameter above"
            )
        return ParameterRow(
            name=name,
            shape=tuple(leaf.shape),
            dtype=leaf.dtype,
            train=train.train,
            group=group.group if group else DEFAULT_GROUP,
            decay=decay.decay if decay else True,
            sharding=sharding.sharding,
            rule=train,
            sharding_rule=sharding,
        )


def _specification(row: ParameterRow, mesh: Mesh) -> PartitionSpec:
    axes = list(row.sharding)
    for dimension, axis in enumerate(axes):
        if axis is None or row.shape[dimension] % mesh.shape[axis] == 0:
            continue
        if not row.sharding_rule.optional:
            raise UserError(
                f"dimension {dimension} of parameter {row.name!r} {row.shape} cannot be cut over mesh axis {axis!r} of "
                f"{mesh.shape[axis]} devices (rule {row.sharding_rule.pattern!r}); choose another size for the axis, "
                "or put a rule with None for this dimension above"
            )
        axes[dimension] = None
    return PartitionSpec(*axes)


def _likeness(pattern: str, name: str) -> float:
    """How much a pattern's path segments look like some segment of a name, 0 to 1, wildcards left out."""
    given = [text for text in (re.sub(r"\W", "", segment) for segment in pattern.split("/")) if text]
    segments = name.split("/")
    best = [max(difflib.SequenceMatcher(None, text, segment).ratio() for segment in segments) for text in given]
    return sum(best) / len(best) if best else 0.0


def _nearest(candidates: Iterable[str], likeness: Callable[[str], float], count: int = 3) -> list[str]:
    return heapq.nlargest(count, candidates, key=likeness)
