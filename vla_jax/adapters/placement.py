"""Where an adapter goes, as a value: towers, slots, layers, ranks, tasks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vla_jax import patterns
from vla_jax.adapters.base import AXES, Method, Share, method_from_description
from vla_jax.errors import UserError, unknown
from vla_jax.slots import SLOTS


@dataclasses.dataclass(frozen=True)
class Placement:
    """A method and the places it occupies.

    Attributes:
        method: what sits there.
        name: the adapter's name, the first part of its parameters' names.
        towers: the towers it sits in; a joint method takes both.
        slots: the slots it sits in; empty for the method's own choice where it has only one.
        layers: which layers, in the notation of :mod:`vla_jax.adapters.layers`. For a joint method they count the pairs
            of blocks from the bottom: as many pairs as the shallower tower has blocks, evenly spread over the other.
        pairs: for a joint method, the pairs of (vision layer, text layer) themselves, instead of ``layers``.
        ranks: an ordered table of (pattern, rank): the first pattern that matches the whole of a site's name, such as
            ``vision/mlp_out/3``, sets the rank there.
        alphas: the same for LoRA's alpha.
        sharing: parameters that places share, before what the method itself says of it; first match wins.
        tied: whether the towers share one set of weights, beside whatever else is shared.
        tasks: names of the tasks that each have weights of their own, picked by each example's route; empty for one
            set of weights for all examples.
        dropped: by tower, of how many of its first blocks the adapters are left out after all (AdapterDrop; see
            :mod:`vla_jax.adapters.drop`); names and ranks stay as if they were there.
    """

    method: Method
    name: str = "adapter"
    towers: tuple[str, ...] = ("vision", "text")
    slots: tuple[str, ...] = ()
    layers: str = "all"
    pairs: tuple[tuple[int, int], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    sharing: tuple[Share, ...] = ()
    tied: bool = False
    tasks: tuple[str, ...] = ()
    dropped: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise UserError(f"adapter name {self.name!r} must be made of letters, digits, '_', '.' and '-'")
        if not self.slots:
            if len(self.method.slots) != 1:
                allowed = ", ".join(self.method.slots)
                raise UserError(f"adapter {self.name!r} ({self.method.kind}) needs slots; it may sit in {allowed}")
            object.__setattr__(self, "slots", self.method.slots)
        for slot in self.slots:
            if slot not in SLOTS:
                raise unknown("slot", slot, SLOTS)
            if slot not in self.method.slots:
                allowed = ", ".join(self.method.slots)
                raise UserError(f"{self.method.kind} cannot sit in slot {slot!r}; it may sit in {allowed}")
        if not self.towers:
            raise UserError(f"adapter {self.name!r} names no tower")
        for kind, values in (("towers", self.towers), ("slots", self.slots), ("tasks", self.tasks)):
            if len(set(values)) < len(values):
                raise UserError(f"{kind} of adapter {self.name!r} name something twice: {', '.join(values)}")
        if self.method.joint and (self.tied or any("towers" in share.over for share in self.shares)):
            raise UserError(
                "a joint method shares weights between towers by its own setting, shared; tied is for others"
            )
        beyond_tasks = self.tied or any(set(share.over) - {"tasks"} for share in self.shares)
        if self.method.uses_weights and beyond_tasks:
            raise UserError(
                f"adapter {self.name!r} ({self.method.kind}) starts from the frozen weights of each place, which "
                "others do not have; share over tasks alone, and leave tied out"
            )
        for share in self.sharing:
            patterns.check("sharing pattern", share.pattern)
            for axis in share.over:
                if axis not in AXES:
                    raise unknown("axis to share over", axis, AXES)
        if self.pairs and not self.method.joint:
            raise UserError(f"pairs are for joint methods; {self.method.kind} takes layers")
        for pattern, rank in self.ranks:
            patterns.check("rank pattern", pattern)
            if rank < 1:
                raise UserError(f"rank {rank} for {pattern!r} must be at least 1")
        for pattern, _ in self.alphas:
            patterns.check("alpha pattern", pattern)

    @property
    def shares(self) -> tuple[Share, ...]:
        """What the placement and its method share; the first pattern that matches a parameter wins."""
        return (*self.sharing, *self.method.sharing)

    def shared_over(self, leaf: str) -> tuple[str, ...]:
        """What a parameter, by its name within the method's module, is shared over."""
        over = next((share.over for share in self.shares if patterns.fullmatch(share.pattern, leaf)), ())
        return (*over, "towers") if self.tied and "towers" not in over else over

    def method_at(self, site: str) -> Method:
        """The method with the rank and the alpha that the tables give to a site."""
        method = self.method
        for table, change in ((self.ranks, Method.with_rank), (self.alphas, Method.with_alpha)):
            value = next((value for pattern, value in table if patterns.fullmatch(pattern, site)), None)
            method = method if value is None else change(method, value)
        return method

    def describe(self) -> dict[str, Any]:
        """The placement as JSON-able values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["pairs"] = [list(pair) for pair in self.pairs]
        for name in ("ranks", "alphas", "dropped"):
            fields[name] = [list(row) for row in fields[name]]
        fields["sharing"] = [{"pattern": share.pattern, "over": list(share.over)} for share in self.sharing]
        for name in ("towers", "slots", "tasks"):
            fields[name] = list(fields[name])
        return fields | {"method": self.method.describe()}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Placement:
        """The placement that :meth:`describe` described."""
        fields = dict(description)
        allowed = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in allowed:
                raise unknown("field of a placement", name, allowed)
        if "method" not in fields:
            raise UserError(f"the description of a placement has no method; it has {', '.join(fields) or 'nothing'}")
        fields["method"] = method_from_description(fields["method"])
        for name in ("towers", "slots", "tasks"):
            fields[name] = tuple(fields.get(name, getattr(cls, name, ())))
        for name in ("pairs", "ranks", "alphas", "dropped"):
            fields[name] = tuple(tuple(row) for row in fields.get(name, ()))
        fields["sharing"] = tuple(Share(row["pattern"], tuple(row["over"])) for row in fields.get("sharing", ()))
        return cls(**fields)
