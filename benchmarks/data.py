"""How many pictures a second go through the input pipeline, beside PyTorch's DataLoader with the same transforms?

Both take the same encoded pictures and texts from memory, shuffled, and decode, resize, normalise and tokenise them
with the same functions into batches. ``photos`` are JPEG files of 640 by 480 pixels for a backbone of 224; ``scenes``
are PNG files that have the backbone's size already, so that what a pipeline itself does weighs more. Grain's pipeline
reads in threads of its process, so that pictures a second of *processor time*, workers' included, say what a core does.

    pip install -r requirements-dev.txt
    python benchmarks/data.py --write_readme
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

SCENE_SIZE = 72  # pixels of an edge, as the embedded backbone sees them

Workload = Literal["photos", "scenes"]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        workloads: kinds of pictures.
        workers: numbers of worker processes; 0 is the process itself.
        batch: pictures in a batch.
        batches: timed batches.
        warm_up: batches before, while workers start and buffers fill.
        rounds: how often everything is measured, the frameworks in turns.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md.
    """

    workloads: tuple[Workload, ...] = ("photos", "scenes")
    workers: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    batches: int = 40
    warm_up: int = 10
    rounds: int = 3
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        if min(self.batch, self.batches, self.warm_up, self.rounds) < 1 or min(self.workers, default=0) < 0:
            raise UserError("batch, batches, warm_up and rounds must be 1 or more, workers 0 or more")


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


def transforms(workload: Workload) -> tuple[Any, Any]:
    """What both frameworks do to a picture and to a text, ``Preprocess`` and ``Tokenize``."""
    from transformers import CLIPImageProcessorPil

    from vla_jax.backbones.loading import load_backbone
    from vla_jax.data.image import Preprocess
    from vla_jax.data.text import Tokenize

    tiny = load_backbone("tiny")
    processor = tiny.image_processor if workload == "scenes" else CLIPImageProcessorPil()
    return Preprocess(processor), Tokenize(tiny.tokenizer, TEXT)


class Repeated:
    """So many examples, the same ones again and again: a data set as large as what is read of it."""

    def __init__(self, examples: Sequence[dict[str, Any]], length: int):
        self.examples, self.length = examples, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index % len(self.examples)]


def make_source(options: Options, workload: Workload, training: bool) -> Repeated:
    """The examples of both frameworks; without training, each of them once."""
    examples = make_pictures(workload)
    # PyTorch stops at the end of an epoch: with fewer batches ahead its workers would rest while the last are counted.
    ahead = 2 * max(1, *options.workers) + 1
    count = (options.warm_up + options.batches + ahead) * options.batch if training else len(examples)
    return Repeated(examples, count)


class Pictures:
    """PyTorch's view of the examples: rows by position, as its collation takes them."""

    def __init__(self, source: Repeated, preprocess: Any, tokenize: Any):
        self.source, self.preprocess, self.tokenize = source, preprocess, tokenize

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        tokens, mask = self.tokenize(example["text"])
        return {"image": self.preprocess(example["image"]), "tokens": tokens, "text_mask": mask}


def our_batches(options: Options, workload: Workload, workers: int, training: bool) -> Iterator[Any]:
    """Endless shuffled batches, or one pass in order, of the pipeline."""
    from vla_jax.data.pipeline import Pipeline, TransformExample

    transform = TransformExample(*transforms(workload))
    source = make_source(options, workload, training)
    return iter(Pipeline(source, transform, options.batch, training, workers=workers))


def peer_batches(options: Options, workload: Workload, workers: int, training: bool) -> Iterator[Any]:
    """The same of PyTorch."""
    from torch.utils.data import DataLoader

    pictures = Pictures(make_source(options, workload, training), *transforms(workload))
    return iter(DataLoader(pictures, options.batch, shuffle=training, num_workers=workers, drop_last=training))


FRAMEWORKS: dict[str, Callable[[Options, Workload, int, bool], Iterator[Any]]] = {
    "vla_jax": our_batches,
    "PyTorch": peer_batches,
}


def digest(framework: str, options: Options, workload: Workload) -> str:
    """What a framework's first unshuffled batch holds."""
    import numpy as np

    batch = next(FRAMEWORKS[framework](options, workload, 0, False))
    found = hashlib.sha256()
    for name in ("image", "tokens", "text_mask"):
        found.update(np.ascontiguousarray(batch[name]).tobytes())
    return found.hexdigest()


