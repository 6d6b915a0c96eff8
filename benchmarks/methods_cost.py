"""What does each family of adapters cost: memory and time of a training step, time of a forward, on CLIP B/32?

    python benchmarks/methods_cost.py --methods linear full lora ladder

Every method of the catalogue has a process of its own, and trains by the same contrastive step on the same batch.
``README.md`` says more.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

# The script is run from a checkout; a checkout need not be installed.
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.measuring import alone, in_turns, make_batch, peak_resident, prepare, timed  # noqa: E402
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
from benchmarks.training import Remat  # noqa: E402
from vla_jax.catalogue import METHODS, entry, fits, variant  # noqa: E402
from vla_jax.errors import UserError  # noqa: E402

OUTPUT = Path(__file__).with_name("methods_cost.jsonl")
COLUMNS = (
    "method",
    "family",
    "trained",
    "compiled step, GiB",
    "of full (%)",
    "above the weights, of full (%)",
    "process, GiB",
    "step, s",
    "of full's step (%)",
    "forward against the plain (%)",
)
# Of the memory that full fine-tuning needs, for ladder side tuning (Sung et al. 2022, in kind).
LADDER_TARGET = 50.0
# Tokens of a text, of the 77 there is room for: methods that insert tokens put theirs beside them.
TEXT = 64


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        model: shape by preset name.
        methods: of the catalogue; all that fit if empty.
        batch: images, and texts, in a batch.
        steps: timed training steps, after the first.
        pairs: timed pairs of forwards, one of the plain backbone and one with adapters.
        remat: what the backward pass recomputes; nothing by default, as papers report memory.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md.
    """

    model: str = "vit_b_32"
    methods: tuple[str, ...] = ()
    batch: int = 16
    steps: int = 2
    pairs: int = 3
    remat: Remat = "none"
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        if min(self.batch, self.steps, self.pairs) < 1:
            raise UserError("batch, steps and pairs must be 1 or more")
        for name in self.methods:
            entry(name)


def measure_method(options: Options, folder: str, name: str) -> dict[str, Any]:
    """Memory and times of one method.

    Returns:
        ``trained`` parameters; ``weights_bytes``, of all parameters; ``step_bytes`` that the compiled step needs, its
        arguments (weights, optimiser state, batch) and temporaries; ``peak_bytes`` of the process until the timed steps
        were done; seconds of each step and of each paired forward, plain and adapted.
    """
    import jax
    import jax.numpy as jnp

    from vla_jax.backbones.loading import load_backbone
    from vla_jax.backbones.transformer import Compute
    from vla_jax.model import AdaptedModel
    from vla_jax.names import Tree
    from vla_jax.tasks.retrieval import Retrieval
    from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
    from vla_jax.training.presets import GROUPS, preset
    from vla_jax.training.step import init_state, make_train_step
    from vla_jax.training.table import ParameterTable

    backbone = load_backbone(folder)
    config, compute = backbone.config, Compute(remat=options.remat)
    chosen = variant(name, config, (1e-4,))
    model = AdaptedModel(backbone, Retrieval(), chosen.placements, compute, robust_drop=chosen.robust_drop)
    images, tokens = make_batch(options.batch, config.image_size, config.vocabulary_size)
    tokens = tokens[:, -TEXT:]  # the end of the text stays
    batch = {
        "image": jnp.asarray(images.transpose(0, 2, 3, 1)),
        "tokens": jnp.asarray(tokens),
        "text_mask": jnp.ones(tokens.shape, bool),
    }
    params = model.init(jax.random.key(0))
    table = ParameterTable(preset(chosen.rules)).resolve(params)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    trainable, frozen = table.split(params)
    settings = OptimizerConfig(1e-4, "constant", groups=GROUPS.get(chosen.rules, ()))
    optimizer = make_optimizer(settings, table, trainable, options.steps + 1)
    state = init_state(trainable, optimizer)
    del params, trainable
    train_step = make_train_step(model.loss, optimizer, seed=0)
    program = train_step.lower(state, frozen, batch).compile()
    memory = program.memory_analysis()

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(program(state, frozen, batch, *train_step.constants))

    step()
    steps = [timed(step) for _ in range(options.steps)]
    peak = peak_resident()

    plain = AdaptedModel(backbone, Retrieval(), (), compute)

    def features(of: AdaptedModel, params: Tree) -> tuple[jax.Array, jax.Array]:
        output = of.apply(params, batch)
        return output.image_features, output.text_features

    programs = {False: jax.jit(lambda params: features(plain, params)), True: jax.jit(lambda p: features(model, p))}
    whole = {False: {"backbone": backbone.params}, True: model.init(jax.random.key(0))}
    bare, adapted = in_turns(lambda on: lambda: jax.block_until_ready(programs[on](whole[on])), options.pairs)
    return {
        "versions": {"jax": jax.__version__},
        "trained": table.trained,
        "weights_bytes": weights,
        "step_bytes": int(memory.argument_size_in_bytes + memory.temp_size_in_bytes),
        "peak_bytes": peak,
        "step_seconds": steps,
        "bare_seconds": bare,
        "adapted_seconds": adapted,
    }


