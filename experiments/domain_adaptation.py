"""How few labels does a new domain take? Learning curves of adapters, full fine-tuning and a linear probe.

    python launch.py --experiment=domain_adaptation
    python launch.py --experiment=domain_adaptation --config.preset=smoke
    python launch.py --experiment=domain_adaptation --config.methods=linear,full,dora --config.labels=2,8,32

A backbone made for plain generated scenes is adapted to pictures that are new to it: simulated textiles with and
without defects, and scenes in another world (dull colours, other textures, strokes behind the objects, noise), where
the shape of a single object is asked for. Only the image tower runs, and a linear head tells the classes. Every method
has the same steps with the same examples: one label a class, then more, up to all there are. A seed draws examples of
its own, and those of fewer labels are among those of more.

The learning rate of each method is chosen on validation data, for each number of labels, on the first seed; the labels
of the validation split are the same for all methods and are not counted.

Three things come out: accuracy by labels and method; how many labels a method needs for the accuracy of full
fine-tuning, which is claimed to take 10 to 100 times more of them; and what is left on plain scenes of what the
backbone could do there without training, with the adapters and with the adapters taken out again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import rich
import rich.table

from vla_jax import catalogue
from vla_jax.backbones.loading import Backbone, abstract_backbone, load_backbone
from vla_jax.catalogue import entry
from vla_jax.comparison import Comparison
from vla_jax.data.cached import as_rows, evaluate
from vla_jax.data.pipeline import Pipeline
from vla_jax.domain_data import DOMAINS, Domain, DomainSizes, describe, domain, domain_task
from vla_jax.domain_results import DomainResults, Tried
from vla_jax.errors import UserError
from vla_jax.evaluation.forgetting import MEASURES, Kept, OldDomain
from vla_jax.evaluation.scene_zero_shot import SceneQuestions
from vla_jax.evaluation.statistics import Interval, accuracy
from vla_jax.model import AdaptedModel
from vla_jax.reporting import domain_report
from vla_jax.reporting.table import write_atomically
from vla_jax.run_config import RunConfig
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import batch_sharding, check_batch, make_mesh
from vla_jax.variants import Budget, Outcome, TaskData, Variant


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The whole experiment.

    Attributes:
        domains: which of :data:`vla_jax.domain_data.DOMAINS`.
        methods: which methods of :mod:`vla_jax.catalogue`, in the order of the tables; those that act on pictures.
        labels: labels a class; all there are come after them, and those that are not there are left out.
        head_rates: learning rates tried for a linear head alone, all to the end.
        adapter_rates: learning rates tried for adapters.
        light_rates: learning rates tried where few numbers are trained, or numbers that others are multiplied with.
        full_rates: learning rates tried for full fine-tuning.
        budget: steps, batch, seeds and optimiser, the same for every method and number of labels.
        sizes: how many pictures.
        classes: pictures of single objects that models are asked about on plain scenes.
        candidates: pictures and descriptions that are candidates for each other there.
        quadruples: quadruples of each of three kinds there.
    """

    domains: tuple[str, ...] = tuple(DOMAINS)
    methods: tuple[str, ...] = ("linear", "lora", "parallel", "full")
    labels: tuple[int, ...] = (1, 4, 16, 64)
    head_rates: tuple[float, ...] = (2e-2, 6e-2, 2e-1)
    adapter_rates: tuple[float, ...] = (1e-3, 3e-3)
    light_rates: tuple[float, ...] = (6e-3, 2e-2)
    full_rates: tuple[float, ...] = (1e-4, 3e-4)
    budget: Budget = dataclasses.field(
        default_factory=lambda: Budget(
            steps=100,
            selection_share=0.5,
            batch_size=32,
            seeds=(1, 2, 3, 4, 5),
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
            head_rate=1e-2,
        )
    )
    sizes: DomainSizes = dataclasses.field(default_factory=DomainSizes)
    classes: int = 256
    candidates: int = 256
    quadruples: int = 100

    def __post_init__(self):
        for name in self.domains:
            describe(name)
        for name in self.methods:
            entry(name)
        for kind, given in (("domains", self.domains), ("methods", self.methods)):
            if not given or len(set(given)) < len(given):
                raise UserError(f"{kind} must name at least one, and none twice; given: {', '.join(given)}")
        if list(self.labels) != sorted(set(self.labels)) or min(self.labels, default=1) < 1:
            raise UserError(f"labels are numbers of labels a class, from 1 on and rising; got {self.labels}")
        if min(self.classes, self.quadruples) < 1 or self.candidates < 2:
            raise UserError("classes and quadruples must be at least 1, candidates at least 2")


