"""The modules of transformers' CLIPModel by name: which slot each is, and how peft's patterns choose among them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vla_jax import patterns
from vla_jax.algebra.places import Place
from vla_jax.backbones.convert import LINEAR, TABLE, Row
from vla_jax.errors import UserError
from vla_jax.slots import LINEAR_MAPS, TowerShape

PREFIX = "base_model.model."
"""What stands before a module's name in peft's checkpoints."""

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"

FINGERPRINT = "vla_jax_fingerprint"
"""Under what the header of a checkpoint that was written here keeps the backbone's fingerprint; peft ignores it."""

FEEDFORWARD_SLOTS = {"mlp_fc1": "mlp_in", "mlp_fc2": "mlp_hidden"}
"""By the slot of a map, the slot of what goes into it, where that goes nowhere else."""


class HubTensor(NamedTuple):
    """One of the hub's tensors: the row of our table that it belongs to, and its layer where the row is stacked."""

    row: Row
    layer: int | None


@dataclasses.dataclass(frozen=True)
class Modules:
    """The modules of a CLIPModel of one shape.

    Attributes:
        tensors: every tensor of the hub's format by name.
        places: by the name of a linear module, the slot around it, as the places of placement 0.
    """

    tensors: Mapping[str, HubTensor]
    places: Mapping[str, Place]

    @classmethod
    def of(cls, towers: Mapping[str, TowerShape]) -> Modules:
        """The modules of a CLIP with these towers."""
        slots = {path: slot for slot, path in LINEAR_MAPS.items()}
        tensors, places = {}, {}
        for row in TABLE:
            tower, _, path = row.ours.removesuffix("/kernel").partition("/")
            for layer, name in enumerate(row.names((towers[tower].depth if row.stacked else 1,))):
                tensors[name] = HubTensor(row, layer if row.stacked else None)
                if row.axes == LINEAR:
                    places[name.removesuffix(".weight")] = Place(0, tower, slots[path], layer)
        return cls(tensors, places)

    @property
    def names(self) -> list[str]:
        """Every module, those that only hold others included, in the order of the model."""
        found: dict[str, None] = {}
        for tensor in self.tensors:
            *path, _ = tensor.split(".")
            for end in range(1, len(path) + 1):
                found[".".join(path[:end])] = None
        return list(found)

    def at(self, place: Place) -> str | None:
        """The linear module at a place, None where there is none."""
        return next((name for name, own in self.places.items() if own == place._replace(placement=0)), None)

    def below(self, module: str) -> list[str]:
        """The tensors of a module and of what it holds."""
        return [tensor for tensor in self.tensors if tensor.startswith(f"{module}.")]


def targeted(names: Iterable[str], settings: Mapping[str, Any], linear: Iterable[str]) -> list[str]:
    """The modules that peft would put an adapter in.

    A list names modules or ends of their names, a text is a regular expression for the whole name, or ``all-linear``;
    ``exclude_modules`` and ``modules_to_save`` take modules out, and beside a list ``layers_to_transform`` chooses
    layers, counted by the first number in the name or by that after a ``layers_pattern``.

    Args:
        names: the model's modules.
        settings: the contents of ``adapter_config.json``.
        linear: those that are linear maps.

    Raises:
        UserError: a pattern is no regular expression, or nothing is targeted.
    """
    wanted = settings.get("target_modules")
    if wanted is None:
        raise UserError(
            "adapter_config.json: target_modules is missing, and peft has no default for CLIP; supported: a list of "
            "module names, a regular expression, or 'all-linear'"
        )
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = list(linear)
    chosen = []
    for name in names:
        if isinstance(wanted, str):
            matches = _full(wanted, name, "target_modules")
        else:
            # peft does not ask for the layer of a module that is named in full.
            matches = name in wanted or (_ends(name, wanted) and _in_layers(name, settings))
        if matches and not _left_out(name, settings):
            chosen.append(name)
    if not chosen:
        raise UserError(
            f"adapter_config.json: target_modules {wanted!r} name no module of this CLIP; it has for example "
            f"{', '.join(list(linear)[:3])}"
        )
    return chosen


def saved_whole(names: Iterable[str], modules_to_save: Sequence[str]) -> list[str]:
    """The modules that ``modules_to_save`` replaces: those whose name ends so, without those within another."""
    chosen: list[str] = []
    for name in names:
        within = any(name.startswith(f"{other}.") for other in chosen)
        if not within and any(name.endswith(end) for end in modules_to_save):
            chosen.append(name)
    return chosen


def is_feedforward(name: str, feedforward_modules: str | Sequence[str]) -> bool:
    """Whether (IA)^3 scales what goes into a module instead of what comes out of it."""
    if isinstance(feedforward_modules, str):
        return _full(feedforward_modules, name, "feedforward_modules")
    return any(name.endswith(end) for end in feedforward_modules)


def pattern_value(table: Mapping[str, Any], name: str, default: Any, field: str) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` says of a module: the first key that ends its name wins."""
    for pattern, value in table.items():
        _check(pattern, field)
        if patterns.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _full(pattern: str, name: str, field: str) -> bool:
    _check(pattern, field)
    return patterns.fullmatch(pattern, name) is not None


@functools.lru_cache(maxsize=4096)
def _check(pattern: str, field: str) -> None:
    patterns.check(f"adapter_config.json: {field}", pattern)


def _left_out(name: str, settings: Mapping[str, Any]) -> bool:
    excluded = settings.get("exclude_modules") or []
    out = _full(excluded, name, "exclude_modules") if isinstance(excluded, str) else _ends(name, excluded)
    for saved in settings.get("modules_to_save") or []:
        _check(saved, "modules_to_save")
        out = out or patterns.match(rf"(^|.*\.){saved}($|\..*)", name) is not None
    return out


def _in_layers(name: str, settings: Mapping[str, Any]) -> bool:
    layers = settings.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    given = settings.get("layers_pattern") or [r"[^.]*"]
    for pattern in [given] if isinstance(given, str) else given:
        # Without a pattern of its own, peft wants something before the list of layers; with one it does not.
        before = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        _check(pattern, "layers_pattern")
        found = patterns.match(rf"{before}{pattern}\.(?P<layer>\d+)\.", name)
        if found and found["layer"].isdecimal():  # the pattern may have a group of that name
            return int(found["layer"]) in ([layers] if isinstance(layers, int) else layers)
    return False