def processor_seconds() -> float:
    """What this process and its living children have used of processors."""
    ticks = 0
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        # Behind the name, which may hold spaces: user and system time are the 12th and 13th fields.
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_framework(framework: str, options: Options, workload: Workload, workers: int) -> dict[str, Any]:
    """Time of the batches after the first ones: ``seconds``, and ``processor_seconds`` of all processes."""
    import importlib.metadata

    batches = FRAMEWORKS[framework](options, workload, workers, True)
    for _ in range(options.warm_up):
        next(batches)
    start, used = time.perf_counter(), processor_seconds()
    for _ in range(options.batches):
        next(batches)
    found = {"seconds": time.perf_counter() - start, "processor_seconds": processor_seconds() - used}
    if framework == "vla_jax":
        batches.close()  # or Grain complains of its workers when the process ends
    package = "grain" if framework == "vla_jax" else "torch"
    return found | {
        "versions": {package: importlib.metadata.version(package)},
    }


def measure(options: Options) -> list[Record]:
    """Runs every case, appends its records to ``options.output`` and returns them."""
    run, records = started("data"), []
    fields = {"batch": options.batch, "batches": options.batches}
    cases = [(workload, workers) for workload in options.workloads for workers in options.workers]
    with Progress() as progress:
        task = progress.add_task("", total=len(cases) * options.rounds * len(FRAMEWORKS))
        for workload in options.workloads:
            if len({alone(digest, framework, options, workload) for framework in FRAMEWORKS}) > 1:
                raise RuntimeError(f"{workload}: the frameworks' batches differ")
        for round_ in range(options.rounds):
            for workload, workers in cases:
                # Each is first in every other round.
                for framework in list(FRAMEWORKS)[:: 1 if round_ % 2 == 0 else -1]:
                    progress.update(task, description=f"{workload}, {workers} workers, {framework}")
                    found = alone(measure_framework, framework, options, workload, workers)
                    case = {"workload": workload, "workers": workers, "framework": framework, "round": round_}
                    records.append(run | fields | case | found)
                    append_record(options.output, records[-1])
                    progress.advance(task)
    return records


def rates(records: Sequence[Record], workload: str, workers: int, framework: str, field: str) -> Spread:
    """Pictures a second over the rounds, by ``seconds`` or by ``processor_seconds``."""
    own = [r for r in records if (r["workload"], r["workers"], r["framework"]) == (workload, workers, framework)]
    return Spread.of(record["batch"] * record["batches"] / record[field] for record in own)


def cases_of(records: Sequence[Record]) -> list[tuple[str, int]]:
    """The measured kinds of pictures and numbers of workers, in order."""
    return list(dict.fromkeys((record["workload"], record["workers"]) for record in records))


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a case under :data:`COLUMNS`."""
    found = []
    for workload, workers in cases_of(records):
        by_time, by_core = (
            [rates(records, workload, workers, framework, field) for framework in FRAMEWORKS]
            for field in ("seconds", "processor_seconds")
        )
        ratio = by_core[0].median / by_core[1].median
        spreads = [spread.text(0) for spread in (*by_time, *by_core)]
        found.append([workload, str(workers), *spreads, f"{ratio:.2f}"])
    return found


def section(records: Sequence[Record]) -> str:
    """The newest run as a section of the README: how it was made, the table and the target."""
    records = [record for record in records if record["run"] == records[-1]["run"]]
    first = records[0]
    versions = {name: value for record in records for name, value in record["versions"].items()}
    lines = [
        f"Run of {first['run']}, batches of {first['batch']}, {first['batches']} timed:",
        "",
        f"    {first['command']}",
        "",
        machine_line(first | {"device": "cpu", "device_name": "cpu"}),
        f"- Python {first['machine']['python']}, " + ", ".join(f"{n} {v}" for n, v in sorted(versions.items())),
        "- medians of the rounds with their quartiles; a second of a core counts all processes and threads",
        "",
        markdown(COLUMNS, rows(records), 1),
        "",
        "Target, at least as many pictures for a second of a core as PyTorch:",
        "",
    ]
    for workload, workers in cases_of(records):
        ours, peer = (rates(records, workload, workers, name, "processor_seconds").median for name in FRAMEWORKS)
        verdict = "met" if ours >= peer else "**missed**"
        lines.append(f"- {workload}, {workers} workers: {verdict} ({ours / peer:.2f} times as many).")
    return "\n".join(lines)


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("The input pipeline", COLUMNS, rows(records))


if __name__ == "__main__":
    command_line("data", Options, __doc__, measure, show, section)
