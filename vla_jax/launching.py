"""The command line of ``launch.py``: which experiment, with which configuration, where.

An experiment is a module of ``experiments`` with three names:

- ``PRESETS``: configurations by name, ``default`` among them, of one frozen dataclass whose first field, ``preset``,
  is their name.
- ``check(config)``: raises a :class:`UserError` for what cannot be run, before anything is compiled, and returns what
  ``--dry_run`` prints.
- ``run(config, workdir)``: runs it, or goes on with what is unfinished in ``workdir``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import pkgutil
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import rich
import tyro

from vla_jax.errors import UserError, nearest, unknown

_USAGE = """python launch.py --experiment=NAME [--workdir=FOLDER] [--config.preset=PRESET] [--config.FIELD=VALUE ...]
       python launch.py --list
       python launch.py --experiment=NAME --dry_run     what would be trained, without training
       python launch.py --experiment=NAME --help        every field of the configuration"""


def main(arguments: Sequence[str]) -> None:
    """Runs ``launch.py`` with these arguments.

    Raises:
        UserError: for an unknown experiment, preset or field, a value of the wrong type, or a configuration that the
            experiment refuses.
    """
    parser = argparse.ArgumentParser(prog="launch.py", usage=_USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--experiment")
    parser.add_argument("--workdir")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    if own.list:
        for name, line in _experiments().items():
            rich.print(f"[bold]{name}[/bold]  {line}")
        return
    if own.experiment is None:
        if own.help:
            print(f"usage: {_USAGE}")
            return
        raise UserError(f"no experiment given; --experiment=NAME with one of {', '.join(_experiments())}")
    experiment = load_experiment(own.experiment)
    config = parse_config(experiment, rest, show_help=own.help)
    report = experiment.check(config)
    if own.dry_run:
        rich.print(report)
        return
    workdir = Path(own.workdir or f"runs/{own.experiment}-{config.preset}")
    _prepare(workdir, config)
    experiment.run(config, workdir)


def load_experiment(name: str) -> ModuleType:
    """The module of an experiment; :class:`UserError` with the nearest names if there is none."""
    if name not in _experiments():
        raise unknown("experiment", name, _experiments())
    return importlib.import_module(f"experiments.{name}")


def parse_config(experiment: ModuleType, arguments: Sequence[str], *, show_help: bool = False) -> Any:
    """The configuration that a preset and ``--config.field=value`` arguments make.

    Raises:
        UserError: for an unknown preset or field or a value that does not fit its type, naming the nearest.
    """
    arguments = _split_values(arguments)
    chosen = "default"
    for position, argument in enumerate(arguments):
        if argument == "--config.preset" and position + 1 < len(arguments):
            chosen = arguments[position + 1]
    if chosen not in experiment.PRESETS:
        raise unknown("preset", chosen, experiment.PRESETS)
    preset = experiment.PRESETS[chosen]
    fields = dict(_fields(type(preset), "--config"))
    for argument in arguments:
        if argument.startswith("--") and argument not in fields:
            near = nearest(argument, ["--experiment", "--workdir", "--list", "--dry_run", *fields])
            hint = f"did you mean {' or '.join(near)}?" if near else "--help lists every field"
            raise UserError(f"unknown argument {argument}; {hint}")
    if show_help:
        _parse(preset, [*arguments, "--help"], quiet=False)
    try:
        return _parse(preset, arguments, quiet=True)
    except SystemExit:
        for one in _one_by_one(arguments):
            try:
                _parse(preset, one, quiet=True)
            except SystemExit:
                given = " ".join(one[1:]) or "nothing"
                raise UserError(f"{one[0]} cannot be {given!r}; allowed: {_type_name(fields[one[0]])}") from None
        raise UserError(f"the arguments do not fit together: {' '.join(arguments)}") from None


def _parse(preset: Any, arguments: Sequence[str], *, quiet: bool) -> Any:
    whole = dataclasses.make_dataclass("Arguments", [("config", type(preset))], frozen=True)
    silence = contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
    with silence:
        return tyro.cli(
            whole,
            args=list(arguments),
            default=whole(preset),
            use_underscores=True,
            console_outputs=not quiet,
            prog="launch.py",
            config=(tyro.conf.AvoidSubcommands,),
        ).config


def _split_values(arguments: Sequence[str]) -> list[str]:
    """``--a=b`` as ``--a b``; a tuple may be given as ``--a=1,2`` as well as ``--a 1 2``."""
    parts: list[str] = []
    for argument in arguments:
        if argument.startswith("--") and "=" in argument:
            name, value = argument.split("=", 1)
            parts += [name, value]
        else:
            parts.append(argument)
    return parts


def _one_by_one(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Each flag with its values."""
    current: list[str] = []
    for argument in arguments:
        if argument.startswith("--") and current:
            yield current
            current = []
        current.append(argument)
    if current:
        yield current


def _fields(config: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every settable field's flag and type."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        flag, kind = f"{prefix}.{field.name}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, flag)
        else:
            yield flag, kind
            if kind is bool:
                yield f"{prefix}.no_{field.name}", kind


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    return getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)


def _experiments() -> dict[str, str]:
    """The experiments and the first lines of their docstrings, read without importing them."""
    import experiments

    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        source = (Path(module.module_finder.path) / f"{module.name}.py").read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(source)) or ""
        found[module.name] = text.partition("\n")[0]
    return found


def _prepare(workdir: Path, config: Any) -> None:
    """Makes the work directory and lets compiled programs outlive the process, so that going on costs no compiling."""
    import jax

    from vla_jax.training.metrics import run_record

    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the work directory {workdir} cannot be made: {error}; choose another with --workdir"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    run_record(workdir, config)
