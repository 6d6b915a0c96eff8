"""The command line of ``launch.py``: which experiment, with which configuration, where.

An experiment is a module of ``experiments`` with three names:

- ``PRESETS``: configurations by name, ``default`` among them, of one frozen dataclass whose first field, ``preset``,
  is their name.
- ``check(config)``: raises a :class:`UserError` for what cannot be run, before anything is compiled, and returns what
  ``--dry_run`` prints.
- ``run(config, workdir)``: runs it, or goes on with what is unfinished in ``workdir``.

With ``--distributed`` the same command is started on every host. The processes find each other before anything touches
a device, refuse together what one of them refuses, and check that they run the same program. The first one alone holds
the work directory, writes and reports.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import pkgutil
import sys
import traceback
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import rich
import tyro

from vla_jax import distributed
from vla_jax.errors import UserError, nearest, unknown
from vla_jax.redaction import redacted

_USAGE = """python launch.py --experiment=NAME [--workdir=FOLDER] [--config.preset=PRESET] [--config.FIELD=VALUE ...]
       python launch.py --list
       python launch.py --experiment=NAME --dry_run     what would be trained, without training
       python launch.py --experiment=NAME --help        every field of the configuration
       python launch.py --experiment=NAME --distributed [--coordinator=HOST:PORT --num_processes=N --process_id=I]
                                                        the same on every host; the last three where JAX finds no
                                                        cluster by itself"""

_LOG_WIDTH = 200  # columns of a table in a log: rich assumes 80 where there is no terminal, and cuts words to fit

_OWN_FLAGS = ("--experiment", "--workdir", "--list", "--dry_run", "--distributed")


def command(arguments: Sequence[str]) -> NoReturn:
    """Runs ``launch.py`` with these arguments and ends the process with its status.

    0 after a finished run, and after SIGTERM once what was done is saved, as schedulers take it; 130 after Ctrl-C; 2
    after what the user can mend, said in one line; 1 after any other error.
    """
    if "COLUMNS" not in os.environ and not sys.stdout.isatty():
        rich.reconfigure(width=_LOG_WIDTH)
    try:
        main(arguments)
    except UserError as error:
        # What the user can mend is one clear line, not a traceback.
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(2)
    except KeyboardInterrupt:
        distributed.leave(130)
    except Exception:
        print(redacted(traceback.format_exc()), file=sys.stderr)
        distributed.leave(1)
    sys.exit(0)


def main(arguments: Sequence[str]) -> None:
    """Runs ``launch.py`` with these arguments.

    Raises:
        UserError: for an unknown experiment, preset or field, a value of the wrong type, or a configuration that the
            experiment refuses.
    """
    parser = _Parser(prog="launch.py", usage=_USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--experiment")
    parser.add_argument("--workdir")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
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
    if own.distributed:
        distributed.start(own.coordinator, own.num_processes, own.process_id)
        distributed.only_first_speaks()
    elif {own.coordinator, own.num_processes, own.process_id} != {None}:
        raise UserError(
            "--coordinator, --num_processes and --process_id go with --distributed; add it, or leave them out"
        )
    with distributed.together():
        experiment = load_experiment(own.experiment)
        config = parse_config(experiment, rest, show_help=own.help)
        report = experiment.check(config)
    if own.dry_run:
        rich.print(report)
        return
    from vla_jax import workplace  # and with it JAX, for which --list does not wait

    workdir = Path(own.workdir or f"runs/{own.experiment}-{config.preset}")
    try:
        with workplace.prepared(workdir, experiment, config):
            experiment.run(config, workdir)
    except (KeyboardInterrupt, SystemExit) as stopped:
        if distributed.is_first():
            print(f"stopped; the same command goes on with what is unfinished in {workdir}", file=sys.stderr)
        if distributed.several() and isinstance(stopped, KeyboardInterrupt):
            raise
        raise SystemExit(130 if isinstance(stopped, KeyboardInterrupt) else stopped.code) from None


class _Parser(argparse.ArgumentParser):
    """Reports what it cannot read as everything else here does."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help shows how to call launch.py")


def load_experiment(name: str) -> ModuleType:
    """The module of an experiment; :class:`UserError` with the nearest names if there is none."""
    if name not in _experiments():
        raise unknown("experiment", name, _experiments())
    return importlib.import_module(f"experiments.{name}")


