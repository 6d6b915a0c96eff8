"""Few-shot CLIP: a picture's class by its name, from 1 to 16 examples a class, and for classes without any.

    python launch.py --experiment=few_shot
    python launch.py --experiment=few_shot --config.preset=smoke
    python launch.py --experiment=few_shot --config.data.name=oxford_pets --config.data.manual_dir=FOLDER
        --config.backbone=openai/clip-vit-base-patch16
    python launch.py --experiment=few_shot --config.data.name=dtd --config.data.data_dir=FOLDER
    python launch.py --experiment=few_shot --config.data.path=my.csv --config.methods=tip,coop,lora

The protocol of CoOp (Zhou et al. 2022) and of those after it: 1, 2, 4, 8 and 16 examples a class, three seeds, each
with draws of its own, and the whole test split. Base to novel (CoCoOp): trained on the first half of the classes,
tested on either half by itself. Where published code looked at test data (to choose an epoch, or Tip-Adapter's
weights), here everything is chosen on validation examples of the same draw, as many as there are shots and four a class
at most.

The eleven data sets of the field go by their names: ``imagenet``, ``caltech101``, ``oxford_pets``, ``stanford_cars``,
``flowers102``, ``food101``, ``fgvc_aircraft``, ``sun397``, ``dtd``, ``eurosat`` and ``ucf101``. With
``--config.data.manual_dir`` they are read from files laid out as CoOp's authors say, in the splits of published figures
(the same as ``--config.data.name=few_shot --config.data.config=NAME``). Without, they are what TFDS has prepared as
array_record below ``--config.data.data_dir``, in TFDS's splits, so that figures compare with each other only; a split
that TFDS lacks is held out of training pictures (:mod:`vla_jax.data.few_shot_splits`). ImageNet is TFDS's in any case,
and needs ``imagenet/classnames.txt`` in ``manual_dir``. TFDS has no pictures of ``fgvc_aircraft`` and ``ucf101``.
Nothing is downloaded; what is missing is named, with how to get it.

Methods that are trained begin as the zero-shot classifier of the classes' names; ``linear`` is a linear map of the
image features instead, and ``tip`` and ``tip_f`` keep the examples' features. The default adapts ``tiny`` to generated
objects of another world (dull colours, other textures, some strokes and noise) by colour and shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
import rich.table

from vla_jax import catalogue
from vla_jax.adapters import TipAdapter
from vla_jax.backbones.loading import Backbone, abstract_backbone, load_backbone
from vla_jax.catalogue import METHODS, entry, fits
from vla_jax.comparison import Comparison
from vla_jax.composed_methods import is_composed
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.data.text import Tokenize
from vla_jax.data_sets import Data, Generated
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation.few_shot import MOST_VALIDATION, SEEDS, SHOTS, base_to_novel, few_shot
from vla_jax.few_shot_data import ALL, BASE, OBJECTS, Classes, classes_of, pool
from vla_jax.few_shot_learners import (
    FrozenFeatures,
    Problem,
    Trained,
    all_classes,
    halves_of,
    tip,
    zero_shot,
)
from vla_jax.model import Task
from vla_jax.reporting import few_shot_report
from vla_jax.reporting.table import MISSING
from vla_jax.run_config import RunConfig
from vla_jax.tasks.classification import Classification, ZeroShotClassification
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import check_batch, make_mesh
from vla_jax.variants import Budget, TaskData, Variant

KEPT = {"tip": "Tip-Adapter", "tip_f": "Tip-Adapter-F"}
"""The methods that keep the examples' features, beside those of :mod:`vla_jax.catalogue`."""


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The whole experiment.

    Attributes:
        data: the pictures; ``shifted_objects`` by name, one of the eleven sets of the field, any data set with pictures
            and labels, or a file of one's own.
        templates: sentences with ``{}`` where a class's name stands; the data set's own if empty.
        methods: which of :data:`KEPT` and :mod:`vla_jax.catalogue`, in the order of the tables.
        shots: numbers of examples a class.
        novel_shots: examples a class of base to novel, which is left out for 0.
        head_rates: learning rates tried for a linear head alone, all to the end.
        adapter_rates: learning rates tried for adapters.
        light_rates: learning rates tried where few numbers are trained, or numbers that others are multiplied with.
        full_rates: learning rates tried for full fine-tuning.
        tip: of both Tip-Adapters; its scale is the backbone's.
        budget: steps, batch, seeds and optimiser, the same for every method that is trained and number of shots.
    """

    data: Data = dataclasses.field(
        default_factory=lambda: Data(name=OBJECTS, generated=Generated(train=1_024, validation=256, test=960))
    )
    templates: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("tip", "tip_f", "linear", "clip_adapter", "coop", "maple", "mma", "lora", "full")
    shots: tuple[int, ...] = SHOTS
    novel_shots: int = 16
    head_rates: tuple[float, ...] = (2e-2, 6e-2, 2e-1)
    adapter_rates: tuple[float, ...] = (1e-3, 3e-3)
    light_rates: tuple[float, ...] = (6e-3, 2e-2)
    full_rates: tuple[float, ...] = (1e-4, 3e-4)
    tip: TipAdapter = dataclasses.field(default_factory=TipAdapter)
    budget: Budget = dataclasses.field(
        default_factory=lambda: Budget(
            steps=100,
            selection_share=0.5,
            batch_size=32,
            seeds=SEEDS,
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
        )
    )

    def __post_init__(self):
        for name in self.methods:
            if is_composed(name):
                entry(name)
            elif name not in KEPT and name not in METHODS:
                raise unknown("method", name, [*KEPT, *METHODS])
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UserError(f"methods must name at least one, and none twice; given: {', '.join(self.methods)}")
        if list(self.shots) != sorted(set(self.shots)) or min(self.shots, default=0) < 1:
            raise UserError(f"shots are numbers of examples a class, from 1 on and rising; got {self.shots}")
        if self.novel_shots < 0:
            raise UserError(f"novel_shots are examples a class, or 0 for none of it; got {self.novel_shots}")


PRESETS = {
    "default": Config(),
    "smoke": Config(
        preset="smoke",
        data=Data(name=OBJECTS, generated=Generated(train=128, validation=64, test=64)),
        methods=("tip", "tip_f", "coop", "lora"),
        shots=(1, 2),
        novel_shots=2,
        adapter_rates=(2e-3,),
        light_rates=(6e-3,),
        tip=TipAdapter(epochs=4, beta_steps=10),
        budget=Budget(steps=5, batch_size=16, seeds=(1, 2), checkpoint_every=5, log_every=5),
    ),
    "full": Config(
        preset="full",
        data=Data(name=OBJECTS, generated=Generated(train=2_048, validation=512, test=4_000)),
        methods=(*KEPT, "linear", "clip_adapter", "coop", "cocoop", "vpt_deep", "maple", "mma", "lora", "dora", "full"),
        adapter_rates=(3e-4, 1e-3, 3e-3),
        light_rates=(2e-3, 6e-3, 2e-2),
        full_rates=(3e-5, 1e-4, 3e-4),
        budget=Budget(
            steps=1_000,
            selection_share=0.5,
            batch_size=64,
            seeds=SEEDS,
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
        ),
    ),
}


def variant(config: Config, name: str, backbone: Backbone) -> Variant:
    """A method that is trained, as a comparison takes it.

    Raises:
        UserError: if it does not fit the backbone.
    """
    if problem := fits(name, backbone.config):
        raise UserError(f"{name} does not fit {backbone.name}: {problem}; leave it out of methods")
    rates = {
        "head": config.head_rates,
        "adapters": config.adapter_rates,
        "light": config.light_rates,
        "full": config.full_rates,
    }
    pace = entry(name).pace
    known = catalogue.variant(name, backbone.config, rates[pace], 1.0 if pace == "head" else None)
    return dataclasses.replace(known, modalities=("image",)) if _linear(known) else known


def _linear(variant: Variant) -> bool:
    """Whether a linear head alone is trained, which the classifier of names, having no weights, cannot stand for."""
    return variant.rules == "linear_probe"


def named(names: tuple[str, ...], templates: tuple[str, ...], backbone: Backbone) -> ZeroShotClassification:
    """The task of telling classes apart by their names; texts are as long as the longest."""
    tokenize = Tokenize(backbone.tokenizer, backbone.config.context_length)
    task = ZeroShotClassification.of_names("classes", names, templates, tokenize)
    longest = max(task.lengths)
    return dataclasses.replace(task, tokens=tuple(ids[:longest] for ids in task.tokens))


def _task(variant: Variant, classes: Classes, backbone: Backbone) -> Task:
    if _linear(variant):
        return Classification("classes", len(classes.names))
    return named(classes.names, classes.templates, backbone)


def check(config: Config) -> Any:
    """Refuses what cannot be run, before anything is compiled; returns the table for ``--dry_run``."""
    shapes = abstract_backbone(config.backbone)
    mesh = make_mesh(config.mesh)
    check_batch(config.budget.batch_size, mesh)
    classes = classes_of(config.data, config.templates)
    if config.novel_shots and len(classes.names) < 4:
        raise UserError(
            f"base to novel needs at least 4 classes, and {classes.origin} has {len(classes.names)}; leave it out with "
            "--config.novel_shots=0"
        )
    report = rich.table.Table(title=f"few_shot, {config.preset}: {config.backbone}, {len(classes.names)} classes")
    for heading in ("method", "trained", "of the backbone", "adapters"):
        report.add_column(heading, justify="left" if heading in ("method", "adapters") else "right")
    for name in config.methods:
        if name in KEPT:
            report.add_row(KEPT[name], MISSING, MISSING, "keeps the examples' features")
            continue
        chosen = variant(config, name, shapes)
        task = _task(chosen, classes, shapes)
        comparison = Comparison(shapes, TaskData(task, {}, None), config.budget, config.compute, mesh, Path())
        if isinstance(task, ZeroShotClassification):
            comparison.model(chosen).check_room(len(task.tokens[0]))
        table = comparison.table(chosen)
        sites = "; ".join(f"{p.method.kind} in {', '.join(p.slots)}, {p.layers} layers" for p in chosen.placements)
        share = f"{table.share_of_backbone:.2f} %"
        report.add_row(chosen.title, f"{table.trained:,}", share, sites or f"rules: {chosen.rules}")
    return report


def run(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Runs the protocol with every method, and writes tables and figures anew after each."""
    return _Run(config, workdir).run()


