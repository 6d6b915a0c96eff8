"""What do one training step and one forward of CLIP cost, beside PyTorch with transformers and peft?

    python benchmarks/train_step.py --models vit_b_32 --methods lora bottleneck --steps 5 --batch 32

Every measurement has a process of its own, so that peak memory and first-time costs are its own; the two frameworks
take turns, so that a machine that slows down slows both. Both load the same weights and see the same batch; the script
stops if they disagree about the first loss or about how much is trained. ``README.md`` says more.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

# The script is run from a checkout; a checkout need not be installed.
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.measuring import TOKENS, alone, prepare  # noqa: E402
from benchmarks.report import append_record, command_line, started  # noqa: E402
from benchmarks.train_step_report import section, show  # noqa: E402
from benchmarks.training import Case, Method, Remat, measure_ours, measure_peer  # noqa: E402
from vla_jax.errors import UserError  # noqa: E402
from vla_jax.flop import pair_flop  # noqa: E402

OUTPUT = Path(__file__).with_name("train_step.jsonl")
# The fastest setting on each kind of device: on a CPU, keeping less for the backward pass saves more time in memory
# traffic than recomputing it takes.
FASTEST_REMAT: dict[str, Remat] = {"cpu": "dots", "gpu": "none"}
# By how much the frameworks' first losses may differ: rounding, in the dtype computed in.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        models: shapes by preset name, such as ``vit_b_32`` and ``vit_b_16``.
        methods: what is trained: LoRA, bottlenecks (both on a frozen backbone) or everything.
        steps: timed training steps in a process, after the first.
        pairs: timed pairs of forwards in a process, one without and one with adapters.
        rounds: processes for each framework, in turns.
        batch: images, and texts, in a batch.
        remat: what our backward pass recomputes; by default what is fastest on the device.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md from all measurements in ``output``.
    """

    models: tuple[str, ...] = ("vit_b_32", "vit_b_16")
    methods: tuple[Method, ...] = ("lora", "bottleneck", "full")
    steps: int = 5
    pairs: int = 5
    rounds: int = 2
    batch: int = 32
    remat: Remat | None = None
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        for name in ("steps", "pairs", "rounds", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


def check(ours: dict[str, Any], peer: dict[str, Any], case: Case) -> None:
    """Stops where the two did not do the same work."""
    difference, allowed = abs(ours["loss"] - peer["loss"]), LOSS_TOLERANCE[case.dtype]
    if difference > allowed or ours["trained"] != peer["trained"]:
        raise RuntimeError(
            f"{case.model} {case.method}: the frameworks do different work: first loss {ours['loss']} against "
            f"{peer['loss']}, trained parameters {ours['trained']} against {peer['trained']}"
        )


def measure(options: Options) -> list[dict[str, Any]]:
    """Runs every case, appends its record to ``options.output`` and returns all records of this run.

    A record has the run, its command and machine; the case's fields; and what :func:`measure_ours` and
    :func:`measure_peer` return: parameters ``trained``; the first ``loss``; ``*_seconds`` to compile, of the first step
    (compiling included), of the further steps, and of paired forwards, bare and adapted; ``*_bytes`` held after the
    imports and at the peak of training; FLOP/s of a large product; versions. ``step_flop`` is what a step needs.
    """
    run = started("train_step")
    records = []
    places = [(model, method) for model in options.models for method in options.methods]
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("", total=len(places) * options.rounds * 2)
        prepared: dict[str, dict[str, Any]] = {}
        for model, method in places:
            if model not in prepared:
                progress.update(task, description=f"{model}: writing weights")
                prepared[model] = alone(prepare, model, f"{folder}/{model}")
            device = prepared[model]["device"]
            flop = options.batch * pair_flop(prepared[model]["config"], TOKENS, full=method == "full")
            for round_ in range(options.rounds):
                results = {}
                for framework, function in (("vla_jax", measure_ours), ("pytorch", measure_peer)):
                    progress.update(task, description=f"{model} {method} {framework}")
                    case = Case(
                        framework=framework,
                        model=model,
                        method=method,
                        round=round_,
                        steps=options.steps,
                        pairs=options.pairs,
                        batch=options.batch,
                        remat=options.remat or FASTEST_REMAT[device],
                        device=device,
                        folder=f"{folder}/{model}",
                    )
                    results[framework] = alone(function, case)
                    fields = {name: value for name, value in asdict(case).items() if name != "folder"}
                    extra = {"dtype": case.dtype, "device_name": prepared[model]["device_name"], "step_flop": flop}
                    records.append(run | fields | extra | results[framework])
                    append_record(options.output, records[-1])
                    progress.advance(task)
                check(results["vla_jax"], results["pytorch"], case)
    return records


if __name__ == "__main__":
    command_line("train_step", Options, __doc__, measure, show, section)
