"""``vla-report``: one HTML page of an experiment's work directory, to be opened in any browser, without network.

    vla-report runs/fusion_ablation-default
    vla-report runs/adapt-default --out lora.html --examples=12

The page has the result tables, figures, learning curves, and a gallery of test examples and of quadruples in
Winoground's format: what every variant said of them, right and wrong, and which patches of the picture look like the
text to its towers. For the gallery the saved adapters are run once; ``--examples=0`` leaves it out. What a work
directory lacks, as of a run that is not finished, the page says.

What the user can mend is one line on standard error and status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vla_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, those of the process if left out, and ends with its status."""
    try:
        given = _parser().parse_args(arguments)
        _report(Path(given.workdir), given.out, given.examples, given.data_dir)
        status = 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


class _Parser(argparse.ArgumentParser):
    """Reports what it cannot read as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows how to call it")


def _parser() -> argparse.ArgumentParser:
    text = "One self-contained HTML page of an experiment's work directory."
    parser = _Parser(prog="vla-report", description=text, allow_abbrev=False)
    parser.add_argument("workdir", help="the --workdir of an experiment, finished or not")
    parser.add_argument("--out", metavar="FILE", help="the page; WORKDIR/report.html if left out")
    parser.add_argument(
        "--examples",
        type=int,
        default=6,
        metavar="N",
        help="examples, and quadruples, that the gallery shows of each task; 0 for a page without gallery (default: 6)",
    )
    parser.add_argument(
        "--data-dir", metavar="FOLDER", help="where data sets lie now, in place of what the configuration says"
    )
    return parser


def _report(workdir: Path, out: str | None, examples: int, data_dir: str | None) -> None:
    if examples < 0:
        raise UserError(f"--examples cannot be negative, got {examples}; 0 makes a page without gallery")
    target = workdir / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; give the page's file, such as {target / 'report.html'}")

    from vla_jax.reporting.page.workdir import read_work_directory

    work = read_work_directory(workdir)

    from absl import logging
    from tqdm.auto import tqdm

    from vla_jax.reporting.page.gallery import make_galleries
    from vla_jax.reporting.page.render import page
    from vla_jax.reporting.table import write_atomically

    # TFDS and Orbax tell at length, through absl, what nobody needs to know of a page; their errors stay.
    logging.set_verbosity(logging.ERROR)
    galleries = []
    if examples:
        with tqdm(desc="vla-report", bar_format="{desc} [{elapsed}]", disable=None, leave=False) as bar:
            galleries = make_galleries(work, examples, data_dir, bar.set_description)
    content = page(work, galleries).encode()
    try:
        write_atomically(target, content)
    except OSError as error:
        raise UserError(f"the page cannot be written to {target}: {error}; choose another place with --out") from None
    for sentence in [*work.missing(), *(problem for gallery in galleries for problem in gallery.problems)]:
        print(f"note: {sentence}", file=sys.stderr)
    print(f"{target} ({len(content) / 2**20:.1f} MiB)")