PRESETS = {
    "default": Config(),
    "smoke": Config(
        preset="smoke",
        domains=("shifted_scenes",),
        methods=("linear", "lora", "full"),
        labels=(2,),
        head_rates=(2e-2,),
        adapter_rates=(2e-3,),
        light_rates=(6e-3,),
        full_rates=(3e-4,),
        budget=Budget(steps=6, batch_size=16, seeds=(1, 2), checkpoint_every=6, log_every=3),
        sizes=DomainSizes(train=64, validation=24, test=48),
        classes=32,
        candidates=32,
        quadruples=8,
    ),
    "full": Config(
        preset="full",
        methods=("linear", "lora", "dora", "pfeiffer", "parallel", "layer_norm", "full"),
        labels=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        adapter_rates=(3e-4, 1e-3, 3e-3),
        full_rates=(3e-5, 1e-4, 3e-4),
        budget=Budget(
            steps=1_000,
            selection_share=0.5,
            batch_size=64,
            seeds=(1, 2, 3, 4, 5),
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
            head_rate=1e-2,
        ),
        sizes=DomainSizes(train=8_192, validation=800, test=4_000),
        classes=512,
        quadruples=400,
    ),
}


def variants(config: Config, backbone: Backbone) -> list[Variant]:
    """The methods as the comparison takes them, in the image tower alone.

    Raises:
        UserError: for a method that acts on texts, or on both towers at once.
    """
    rates = {
        "head": config.head_rates,
        "adapters": config.adapter_rates,
        "light": config.light_rates,
        "full": config.full_rates,
    }
    found = []
    for name in config.methods:
        pace = entry(name).pace
        known = catalogue.variant(name, backbone.config, rates[pace], 1.0 if pace == "head" else None)
        if any("vision" not in placement.towers or placement.method.joint for placement in known.placements):
            raise UserError(f"{name} acts on texts, which are not seen here; leave it out of methods")
        found.append(
            dataclasses.replace(
                known,
                rules="image_tower" if known.rules == "full" else known.rules,
                placements=tuple(dataclasses.replace(placement, towers=("vision",)) for placement in known.placements),
                modalities=("image",),
            )
        )
    return found


def check(config: Config) -> Any:
    """Refuses what cannot be run, before anything is compiled; returns the table for ``--dry_run``."""
    shapes = abstract_backbone(config.backbone)
    mesh = make_mesh(config.mesh)
    check_batch(config.budget.batch_size, mesh)
    report = rich.table.Table(title=f"domain_adaptation, {config.preset}: {config.backbone}")
    for heading in ("method", "trained", "of the backbone", "adapters"):
        report.add_column(heading, justify="left" if heading in ("method", "adapters") else "right")
    data = TaskData(domain_task(config.domains[0]), {}, None)
    comparison = Comparison(shapes, data, config.budget, config.compute, mesh, Path())
    for variant in variants(config, shapes):
        table = comparison.table(variant)
        sites = "; ".join(f"{p.method.kind} in {', '.join(p.slots)}, {p.layers} layers" for p in variant.placements)
        share = f"{table.share_of_backbone:.2f} %"
        report.add_row(variant.title, f"{table.trained:,}", share, sites or f"rules: {variant.rules}")
    return report


