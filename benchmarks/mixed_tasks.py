"""What does it cost that every example of a batch has an adapter of its own, beside peft's mixed batches?

    python benchmarks/mixed_tasks.py --tasks 1 16 --pairs 3

The forward of CLIP with LoRA for as many tasks as ``--tasks`` says, a batch that mixes all of them against one whose
examples share one adapter, timed in turns in one process. Every framework and method has a process of its own. The
script stops if ours and peft's mixed batches have different logits. ``README.md`` says more.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress
from rich.table import Table

# The script is run from a checkout; a checkout need not be installed.
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.measuring import alone, in_turns, make_batch, peak_resident, prepare  # noqa: E402
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

Name = Literal["vla_jax LoRA", "vla_jax bottleneck", "peft LoRA"]

OUTPUT = Path(__file__).with_name("mixed_tasks.jsonl")
COLUMNS = (
    "adapters",
    "tasks",
    "one task, examples/s",
    "mixed, examples/s",
    "mixed / one task [quartiles], %",
    "ours / peft",
    "peak, GiB",
)
RANK = 16
REDUCTION = 16
# Of the single task's throughput at 16 tasks, in per cent, and of peft's mixed throughput.
SHARE_TARGET, PEER_TARGET, TARGET_TASKS = 90.0, 2.0, 16
LOGITS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        model: shape by preset name.
        tasks: how many tasks a batch mixes; none more than the batch has examples.
        batch: images, and texts, in a batch.
        pairs: timed pairs of forwards for each number of tasks, one of one task and one mixed.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md.
    """

    model: str = "vit_b_32"
    tasks: tuple[int, ...] = (1, 4, 16, 64)
    batch: int = 64
    pairs: int = 4
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        if not self.tasks or min(*self.tasks, self.batch, self.pairs) < 1:
            raise UserError("tasks, batch and pairs must be 1 or more")
        if max(self.tasks) > self.batch:
            raise UserError(f"a batch of {self.batch} cannot mix {max(self.tasks)} tasks; give a larger --batch")


def lora_up(task: int) -> float:
    """The one number that a task's up-projections are filled with, so that tasks differ in both frameworks alike."""
    return 0.01 * (task + 1)


