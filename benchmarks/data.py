"""How many pictures a second go through the input pipeline, beside PyTorch's DataLoader with the same transforms?

Both take the same encoded pictures and texts from memory, shuffled, and decode, resize, normalise and tokenise them
with the same function into batches. ``photos`` are JPEG files of 640 by 480 pixels for a backbone of 224; ``scenes``
are PNG files that have the backbone's size already, so that what a pipeline itself does weighs more. Grain's pipeline
reads in threads of its process, so that pictures a second of *processor time*, workers' included, say what a core does.

Both stand ready in processes of their own and are measured in turns of a few seconds, so that a machine whose speed
changes by the minute changes both. A turn begins and ends with everything that is read ahead at its fill, and so counts
the work of the batches that were taken and no other.

    pip install -r requirements-dev.txt
    python benchmarks/data.py --write_readme
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress
from rich.table import Table

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script, from a checkout

from benchmarks.measuring import alone  # noqa: E402
from benchmarks.report import (  # noqa: E402
    Record,
    Spread,
    append_record,
    command_line,
    machine_line,
    markdown,
    started,
    terminal_table,
)
from vla_jax.errors import UserError  # noqa: E402

OUTPUT = Path(__file__).with_name("data.jsonl")

COLUMNS = (
    "pictures",
    "workers",
    "vla_jax, pictures/s",
    "PyTorch, pictures/s",
    "vla_jax, a second of a core",
    "PyTorch, a second of a core",
    "ours / peer, by core",
)

TEXT = 48  # tokens, which hold every caption

LENGTH = 1 << 21  # examples: no turn comes to the end of them, where PyTorch's workers would be started again

SCENE_SIZE = 72  # pixels of an edge, as the embedded backbone sees them

Workload = Literal["photos", "scenes"]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        workloads: kinds of pictures.
        workers: numbers of worker processes; 0 is the process itself.
        batch: pictures in a batch.
        seconds: of a turn.
        warm_up: batches before the first, while workers start.
        rounds: how many turns each has, in pairs.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md.
    """

    workloads: tuple[Workload, ...] = ("photos", "scenes")
    workers: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    seconds: float = 6.0
    warm_up: int = 10
    rounds: int = 8
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        if min(self.batch, self.warm_up, self.rounds) < 1 or min(self.workers, default=0) < 0 or self.seconds <= 0:
            raise UserError("batch, warm_up and rounds must be 1 or more, workers 0 or more, seconds above 0")


def make_pictures(workload: Workload, count: int = 256) -> list[dict[str, Any]]:
    """Raw examples, the same in every process: ``image``, the bytes of a file, and ``text``."""
    import numpy as np
    from PIL import Image

    from vla_jax.data.scenes import SceneConfig
    from vla_jax.data.scenes.source import SceneSource

    if workload == "scenes":
        source = SceneSource("train", "captions", SceneConfig(image_size=SCENE_SIZE), count)
        found = []
        for index in range(count):
            example = source[index]
            file = io.BytesIO()
            Image.fromarray(example["image"]).save(file, "PNG")
            found.append({"image": file.getvalue(), "text": str(example["caption"])})
        return found
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        # Coarse noise enlarged, with a little fine noise: it compresses about as photographs do.
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = np.asarray(coarse, np.int16) + generator.integers(-12, 13, (480, 640, 3), np.int16)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        found.append({"image": file.getvalue(), "text": "a large red circle left of a small blue square"})
    return found


def make_transform(workload: Workload) -> Callable[..., dict[str, Any]]:
    """What both frameworks do to an example: picture, tokens, label and route of a row."""
    from transformers import CLIPImageProcessorPil

    from vla_jax.backbones.loading import load_backbone
    from vla_jax.data.image import Preprocess
    from vla_jax.data.pipeline import TransformExample
    from vla_jax.data.text import Tokenize

    tiny = load_backbone("tiny")
    processor = tiny.image_processor if workload == "scenes" else CLIPImageProcessorPil()
    return TransformExample(Preprocess(processor), Tokenize(tiny.tokenizer, TEXT))


class Repeated:
    """So many examples, the same ones again and again: a data set as large as what is read of it."""

    def __init__(self, examples: Sequence[dict[str, Any]], length: int):
        self.examples, self.length = examples, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index % len(self.examples)]


