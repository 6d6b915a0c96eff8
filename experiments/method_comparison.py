"""Which adapter is worth its parameters? Every family on the same tasks, with the same steps and the same search.

    python launch.py --experiment=method_comparison
    python launch.py --experiment=method_comparison --config.preset=smoke
    python launch.py --experiment=method_comparison --config.methods=lora,pfeiffer,full --config.backbone=FOLDER
    python launch.py --experiment=method_comparison --config.preset=full

Three tasks: true or false statements about generated scenes, the questions of easy-VQA, and retrieval among captions
of scenes. Every method has the same steps and data; its learning rate is chosen on validation data from a grid of two
values, a linear head's of three. The first row is the backbone as it was loaded, with nothing trained
(:mod:`vla_jax.evaluation.untrained`). Beside accuracy the table says what a method costs (trained parameters, memory
and time of a training step, forward time as it is and merged into the weights, size on disk) and what it forgets: how
well the model, trained for a task, still finds captions as the untrained backbone does. Blocks that no trained weight
touches are computed once an example, before training: a step's time and memory leave out as many as the table says.

Models whose features of one modality depend on what of the other stands beside it (fusion, CoCoOp) cannot index images
and texts apart; they have no results where features of different pairs are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
import rich.markup
import rich.table

from vla_jax import catalogue, names
from vla_jax.algebra import Adapter, merge
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.loading import Backbone, abstract_backbone, load_backbone
from vla_jax.catalogue import METHODS, entry, fits
from vla_jax.comparison import Comparison
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation.latency import forward_seconds
from vla_jax.evaluation.statistics import PairedDifference, accuracy, paired_difference
from vla_jax.evaluation.untrained import untrained
from vla_jax.model import AdaptedModel, Batch
from vla_jax.reporting import method_report
from vla_jax.reporting.table import write_atomically
from vla_jax.run_config import RunConfig
from vla_jax.task_data import TASKS, Sizes, clusters, examples_of, of_kinds, task, task_data
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import check_batch, make_mesh
from vla_jax.variants import Budget, Outcome, TaskData, Variant


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The whole experiment.

    Attributes:
        tasks: which tasks, of ``statements``, ``easy_vqa`` and ``retrieval``.
        methods: which methods of :mod:`vla_jax.catalogue`, in the order of the table; all that fit if empty, as in the
            preset ``full``.
        head_rates: learning rates tried for a linear head alone, all to the end: it costs next to nothing.
        adapter_rates: learning rates tried for adapters.
        light_rates: learning rates tried where few numbers are trained, or numbers that others are multiplied with.
        full_rates: learning rates tried for full fine-tuning, and for networks that make an adapter's weights.
        budget: steps, batch, seeds and optimiser, the same for every method.
        sizes: how much data.
        latency_batch: pairs of the forward pass that is timed.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = ()
    head_rates: tuple[float, ...] = (2e-3, 6e-3, 2e-2)
    adapter_rates: tuple[float, ...] = (2e-3, 6e-3)
    light_rates: tuple[float, ...] = (6e-3, 2e-2)
    full_rates: tuple[float, ...] = (3e-4, 1e-3)
    budget: Budget = dataclasses.field(
        default_factory=lambda: Budget(
            steps=100,
            selection_share=1.0,
            batch_size=48,
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
            head_rate=1e-2,
        )
    )
    sizes: Sizes = dataclasses.field(
        default_factory=lambda: Sizes(train=6_400, quadruples=200, kept=512, caption_length=44)
    )
    latency_batch: int = 32

    def __post_init__(self):
        if not self.tasks:
            raise UserError(f"the comparison needs at least one task of {', '.join(TASKS)}")
        for name in self.tasks:
            if name not in TASKS:
                raise unknown("task", name, TASKS)
        for name in self.methods:
            entry(name)
        for kind, given in (("tasks", self.tasks), ("methods", self.methods)):
            if len(set(given)) < len(given):
                raise UserError(f"{kind} name something twice: {', '.join(given)}")
        if self.latency_batch < 1:
            raise UserError(f"latency_batch must be at least 1, got {self.latency_batch}")


UNTRAINED = "untrained"

# One or two of every family, so that every learning rate can be run to its end.
REPRESENTATIVES = (
    "linear",
    "full",
    "bitfit",
    "ia3",
    "pfeiffer",
    "adapter_drop",
    "lora",
    "dora",
    "compacter",
    "hyperformer",
    "coop",
    "vpt_deep",
    "maple",
    "fusion",
    "mma",
    "clip_adapter",
    "ladder",
)

PRESETS = {
    "default": Config(methods=REPRESENTATIVES),
    "smoke": Config(
        preset="smoke",
        tasks=("statements", "retrieval"),
        methods=("linear", "full", "pfeiffer", "lora"),
        head_rates=(6e-3,),
        adapter_rates=(2e-3,),
        light_rates=(6e-3,),
        full_rates=(3e-4,),
        budget=Budget(steps=10, batch_size=32, checkpoint_every=5, log_every=5),
        sizes=Sizes(train=320, validation=96, test=192, quadruples=20, kept=128),
        latency_batch=8,
    ),
    "full": Config(
        preset="full",
        adapter_rates=(1e-3, 2e-3, 6e-3),
        light_rates=(2e-3, 6e-3, 2e-2),
        full_rates=(1e-4, 3e-4, 1e-3),
        budget=Budget(
            steps=2_000,
            selection_share=0.5,
            batch_size=128,
            seeds=(0, 1, 2),
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
            head_rate=1e-2,
        ),
        sizes=Sizes(train=64_000, quadruples=1_000, kept=2_048, caption_length=44),
    ),
}


def variants(config: Config, backbone: Backbone) -> list[Variant]:
    """The methods as the comparison takes them; those that do not fit the backbone are refused if asked for by name."""
    found = []
    for name in config.methods or METHODS:
        if problem := fits(name, backbone.config):
            if config.methods:
                raise UserError(f"{name} does not fit {backbone.name}: {problem}; leave it out of methods")
            rich.print(f"[yellow]{name} is left out: {rich.markup.escape(str(problem))}[/yellow]")
            continue
        found.append(_variant(config, name, backbone))
    return found


def _variant(config: Config, name: str, backbone: Backbone) -> Variant:
    rates = {
        "head": config.head_rates,
        "adapters": config.adapter_rates,
        "light": config.light_rates,
        "full": config.full_rates,
    }
    pace = entry(name).pace
    # What costs next to nothing can afford to be looked at after all of the steps.
    return catalogue.variant(name, backbone.config, rates[pace], 1.0 if pace == "head" else None)


def check(config: Config) -> Any:
    """Refuses what cannot be run, before anything is compiled; returns the table for ``--dry_run``."""
    shapes = abstract_backbone(config.backbone)
    mesh = make_mesh(config.mesh)
    check_batch(config.budget.batch_size, mesh)
    lengths = {"sizes.text_length": config.sizes.text_length, "sizes.caption_length": config.sizes.caption_length}
    for name, length in lengths.items():
        shapes.config.check_text_length(name, length)
    report = rich.table.Table(title=f"method_comparison, {config.preset}: {config.backbone}")
    for heading in ("method", "family", "trained", "of the backbone", "adapters"):
        report.add_column(heading, justify="right" if heading in ("trained", "of the backbone") else "left")
    data = TaskData(task(config.tasks[0]), {}, None)
    for variant in variants(config, shapes):
        comparison = Comparison(shapes, data, config.budget, config.compute, mesh, Path())
        model, table = comparison.model(variant), comparison.table(variant)
        model.check_room(max(lengths.values()))
        sites = "; ".join(f"{p.method.kind} in {', '.join(p.slots)}, {p.layers} layers" for p in variant.placements)
        share = f"{table.share_of_backbone:.2f} %"
        report.add_row(variant.title, variant.group, f"{table.trained:,}", share, sites or f"rules: {variant.rules}")
    return report


def run(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Runs every method on every task, and writes table and figures anew after each."""
    backbone = load_backbone(config.backbone, dtype=config.storage)
    mesh = make_mesh(config.mesh)
    rows: dict[str, dict[str, Any]] = {}
    for name in config.tasks:
        data = task_data(name, config.sizes, backbone)
        comparison = Comparison(backbone, data, config.budget, config.compute, mesh, workdir / "runs" / name)
        outcomes: dict[str, Outcome] = {}
        reference = untrained(name, data, backbone, config.compute, mesh, config.budget.batch_size)
        row = {"name": UNTRAINED, "variant": "backbone, zero-shot", "group": "reference", "trained": 0, "share": 0.0}
        rows[UNTRAINED] = rows.get(UNTRAINED, row) | _accuracies(name, data, reference)
        for variant in variants(config, backbone):
            pairs = comparison.model(variant).plan.needs_pairs
            row = rows.setdefault(variant.name, {"name": variant.name, "variant": variant.title})
            row |= {"group": variant.group}
            if name == "retrieval" and pairs:
                continue
            outcomes[variant.name] = comparison.run(variant)
            row |= _results(name, data, outcomes[variant.name])
            row |= _compared(name, data, outcomes, variant.name)
            if variant.name == "full":  # rows that were there before it had nothing to be compared with
                for earlier in outcomes:
                    rows[earlier] |= _compared(name, data, outcomes, earlier)
                rows[UNTRAINED] |= _difference(name, data, reference, outcomes["full"])
            if "forward_seconds" not in row:
                row |= _latency(config, comparison, variant, outcomes[variant.name], workdir)
            row.setdefault("trained", row[f"{name}_trained"])
            row.setdefault("share", row["trained"] / outcomes[variant.name].table.backbone)
            method_report.write(list(rows.values()), config.tasks, config.backbone, workdir)
    rich.print(method_report.table(list(rows.values()), config.tasks, config.backbone).terminal())
    rich.print(f"table, figures and runs: {workdir}")
    return list(rows.values())


