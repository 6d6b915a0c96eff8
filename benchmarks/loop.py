"""What does the training loop add to its steps, and how long does a run take to its first one?

Contrastive training with LoRA on queries and values of every block, on encoded pictures that the pipeline decodes as it
goes: `tiny` on small scenes, B/32 (random weights) on photos. One compiled step is called again and again with one
batch on the device, which is what the device needs; the same step in the loop, with the pipeline; and the loop with a
logged step each time, and with a checkpoint after each step, which says what one of them costs. All take turns.

    python benchmarks/loop.py --write_readme
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script, from a checkout

from benchmarks.measuring import alone, prepare, timed  # noqa: E402
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

OUTPUT = Path(__file__).with_name("loop.jsonl")

# The experiments' own intervals, in steps.
LOG_EVERY, SAVE_EVERY = 20, 200

LOOP = (
    "model",
    "batch",
    "step alone, ms",
    "step in the loop, ms",
    "device waits, %",
    "loop's own bound on it, %",
    f"logging every {LOG_EVERY}, %",
    f"saving every {SAVE_EVERY}, %",
    "compilations of the step",
)
START = ("model", "compiled programs", "imports", "weights", "first batch", "compile", "first step", "together, s")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        models: ``tiny``, or shapes by preset name.
        batch: pairs of a step, of ``tiny`` and of the others.
        steps: steps of each round, likewise.
        rounds: how often everything is measured.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md.
    """

    models: tuple[str, ...] = ("tiny", "vit_b_32")
    batch: tuple[int, int] = (64, 8)
    steps: tuple[int, int] = (40, 6)
    rounds: int = 3
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        if min(*self.batch, self.rounds) < 1 or min(self.steps) < 2:
            raise UserError("batch and rounds must be 1 or more, steps 2 or more")


class Training:
    """Everything that a training needs, made one after the other."""

    def __init__(self, options: Options, model: str, folder: str, mark: Callable[[str], None] = lambda name: None):
        """Args:
        options: the settings.
        model: which model.
        folder: where its weights lie.
        mark: is told when something is done.
        """
        import jax

        from benchmarks.data import make_pictures, transforms
        from vla_jax.adapters import LoRA, Placement
        from vla_jax.backbones.loading import load_backbone
        from vla_jax.data.batches import Batches
        from vla_jax.data.pipeline import Pipeline, TransformExample
        from vla_jax.model import AdaptedModel
        from vla_jax.tasks.retrieval import Retrieval
        from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
        from vla_jax.training.presets import preset
        from vla_jax.training.sharding import MeshConfig, make_mesh, place
        from vla_jax.training.step import init_state, make_train_step, step_shardings
        from vla_jax.training.table import ParameterTable

        mark("imports")
        backbone = load_backbone("tiny" if model == "tiny" else folder)
        placement = Placement(LoRA(rank=8), slots=("attn_q", "attn_v"))
        self.model = AdaptedModel(backbone, Retrieval(), (placement,))
        params = self.model.init(jax.random.key(0))
        table = ParameterTable(preset("adapters")).resolve(params)
        self.trainable, frozen = table.split(params)
        optimizer = make_optimizer(OptimizerConfig(1e-4, "constant"), table, self.trainable, 1_000_000)
        shardings = step_shardings(table, self.trainable, optimizer, make_mesh(MeshConfig()))
        self.frozen = place(frozen, shardings.frozen)
        self.new_state = lambda: init_state(self.trainable, optimizer, shardings)
        jax.block_until_ready(self.frozen)
        mark("weights")
        workload, batch = "scenes" if model == "tiny" else "photos", options.batch[model != "tiny"]
        pipeline = Pipeline(make_pictures(workload), TransformExample(*transforms(workload)), batch, True)
        self.new_batches = lambda: Batches(iter(pipeline), shardings.batch)
        self.batch = next(self.new_batches())
        mark("first batch")
        self.step = make_train_step(self.model.loss, optimizer, seed=0, shardings=shardings)


def measure_start(options: Options, model: str, folder: str, cache: str, started_at: float) -> dict[str, float]:
    """Seconds from the start of this process to the end of its first step, by what they were spent on."""
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    found, last = {}, started_at

    def mark(name: str) -> None:
        nonlocal last
        found[name], last = time.time() - last, time.time()

    training = Training(options, model, folder, mark)
    state = training.new_state()
    program = training.step.lower(state, training.frozen, training.batch).compile()
    mark("compile")
    jax.block_until_ready(program(state, training.frozen, training.batch, *training.step.constants))
    mark("first step")
    return found