def routes(batch: int, tasks: int) -> list[int]:
    """A task for each example, all of them equally often, in no order."""
    return [(7 * example + example // tasks) % tasks for example in range(batch)]


def measure_ours(options: Options, folder: str, method: str) -> list[dict[str, Any]]:
    """A record for each number of tasks: seconds of one task's and of mixed batches, the mixed batch's logits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vla_jax import names
    from vla_jax.adapters import Bottleneck, LoRA, Placement, Plan, place
    from vla_jax.backbones.clip import CLIP
    from vla_jax.backbones.loading import load_backbone
    from vla_jax.backbones.transformer import Compute

    backbone = load_backbone(folder)
    config, model = backbone.config, CLIP(backbone.config, Compute())
    images, tokens = make_batch(options.batch, config.image_size, config.vocabulary_size)
    images, tokens = jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(tokens)

    def plan_for(tasks: int) -> Plan:
        named = tuple(f"task_{task}" for task in range(tasks))
        if method == "LoRA":
            return place(Placement(LoRA(rank=RANK, alpha=RANK), slots=("attn_q", "attn_v"), tasks=named), config.towers)
        return place(Placement(Bottleneck(reduction=REDUCTION), slots=("mlp_out",), tasks=named), config.towers)

    def filled(plan: Plan, tasks: int) -> names.Tree:
        """Both maps of LoRA are filled with one number; bottlenecks, which have no peer here, with small ones."""
        leaves = {}
        for path, shape in names.flatten(plan.shapes()).items():
            value = np.full(shape.shape, 0.01, np.float32)
            if path.endswith("/b"):  # [layers, tasks, rank, out]
                ups = np.array([lora_up(task) for task in range(max(tasks, 1))], np.float32)
                value = np.broadcast_to(ups[:, None, None] if tasks else ups[0], shape.shape)
            leaves[path] = jnp.asarray(value)
        return names.unflatten(leaves)

    def program(plan: Plan) -> Any:
        def forward(params: names.Tree, adapters: names.Tree, route: jax.Array | None) -> jax.Array:
            bound = plan.bind(adapters)
            return model.apply({"params": params}, images, tokens, adapters=bound, route=route).logits

        return jax.jit(forward)

    one_plan = plan_for(0)
    one_weights, one_program = filled(one_plan, 0), program(one_plan)
    found = []
    for tasks in options.tasks:
        plan, route = plan_for(tasks), jnp.asarray(routes(options.batch, tasks), jnp.int32)
        weights, mixed_program = filled(plan, tasks), program(plan)

        def forward(mixed: bool, program=mixed_program, weights=weights, route=route) -> Any:
            chosen = (program, weights, route) if mixed else (one_program, one_weights, None)
            return lambda: jax.block_until_ready(chosen[0](backbone.params, *chosen[1:]))

        one, mixed = in_turns(forward, options.pairs)
        logits = np.asarray(mixed_program(backbone.params, weights, route))
        found.append(_record(tasks, one, mixed, logits, {"jax": jax.__version__}))
    return found


def measure_peer(options: Options, folder: str, method: str) -> list[dict[str, Any]]:
    """The same of ``transformers.CLIPModel`` with peft's LoRA and ``adapter_names``."""
    import warnings

    warnings.simplefilter("ignore", FutureWarning)
    import peft
    import torch
    import transformers

    del method  # peft mixes LoRA alone
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    images, tokens = make_batch(options.batch, config.vision_config.image_size, config.text_config.vocab_size)
    batch = {"pixel_values": torch.from_numpy(images), "input_ids": torch.from_numpy(tokens).long()}
    settings = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, settings, adapter_name="task_0")
    found = []
    for tasks in sorted(options.tasks):
        for task in range(len(adapted.peft_config), tasks):
            adapted.add_adapter(f"task_{task}", settings)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                task = int(name.split("task_")[1].split(".")[0])
                parameter.data.fill_(0.01 if "lora_A" in name else lora_up(task))
        adapted.set_adapter("task_0")
        adapted.eval()
        names = [f"task_{task}" for task in routes(options.batch, tasks)]

        def run(mixed: bool, names: list[str] = names) -> Any:
            with torch.inference_mode():
                return adapted(**batch, **({"adapter_names": names} if mixed else {})).logits_per_image

        one, mixed = in_turns(lambda mixed, run=run: lambda: run(mixed), options.pairs)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        found.append(_record(tasks, one, mixed, run(True).numpy(), versions))
    return found


def _record(tasks: int, one: list[float], mixed: list[float], logits: Any, versions: dict[str, str]) -> dict[str, Any]:
    measured = {"one_seconds": one, "mixed_seconds": mixed, "peak_bytes": peak_resident(), "versions": versions}
    return {"tasks": tasks, "logits": logits} | measured


def check(ours: Sequence[dict[str, Any]], peer: Sequence[dict[str, Any]]) -> None:
    """Stops where the two did not do the same work."""
    import numpy as np

    theirs = {record["tasks"]: record["logits"] for record in peer}
    for record in ours:
        expected = theirs[record["tasks"]]
        difference = float(np.linalg.norm(record["logits"] - expected) / np.linalg.norm(expected))
        if not difference <= LOGITS_TOLERANCE:
            raise RuntimeError(f"{record['tasks']} tasks: the frameworks' logits differ by {difference:.2g} relative")


def measure(options: Options) -> list[Record]:
    """Runs every case, appends its records to ``options.output`` and returns them."""
    run = started("mixed_tasks")
    cases: list[tuple[Name, Any]] = [
        ("vla_jax LoRA", measure_ours),
        ("peft LoRA", measure_peer),
        ("vla_jax bottleneck", measure_ours),
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    records = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        steps = progress.add_task("writing weights", total=len(cases))
        prepared = alone(prepare, options.model, folder)
        for name, function in cases:
            progress.update(steps, description=name)
            found[name] = alone(function, options, folder, name.split()[1])
            progress.advance(steps)
            fields = {key: value for key, value in asdict(options).items() if key in ("model", "batch", "pairs")}
            fields |= {"adapters": name, "device": prepared["device"], "device_name": prepared["device_name"]}
            for each in found[name]:
                records.append(run | fields | {key: value for key, value in each.items() if key != "logits"})
                append_record(options.output, records[-1])
    check(found["vla_jax LoRA"], found["peft LoRA"])
    return records


def _rate(record: Record, name: str) -> float:
    """Examples a second."""
    return record["batch"] / Spread.of(record[name]).median


def _share(record: Record) -> Spread:
    """A mixed batch's throughput as a share of one task's, pair by pair, in per cent."""
    pairs = zip(record["one_seconds"], record["mixed_seconds"], strict=True)
    return Spread.of(100 * one / mixed for one, mixed in pairs)


def _ahead(record: Record, records: Sequence[Record]) -> float | None:
    """How many times as many mixed examples a second as peft's, for the method that peft has."""
    peer = [r for r in records if r["adapters"] == "peft LoRA" and r["tasks"] == record["tasks"]]
    if record["adapters"] != "vla_jax LoRA" or not peer:
        return None
    return _rate(record, "mixed_seconds") / _rate(peer[0], "mixed_seconds")


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a case under :data:`COLUMNS`."""
    found = []
    for record in records:
        ahead = _ahead(record, records)
        found.append(
            [
                record["adapters"],
                str(record["tasks"]),
                f"{_rate(record, 'one_seconds'):.1f}",
                f"{_rate(record, 'mixed_seconds'):.1f}",
                _share(record).text(0),
                "" if ahead is None else f"{ahead:.2f}",
                f"{record['peak_bytes'] / 2**30:.2f}",
            ]
        )
    return found


def targets(records: Sequence[Record]) -> list[str]:
    """Which targets are met at 16 tasks."""
    lines = []
    for record in records:
        if record["tasks"] != TARGET_TASKS or not record["adapters"].startswith("vla_jax"):
            continue
        share, ahead = _share(record).median, _ahead(record, records)
        met = "met" if share >= SHARE_TARGET else "**missed**"
        lines.append(f"- {record['adapters']}: at least {SHARE_TARGET:.0f} % of one task: {met} ({share:.0f} %).")
        if ahead is not None:
            met = "met" if ahead >= PEER_TARGET else "**missed**"
            lines.append(f"- {record['adapters']}: at least {PEER_TARGET:g} times peft: {met} ({ahead:.2f} times).")
    return lines


def section(records: Sequence[Record]) -> str:
    """The newest run as a section of the README."""
    newest = [record for record in records if record["run"] == records[-1]["run"]]
    first = newest[0]
    versions = {name: value for record in newest for name, value in record["versions"].items()}
    lines = [
        f"Run of {first['run']}, {first['model']}, batch {first['batch']}, {first['pairs']} pairs, float32:",
        "",
        f"    {first['command']}",
        "",
        machine_line(first),
        f"- Python {first['machine']['python']}, " + ", ".join(f"{n} {v}" for n, v in sorted(versions.items())),
        "",
        markdown(COLUMNS, rows(newest), words=1),
    ]
    return "\n".join([*lines, "", f"Targets, at {TARGET_TASKS} tasks:", "", *targets(newest)])


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("Batches that mix tasks", COLUMNS, rows(records))


if __name__ == "__main__":
    command_line("mixed_tasks", Options, __doc__, measure, show, section)