def make_source(workload: Workload, training: bool) -> Repeated:
    """The examples of both frameworks; without training, each of them once."""
    examples = make_pictures(workload)
    return Repeated(examples, LENGTH if training else len(examples))


class Rows:
    """PyTorch's view of the examples: rows by position, as its collation takes them."""

    def __init__(self, source: Repeated, transform: Callable[[dict[str, Any]], dict[str, Any]]):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.transform(self.source[index])


def our_batches(options: Options, workload: Workload, workers: int, training: bool) -> Iterator[Any]:
    """Endless shuffled batches, or one pass in order, of the pipeline."""
    from vla_jax.data.pipeline import Pipeline

    source = make_source(workload, training)
    return iter(Pipeline(source, make_transform(workload), options.batch, training, workers=workers))


def peer_batches(options: Options, workload: Workload, workers: int, training: bool) -> Iterator[Any]:
    """The same of PyTorch."""
    from torch.utils.data import DataLoader

    rows = Rows(make_source(workload, training), make_transform(workload))
    return iter(DataLoader(rows, options.batch, shuffle=training, num_workers=workers, drop_last=training))


FRAMEWORKS: dict[str, Callable[[Options, Workload, int, bool], Iterator[Any]]] = {
    "vla_jax": our_batches,
    "PyTorch": peer_batches,
}


def digest(framework: str, options: Options, workload: Workload) -> str:
    """What a framework's first unshuffled batch holds."""
    import numpy as np

    batch = next(FRAMEWORKS[framework](options, workload, 0, False))
    found = hashlib.sha256()
    for name in ("image", "tokens", "text_mask", "label", "route"):
        found.update(np.ascontiguousarray(batch[name]).tobytes())
    return found.hexdigest()


def processor_seconds() -> float:
    """What this process and its living children have used of processors."""
    ticks = 0
    for child in multiprocessing.active_children():
        # Behind the name, which may hold spaces: user and system time are the 12th and 13th fields.
        fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def settle() -> None:
    """Waits until everything that is read ahead is there, and nobody works any more."""
    used = -1.0
    while used < (used := processor_seconds()) - 0.02:
        time.sleep(0.2)


def take_turn(batches: Iterator[Any], seconds: float, ahead: int) -> dict[str, Any]:
    """Takes batches for some seconds.

    Args:
        batches: with all that is read ahead there.
        seconds: how long.
        ahead: batches that may have been there; the clock counts those after them.

    Returns:
        ``batches`` and the ``processor_seconds`` that their making took; ``clocked`` batches of them and the
        ``seconds`` in which those came.
    """
    settle()
    used, start, taken, clocked = processor_seconds(), time.perf_counter(), 0, 0.0
    while taken <= ahead or time.perf_counter() - start < seconds:
        if taken == ahead:
            clocked = time.perf_counter()
        next(batches)
        taken += 1
    end = time.perf_counter()
    settle()
    return {
        "batches": taken,
        "processor_seconds": processor_seconds() - used,
        "clocked": taken - ahead,
        "seconds": end - clocked,
    }


def serve(connection: Connection, framework: str, options: Options, workload: Workload, workers: int) -> None:
    """Takes a turn whenever it is asked to, until told to end."""
    import importlib.metadata

    batches = FRAMEWORKS[framework](options, workload, workers, True)
    for _ in range(options.warm_up):
        next(batches)
    package = "grain" if framework == "vla_jax" else "torch"
    versions = {"versions": {package: importlib.metadata.version(package)}}
    connection.send(None)
    # Two batches ahead for each worker, or for the process itself, one on its way and one that is being made.
    while connection.recv():
        connection.send(take_turn(batches, options.seconds, 2 * max(1, workers) + 2) | versions)
    if framework == "vla_jax":
        batches.close()  # or Grain complains of its workers when the process ends


