"""What does fusing the two modalities inside the adapter buy, against independent adapters, LoRA and full fine-tuning?

    python launch.py --experiment=fusion_ablation
    python launch.py --experiment=fusion_ablation --config.preset=smoke
    python launch.py --experiment=fusion_ablation --config.backbone=FOLDER --config.rank=64

Two tasks: true or false statements about generated scenes (attribute binding, relations, counts; balanced so that
neither the text nor the picture alone tells), and the questions of easy-VQA. Every variant has the same steps, data and
linear head; its learning rate is chosen on validation data. ``independent`` is the fusion adapter without fusion: the
same bottlenecks in the same places. Models that judge statements also score Winoground-format quadruples of scenes.

Cost of the default: 24 minutes on two CPU cores. What came out (one seed, 200 steps): on statements no fusion adapter
beats independent bottlenecks, and fusion at fewer layers loses 1.8 to 1.9 points; on easy-VQA attention gains 2.9
points [1.6, 4.1], gate and attention 4.0 [2.9, 5.3], LoRA 8.1 [6.8, 9.3]. Full fine-tuning is well above chance on
every kind of statement (binding 75.9, relations 81.2, counts 65.3). The table is in ``docs/fusion_ablation``. With
three seeds (``full``, ``docs/fusion_ablation_full``): attention 0.0 [-1.5, 1.4] on statements and 2.8 [1.7, 3.8] on
easy-VQA; at early or late layers alone every kind of adapter loses 1.6 to 2.6 on statements, fused or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich
import rich.table

from vla_jax.adapters import Fusion, LoRA, Placement
from vla_jax.backbones.loading import Backbone, abstract_backbone, load_backbone
from vla_jax.comparison import Comparison
from vla_jax.data.quadruple_pairs import as_scores
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation import winoground
from vla_jax.evaluation.statistics import PairedDifference, accuracy, paired_difference
from vla_jax.reporting import fusion_report
from vla_jax.run_config import RunConfig
from vla_jax.task_data import Sizes, clusters, examples_of, of_kinds, task, task_data
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import check_batch, make_mesh
from vla_jax.variants import Budget, Outcome, TaskData, Variant

TASKS = ("statements", "easy_vqa")
FUSED = ("gate", "attention", "gate_attention")
PLACED = ("best_early", "best_late")
EARLY_AND_LATE = tuple(f"{mix}_{layers}" for mix in ("independent", *FUSED) for layers in ("early", "late"))


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The whole experiment.

    Attributes:
        tasks: which tasks, of ``statements`` and ``easy_vqa``.
        variants: which variants, in the order of the table; if empty, those of :data:`VARIANTS`.
        layers: in which layers adapters sit, in the notation of :mod:`vla_jax.adapters.layers`; early and late variants
            say their own.
        rank: width of the bottlenecks.
        heads: attention heads of the fusion adapters.
        lora_rank: rank of LoRA on queries and values.
        head_rates: learning rates tried for the linear head alone, all to the end: it costs next to nothing.
        adapter_rates: learning rates tried for what sits in the slots.
        full_rates: learning rates tried for full fine-tuning.
        control_rates: learning rates tried for the controls, which train everything too.
        budget: steps, batch, seeds and optimiser, the same for every variant.
        train: training examples of each task, or as many as there are.
        validation: validation examples of each task.
        test: test examples of each task.
        quadruples: Winoground-format quadruples.
        text_length: tokens a text; must hold the longest.
        data_dir: where data sets are built and kept.
    """

    tasks: tuple[str, ...] = TASKS
    variants: tuple[str, ...] = ()
    layers: str = "all"
    rank: int = 32
    heads: int = 4
    lora_rank: int = 8
    head_rates: tuple[float, ...] = (2e-3, 6e-3, 2e-2)
    adapter_rates: tuple[float, ...] = (2e-3, 6e-3)
    full_rates: tuple[float, ...] = (3e-4, 1e-3)
    control_rates: tuple[float, ...] = (1e-3,)
    budget: Budget = dataclasses.field(
        default_factory=lambda: Budget(
            steps=200,
            checkpoint_every=50,
            selection_share=0.2,
            batch_size=64,
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
        )
    )
    train: int = 16_000
    validation: int = 1_000
    test: int = 2_000
    quadruples: int = 300
    text_length: int = 20
    data_dir: str = "data"

    def __post_init__(self):
        if not self.tasks:
            raise UserError(f"the ablation needs at least one task of {', '.join(TASKS)}")
        for name in self.tasks:
            if name not in TASKS:
                raise unknown("task", name, TASKS)
        for name in self.variants:
            if name not in (*VARIANTS, *EARLY_AND_LATE):
                raise unknown("variant", name, (*VARIANTS, *EARLY_AND_LATE))
        for position, name in enumerate(self.variants):
            if name in PLACED and not set(FUSED) & set(self.variants[:position]):
                raise UserError(f"variant {name!r} places the best of {', '.join(FUSED)}; put one of those before it")
        if min(self.train, self.validation, self.test, self.quadruples) < 1:
            raise UserError("train, validation, test and quadruples must be at least 1")


