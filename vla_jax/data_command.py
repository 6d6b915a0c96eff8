"""``vla-data``: data files of one's own, checked from a shell before anything is trained on them.

    vla-data check rows.jsonl
    vla-data check train.csv --test test.csv --task vqa --images photos --column image=file --json

Every problem is one line on standard output, ``FILE:LINE: KIND: MESSAGE``, as soon as it is found; progress and summary
go to standard error. With ``--json`` every line of output is an object: ``file``, ``line``, ``kind`` and ``message`` of
a problem, and at the end ``summary``. The status is 0 if there is no problem, 1 if there is any, and 2 if the check
cannot be made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from vla_jax.errors import UserError, unknown

if TYPE_CHECKING:
    from rich.table import Table

    from vla_jax.data.own import OwnData, Summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, those of the process if left out, and ends with its status."""
    try:
        given = _parser().parse_args(arguments)
        status = given.run(given)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever read along has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    raise SystemExit(status)


class _Parser(argparse.ArgumentParser):
    """Reports what it cannot read as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows how to call it")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vla-data", description="Looks at data files of one's own.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    text = "every bad row of a file (JSON lines, CSV, Parquet) with its line; status 1 if there is any"
    command = commands.add_parser("check", help=text, description=text)
    command.add_argument("file", help="the rows, or those for training where other splits have files of their own")
    command.add_argument("--task", default="", help="what the rows are for; told from the columns if left out")
    command.add_argument("--images", default="", help="the folder that paths of pictures are relative to")
    command.add_argument("--validation", default="", metavar="FILE", help="a file of its own for validation rows")
    command.add_argument("--test", default="", metavar="FILE", help="a file of its own for test rows")
    command.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help="what a column is called in the file"
    )
    command.add_argument("--classes", default="", help="the class names, separated by commas")
    command.add_argument("--box-format", default="xyxy", choices=("xyxy", "xywh"), help="the four numbers of a box")
    command.add_argument("--no-decode", action="store_true", help="only looks whether pictures are there")
    command.add_argument("--json", action="store_true", help="prints objects, one a line")
    command.set_defaults(run=_check)
    return parser


def _data(given: argparse.Namespace) -> OwnData:
    from vla_jax.data.own import Columns, OwnData

    names = [field.name for field in dataclasses.fields(Columns)]
    columns = {}
    for pair in given.column:
        name, equals, column = pair.partition("=")
        if not equals:
            raise UserError(f"--column {pair} lacks the file's name for it; write --column {pair}=COLUMN")
        if name not in names:
            raise unknown("column name", name, names)
        columns[name] = column
    return OwnData(
        path=given.file,
        validation_path=given.validation,
        test_path=given.test,
        images=given.images,
        columns=Columns(**columns),
        classes=tuple(filter(None, given.classes.split(","))),
        box_format=given.box_format,
    )


def _check(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from vla_jax.data.own import Scan

    scan = Scan(_data(given), given.task, decode=not given.no_decode)
    shown = Console(stderr=True)
    out = Console(soft_wrap=True, highlight=False)
    # The bar and the problems would draw over each other where they share a terminal.
    with Progress(console=out if out.is_terminal and shown.is_terminal else shown, transient=True) as bar:
        task = bar.add_task(f"checking {given.file}", total=scan.size)
        for problem in scan.problems(lambda amount: bar.advance(task, amount)):
            if given.json:
                print(json.dumps(dataclasses.asdict(problem)), flush=True)
            else:
                place, rest = str(problem).split(f": {problem.kind}: ", 1)
                out.print(f"{place}: ", style="cyan", end="", markup=False)
                out.print(f"{problem.kind}: ", style="bold red", end="", markup=False)
                out.print(rest, markup=False)
    summary = scan.summary()
    if given.json:
        print(json.dumps({"summary": dataclasses.asdict(summary)}))
    else:
        shown.print(_table(summary))
    return int(bool(summary.problems))


def _table(summary: Summary) -> Table:
    import rich.box
    import rich.markup
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False)
    table.add_row("task", summary.task)
    table.add_row("rows", f"{summary.rows:,}, {summary.bad:,} of them bad")
    for kind, count in sorted(summary.problems.items()):
        table.add_row(f"  {kind}", f"[red]{count:,}[/red]")
    for split, count in summary.splits.items():
        how = ", a share of the training pictures" if split in summary.held_out else ""
        table.add_row(split, f"{count:,} good{how}")
    table.add_row("pictures", f"{summary.pictures:,}")
    if summary.classes:
        names = ", ".join(summary.classes[:10]) + (", ..." if len(summary.classes) > 10 else "")
        table.add_row("classes", rich.markup.escape(f"{len(summary.classes)}: {names}"))
    if summary.shared:
        table.add_row("[yellow]note[/yellow]", f"{summary.shared:,} pictures stand in more than one split")
    table.add_row("", "[red]to be mended[/red]" if summary.problems else "[green]good to train on[/green]")
    return table