@contextlib.contextmanager
def served(framework: str, options: Options, workload: Workload, workers: int) -> Iterator[Callable[[], Record]]:
    """A framework that is ready in a process of its own; what is given takes a turn."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, framework, options, workload, workers))
    process.start()
    theirs.close()

    def turn() -> Record:
        ours.send(True)
        return ours.recv()

    try:
        ours.recv()
        yield turn
        ours.send(False)
        process.join()
    finally:
        process.terminate()


def measure(options: Options) -> list[Record]:
    """Runs every case, appends its records to ``options.output`` and returns them."""
    run, records = started("data"), []
    cases = [(workload, workers) for workload in options.workloads for workers in options.workers]
    with Progress() as progress:
        task = progress.add_task("", total=len(cases) * options.rounds * len(FRAMEWORKS))
        for workload in options.workloads:
            if len({alone(digest, framework, options, workload) for framework in FRAMEWORKS}) > 1:
                raise RuntimeError(f"{workload}: the frameworks' batches differ")
        for workload, workers in cases:
            progress.update(task, description=f"{workload}, {workers} workers")
            with contextlib.ExitStack() as stack:
                ready = {name: stack.enter_context(served(name, options, workload, workers)) for name in FRAMEWORKS}
                for round_ in range(options.rounds):
                    # Each is first in every other round.
                    for framework in list(FRAMEWORKS)[:: 1 if round_ % 2 == 0 else -1]:
                        case = {"workload": workload, "workers": workers, "framework": framework, "round": round_}
                        records.append(run | {"batch": options.batch} | case | ready[framework]())
                        append_record(options.output, records[-1])
                        progress.advance(task)
    return records


def rates(records: Sequence[Record], workload: str, workers: int, framework: str, by: str) -> list[float]:
    """Pictures a second of each round, by the ``clock`` or of a ``core``."""
    count, seconds = {"clock": ("clocked", "seconds"), "core": ("batches", "processor_seconds")}[by]
    own = [r for r in records if (r["workload"], r["workers"], r["framework"]) == (workload, workers, framework)]
    return [record["batch"] * record[count] / record[seconds] for record in own]


def advantage(records: Sequence[Record], workload: str, workers: int) -> Spread:
    """Our pictures for one of the peer's, of a core: round by round, in which the machine was most nearly the same."""
    ours, peer = (rates(records, workload, workers, framework, "core") for framework in FRAMEWORKS)
    return Spread.of(own / other for own, other in zip(ours, peer, strict=True))


def cases_of(records: Sequence[Record]) -> list[tuple[str, int]]:
    """The measured kinds of pictures and numbers of workers, in order."""
    return list(dict.fromkeys((record["workload"], record["workers"]) for record in records))


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a case under :data:`COLUMNS`."""
    found = []
    for workload, workers in cases_of(records):
        spreads = [
            Spread.of(rates(records, workload, workers, framework, by)).text(0)
            for by in ("clock", "core")
            for framework in FRAMEWORKS
        ]
        found.append([workload, str(workers), *spreads, advantage(records, workload, workers).text(2)])
    return found


def section(records: Sequence[Record]) -> str:
    """The newest run as a section of the README: how it was made, the table and the target."""
    records = [record for record in records if record["run"] == records[-1]["run"]]
    first = records[0]
    versions = {name: value for record in records for name, value in record["versions"].items()}
    lines = [
        f"Run of {first['run']}, batches of {first['batch']}:",
        "",
        f"    {first['command']}",
        "",
        machine_line(first | {"device": "cpu", "device_name": "cpu"}),
        f"- Python {first['machine']['python']}, " + ", ".join(f"{n} {v}" for n, v in sorted(versions.items())),
        f"- medians of {1 + max(record['round'] for record in records)} turns with their quartiles, ratios of turns in "
        "succession; a second of a core counts all processes and threads",
        "",
        markdown(COLUMNS, rows(records), 1),
        "",
        "Target, at least as many pictures for a second of a core as PyTorch:",
        "",
    ]
    for workload, workers in cases_of(records):
        ratio = advantage(records, workload, workers).median
        verdict = "met" if ratio >= 1 else "**missed**"
        lines.append(f"- {workload}, {workers} workers: {verdict} ({ratio:.3f} times as many).")
    return "\n".join(lines)


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("The input pipeline", COLUMNS, rows(records))


if __name__ == "__main__":
    command_line("data", Options, __doc__, measure, show, section)
