"""Trains one method on one task: your own file of pictures and texts, or a data set by name.

    python launch.py --experiment=adapt --config.method=lora --config.data.path=my.jsonl
    python launch.py --experiment=adapt --config.data.path=my.csv --config.data.columns.caption=title
    python launch.py --experiment=adapt --config.method=fusion --config.task=vqa --config.data.name=easy_vqa
    python launch.py --experiment=adapt --config.preset=smoke --dry_run

The task (``classification``, ``matching``, ``retrieval``, ``vqa``, ``grounding``) follows from the columns where it is
clear, else ``--config.task`` says it. ``--config.setup`` says how it is put: classes by a linear map, by their names or
by prototypes (``classifier``); answers classified or ranked by their texts (``answers``); a phrase's box predicted or
chosen among candidates (``grounding``). The file is checked before anything is compiled; ``vla-data check FILE`` lists
everything that is wrong with it, and decodes every picture.

In the work directory: ``results.{md,csv,jsonl}`` with the task's measures on validation and test data and their 95 %
intervals, ``groups.*`` with the foremost one by class and by kind of question or statement, where rows say it,
``retrieval.*`` with recall, median rank and mean average precision among a whole split, all captions of a picture
counted (``--config.rerank.adapters`` names a saved model that puts the best candidates in order, such as a fusion
adapter's), ``predictions_{validation,test}.jsonl`` with a line for each example, ``labels.json`` with what the head
chooses from, and below ``runs`` the adapters, logs and checkpoints. The same command goes on with what is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.markup
import rich.table

from vla_jax import catalogue
from vla_jax.adapters import Plan
from vla_jax.backbones.loading import Backbone, abstract_backbone, load_backbone
from vla_jax.catalogue import entry, fits
from vla_jax.comparison import Comparison
from vla_jax.data.each_caption import EachCaption
from vla_jax.data.stages import Source
from vla_jax.data_sets import Data, Found, Generated, find, splits_of
from vla_jax.errors import UserError, unknown
from vla_jax.exchange.checkpoints import form_of
from vla_jax.model import AdaptedModel
from vla_jax.reporting.details import GROUPED, MORE, RETRIEVED, grouped, retrieved, summarised
from vla_jax.reporting.predictions import measured, pictures_of, write_predictions
from vla_jax.reporting.table import Column, Table, write_atomically
from vla_jax.reranking import Judge, Rerank
from vla_jax.run_config import RunConfig
from vla_jax.task_kinds import (
    MEASURES,
    Setup,
    annotation,
    data_of_kind,
    manner,
    pictures_alone,
    task_of_kind,
    transform_of_kind,
)
from vla_jax.tasks.retrieval import PairFeatures
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import check_batch, make_mesh
from vla_jax.training.table import ResolvedTable
from vla_jax.variants import Budget, Outcome, Probe, TaskData, Variant

RATES = {"head": 6e-3, "adapters": 2e-3, "light": 6e-3, "full": 3e-4}
"""The learning rate where none is given, by the method's pace."""


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The whole experiment.

    Attributes:
        method: a method of :mod:`vla_jax.catalogue`.
        task: which task; from the data if empty.
        learning_rate: the peak learning rate; one that suits the method if None. The head beside adapters has
            ``budget.head_rate``, or the same where that is None.
        layers: in which layers adapters sit, in the notation of :mod:`vla_jax.adapters.layers`; in those of the
            method's paper if empty.
        data: which data.
        setup: how the task is put to the backbone.
        rerank: of retrieval, a second stage among whole splits.
        budget: steps, batch, seeds and optimiser.
        kept_gib: how much memory may hold what the frozen blocks below the first adapter make of the data, so that it
            is computed once; 0 computes it in every step.
        streams_dir: folder in which that is kept on disk instead, however much it is, for this run and later ones.
    """

    method: str = "lora"
    task: str = ""
    learning_rate: float | None = None
    layers: str = ""
    data: Data = dataclasses.field(default_factory=Data)
    setup: Setup = dataclasses.field(default_factory=Setup)
    rerank: Rerank = dataclasses.field(default_factory=Rerank)
    budget: Budget = dataclasses.field(
        default_factory=lambda: Budget(
            steps=500,
            batch_size=64,
            head_rate=1e-2,
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
            checkpoint_every=100,
        )
    )
    kept_gib: float = 2.0
    streams_dir: str = ""

    def __post_init__(self):
        entry(self.method)
        if self.task and self.task not in MEASURES:
            raise unknown("task", self.task, MEASURES)
        if self.learning_rate is not None and not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"the learning rate must be above 0, got {self.learning_rate}")
        if self.kept_gib < 0:
            raise UserError(f"kept_gib cannot be negative, got {self.kept_gib}")


PRESETS = {
    "default": Config(),
    "smoke": Config(
        preset="smoke",
        data=Data(generated=Generated(train=256, validation=64, test=64)),
        budget=Budget(steps=10, batch_size=32, head_rate=1e-2, checkpoint_every=5, log_every=5),
    ),
}


_TOLD = ("validation", "test")
"""The splits that results speak of."""


class _Adaptation(Comparison):
    """Keeps what frozen blocks compute where it is the same in every pass: on disk, or in memory if that pays."""

    kept_bytes: float = 0.0
    steady: bool = True

    def stored_blocks(self, model: AdaptedModel, table: ResolvedTable) -> Mapping[str, int] | None:
        train = self.data.splits["train"]
        seen_again = self.budget.steps * self.budget.batch_size > len(train)
        fits = seen_again and self._size(model) <= self.kept_bytes
        if self.steady and (self.data.streams is not None or fits):
            return super().stored_blocks(model, table)
        return None

    def _size(self, model: AdaptedModel) -> float:
        """Bytes of the streams of all examples, by the shapes of one."""
        row = self.data.transform(self.data.splits["train"][0], None)
        batch = {name: jax.ShapeDtypeStruct((1, *array.shape), array.dtype) for name, array in row.items()}
        streams = jax.eval_shape(lambda params: model.prefix(params, _zeros(batch)), {"backbone": self.backbone.params})
        one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(streams))
        return one * sum(map(len, self.data.splits.values()))


def _zeros(batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in batch.items()}


def variant(config: Config, backbone: Backbone) -> Variant:
    """The method as it is trained.

    Raises:
        UserError: if it does not fit the backbone, or has no adapters for the layers that are given.
    """
    if problem := fits(config.method, backbone.config):
        raise UserError(f"{config.method} does not fit {backbone.name}: {problem}; choose another method")
    rate = config.learning_rate or RATES[entry(config.method).pace]
    found = catalogue.variant(config.method, backbone.config, (rate,))
    if not config.layers:
        return found
    if not found.placements:
        raise UserError(f"{config.method} has no adapters that layers {config.layers!r} could be for; leave layers out")
    placements = tuple(dataclasses.replace(placement, layers=config.layers) for placement in found.placements)
    return dataclasses.replace(found, placements=placements)


def _as_shown(found: Variant, data: Found, setup: Setup) -> Variant:
    """The method for what the task shows of the data: where pictures stand alone, no text tower is adapted."""
    if not pictures_alone(data.kind, setup):
        return found
    message = (
        f"classifier=prototypes shows the model pictures alone, and {found.name} {{}}; choose another method, or "
        "classifier linear or names"
    )
    rules = {"full": "image_tower"}.get(found.rules, found.rules)
    if rules in ("bitfit", "layer_norm", "projection"):
        raise UserError(message.format("trains parts of both towers"))
    if found.group == "cross-modal" or found.name == "maple":  # half of it would work, under the whole one's name
        raise UserError(message.format("joins the two towers"))
    placements = tuple(
        dataclasses.replace(placement, towers=("vision",))
        for placement in found.placements
        if "vision" in placement.towers
    )
    if found.placements and not placements:
        raise UserError(message.format("adapts the text tower alone"))
    return dataclasses.replace(found, rules=rules, placements=placements, modalities=("image",))


def check(config: Config) -> Any:
    """Refuses what cannot be run, before anything is compiled; returns the table for ``--dry_run``."""
    shapes = abstract_backbone(config.backbone)
    mesh = make_mesh(config.mesh)
    check_batch(config.budget.batch_size, mesh)
    found = find(config.data, config.task, config.setup)
    chosen = _as_shown(variant(config, shapes), found, config.setup)
    data = TaskData(task_of_kind(found.kind, found.labels, config.setup, shapes), {}, None)
    comparison = Comparison(shapes, data, config.budget, config.compute, mesh, Path())
    model, table = comparison.model(chosen), comparison.table(chosen)
    _check_pairs(found, model.plan, config.method)
    _check_rerank(found, config.rerank)
    model.check_room(config.setup.length(shapes))
    report = rich.table.Table(title=f"adapt, {config.preset}: {config.backbone}", show_header=False)
    sites = "; ".join(f"{p.method.kind} in {', '.join(p.slots)}, {p.layers} layers" for p in chosen.placements)
    for name, value in {
        "task": found.kind,
        "data": found.origin,
        "put as": manner(found.kind, found.labels, config.setup),
        "chooses from": ", ".join(found.labels.names[:8]) + (", ..." if len(found.labels.names) > 8 else ""),
        "method": f"{chosen.title}: {sites or f'rules {chosen.rules}'}",
        "learning rate": f"{chosen.learning_rates[0]:g}",
        "steps": f"{config.budget.steps:,} of {config.budget.batch_size} examples",
        "trained": f"{table.trained:,} parameters, {table.share_of_backbone:.2f} % of the backbone",
    }.items():
        if value:
            report.add_row(name, rich.markup.escape(value))
    return report


def _check_pairs(found: Found, plan: Plan, method: str) -> None:
    if found.kind == "retrieval" and plan.needs_pairs:
        raise UserError(
            f"{method} makes a picture's features depend on the text beside it, and retrieval compares them with those "
            "of every other text; choose another method or task, or have a trained one of it re-rank with "
            "--config.rerank.adapters"
        )


def _check_rerank(found: Found, rerank: Rerank) -> None:
    if not rerank.adapters:
        return
    if found.kind != "retrieval":
        raise UserError(f"rerank is a second stage of retrieval, and the task is {found.kind}; leave it out")
    form_of(Path(rerank.adapters).expanduser())


def run(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Trains, evaluates and writes; returns the rows of the table, one a split."""
    found = find(config.data, config.task, config.setup)
    _same_data(workdir / "data.json", found, config.setup)
    backbone = load_backbone(config.backbone, dtype=config.storage)
    data = data_of_kind(found.kind, found.labels, config.setup, backbone, splits_of(config.data, found, backbone))
    captions = _each_caption(found, data, config.setup, backbone)
    # Validation data are looked at as test data are: with every prediction, not the mean alone.
    data = dataclasses.replace(
        data,
        probes={"validation": Probe(data.splits["validation"])} | captions,
        streams=Path(config.streams_dir).expanduser() if config.streams_dir else None,
    )
    comparison = _Adaptation(backbone, data, config.budget, config.compute, make_mesh(config.mesh), workdir / "runs")
    comparison.kept_bytes = config.kept_gib * 2**30
    drawn = "captions" in annotation(data.splits["train"], 0)  # one of them, anew in every pass
    ranked = found.kind == "vqa" and config.setup.answers == "rank"  # other answers are drawn beside the right one
    comparison.steady = config.setup.augment == "none" and not drawn and not ranked
    if config.streams_dir and not comparison.steady:
        changes = "one of several captions is drawn" if drawn else f"pictures are augmented ({config.setup.augment})"
        changes = "the answers that are ranked are drawn" if ranked else changes
        raise UserError(f"streams_dir keeps what is the same in every pass, but {changes} in each; leave it out")
    chosen = _as_shown(variant(config, backbone), found, config.setup)
    _check_pairs(found, comparison.model(chosen).plan, config.method)
    judge = None
    if config.rerank.adapters:  # before training, so that what it lacks is said at once
        judge = Judge(config.rerank, backbone, data.transform, config.budget.batch_size, comparison.mesh)
    outcome = comparison.run(chosen)
    if found.labels.names:
        write_atomically(workdir / "labels.json", json.dumps(found.labels.names, ensure_ascii=False, indent=0))
    rows = [_row(config, found, data.splits[split], outcome, split) for split in _TOLD]
    for split in _TOLD:
        path = workdir / f"predictions_{split}.jsonl"
        write_predictions(path, data.splits[split], outcome.predictions[split], found.labels, config.budget.seeds)
    title = f"{outcome.variant.title} on {config.backbone}, {found.kind}"
    told = _told(found, rows[0])
    Table([*told, *_COSTS], rows, title=title).write(workdir, "results")
    _print(Table(told, rows, title=title).terminal())
    for name, table in _details(found, data, outcome, title, judge).items():
        table.write(workdir, name)
        _print(table.terminal())
    costs = (f"{column.title} {column.show(rows[0][column.name])[0]} {column.unit}".strip() for column in _COSTS)
    _print(", ".join(costs))
    rate = f"learning_rate_{outcome.learning_rate:g}"
    for seed in config.budget.seeds:
        _print(f"adapters: {workdir / 'runs' / chosen.name / rate / f'seed_{seed}' / 'adapters'}")
    _print(f"table and predictions: {workdir}")
    return rows


