"""What does it save that frozen blocks compute each picture and text once: an epoch of training, from memory and disk?

CLIP B/32 with LoRA in the last layers of both towers, on random pictures with texts. An epoch whose steps run whole
towers stands beside epochs that go on from the streams of the frozen blocks below; the losses of all are compared.

    python benchmarks/frozen_streams.py --write_readme
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script, from a checkout

from benchmarks.measuring import alone, prepare, timed  # noqa: E402
from benchmarks.report import (  # noqa: E402
    Record,
    append_record,
    command_line,
    machine_line,
    markdown,
    started,
    terminal_table,
)
from vla_jax.errors import UserError  # noqa: E402

OUTPUT = Path(__file__).with_name("frozen_streams.jsonl")

TEXT = 32  # tokens

COLUMNS = (
    "adapters in the last",
    "whole towers, s an epoch",
    "from memory, s an epoch",
    "from disk, s an epoch",
    "speed-up, memory",
    "speed-up, disk",
    "computed once, s",
    "largest relative difference of a loss",
)


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        model: shape by preset name.
        layers: numbers of layers, from the top, that have adapters.
        examples: pictures with texts of an epoch.
        batch: examples of a step.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md.
    """

    model: str = "vit_b_32"
    layers: tuple[int, ...] = (1, 2, 6)
    examples: int = 256
    batch: int = 32
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        if min(self.batch, self.examples, *self.layers) < 1 or self.examples % self.batch:
            raise UserError("batch, examples and layers must be 1 or more, examples a multiple of batch")


def measure_layers(options: Options, folder: str, layers: int) -> dict[str, Any]:
    """Seconds of epochs over whole towers, streams in memory and streams on disk; and their losses."""
    import jax
    import numpy as np

    from vla_jax.adapters import LoRA, Placement
    from vla_jax.backbones.loading import load_backbone
    from vla_jax.data.batches import Batches
    from vla_jax.data.cached import ArraySource, as_rows
    from vla_jax.data.pipeline import Pipeline
    from vla_jax.frozen_streams import frozen_streams
    from vla_jax.model import AdaptedModel
    from vla_jax.tasks.retrieval import Retrieval
    from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
    from vla_jax.training.presets import preset
    from vla_jax.training.sharding import MeshConfig, make_mesh, place
    from vla_jax.training.step import init_state, make_train_step, step_shardings
    from vla_jax.training.table import ParameterTable
    from vla_jax.variants import TaskData

    backbone = load_backbone(folder)
    config, count = backbone.config, options.examples
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, config.vocabulary_size - 2, (count, TEXT)).astype(np.int32)
    tokens[:, -1] = config.vocabulary_size - 1
    source = ArraySource(
        {
            "image": generator.standard_normal((count, config.image_size, config.image_size, 3), np.float32),
            "tokens": tokens,
            "text_mask": np.ones(tokens.shape, bool),
        }
    )
    placement = Placement(LoRA(rank=16), slots=("attn_q", "attn_v"), layers=f"last {layers}")
    model = AdaptedModel(backbone, Retrieval(), (placement,))
    mesh = make_mesh(MeshConfig())
    params = model.init(jax.random.key(0))
    table = ParameterTable(preset("adapters")).resolve(params)
    trainable, frozen = table.split(params)
    optimizer = make_optimizer(OptimizerConfig(1e-4, "constant"), table, trainable, 1_000)
    shardings = step_shardings(table, trainable, optimizer, mesh)
    frozen = place(frozen, shardings.frozen)
    step = make_train_step(model.loss, optimizer, seed=0, shardings=shardings)

    def epoch_of(examples: Any) -> tuple[float, list[float]]:
        """The second of two epochs, and the losses of both; the first one compiles."""
        state = init_state(trainable, optimizer, shardings)
        batches = Batches(iter(Pipeline(examples, as_rows, options.batch, training=True)), shardings.batch)
        losses: list[jax.Array] = []

        def epoch() -> None:
            nonlocal state
            for _ in range(count // options.batch):
                state, metrics = step(state, frozen, next(batches))
                losses.append(metrics["loss"])
            jax.block_until_ready(losses[-1])

        epoch()
        seconds = timed(epoch)
        batches.close()
        return seconds, [float(loss) for loss in losses]

    with tempfile.TemporaryDirectory() as streams:
        data = TaskData(Retrieval(), {"train": source}, as_rows)
        kept: dict[str, Any] = {}

        def compute(name: str, where: Path | None) -> None:
            described = TaskData(data.task, data.splits, data.transform, streams=where)
            kept[name] = frozen_streams(model, described, options.batch, mesh)["train"]

        computing = timed(lambda: compute("memory", None))
        compute("disk", Path(streams))
        compute("disk", Path(streams))  # what a later run finds
        found = {"whole": epoch_of(source), "memory": epoch_of(kept["memory"]), "disk": epoch_of(kept["disk"])}
    return {
        "seconds": {name: seconds for name, (seconds, _) in found.items()},
        "losses": {name: losses for name, (_, losses) in found.items()},
        "computing_seconds": computing,
        "versions": {"jax": jax.__version__},
    }


def measure(options: Options) -> list[Record]:
    """Runs every case, appends its record to ``options.output`` and returns them."""
    run = started("frozen_streams") | {"model": options.model, "examples": options.examples, "batch": options.batch}
    records = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("writing weights", total=len(options.layers))
        prepared = alone(prepare, options.model, folder)
        device = {"device": prepared["device"], "device_name": prepared["device_name"]}
        for layers in options.layers:
            progress.update(task, description=f"last {layers} layers")
            records.append(run | device | {"layers": layers} | alone(measure_layers, options, folder, layers))
            append_record(options.output, records[-1])
            progress.advance(task)
    return records


def largest_difference(record: Record) -> float:
    """Of a loss from streams to that of whole towers, relative."""
    whole = record["losses"]["whole"]
    others = (record["losses"][name] for name in ("memory", "disk"))
    return max(abs(one / other - 1) for losses in others for one, other in zip(losses, whole, strict=True))


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a case under :data:`COLUMNS`."""
    found = []
    for record in records:
        whole, memory, disk = (record["seconds"][name] for name in ("whole", "memory", "disk"))
        numbers = [f"{whole:.1f}", f"{memory:.1f}", f"{disk:.1f}", f"{whole / memory:.1f}", f"{whole / disk:.1f}"]
        computing = f"{record['computing_seconds']:.1f}"
        layers = f"{record['layers']} layer{'s' if record['layers'] > 1 else ''}"
        found.append([layers, *numbers, computing, f"{largest_difference(record):.1e}"])
    return found


def section(records: Sequence[Record]) -> str:
    """The newest run as a section of the README."""
    records = [record for record in records if record["run"] == records[-1]["run"]]
    first = records[0]
    same = all(record["losses"]["memory"] == record["losses"]["disk"] for record in records)
    return "\n".join(
        [
            f"Run of {first['run']}, {first['model']}, {first['examples']} examples, batch {first['batch']}, float32:",
            "",
            f"    {first['command']}",
            "",
            machine_line(first),
            f"- Python {first['machine']['python']}, jax {first['versions']['jax']}",
            "",
            markdown(COLUMNS, rows(records), 1),
            "",
            f"All losses from disk are those from memory to the last bit: {'yes' if same else '**no**'}.",
        ]
    )


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("Frozen blocks computed once", COLUMNS, rows(records))


if __name__ == "__main__":
    command_line("frozen_streams", Options, __doc__, measure, show, section)
