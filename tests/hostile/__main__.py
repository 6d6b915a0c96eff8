"""Mutated files of every kind that others write, read one after the other.

    python tests/hostile --count=200000 --seed=0
    python tests/hostile --count=5000 --only "pictures" --failures=runs/hostile

Ends with status 1 where an input had anything happen but the documented errors; such inputs lie in the folder of
failures, each with its traceback. An input that hangs ends the process with the traceback of all threads; the last line
of progress names it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.dont_write_bytecode = True
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from hostile_kind import Kind  # noqa: E402
from hostile_kinds import KINDS  # noqa: E402
from hostile_run import run, table  # noqa: E402
from rich.console import Console  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402


def main() -> int:
    """Runs the command and gives its status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", choices=[kind.name for kind in KINDS], help="a kind; all if left out"
    )
    parser.add_argument("--failures", type=Path, default=Path("runs/hostile"))
    parser.add_argument("--patience", type=float, default=30.0, help="seconds of waiting that end the process")
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if given.only is None or kind.name in given.only]
    with tqdm(total=given.count, unit=" inputs", mininterval=5) as bar:

        def told(kind: Kind, index: int) -> None:
            bar.set_postfix_str(f"{kind.name} {index}", refresh=False)
            bar.update()

        results = run(given.count, given.seed, given.failures, kinds=kinds, patience=given.patience, told=told)
    Console(width=None if sys.stdout.isatty() else 120).print(table(results, given.count, given.seed))
    failures = [failure for result in results for failure in result.failures]
    for failure in failures[:50]:
        print(failure.encode("ascii", "backslashreplace").decode())
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