def _each_caption(found: Found, data: TaskData, setup: Setup, backbone: Backbone) -> dict[str, Probe]:
    """For retrieval, what a whole split is ranked by: every picture with each of its captions."""
    if found.kind != "retrieval":
        return {}
    transform = transform_of_kind("retrieval", found.labels, setup, backbone, "caption")
    return {
        f"{split}_captions": Probe(EachCaption(data.splits[split]), transform, PairFeatures(), pairs=False)
        for split in _TOLD
    }


def _details(found: Found, data: TaskData, outcome: Outcome, title: str, judge: Judge | None) -> dict[str, Table]:
    """What more there is to say, by the name of its file: by class and kind, and of retrieval among whole splits."""
    groups = [
        {"split": split} | row
        for split in _TOLD
        for row in grouped(found.kind, outcome.predictions[split], data.splits[split], found.labels)
    ]
    tables = {"groups": Table(GROUPED, groups, title=title)} if groups else {}
    ranked = []
    for split in _TOLD if found.kind == "retrieval" else ():
        pairs, captions = outcome.predictions[f"{split}_captions"], data.probes[f"{split}_captions"].source
        place = pairs["index"][0]
        images, texts = pairs["image_feature"], pairs["text_feature"]
        # Torn pictures are left out.
        pictures, first, owner = np.unique(captions.owner[place], return_index=True, return_inverse=True)
        second = None if judge is None else (judge.name, judge.stage(captions, place, pictures, owner))
        ranked += [{"split": split} | row for row in retrieved(images[:, first], texts, owner, second)]
    return tables | ({"retrieval": Table(RETRIEVED, ranked, title=title)} if ranked else {})