class _Run:
    """The protocol on one data set."""

    def __init__(self, config: Config, workdir: Path):
        self.config, self.workdir = config, workdir
        self.classes = classes_of(config.data, config.templates)
        self.backbone = load_backbone(config.backbone, dtype=config.storage)
        self.mesh = make_mesh(config.mesh)
        most = max(*config.shots, config.novel_shots)
        ever = {"train": most, "validation": min(most, MOST_VALIDATION)}
        self.pool = pool(config.data, self.classes, self.backbone, ever, config.budget.seeds)
        tokenize = Tokenize(self.backbone.tokenizer, self.backbone.config.context_length)
        self.transform = TransformExample(
            Preprocess(self.backbone.image_processor), tokenize, text_key=None, label_key="label"
        )
        self.folder = workdir / "runs" / self.classes.fingerprint
        task = named(self.classes.names, self.classes.templates, self.backbone)
        self.features = FrozenFeatures(
            self.backbone, task, self.pool, self.transform, config.compute, self.mesh, config.budget.batch_size
        )

    def run(self) -> list[dict[str, Any]]:
        """The rows, one a method; the backbone itself is the first."""
        config, rows, halves = self.config, [], []
        tables: Mapping[str, Any] = {}
        for name in ("zero_shot", *config.methods):
            told, learner, novel = self._learner(name)
            rows.append(told | few_shot_report.row(few_shot(learner, *self._labels, **self._protocol)))
            if config.novel_shots and novel is not None:
                shots = {"shots": config.novel_shots, "seeds": config.budget.seeds}
                found = base_to_novel(novel, *self._labels, len(self.classes.names), **shots)
                halves.append(told | few_shot_report.base_to_novel_row(found))
            if isinstance(learner, Trained):
                rows[-1] |= self._costs(learner)
                if isinstance(novel, Trained):
                    halves[-1] |= self._costs(novel)
            tables = few_shot_report.write(
                rows,
                halves,
                shots=config.shots,
                classes=len(self.classes.names),
                title=f"{self.classes.origin}, {config.backbone}",
                workdir=self.workdir,
            )
        for table in tables.values():
            rich.print(table.terminal())
        rich.print(f"tables, figures and runs: {self.workdir}")
        return rows

    @property
    def _labels(self) -> tuple[np.ndarray, ...]:
        return tuple(self.pool.labels[split] for split in ("train", "validation", "test"))

    @property
    def _protocol(self) -> dict[str, Any]:
        return {"shots": self.config.shots, "seeds": self.config.budget.seeds}

    def _learner(self, name: str) -> tuple[dict[str, Any], Any, Any]:
        """What a method is called, and its learners for all classes and for base to novel, if it has one."""
        if name == "zero_shot":
            told, learner = {"name": name, "variant": "zero-shot"}, zero_shot(self.features)
            return told | {"trained": 0, "share": 0.0}, learner, learner
        if name in KEPT:
            scale = float(np.exp(np.asarray(self.backbone.params["logit_scale"], np.float32)))
            settings = dataclasses.replace(self.config.tip, scale=scale)
            keys = max(self.config.shots) * self.features.classes.size if name == "tip_f" else 0
            told = {"name": name, "variant": KEPT[name], "trained": keys, "share": keys / self._backbone_size}
            return told, tip(self.features, settings, trained=name == "tip_f"), None
        chosen = variant(self.config, name, self.backbone)
        told = {"name": name, "variant": chosen.title}
        task = _task(chosen, self.classes, self.backbone)
        learner = self._trained(all_classes(self.pool, task, self.transform), chosen, ALL)
        if _linear(chosen) or not self.config.novel_shots:  # a linear map has no row for a class without examples
            return told, learner, None
        problem = halves_of(self.pool, self._named, self.transform)
        return told, learner, self._trained(problem, chosen, BASE)

    @property
    def _backbone_size(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.backbone.params))

    def _named(self, some: slice) -> ZeroShotClassification:
        return named(self.classes.names[some], self.classes.templates, self.backbone)

    def _trained(self, problem: Problem, chosen: Variant, kind: str) -> Trained:
        folder = self.folder / kind
        budget = self.config.budget
        comparison = Comparison(self.backbone, problem.data, budget, self.config.compute, self.mesh, folder)
        return Trained(comparison, problem, self.pool, chosen, folder)

    def _costs(self, learner: Trained) -> dict[str, Any]:
        """What is told of a trained method besides its accuracy."""
        outcomes = learner.told
        first = next(iter(outcomes.values()))
        return {
            "trained": first.table.trained,
            "share": first.table.trained / first.table.backbone,
            "step_seconds": float(np.mean([outcome.seconds_per_step for outcome in outcomes.values()])),
            "learning_rates": {
                f"{shots} shots, seed {seed}": outcome.learning_rate for (shots, seed), outcome in outcomes.items()
            },
        }
