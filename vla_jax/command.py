"""``vla-adapter``: adapters listed, shown, converted, merged, combined and compared from a shell.

An adapter is a checkpoint's folder, a single file of ours, or a folder of peft. What the user can mend is one line on
standard error and status 2; ``diff`` ends with status 1 where there are differences.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vla_jax.errors import UserError

if TYPE_CHECKING:
    from vla_jax.exchange.adapter_file import SavedAdapter


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, those of the process if left out, and ends with its status."""
    try:
        given = _parser().parse_args(arguments)
        _quiet()
        status = given.run(given)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # whoever read along has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    raise SystemExit(status)


class _Parser(argparse.ArgumentParser):
    """Reports what it cannot read as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows how to call it")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vla-adapter", description="Lists, shows, converts, merges, combines and compares adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    backbone = argparse.ArgumentParser(add_help=False)
    backbone.add_argument(
        "--backbone",
        help="name or folder of the backbone that the adapter was trained on; if left out, the one that it names",
    )
    part = argparse.ArgumentParser(add_help=False)
    part.add_argument("--only", nargs="+", default=(), metavar="NAME", help="the adapters to take, by name")
    part.add_argument("--task", help="the task to take, of those that the adapter has weights for")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, *parents: argparse.ArgumentParser):
        command = commands.add_parser(name, parents=parents, help=text, description=text)
        command.set_defaults(run=run)
        return command

    command = add("list", _list, "every adapter at or below a folder")
    command.add_argument("folder", type=Path)

    command = add("show", _show, "what an adapter is, and its norms by layer", backbone)
    command.add_argument("adapter", type=Path)

    command = add("convert", _convert, "an adapter in another form", backbone, part)
    command.add_argument("adapter", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--to", required=True, choices=("file", "folder", "peft"), help="the form to write")

    command = add("merge", _merge, "the backbone with an adapter in its weights, in the hub's format", backbone, part)
    command.add_argument("adapter", type=Path)
    command.add_argument("--out", type=Path, required=True, help="the folder to write")

    command = add("combine", _combine, "one adapter from several of one plan", backbone)
    command.add_argument("adapters", type=Path, nargs="+")
    command.add_argument("--out", type=Path, required=True, help="a .safetensors file, or a folder")
    command.add_argument("--weights", type=float, nargs="+", help="one for each adapter; equal shares if left out")
    command.add_argument("--how", default="cat", help="cat (exact), svd, linear, ties, dare_linear, dare_ties, ...")
    command.add_argument("--rank", type=int, help="of the result; for svd, ties, dare and pruning")
    command.add_argument("--density", type=float, help="the share of entries that ties, dare and pruning keep")
    command.add_argument("--seed", type=int, default=0, help="of what dare drops")
    command.add_argument("--no-heads", action="store_true", help="leaves the tasks' heads out")

    command = add("diff", _diff, "in what two adapters differ; status 1 if they do", backbone)
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    return parser


def _quiet() -> None:
    """Orbax tells at length, through absl, what nobody needs to know here."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)


def _list(given: argparse.Namespace) -> int:
    from vla_jax.exchange import checkpoints, report

    found = []
    for path in checkpoints.find_adapters(given.folder):
        try:
            found.append(checkpoints.summary(path))
        except UserError as error:
            found.append((path, error))
    if not found:
        raise UserError(f"there is no adapter at or below {given.folder}")
    _print(report.listing(found))
    return 0


def _show(given: argparse.Namespace) -> int:
    from vla_jax.exchange import checkpoints, report

    adapter = checkpoints.read_adapter(given.adapter, given.backbone)
    _print(report.description(adapter, str(given.adapter), _start(adapter, given)))
    return 0


def _convert(given: argparse.Namespace) -> int:
    from vla_jax.exchange import checkpoints

    adapter = _part(given)
    start = _start(adapter, given) if given.to == "peft" else None
    print(checkpoints.write_adapter(given.out, adapter, given.to, start))
    return 0


def _merge(given: argparse.Namespace) -> int:
    from vla_jax.exchange import checkpoints, weights

    adapter = _part(given)
    backbone = checkpoints.load_backbone_of(adapter, given.backbone)
    if heads := sorted({"/".join(name.split("/")[:2]) for name in adapter.leaves if name.startswith("heads/")}):
        print(f"left out, since the hub's CLIP has no place for them: {', '.join(heads)}", file=sys.stderr)
    print(weights.export_merged(given.out, adapter, backbone))
    return 0


def _combine(given: argparse.Namespace) -> int:
    from vla_jax.exchange import checkpoints, sites, weights

    adapters = [checkpoints.read_adapter(path, given.backbone) for path in given.adapters]
    needed = any(map(sites.uses_weights, adapters))
    combined = weights.combine_saved(
        adapters,
        given.weights or [1.0 / len(adapters)] * len(adapters),
        given.how,
        rank=given.rank,
        density=given.density,
        seed=given.seed,
        backbone=checkpoints.load_backbone_of(adapters[0], given.backbone).params if needed else None,
        heads=not given.no_heads,
    )
    form = "file" if given.out.suffix == ".safetensors" else "folder"
    print(checkpoints.write_adapter(given.out, combined, form))
    return 0


def _diff(given: argparse.Namespace) -> int:
    from vla_jax.exchange import checkpoints, report

    first, second = (checkpoints.read_adapter(path, given.backbone) for path in (given.first, given.second))
    table, differ = report.differences(first, second)
    if differ:
        _print(table)
    return int(differ)


def _part(given: argparse.Namespace) -> SavedAdapter:
    """The adapter, or the part of it that is asked for."""
    from vla_jax.algebra import select_task
    from vla_jax.exchange import checkpoints, sites

    adapter = sites.chosen(checkpoints.read_adapter(given.adapter, given.backbone), tuple(given.only))
    if given.task is None:
        return adapter
    return sites.saved_as(adapter, select_task(sites.adapter_of(adapter, _start(adapter, given)), given.task))


def _start(adapter: SavedAdapter, given: argparse.Namespace) -> Mapping[str, Any] | None:
    """The backbone's parameters where some of the adapter's come from them, else None."""
    from vla_jax.exchange import checkpoints, sites

    if not sites.lacks_start(adapter):
        return None
    return checkpoints.load_backbone_of(adapter, given.backbone).params


def _print(what: object) -> None:
    from rich.console import Console

    console = Console()
    # In a pipe or a file there is no width to keep to, and lines are as long as they have to be.
    Console(width=None if console.is_terminal else 10_000).print(what)