def _print(what: Any) -> None:
    # A path is to be copied: it must not be broken, nor its brackets be read as markup.
    rich.get_console().print(what, soft_wrap=isinstance(what, str), markup=False, highlight=False)


def _row(config: Config, found: Found, source: Source, outcome: Outcome, split: str) -> dict[str, Any]:
    told = dict(outcome.predictions[split])
    if len(found.labels.names) <= 5:
        told.pop("top_5", None)  # it would be right whatever the model says
    return (
        {
            "split": split,
            "task": found.kind,
            "method": outcome.variant.name,
            "examples": told["index"].shape[1],
            "trained": outcome.table.trained,
            "share": outcome.table.trained / outcome.table.backbone,
            "learning_rate": outcome.learning_rate,
            "steps": config.budget.steps,
            "seeds": len(config.budget.seeds),
            "step_seconds": outcome.seconds_per_step,
            "step_bytes": outcome.step_bytes,
            "adapter_bytes": outcome.adapter_bytes,
        }
        | measured(found.kind, told, pictures_of(source, told["index"][0]))
        | summarised(found.kind, told, source, found.labels)
    )


_COSTS = (
    Column.number("trained", "trained", format=",d"),
    Column.percent("share", "of backbone", ".2f"),
    Column.number("step_seconds", "step", "ms", ",.0f", 1e3),
    Column.number("adapter_bytes", "saved", "KiB", ",.0f", 2**-10),
)


