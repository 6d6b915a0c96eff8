"""What does exact recall between 100,000 pictures and texts cost, beside NumPy by blocks and a flat FAISS index?

    python benchmarks/retrieval.py --rows 20000 --rounds 1

Recall at 1, 5 and 10 in both directions. Each contender has a process of its own, in turns; all see the same features
and must find the same recall, or the script stops. Peak memory is that of the whole process, features included.
``README.md`` says more.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

# The script is run from a checkout; a checkout need not be installed.
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.measuring import alone, peak_resident, timed  # noqa: E402
from benchmarks.report import Record, append_record, command_line, machine_line, markdown, started, terminal_table  # noqa: E402
from vla_jax.errors import UserError  # noqa: E402

OUTPUT = Path(__file__).with_name("retrieval.jsonl")
COLUMNS = (
    "contender",
    "rows",
    "seconds",
    "GFLOP/s",
    "peak (after import), GiB",
    "time, ours / peer",
    "R@1, R@5, R@10, %",
)
AT = (1, 5, 10)
# Of the whole process, in GiB.
MEMORY_TARGET = 2.0
NOISE = 0.193  # beside which some three of four texts are found first among 100,000


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        rows: pictures, and as many texts.
        width: of their features.
        rounds: processes for each contender, in turns.
        numpy_block: pictures whose scores NumPy holds at once; 0 tries some and takes the fastest.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md from the newest run in ``output``.
    """

    rows: int = 100_000
    width: int = 512
    rounds: int = 2
    numpy_block: int = 0
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        if self.rows < max(AT) or min(self.width, self.rounds) < 1 or self.numpy_block < 0:
            raise UserError(f"rows must be {max(AT)} or more, width and rounds 1 or more, numpy_block 0 or more")


def make_features(options: Options) -> tuple[Any, Any]:
    """Pictures and texts float32 ``[rows, width]`` of length one, made in place: a text is its picture and noise."""
    import numpy as np

    generator = np.random.default_rng(0)
    images = generator.standard_normal((options.rows, options.width), np.float32)
    texts = generator.standard_normal((options.rows, options.width), np.float32)
    images /= np.sqrt(np.einsum("nw,nw->n", images, images))[:, None]
    texts *= NOISE * (512 / options.width) ** 0.5
    texts += images
    texts /= np.sqrt(np.einsum("nw,nw->n", texts, texts))[:, None]
    return images, texts


def measure_ours(options: Options) -> Record:
    """Ranks of all in both directions, from which recall, median rank and mAP follow."""
    import jax
    import numpy as np

    from vla_jax.evaluation.exact_ranks import count_before

    after_import = peak_resident()
    images, texts = make_features(options)
    found: dict[str, Any] = {}

    def run() -> None:
        before = count_before(images, texts)
        found.update(image_to_text=before.image_to_text[:, 0], text_to_image=before.text_to_image)

    seconds = timed(run)
    recall = {name: [float(np.mean(each < k)) for k in AT] for name, each in found.items()}
    device = jax.devices()[0]
    shown = {"device": jax.default_backend(), "device_name": device.device_kind}
    return _record(seconds, after_import, recall, {"jax": jax.__version__}) | shown


def measure_numpy(options: Options) -> Record:
    """The same counts as plainly as NumPy has them: a block of pictures against all texts, both directions at once."""
    import numpy as np

    after_import = peak_resident()
    images, texts = make_features(options)
    own = np.einsum("nw,nw->n", images, texts)

    def counts(block: int, rows: int) -> tuple[Any, Any]:
        of_images = np.empty(rows, np.int64)
        of_texts = np.zeros(len(texts), np.int64)
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            scores = images[part] @ texts.T
            # The own pair is counted by its product in either form, so that rounding cannot leave it out.
            scores[np.arange(part.stop - start), np.arange(start, part.stop)] = np.inf
            of_images[part] = np.count_nonzero(scores >= own[part, None], axis=1) - 1
            of_texts += np.count_nonzero(scores >= own, axis=0)
        return of_images, of_texts - 1

    block = options.numpy_block
    if not block:
        # The peer's best setting, found outside the timed run.
        trial = min(options.rows, 2048)
        block = min((128, 512, 1024), key=lambda size: timed(lambda: counts(size, trial)))
    found: list[Any] = []
    seconds = timed(lambda: found.extend(counts(block, options.rows)))
    recall = {
        name: [float(np.mean(each < k)) for k in AT]
        for name, each in zip(("image_to_text", "text_to_image"), found, strict=True)
    }
    return _record(seconds, after_import, recall, {"numpy": np.__version__}) | {"block": block}