def _results(name: str, data: TaskData, outcome: Outcome) -> dict[str, Any]:
    """What a method's row says of one task."""
    return _accuracies(name, data, _tested(outcome)) | {
        f"{name}_trained": outcome.table.trained,
        f"{name}_learning_rate": outcome.learning_rate,
        f"{name}_validation": {f"{rate:g}": value for rate, value in outcome.validation.items()},
        f"{name}_step_seconds": outcome.seconds_per_step,
        f"{name}_step_bytes": outcome.step_bytes,
        f"{name}_step_mebibytes": outcome.step_bytes / 2**20,
        f"{name}_stored_blocks": outcome.stored_blocks,
        f"{name}_adapter_bytes": outcome.adapter_bytes,
    }


def _tested(outcome: Outcome) -> dict[str, np.ndarray]:
    """``correct`` bool ``[seeds, examples]``, and ``index`` int32 ``[examples]``, of the test examples."""
    found = outcome.predictions["test"]
    return {"correct": found["correct"], "index": found["index"][0]}


def _accuracies(name: str, data: TaskData, tested: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy on the test examples, and on those of every kind."""
    correct, examples = tested["correct"], examples_of(data, tested["index"])
    by_kind = {f"{name}_{kind}": accuracy(correct[..., chosen]) for kind, chosen in of_kinds(name, examples).items()}
    return {name: accuracy(correct, clusters(name, examples))} | by_kind


def _compared(name: str, data: TaskData, outcomes: dict[str, Outcome], method: str) -> dict[str, Any]:
    """A method's differences: to full fine-tuning on the task, and to the untouched backbone on what it could do."""
    own, row = outcomes[method], {}
    if method != "full" and "full" in outcomes:
        row |= _difference(name, data, _tested(own), outcomes["full"])
    frozen = outcomes.get("linear")
    if frozen is not None and "kept" in own.predictions:
        kept = own.predictions["kept"]["correct"]
        row[f"{name}_kept"] = accuracy(kept)
        row[f"{name}_forgotten"] = paired_difference(kept, frozen.predictions["kept"]["correct"])
    return row


def _difference(
    name: str, data: TaskData, tested: Mapping[str, np.ndarray], full: Outcome
) -> dict[str, PairedDifference]:
    """Accuracy on the test examples minus that of full fine-tuning."""
    together = clusters(name, examples_of(data, tested["index"]))
    theirs = full.predictions["test"]["correct"]
    own = np.broadcast_to(tested["correct"], theirs.shape)  # what is not trained is the same with every seed
    return {f"{name}_difference": paired_difference(own, theirs, together)}


def _latency(
    config: Config, comparison: Comparison, variant: Variant, outcome: Outcome, workdir: Path
) -> dict[str, float]:
    """Forward time of a method beside the plain backbone's, and merged where it can be; measured once and kept."""
    path = workdir / "latency" / f"{variant.name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    model, backbone = comparison.model(variant), comparison.backbone
    adapted, batch = comparison.parameters(outcome), _batch(config, backbone.config)
    plain = dataclasses.replace(model, placements=(), robust_drop=0)
    run_adapted, run_plain = (jax.jit(functools.partial(_features, each)) for each in (model, plain))
    programs = {
        "plain": lambda: run_plain({"backbone": backbone.params}, batch),
        "adapted": lambda: run_adapted(adapted, batch),
    }
    if model.plan.groups:
        try:
            merged = merge(backbone.params, Adapter(model.plan, adapted["adapters"])).params
            programs["merged"] = lambda: run_plain({"backbone": merged}, batch)
        except UserError:
            pass  # not linear in the weights: there is nothing to merge
    seconds = forward_seconds(programs)
    row = {"forward_seconds": seconds["adapted"], "forward_overhead": seconds["adapted"] / seconds["plain"] - 1}
    if "merged" in seconds:
        row["merged_overhead"] = seconds["merged"] / seconds["plain"] - 1
    write_atomically(path, json.dumps(row))
    return row


def _features(model: AdaptedModel, params: names.Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    output = model.apply(params, batch)
    return output.image_features, output.text_features


def _batch(config: Config, shape: CLIPConfig) -> dict[str, jax.Array]:
    """Pairs of the right sizes; what they show costs nothing."""
    count, length = config.latency_batch, max(config.sizes.text_length, config.sizes.caption_length)
    generator = np.random.default_rng(0)
    images = generator.standard_normal((count, shape.image_size, shape.image_size, 3)).astype(np.float32)
    tokens = generator.integers(0, shape.vocabulary_size, (count, length)).astype(np.int32)
    arrays = {"image": images, "tokens": tokens, "text_mask": np.ones((count, length), bool)}
    return jax.device_put(arrays)