def _told(found: Found, row: dict[str, Any]) -> list[Column]:
    """The columns of what was measured."""
    measures = [measure for measure in MEASURES[found.kind] if measure.field in row]
    counts = [Column.text("split", "split"), Column.number("examples", "examples", format=",d")]
    further = [column for column in MORE.get(found.kind, ()) if column.name in row]
    return counts + [Column.accuracy(measure.field, measure.title, "range") for measure in measures] + further


def _same_data(path: Path, found: Found, setup: Setup) -> None:
    """Refuses a work directory whose runs saw other data, or the same in another way."""
    mine = {"data": found.fingerprint, "task": found.kind, "origin": found.origin, "setup": dataclasses.asdict(setup)}
    mine = json.loads(json.dumps(mine))
    if not path.is_file():
        write_atomically(path, json.dumps(mine, indent=1))
        return
    stored = json.loads(path.read_text())
    # A setting that came later had its default's effect before.
    stored["setup"] = json.loads(json.dumps(dataclasses.asdict(Setup()))) | stored.get("setup", {})
    if changed := [name for name in ("data", "task", "setup") if stored.get(name) != mine[name]]:
        shown = "; ".join(f"{name} was {stored.get(name)} and is now {mine[name]}" for name in changed)
        raise UserError(
            f"{path.parent} belongs to another run, on {stored.get('origin')}: {shown}. Choose another --workdir, the "
            "old data and settings, or delete that folder"
        )