def run(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Runs every method with every number of labels, and writes tables and figures anew after each method."""
    backbone = load_backbone(config.backbone, dtype=config.storage)
    chosen, mesh = variants(config, backbone), make_mesh(config.mesh)
    domains = [domain(name, config.sizes, backbone) for name in config.domains]  # what is missing is found out first
    old = OldDomain(backbone, _questions(config, backbone), config.compute, mesh)
    asked = workdir / "forgetting" / f"{config.classes}_{config.candidates}_{config.quadruples}"
    results = DomainResults({variant.name: variant.title for variant in chosen})
    for each in domains:
        comparison = Comparison(backbone, each.data, config.budget, config.compute, mesh, workdir)
        tried = _tried(config, each, comparison)
        for variant in chosen:
            for labels in tried.labels:
                folder = workdir / "runs" / each.name / f"labels_{labels}"
                drawing = comparison.drawing(each.draws(labels, config.budget.seeds), folder)
                outcome = drawing.run(variant)
                correct = outcome.predictions["test"]["correct"]
                results.add(tried, labels, variant.name, correct, _details(outcome))
            if variant.rules != "linear_probe":  # which changes no feature
                before = _kept(asked / "backbone.npz", lambda: old.before)
                folder = asked / each.name / variant.name / f"learning_rate_{outcome.learning_rate:g}"
                kept = [
                    _kept(folder / f"seed_{seed}.npz", functools.partial(_ask, old, drawing, outcome, seed))
                    for seed in config.budget.seeds
                ]
                results.forget(tried, variant.name, before, kept)
            domain_report.write(results, config.backbone, workdir)
    for table in domain_report.tables(results, config.backbone).values():
        rich.print(table.terminal())
    rich.print(f"tables, figures and runs: {workdir}")
    return results.rows


def _questions(config: Config, backbone: Backbone) -> SceneQuestions:
    return SceneQuestions.draw(
        image_size=backbone.config.image_size,
        split="test",
        classes=config.classes,
        candidates=config.candidates,
        quadruples=config.quadruples,
    )


def _tried(config: Config, each: Domain, comparison: Comparison) -> Tried:
    """What is tried on a domain, and what the backbone does there without training."""
    known = describe(each.name)
    labels = [*(number for number in config.labels if number < each.most), each.most]
    return Tried(each.name, known.title, len(known.classes), labels, _zero_shot(each, comparison))


def _zero_shot(each: Domain, comparison: Comparison) -> Interval | None:
    """Accuracy on the test split by the classes' names, without training; None where these say nothing."""
    if each.by_name is None:
        return None
    model = AdaptedModel(comparison.backbone, each.by_name, compute=comparison.compute)
    program = functools.partial(jax.jit(model.predict), model.init(jax.random.key(0)))
    pipeline = Pipeline(each.data.splits["test"], as_rows, comparison.budget.batch_size, training=False)
    return accuracy(evaluate(pipeline, program, batch_sharding(comparison.mesh))["correct"])


def _details(outcome: Outcome) -> dict[str, Any]:
    """What is told of a method besides its accuracy."""
    return {
        "trained": outcome.table.trained,
        "learning_rate": outcome.learning_rate,
        "validation": {f"{rate:g}": value for rate, value in outcome.validation.items()},
        "step_seconds": outcome.seconds_per_step,
    }


def _ask(old: OldDomain, comparison: Comparison, outcome: Outcome, seed: int) -> Kept:
    """What the model of a seed can still do on plain scenes."""
    return old.kept(comparison.parameters(outcome, seed), comparison.model(outcome.variant).plan)


def _kept(path: Path, ask: Callable[[], Kept]) -> Kept:
    """What was asked once and kept, or is asked now; also where not all of it was asked then."""
    if not path.is_file() or MEASURES.keys() - Kept.from_bytes(path.read_bytes()).right.keys():
        write_atomically(path, ask().to_bytes())
    return Kept.from_bytes(path.read_bytes())
