"""What methods made of named methods have in common; see :mod:`vla_jax.adapters.composition`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

import flax.linen as nn

from vla_jax.adapters.base import Method, Share, method_from_description
from vla_jax.errors import UserError
from vla_jax.slots import SLOTS, Site

Children = tuple[tuple[str, Method], ...]

REPLACED = "deep prompts take the place of the tokens there instead of adding to them"
"""Why most compositions have no meaning at the slot ``prompts``."""


@dataclasses.dataclass(frozen=True)
class Composite(Method):
    """A method made of named methods.

    Attributes:
        children: names and methods; parameters of each lie below its name.
    """

    refused: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Slots at which this composition has no meaning, and why."""
    refused_joint: ClassVar[str | None] = None
    """Why it has no meaning for methods that join the towers; None where it has one."""
    reserved: ClassVar[tuple[str, ...]] = ()
    """Names that no child can have, since the composite has parameters of its own below them."""

    children: Children

    def __post_init__(self):
        if not self.children:
            raise UserError(f"{self.kind} needs at least one child: pairs of a name and a method")
        names = [name for name, _ in self.children]
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise UserError(f"name {name!r} of a child must be made of letters, digits, '_', '.' and '-'")
            if names.count(name) > 1:
                raise UserError(f"two children of {self.kind} are named {name!r}; give each a name of its own")
            if name in self.reserved:
                raise UserError(f"{self.kind} keeps parameters of its own below {name!r}; name that child otherwise")
        joint = [name for name, child in self.children if child.joint]
        if joint and self.refused_joint:
            raise UserError(f"{self.kind} cannot take {joint[0]!r}, which joins the towers: {self.refused_joint}")
        if joint and len(joint) < len(names):
            alone = next(name for name in names if name not in joint)
            raise UserError(
                f"{joint[0]!r} joins the towers and {alone!r} sits in one of them, so that they cannot share a place; "
                "give each a placement of its own"
            )
        if not self.slots:
            places = "; ".join(f"{name} ({child.kind}) in {', '.join(child.slots)}" for name, child in self.children)
            raise UserError(f"the children of {self.kind} have no slot in common: {places}")

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots in which every child may sit."""
        allowed = [child.slots for _, child in self.children]  # once: compositions may be nested
        return tuple(slot for slot in SLOTS if all(slot in slots for slots in allowed))

    @property
    def joint(self) -> bool:
        """Whether the children join both towers' streams."""
        return any(child.joint for _, child in self.children)

    @property
    def uses_weights(self) -> bool:
        """Whether a child needs the frozen map at the slot."""
        return any(child.uses_weights for _, child in self.children)

    @property
    def conditioned(self) -> bool:
        """Whether a child needs the image's feature."""
        return any(child.conditioned for _, child in self.children)

    @property
    def uses_dropout(self) -> bool:
        """Whether training of a child needs a dropout key."""
        return any(child.uses_dropout for _, child in self.children)

    @property
    def starts_as_identity(self) -> bool:
        """Whether every child does: no composition makes a change out of none."""
        return all(child.starts_as_identity for _, child in self.children)

    @property
    def sharing(self) -> tuple[Share, ...]:
        """What the children share, below their names."""
        return tuple(
            Share(below(name, share.pattern), share.over) for name, child in self.children for share in child.sharing
        )

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """Those of the children, below their names.

        Raises:
            UserError: where the composition has no meaning at the site, or a child does not fit it.
        """
        if site.slot in self.refused:
            raise UserError(f"{self.kind} has no meaning at slot {site.slot!r}: {self.refused[site.slot]}")
        return {
            f"{name}/{leaf}": count
            for name, child in self.children
            for leaf, count in child.parameter_counts(site).items()
        }

    def describe(self) -> dict[str, Any]:
        """The settings as JSON-able values, with those of the children."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        children = [[name, child.describe()] for name, child in self.children]
        return {"kind": self.kind} | settings | {"children": children}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The composite with these settings; see :meth:`Method.from_settings`."""
        settings = {name: _as_tuple(value) for name, value in settings.items() if name != "children"} | {
            "children": tuple((name, method_from_description(child)) for name, child in settings.get("children", ()))
        }
        return cls(**settings)


def below(name: str, pattern: str) -> str:
    """The pattern of parameters of a child, of which ``pattern`` is that within its module."""
    return f"{re.escape(name)}/(?:{pattern})"


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


Call = Callable[..., Any]
"""A child bound to its inputs: ``call(state)`` is what it makes of a state, ``call(state, x)`` with another x."""


def bound(parent: nn.Module, method: Composite, site: Site, arrays: Sequence[Any]) -> tuple[Any, list[Call]]:
    """What a composite's children change, and the children as functions of it.

    To be called within a compact method: the children's modules become those of the parent, by their names.

    Args:
        parent: the composite's module.
        method: the composite.
        site: the place.
        arrays: what the composite's module is called with.

    Returns:
        The state, which is y, or both streams of a joint method; and each child bound to the other inputs.
    """
    first, second, *more = arrays

    def bind(name: str, child: Method) -> Call:
        module = child.module(site).clone(parent=parent, name=name)
        if child.joint:
            return lambda state: module(*state, *more)
        # At the other slots everything beside x and y is for those who ask for it.
        given = more if child.uses_weights or child.conditioned or site.slot == "side" else ()
        return lambda y, x=first: module(x, y, *given)

    return (first, second) if method.joint else second, [bind(name, child) for name, child in method.children]