def measure(options: Options) -> list[Record]:
    """Runs every method, appends its record to ``options.output`` and returns them."""
    run = started("methods_cost")
    records = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("writing weights", total=None)
        prepared = alone(prepare, options.model, folder)
        for name in options.methods:
            if problem := fits(name, prepared["config"]):
                raise UserError(f"{name} does not fit {options.model}: {problem}")
        methods = options.methods or tuple(name for name in METHODS if not fits(name, prepared["config"]))
        progress.update(task, total=len(methods))
        for name in methods:
            progress.update(task, description=name)
            fields = {k: v for k, v in asdict(options).items() if k in ("model", "batch", "steps", "pairs", "remat")}
            fields |= {"method": name, "device": prepared["device"], "device_name": prepared["device_name"]}
            records.append(run | fields | alone(measure_method, options, folder, name))
            append_record(options.output, records[-1])
            progress.advance(task)
    return records


def _above(record: Record) -> float:
    """What a step needs beyond the weights themselves, in bytes: activations, gradients, optimiser state."""
    return record["step_bytes"] - record["weights_bytes"]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a method under :data:`COLUMNS`."""
    full = next((record for record in records if record["method"] == "full"), None)
    found = []
    for record in records:
        known = entry(record["method"])
        step = Spread.of(record["step_seconds"]).median
        pairs = zip(record["adapted_seconds"], record["bare_seconds"], strict=True)
        overhead = Spread.of(100 * (adapted / bare - 1) for adapted, bare in pairs)
        shares = ["", "", ""]
        if full is not None:
            whole = (full["step_bytes"], _above(full), Spread.of(full["step_seconds"]).median)
            own = (record["step_bytes"], _above(record), step)
            shares = [f"{100 * mine / its:.0f}" for mine, its in zip(own, whole, strict=True)]
        found.append(
            [
                known.title,
                known.family,
                f"{record['trained']:,}",
                f"{record['step_bytes'] / 2**30:.2f}",
                shares[0],
                shares[1],
                f"{record['peak_bytes'] / 2**30:.2f}",
                f"{step:.2f}",
                shares[2],
                f"{overhead.median:+.1f}" if known.placements is not METHODS["full"].placements else "",
            ]
        )
    return found


def targets(records: Sequence[Record]) -> list[str]:
    """Whether ladder side tuning saves the memory that its paper says."""
    by_name = {record["method"]: record for record in records}
    if not {"ladder", "full"} <= by_name.keys():
        return []
    share = 100 * by_name["ladder"]["step_bytes"] / by_name["full"]["step_bytes"]
    met = "met" if share <= LADDER_TARGET else "**missed**"
    return [
        f"- {entry('ladder').title}: at most {LADDER_TARGET:.0f} % of the memory of a step of full fine-tuning: "
        f"{met} ({share:.0f} %)."
    ]


def section(records: Sequence[Record]) -> str:
    """The newest run as a section of the README."""
    newest = [record for record in records if record["run"] == records[-1]["run"]]
    first = newest[0]
    return "\n".join(
        [
            f"Run of {first['run']}, {first['model']}, batch {first['batch']}, remat {first['remat']}, float32:",
            "",
            f"    {first['command']}",
            "",
            machine_line(first),
            f"- Python {first['machine']['python']}, jax {first['versions']['jax']}; {first['steps']} timed steps, "
            f"{first['pairs']} pairs of forwards",
            "",
            markdown(COLUMNS, rows(newest), words=2),
            "",
            *targets(newest),
        ]
    )


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("What methods cost", COLUMNS, rows(records), words=2)


if __name__ == "__main__":
    command_line("methods_cost", Options, __doc__, measure, show, section)