def measure_faiss(options: Options) -> Record:
    """A flat index for each direction; the ten best are all that it gives, so that ranks beyond them stay unknown."""
    import faiss
    import numpy as np

    after_import = peak_resident()
    images, texts = make_features(options)
    found: dict[str, Any] = {}

    def run() -> None:
        own = np.arange(options.rows)[:, None]
        for name, queries, candidates in (("image_to_text", images, texts), ("text_to_image", texts, images)):
            index = faiss.IndexFlatIP(options.width)
            index.add(candidates)
            _, places = index.search(queries, max(AT))
            hit = places == own
            found[name] = np.where(hit.any(1), hit.argmax(1), max(AT))

    seconds = timed(run)
    recall = {name: [float(np.mean(each < k)) for k in AT] for name, each in found.items()}
    return _record(seconds, after_import, recall, {"faiss": faiss.__version__})


def _record(seconds: float, after_import: int, recall: dict[str, list[float]], versions: dict[str, str]) -> Record:
    return {
        "seconds": seconds,
        "after_import_bytes": after_import,
        "peak_bytes": peak_resident(),
        "recall": recall,
        "versions": versions,
    }


CONTENDERS = {"vla_jax": measure_ours, "NumPy": measure_numpy, "FAISS": measure_faiss}


def check(records: list[Record]) -> None:
    """Stops where two contenders found something else: rounding may move one query in 10,000."""
    first = records[0]
    for record in records[1:]:
        for name, shares in first["recall"].items():
            for k, mine, theirs in zip(AT, shares, record["recall"][name], strict=True):
                if abs(mine - theirs) > 1e-4:
                    raise RuntimeError(
                        f"{name}: recall at {k} is {mine} by {first['contender']} and {theirs} by {record['contender']}"
                    )


def measure(options: Options) -> list[Record]:
    """Runs every contender, appends its record to ``options.output`` and returns all records of this run.

    Raises:
        UserError: if FAISS is not installed.
    """
    if importlib.util.find_spec("faiss") is None:
        raise UserError("FAISS, a contender, is not installed; pip install faiss-cpu")
    run = started("retrieval") | {"rows": options.rows, "width": options.width}
    records: list[Record] = []
    with Progress() as progress:
        task = progress.add_task("", total=options.rounds * len(CONTENDERS))
        for round_ in range(options.rounds):
            for name, function in CONTENDERS.items():
                progress.update(task, description=f"{name}, round {round_ + 1}")
                records.append(run | {"contender": name, "round": round_} | alone(function, options))
                append_record(options.output, records[-1])
                progress.advance(task)
            check(records[-len(CONTENDERS) :])
    return records


def rows(records: list[Record]) -> list[list[str]]:
    """One row a contender under :data:`COLUMNS`; of several rounds the fastest, and the largest peak."""
    seconds = {name: min(r["seconds"] for r in records if r["contender"] == name) for name in CONTENDERS}
    found = []
    for name in CONTENDERS:
        own = [record for record in records if record["contender"] == name]
        first = own[0]
        # Every product once; FAISS takes each of them twice, once a direction.
        flop = 2 * first["rows"] ** 2 * first["width"]
        peak, after_import = (max(r[key] for r in own) / 2**30 for key in ("peak_bytes", "after_import_bytes"))
        shares = "; ".join(", ".join(f"{100 * share:.2f}" for share in first["recall"][key]) for key in first["recall"])
        found.append(
            [
                name,
                f"{first['rows']:,}",
                f"{seconds[name]:.2f}",
                f"{flop / seconds[name] / 1e9:.0f}",
                f"{peak:.2f} ({after_import:.2f})",
                "" if name == "vla_jax" else f"{seconds['vla_jax'] / seconds[name]:.2f}",
                shares,
            ]
        )
    return found


def section(records: list[Record]) -> str:
    """The newest run as a section of the README: how it was made, the table and the targets."""
    records = [record for record in records if record["run"] == records[-1]["run"]]
    first = records[0]
    versions = {name: value for record in records for name, value in record["versions"].items()}
    seconds = {name: min(r["seconds"] for r in records if r["contender"] == name) for name in CONTENDERS}
    peak = max(r["peak_bytes"] for r in records if r["contender"] == "vla_jax") / 2**30
    lines = [
        f"Run of {first['run']}, {first['rows']:,} by {first['rows']:,} features of width {first['width']}:",
        "",
        f"    {first['command']}",
        "",
        machine_line(first),
        f"- Python {first['machine']['python']}, " + ", ".join(f"{n} {v}" for n, v in sorted(versions.items())),
        "",
        markdown(COLUMNS, rows(records), 1),
        "",
        "Targets:",
        "",
        f"- at most {MEMORY_TARGET:g} GiB: {'met' if peak <= MEMORY_TARGET else '**missed**'} ({peak:.2f} GiB).",
    ]
    for name in ("NumPy", "FAISS"):
        ratio = seconds["vla_jax"] / seconds[name]
        lines.append(
            f"- at least as fast as {name}: {'met' if ratio <= 1 else '**missed**'} ({ratio:.2f} of its time)."
        )
    return "\n".join(lines)


def show(records: list[Record]) -> Table:
    """The table to print."""
    return terminal_table("Exact recall in both directions", COLUMNS, rows(records))


if __name__ == "__main__":
    command_line("retrieval", Options, __doc__, measure, show, section)