def parse_config(experiment: ModuleType, arguments: Sequence[str], *, show_help: bool = False) -> Any:
    """The configuration that a preset and ``--config.field=value`` arguments make.

    A field of a part of the configuration, such as ``--config.budget.steps``, may be called by its last name,
    ``--config.steps``, where no other field has that name.

    Raises:
        UserError: for an unknown preset or field or a value that does not fit its type, naming the nearest.
    """
    given = _flags(arguments)
    chosen = next((values[0] for flag, values in reversed(given) if flag == "--config.preset" and values), "default")
    if chosen not in experiment.PRESETS:
        raise unknown("preset", chosen, experiment.PRESETS)
    preset = experiment.PRESETS[chosen]
    fields = dict(_fields(preset, "--config"))
    given = [(_in_full(flag, fields), values) for flag, values in given]
    spelled = [_spelled(flag, values, fields[flag]) for flag, values in given]
    if show_help:
        _parse(preset, [*itertools.chain(*spelled), "--help"], quiet=False)
    try:
        return _parse(preset, itertools.chain(*spelled), quiet=True)
    except SystemExit as refused:
        if (said := _said_by_configuration(refused)) is not None:
            raise said from None
        for (flag, values), parts in zip(given, spelled, strict=True):
            try:
                _parse(preset, parts, quiet=True)
            except SystemExit as alone:
                if _said_by_configuration(alone) is not None:
                    continue  # the value fits its type, and only misses one of the other flags
                value = repr(" ".join(values)) if values else "without a value"
                raise UserError(f"{flag} cannot be {value}; allowed: {_type_name(fields[flag])}") from None
        raise UserError(f"the arguments do not fit together: {' '.join(arguments)}") from None


def _parse(preset: Any, arguments: Iterable[str], *, quiet: bool) -> Any:
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


def _said_by_configuration(refused: BaseException) -> UserError | None:
    """What a configuration said against its values: tyro takes it for its own and ends the process with it."""
    cause = refused.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    return cause


def _flags(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the values that follow it, ``--a=b`` as well as ``--a b``."""
    flags: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            flags.append((flag, [value] if equals else []))
        elif flags:
            flags[-1][1].append(argument)
        else:
            raise UserError(f"{argument!r} belongs to no argument; write --config.FIELD={argument}")
    return flags


def _in_full(flag: str, fields: Iterable[str]) -> str:
    """The whole name of a field that may be called by its last name."""
    if flag in fields:
        return flag
    parent, _, name = flag.rpartition(".")
    called = [field for field in fields if parent == "--config" and field.endswith(f".{name}")]
    if len(called) == 1:
        return called[0]
    near = called or nearest(flag, [*_OWN_FLAGS, *fields])
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists every field"
    raise UserError(f"unknown argument {flag}; {hint}")


def _spelled(flag: str, values: list[str], kind: Any) -> list[str]:
    """A flag and its values as tyro reads them.

    Beyond its own forms these may be given: ``--a=1,2`` for ``--a 1 2`` (and ``--a=`` for none), ``--a=false`` for
    ``--no_a``, and ``none`` in any case.
    """
    if typing.get_origin(kind) is tuple and len(values) == 1:
        return [flag, *filter(None, values[0].split(","))]
    if kind is bool and len(values) == 1 and values[0].lower() in ("true", "false"):
        parent, _, name = flag.rpartition(".")
        return [flag if values[0].lower() == "true" else f"{parent}.no_{name}"]
    if type(None) in typing.get_args(kind):
        return [flag, *("None" if value.lower() == "none" else value for value in values)]
    return [flag, *values]


def _fields(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every settable field's flag and type; of a tuple of configurations, those of the members it has."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        flag, kind, value = f"{prefix}.{field.name}", hints[field.name], getattr(config, field.name)
        members = enumerate(value) if isinstance(value, tuple) else ()
        if dataclasses.is_dataclass(value):
            yield from _fields(value, flag)
        elif any(map(dataclasses.is_dataclass, typing.get_args(kind))):
            for position, member in members:
                yield from _fields(member, f"{flag}.{position}")
        else:
            yield flag, kind
            if kind is bool:
                yield f"{prefix}.no_{field.name}", type(None)


def _type_name(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, arguments))
    if typing.get_origin(kind) is tuple:
        return f"any number of {_type_name(arguments[0])}, separated by commas"
    if arguments:
        return " or ".join(map(_type_name, arguments))
    return {type(None): "none", bool: "true, false"}.get(kind, getattr(kind, "__name__", str(kind)))


def _experiments() -> dict[str, str]:
    """The experiments and the first lines of their docstrings, read without importing them."""
    import experiments

    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        source = (Path(module.module_finder.path) / f"{module.name}.py").read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(source)) or ""
        found[module.name] = text.partition("\n")[0]
    return found