VARIANTS = ("linear", "independent", "tied", *FUSED, *PLACED, "lora", "full", "text_only", "image_only")

PRESETS = {
    "default": Config(),
    "smoke": Config(
        preset="smoke",
        variants=("linear", "independent", "gate"),
        head_rates=(6e-3,),
        adapter_rates=(2e-3,),
        budget=Budget(steps=12, batch_size=32, checkpoint_every=6, log_every=4),
        train=400,
        validation=100,
        test=200,
        quadruples=20,
    ),
    "full": Config(
        preset="full",
        variants=(
            "linear",
            *(name for mix in ("independent", *FUSED) for name in (mix, f"{mix}_early", f"{mix}_late")),
            *("tied", "lora", "full", "text_only", "image_only"),
        ),
        budget=dataclasses.replace(Config().budget, seeds=(0, 1, 2)),
    ),
}


def variants(config: Config, backbone: Backbone) -> Iterator[Variant]:
    """The variants that do not depend on results, in the table's order."""
    asked = config.variants or VARIANTS
    towers = backbone.config.towers
    # Weights cannot be shared between towers of different widths; the other variants do not need it.
    fits_tied = towers["vision"].width == towers["text"].width
    for name in asked:
        if name in PLACED or (name == "tied" and not config.variants and not fits_tied):
            continue
        yield _variant(config, name)


def _variant(config: Config, name: str) -> Variant:
    rates = {"learning_rates": config.adapter_rates}
    full = {"learning_rates": config.full_rates, "rules": "full"}
    control = {"learning_rates": config.control_rates, "rules": "full", "group": "control"}
    if name == "text_only":
        return Variant(name, "text only (control)", modalities=("text",), **control)
    if name == "image_only":
        return Variant(name, "image only (control)", modalities=("image",), **control)
    if name == "linear":
        head = {"learning_rates": config.head_rates, "selection_share": 1.0, "rules": "linear_probe"}
        return Variant(name, "linear head alone", group="no adapter", **head)
    if name == "full":
        return Variant(name, "full fine-tuning", group="no adapter", **full)
    if name == "lora":
        method = LoRA(rank=config.lora_rank, alpha=2.0 * config.lora_rank)
        placement = Placement(method, slots=("attn_q", "attn_v"), layers=config.layers)
        return Variant(name, "LoRA on q, v", placements=(placement,), group="independent", **rates)
    if name == "tied":
        placement = Placement(Fusion(rank=config.rank, mix="none", shared=True), layers=config.layers)
        return Variant(name, "tied bottlenecks", placements=(placement,), group="independent", **rates)
    mix, layers = name.rsplit("_", 1) if name in EARLY_AND_LATE else (name, "")
    return _placed(config, name, mix, layers)


_TITLES = {
    "independent": "independent bottlenecks",
    "gate": "gated fusion",
    "attention": "attention fusion",
    "gate_attention": "gate and attention",
}


def _placed(config: Config, name: str, mix: str, layers: str) -> Variant:
    fused = mix != "independent"
    title = "best fusion" if name in PLACED else _TITLES[mix]  # which one is best may differ from task to task
    method = Fusion(rank=config.rank, heads=config.heads, mix=mix) if fused else Fusion(rank=config.rank, mix="none")
    return Variant(
        name,
        f"{title}, {layers} layers" if layers else title,
        placements=(Placement(method, layers=layers or config.layers),),
        group="fusion" if fused else "independent",
        learning_rates=config.adapter_rates,
    )


