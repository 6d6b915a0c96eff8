"""``python -m vla_jax.evaluation.winoground``: the tables of score files in the authors' format. Imports no JAX."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vla_jax.errors import UserError
from vla_jax.evaluation.winoground.examples import (
    groups_of_examples,
    read_examples,
    read_relabelling,
    relabelled_groups,
)
from vla_jax.evaluation.winoground.report import report, tables
from vla_jax.evaluation.winoground.score_files import read_scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report of score files.

    Args:
        arguments: of the command line.

    Returns:
        The exit status: 0, or 2 where something given cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vla_jax.evaluation.winoground",
        description="Text, image and group score of Winoground score files, by group of examples; and, for several "
        "files, the first against each other one.",
    )
    parser.add_argument("--examples", required=True, metavar="FILE", help="examples.jsonl as published")
    parser.add_argument(
        "--scores",
        required=True,
        action="append",
        metavar="FILE",
        help='one JSON a line, {"label": "<id>_c<caption>_i<image>", "score": x}; may be given several times',
    )
    parser.add_argument(
        "--relabelling", metavar="FILE", help="new_tag_assignments.json of Diwan et al. 2022, for scores by its tags"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, fractions at full precision")
    given = parser.parse_args(arguments)
    try:
        examples = read_examples(given.examples)
        groups = groups_of_examples(examples)
        if given.relabelling:
            groups |= relabelled_groups(examples, read_relabelling(given.relabelling, examples))
        identifiers = [example.identifier for example in examples]
        names = _names(given.scores)
        content = report({names[path]: read_scores(path, identifiers) for path in given.scores}, groups)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(content, indent=1, ensure_ascii=False))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # a pipe or a file has no width to keep to
    for table in tables(content):
        console.print(table.terminal())
    return 0


def _names(paths: Sequence[str]) -> dict[str, str]:
    """What models are called: their files' names, or whole paths where names are alike."""
    if twice := [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]:
        raise UserError(f"the scores file {twice[0]!r} is given twice; give each model's own file")
    stems = Counter(Path(path).stem for path in paths)
    return {path: Path(path).stem if stems[Path(path).stem] == 1 else path for path in paths}


if __name__ == "__main__":
    sys.exit(main())