def measure_loop(options: Options, model: str, folder: str) -> dict[str, Any]:
    """Seconds a step, round by round, of the step alone and of the loop's kinds."""
    import jax

    from vla_jax.training.checkpoint import Checkpointer
    from vla_jax.training.checkpoint_metadata import Identity
    from vla_jax.training.compilations import compiled
    from vla_jax.training.metrics import JsonLines, TensorBoard
    from vla_jax.training.trainer import fit

    training = Training(options, model, folder)
    steps = options.steps[model != "tiny"]
    backbone = training.model.backbone
    identity = Identity(backbone.name, backbone.fingerprint, training.model.description())
    state = training.new_state()

    def device() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = training.step(state, training.frozen, training.batch)
        jax.block_until_ready(metrics)

    def loop(name: str) -> tuple[float, float]:
        """Seconds a step without the first one, and the share of waiting that the loop itself reports."""
        with tempfile.TemporaryDirectory() as workdir:
            batches, begun = training.new_batches(), []
            saver = Checkpointer(Path(workdir) / "checkpoints", identity, every=1) if name == "saving" else None

            def step(*arguments: Any) -> Any:
                # The loop waits for its first step, in whose time the pipeline fills its buffers.
                if len(begun) < 2:
                    begun.append(time.perf_counter())
                return training.step(*arguments)

            fitted = fit(
                training.new_state(),
                training.frozen,
                step,
                batches,
                steps + 1,
                checkpointer=saver,
                log_every=1 if name == "logging" else steps + 1,
                writers=[JsonLines(Path(workdir) / "metrics.jsonl"), TensorBoard(Path(workdir) / "tensorboard")],
            )
            seconds = (time.perf_counter() - begun[1]) / steps
            batches.close()
            if saver is not None:
                saver.close()
            return seconds, fitted.history[-1]["data_wait_share"]

    before = compiled()
    device()
    kinds: dict[str, Callable[[], Any]] = {
        "device": lambda: timed(device) / steps,
        **{name: lambda name=name: loop(name) for name in ("loop", "logging", "saving")},
    }
    for name in ("loop", "logging", "saving"):
        kinds[name]()  # once, for whatever happens the first time
    rounds: dict[str, list[Any]] = {name: [] for name in kinds}
    for number in range(options.rounds):
        for name in list(kinds) if number % 2 == 0 else list(kinds)[::-1]:
            rounds[name].append(kinds[name]())
    return {
        "device_seconds": rounds["device"],
        "wait_bound": [share for _, share in rounds["loop"]],
        **{f"{name}_seconds": [seconds for seconds, _ in rounds[name]] for name in ("loop", "logging", "saving")},
        "compilations": (compiled() - before)["jit(train_step)"],
        "steps": steps,
        "versions": {"jax": jax.__version__},
    }


def measure(options: Options) -> list[Record]:
    """Runs every model, appends its record to ``options.output`` and returns them."""
    run, records = started("loop"), []
    with Progress() as progress:
        task = progress.add_task("", total=3 * len(options.models))
        for model in options.models:
            with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
                progress.update(task, description=f"{model}: start")
                shape = "vit_b_32" if model == "tiny" else model
                prepared = alone(prepare, shape, folder)
                start = {}
                for kind in ("new", "cached"):
                    start[kind] = alone(measure_start, options, model, folder, cache, time.time())
                    progress.advance(task)
                progress.update(task, description=f"{model}: loop")
                device = {"device": prepared["device"], "device_name": prepared["device_name"]}
                found = alone(measure_loop, options, model, folder)
                own = {"model": model, "batch": options.batch[model != "tiny"], "start": start}
                records.append(run | device | own | found)
                append_record(options.output, records[-1])
                progress.advance(task)
    return records


def _overhead(record: Record, kind: str, every: int) -> Spread:
    """What logging or saving adds when it is done every so many steps, as a share of the steps; round by round."""
    pairs = zip(record[f"{kind}_seconds"], record["loop_seconds"], strict=True)
    return Spread.of([100 * (with_it - without) / (every * without) for with_it, without in pairs])


def loop_rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a model under :data:`LOOP`."""
    found = []
    for record in records:
        pairs = zip(record["device_seconds"], record["loop_seconds"], strict=True)
        waits = Spread.of([100 * (1 - device / loop) for device, loop in pairs])
        milliseconds = [Spread.of([1e3 * s for s in record[f"{kind}_seconds"]]).text(0) for kind in ("device", "loop")]
        bound = Spread.of([100 * share for share in record["wait_bound"]]).text(1)
        added = [_overhead(record, *kind).text(2) for kind in (("logging", LOG_EVERY), ("saving", SAVE_EVERY))]
        count = str(record["compilations"])
        found.append([record["model"], str(record["batch"]), *milliseconds, waits.text(1), bound, *added, count])
    return found


def start_rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a model and start under :data:`START`."""
    found = []
    for record in records:
        for kind, parts in record["start"].items():
            numbers = [f"{parts[name]:.1f}" for name in START[2:-1]]
            found.append([record["model"], kind, *numbers, f"{sum(parts.values()):.1f}"])
    return found


def section(records: Sequence[Record]) -> str:
    """Each model's newest run as a section of the README."""
    records = list({record["model"]: record for record in records}.values())
    runs = {record["run"]: record for record in records}
    lines, targets = [], []
    for run, first in runs.items():
        lines += [f"Run of {run}, float32; medians and quartiles of rounds:", "", f"    {first['command']}", ""]
        lines += [machine_line(first), f"- Python {first['machine']['python']}, jax {first['versions']['jax']}", ""]
    for record in records:
        # Not by the difference of two times, whose rounds scatter by more than the target.
        waits = Spread.of([100 * share for share in record["wait_bound"]]).median
        for what, found, target in (
            ("the device waits, by the loop's own bound,", waits, 2.0),
            ("logging takes", _overhead(record, "logging", LOG_EVERY).median, 1.0),
            ("saving takes", _overhead(record, "saving", SAVE_EVERY).median, 1.0),
        ):
            met = "met" if found < target else "**missed**"
            targets.append(f"- {record['model']}: {what} under {target:g} %: {met} ({found:.2f} %).")
    return "\n".join(
        [
            *lines,
            markdown(LOOP, loop_rows(records), 1),
            "",
            "From the start of the process to the end of the first step, in seconds:",
            "",
            markdown(START, start_rows(records), 2),
            "",
            "Targets:",
            "",
            *targets,
        ]
    )


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("The training loop", LOOP, loop_rows(records))


if __name__ == "__main__":
    command_line("loop", Options, __doc__, measure, show, section)