def check(config: Config) -> Any:
    """Refuses what cannot be run, before anything is compiled; returns the table for ``--dry_run``."""
    shapes = abstract_backbone(config.backbone)
    mesh = make_mesh(config.mesh)
    check_batch(config.budget.batch_size, mesh)
    shapes.config.check_text_length("text_length", config.text_length)
    report = rich.table.Table(title=f"fusion_ablation, {config.preset}: {config.backbone}")
    for heading in ("variant", "trained", "of the backbone", "adapters"):
        report.add_column(heading, justify="left" if heading in ("variant", "adapters") else "right")
    first = None
    for variant in variants(config, shapes):
        data = TaskData(task(config.tasks[0]), {}, None)
        table = Comparison(shapes, data, config.budget, config.compute, mesh, Path()).table(variant)
        sites = "; ".join(f"{p.method.kind} in {', '.join(p.slots)}, {p.layers} layers" for p in variant.placements)
        report.add_row(variant.title, f"{table.trained:,}", f"{table.share_of_backbone:.2f} %", sites or "none")
        first = table if variant.name == "gate_attention" or first is None else first
    return rich.console.Group(report, first.summary())


def run(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Runs every variant on every task, and writes table and figures anew after each."""
    backbone = load_backbone(config.backbone, dtype=config.storage)
    mesh = make_mesh(config.mesh)
    rows: dict[str, dict[str, Any]] = {}
    for name in config.tasks:
        data = task_data(name, _sizes(config), backbone)
        comparison = Comparison(backbone, data, config.budget, config.compute, mesh, workdir / "runs" / name)
        outcomes: dict[str, Outcome] = {}
        for variant in _in_order(config, backbone, outcomes):
            outcomes[variant.name] = comparison.run(variant)
            row = rows.setdefault(
                variant.name, {"name": variant.name, "variant": variant.title, "group": variant.group}
            )
            row |= _results(name, data, outcomes[variant.name])
            if (independent := outcomes.get("independent")) is not None:
                for other in outcomes:
                    if other != "independent" and f"{name}_difference" not in rows[other]:
                        rows[other][f"{name}_difference"] = _difference(name, data, outcomes[other], independent)
            # Tasks differ in the size of their heads; the table shows the first one's.
            row.setdefault("trained", row[f"{name}_trained"])
            row.setdefault("share", row["trained"] / outcomes[variant.name].table.backbone)
            fusion_report.write(list(rows.values()), config.tasks, config.backbone, workdir)
    rich.print(fusion_report.table(list(rows.values()), config.tasks, config.backbone).terminal())
    rich.print(f"table, figures and runs: {workdir}")
    return list(rows.values())


def _in_order(config: Config, backbone: Backbone, outcomes: dict[str, Outcome]) -> Iterator[Variant]:
    """The variants in the table's order; the best fusion so far (on validation data) is placed early and late."""
    known = {variant.name: variant for variant in variants(config, backbone)}
    for name in config.variants or VARIANTS:
        if name in known:
            yield known[name]
        elif name in PLACED:
            fused = [outcomes[mix] for mix in FUSED if mix in outcomes]
            best = max(fused, key=lambda outcome: outcome.validated).variant.name
            yield _placed(config, name, best, name.removeprefix("best_"))


def _sizes(config: Config) -> Sizes:
    names = ("train", "validation", "test", "quadruples", "text_length", "data_dir")
    return Sizes(**{name: getattr(config, name) for name in names})


def _results(name: str, data: TaskData, outcome: Outcome) -> dict[str, Any]:
    """What a variant's row says of one task."""
    found = outcome.predictions["test"]
    correct, examples = found["correct"], examples_of(data, found["index"][0])
    row: dict[str, Any] = {
        f"{name}_trained": outcome.table.trained,
        f"{name}_methods": [placement.method.describe() for placement in outcome.variant.placements],
        f"{name}": accuracy(correct, clusters(name, examples)),
        f"{name}_learning_rate": outcome.learning_rate,
        f"{name}_validation": {f"{rate:g}": value for rate, value in outcome.validation.items()},
        f"{name}_step_seconds": outcome.seconds_per_step,
        f"{name}_step_bytes": outcome.step_bytes,
        f"{name}_adapter_bytes": outcome.adapter_bytes,
    }
    row |= {f"{name}_{kind}": accuracy(correct[:, chosen]) for kind, chosen in of_kinds(name, examples).items()}
    if "quadruples" in outcome.predictions:
        scored = outcome.predictions["quadruples"]
        scores = winoground.evaluate(as_scores(scored["score"], outcome.variant.modalities))
        row |= {f"quadruples_{part}": getattr(scores, part) for part in winoground.CHANCE}
    return row


def _difference(name: str, data: TaskData, outcome: Outcome, independent: Outcome) -> PairedDifference:
    """A variant's accuracy on the test examples minus that of independent adapters."""
    found = outcome.predictions["test"]
    together = clusters(name, examples_of(data, found["index"][0]))
    return paired_difference(found["correct"], independent.predictions["test"]["correct"], together)
