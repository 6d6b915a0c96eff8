"""Adapters as tables to print: what they are, how large their updates are, how two of them differ."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vla_jax.adapters import Affine, LoRA, Placement, Plan
from vla_jax.adapters.base import Method
from vla_jax.algebra.places import Adapter, occupants, select_task
from vla_jax.errors import UserError
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.checkpoints import Summary
from vla_jax.exchange.sites import adapter_of, is_start
from vla_jax.names import Tree, flatten
from vla_jax.slots import SINGLE_SLOTS


def listing(found: Iterable[Summary | tuple[Any, UserError]]) -> Table:
    """One line for every adapter, or for the error that reading it ended in."""
    table = Table("adapter", "form", "methods", "backbone", title="Adapters")
    for column in ("parameters", "step"):
        table.add_column(column, justify="right")
    for one in found:
        if not isinstance(one, Summary):
            table.add_row(escape(str(one[0])), "[red]unreadable[/red]", escape(str(one[1])), "", "", "")
            continue
        step = "" if one.step is None else str(one.step)
        texts = map(escape, (str(one.path), one.form, ", ".join(one.methods) or "none", one.backbone))
        table.add_row(*texts, f"{one.parameters:,}", step)
    return table


def description(saved: SavedAdapter, where: str, backbone: Tree | None = None) -> RenderableType:
    """An adapter in full: where it belongs, its placements, norms by layer, and what else was trained.

    Args:
        saved: the adapter.
        where: what to call it.
        backbone: the tree below ``backbone/``; needed for PiSSA alone.
    """
    parts: list[RenderableType] = [_head(saved, where)]
    if saved.adapters.get("placements"):
        adapter = adapter_of(saved, backbone)
        parts += [_placements(adapter), *_norms(adapter)]
    others = {name: leaf for name, leaf in saved.leaves.items() if not name.startswith("adapters/")}
    if others:
        parts.append(_leaves(others))
    return Group(*parts)


def norm(method: Method, leaves: Mapping[str, np.ndarray]) -> float:
    """How far an adapter is from doing nothing: the Frobenius norm of LoRA's update s A B, else of its parameters.

    Of PiSSA's update what it started from is taken off; factors of affine adapters are counted from one; DoRA's
    magnitudes are left out, since their start is the backbone's.
    """
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    if not isinstance(method, LoRA):
        start = float(isinstance(method, Affine))
        return float(sum(np.sum((leaf - start * (name == "scale")) ** 2) for name, leaf in leaves.items()) ** 0.5)
    a, b = leaves["a"], leaves["b"]
    if method.from_singular_vectors:
        a, b = np.concatenate([a, leaves["frozen/a"]], 1), np.concatenate([b, -leaves["frozen/b"]], 0)
    # |A B|^2 is the sum over (A^T A) * (B B^T): r by r numbers instead of in by out.
    return float(method.scale * max(np.sum((a.T @ a) * (b @ b.T)), 0.0) ** 0.5)


def differences(one: SavedAdapter, other: SavedAdapter) -> tuple[Table, bool]:
    """Everything in which two adapters differ, and whether there is anything.

    Where the form keeps no fingerprint or no step, none is compared.
    """
    table = Table("what", "first", "second", title="Differences")
    for column in ("largest", "relative"):
        table.add_column(column, justify="right")
    has, wants = (dict(_fields(dataclasses.replace(side, leaves={}).description)) for side in (one, other))
    for name in dict.fromkeys([*has, *wants]):
        if name in ("version", "step", "backbone") or has.get(name) == wants.get(name):
            continue
        table.add_row(*map(escape, (name, str(has.get(name, "nothing")), str(wants.get(name, "nothing")))), "", "")
    for name in dict.fromkeys([*one.leaves, *other.leaves]):
        first, second = one.leaves.get(name), other.leaves.get(name)
        if first is None or second is None or first.shape != second.shape:
            shapes = ("nothing" if leaf is None else str(list(leaf.shape)) for leaf in (first, second))
            table.add_row(*map(escape, (name, *shapes)), "", "")
        elif not np.array_equal(first, second):
            a, b = (np.asarray(leaf, np.float64) for leaf in (first, second))
            far, size = np.linalg.norm(a - b), np.linalg.norm(a)
            relative = f"{far / size:.3g}" if size else "inf"
            norms = (f"norm {np.linalg.norm(leaf):.4g}" for leaf in (a, b))
            table.add_row(escape(name), *norms, f"{np.abs(a - b).max():.3g}", relative)
    return table, bool(table.rows)


def _head(adapter: SavedAdapter, where: str) -> Table:
    table = Table(show_header=False, title=escape(where), title_justify="left")
    parameters = sum(leaf.size for leaf in adapter.leaves.values())
    size = sum(leaf.nbytes for leaf in adapter.leaves.values())
    rows = {
        "backbone": adapter.backbone,
        "fingerprint": adapter.fingerprint or "not known",
        "parameters": f"{parameters:,} in {len(adapter.leaves)} arrays, {size:,} bytes",
        "step": str(adapter.step),
        "version": adapter.version or "not known",
    }
    task = adapter.adapters.get("task")
    if task:
        rows["task"] = ", ".join(f"{name} {value}" for name, value in task.items())
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _placements(adapter: Adapter) -> Table:
    table = Table("adapter", "method", "settings", "towers", "slots", "layers", "tasks", title="Placements")
    table.add_column("parameters", justify="right")
    sizes: dict[str, int] = collections.Counter()
    known = adapter.plan.leaves()
    for path, leaf in flatten(adapter.params).items():
        if not is_start(known[path]):
            sizes[path.split("/")[0]] += leaf.size
    for placement in adapter.plan.placements:
        texts = (
            placement.name,
            placement.method.kind,
            _settings(placement),
            ", ".join(placement.towers),
            ", ".join(placement.slots),
            placement.layers,
            ", ".join(placement.tasks) or "one for all",
        )
        table.add_row(*map(escape, texts), f"{sizes[placement.name]:,}")
    return table


def _settings(placement: Placement) -> str:
    """What was chosen otherwise than by default, and rank in any case."""
    method = placement.method
    chosen = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "rank" or value != field.default:
            chosen.append(f"{field.name} {value}")
    tables = [f"{name} {len(table)} places" for name in ("ranks", "alphas") if (table := getattr(placement, name))]
    return ", ".join(chosen + tables)


def _norms(adapter: Adapter) -> Iterator[RenderableType]:
    """By placement, task and tower, a table of layers by slots."""
    for placement in adapter.plan.placements:
        part = Adapter(_of_one(adapter.plan, placement), {placement.name: adapter.params[placement.name]})
        for task in placement.tasks or (None,):
            tables: dict[str, dict[tuple[str, str], float]] = {}
            for at, occupant in occupants(part if task is None else select_task(part, task)).items():
                row = "once" if at.slot in SINGLE_SLOTS else str(at.layer)
                tables.setdefault(at.tower, {})[row, at.slot] = norm(occupant.method, occupant.leaves)
            for tower, values in tables.items():
                named = [placement.name, *([] if task is None else [f"task {task}"]), tower]
                # No title of the table's own, which would be broken to fit a narrow one.
                yield Text(f"\nNorms of {', '.join(named)}", style="italic")
                yield _norm_table(values)


def _of_one(plan: Plan, placement: Placement) -> Plan:
    groups = tuple(group for group in plan.groups if group.path[0] == placement.name)
    return plan._replace(placements=(placement,), groups=groups)


def _norm_table(values: Mapping[tuple[str, str], float]) -> Table:
    table = Table("layer")
    slots = list(dict.fromkeys(slot for _, slot in values))
    for slot in slots:
        table.add_column(slot, justify="right")
    rows = dict.fromkeys(row for row, _ in values)
    for row in sorted(rows, key=lambda name: (name == "once", name.zfill(4))):
        cells = (values.get((row, slot)) for slot in slots)
        table.add_row(row, *("" if value is None else f"{value:.4g}" for value in cells))
    return table


def _leaves(leaves: Mapping[str, np.ndarray]) -> Table:
    table = Table("parameter", "shape", title="Trained beside the adapters")
    for column in ("parameters", "norm"):
        table.add_column(column, justify="right")
    for name, leaf in leaves.items():
        length = float(np.linalg.norm(np.asarray(leaf, np.float64)))
        table.add_row(escape(name), escape(str(list(leaf.shape))), f"{leaf.size:,}", f"{length:.4g}")
    return table


def _fields(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested JSON as ``("placements.0.method.rank", 8)``."""
    if isinstance(content, Mapping | list | tuple) and content:
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            yield from _fields(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
