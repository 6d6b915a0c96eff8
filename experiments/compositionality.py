"""Does fusion bind words to objects, or does any fine-tuning? Models that judge pairs, trained with and without swaps.

    python launch.py --experiment=compositionality
    python launch.py --experiment=compositionality --config.preset=smoke
    python launch.py --experiment=compositionality --config.models=zero_shot,adapters,fusion --config.backbone=FOLDER

Every model learns whether a caption belongs to a generated scene, from the same pictures with the same true captions.
With ``plain`` negatives the false captions are those of other scenes: fine-tuning as usual. With ``hard`` ones they are
true of a twin that differs by one swap, so that they have the same words. Two ways to score a pair stand beside each
other: a dual encoder (the cosine of both features) and a head on both features, which fusion inside the adapters can
serve. The question is put as Winoground puts it (Thrush et al. 2022), to quadruples by kind of swap and by number of
objects. Models that see the text or the picture alone are controls: they must have no group right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich
import rich.table

from vla_jax.adapters import Fusion, Placement
from vla_jax.backbones.loading import Backbone, abstract_backbone, load_backbone
from vla_jax.comparison import Comparison
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.data.quadruple_pairs import QuadruplePairs, as_scores
from vla_jax.data.scenes import SceneConfig
from vla_jax.data.text import Tokenize
from vla_jax.data.twin_pairs import Negatives
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation import scene_probe, winoground
from vla_jax.evaluation.scene_probe import SWAPS, SceneProbe
from vla_jax.evaluation.statistics import accuracy
from vla_jax.model import Task
from vla_jax.reporting import compositionality_report
from vla_jax.run_config import RunConfig
from vla_jax.task_data import twin_pairs
from vla_jax.tasks.matching import Matching
from vla_jax.tasks.similarity import Similarity
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import check_batch, make_mesh
from vla_jax.variants import Budget, Outcome, Probe, TaskData, Variant

SCORERS: Mapping[str, Task] = {"cosine": Similarity("pairs"), "head": Matching("pairs")}
"""How a pair is scored: by the features' cosine, or by a linear head on both features."""


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the models compared.

    Attributes:
        title: in tables and figures.
        scorer: one of :data:`SCORERS`.
        rules: what is trained.
        mix: how the towers meet inside the adapters (:class:`vla_jax.adapters.Fusion`); None without adapters.
        modalities: what the model is shown.
        negatives: which kinds of training; what is not trained needs one.
    """

    title: str
    scorer: str
    rules: str = "adapters"
    mix: str | None = None
    modalities: tuple[str, ...] = ("image", "text")
    negatives: tuple[Negatives, ...] = ("plain", "hard")


MODELS: Mapping[str, Model] = {
    "zero_shot": Model("zero-shot", "cosine", "linear_probe", negatives=("plain",)),
    "adapters": Model("dual encoder, adapters", "cosine", mix="none"),
    "full": Model("dual encoder, full", "cosine", "full"),
    "head": Model("head alone", "head", "linear_probe"),
    "head_adapters": Model("head, independent adapters", "head", mix="none"),
    "fusion": Model("head, fusion adapters", "head", mix="gate_attention"),
    "head_full": Model("head, full", "head", "full"),
    "text_only": Model("text only (control)", "head", "full", modalities=("text",), negatives=("hard",)),
    "image_only": Model("image only (control)", "head", "full", modalities=("image",), negatives=("hard",)),
}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The whole experiment.

    Attributes:
        models: which of :data:`MODELS`, in the order of the table; all of them if empty.
        rank: width of the adapters.
        heads: attention heads of the fusion adapters.
        head_rates: learning rates tried where a head alone is trained, all to the end.
        adapter_rates: learning rates tried for adapters.
        full_rates: learning rates tried for full fine-tuning, and for the controls.
        budget: steps, batch, seeds and optimiser, the same for every model.
        twins: pairs of twins for training; each gives four pairs to judge.
        validation: pairs of twins for validation.
        test: pairs of twins for the accuracy on pairs.
        quadruples: quadruples for each kind of swap and number of objects.
        text_length: tokens a text; must hold the longest.
        data_dir: where data sets are built and kept.
    """

    models: tuple[str, ...] = ()
    rank: int = 32
    heads: int = 4
    head_rates: tuple[float, ...] = (6e-3, 2e-2)
    adapter_rates: tuple[float, ...] = (2e-3, 6e-3)
    full_rates: tuple[float, ...] = (3e-4, 1e-3)
    budget: Budget = dataclasses.field(
        default_factory=lambda: Budget(
            steps=200,
            selection_share=0.2,
            batch_size=64,
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
        )
    )
    twins: int = 3_200
    validation: int = 150
    test: int = 300
    quadruples: int = 60
    text_length: int = 48
    data_dir: str = "data"

    def __post_init__(self):
        for name in self.models:
            if name not in MODELS:
                raise unknown("model", name, MODELS)
        if len(set(self.models)) < len(self.models):
            raise UserError(f"models name something twice: {', '.join(self.models)}")
        if min(self.twins, self.validation, self.test) < 2 or self.quadruples < 1:
            raise UserError("twins, validation and test must be at least 2, quadruples at least 1")


PRESETS = {
    "default": Config(),
    "smoke": Config(
        preset="smoke",
        models=("zero_shot", "head_adapters", "fusion"),
        head_rates=(6e-3,),
        adapter_rates=(2e-3,),
        budget=Budget(steps=10, batch_size=32, checkpoint_every=5, log_every=5),
        twins=80,
        validation=10,
        test=20,
        quadruples=4,
    ),
}


def variant(config: Config, name: str) -> Variant:
    """A model as a comparison takes it."""
    model = MODELS[name]
    rates = {"linear_probe": config.head_rates, "full": config.full_rates, "adapters": config.adapter_rates}
    placements = ()
    if model.mix is not None:
        placements = (Placement(Fusion(rank=config.rank, heads=config.heads, mix=model.mix)),)
    return Variant(
        name,
        model.title,
        model.rules,
        placements,
        modalities=model.modalities,
        group="control" if len(model.modalities) == 1 else model.scorer,
        learning_rates=rates[model.rules],
        selection_share=1.0 if model.rules == "linear_probe" else None,
    )


def check(config: Config) -> Any:
    """Refuses what cannot be run, before anything is compiled; returns the table for ``--dry_run``."""
    shapes = abstract_backbone(config.backbone)
    mesh = make_mesh(config.mesh)
    check_batch(config.budget.batch_size, mesh)
    shapes.config.check_text_length("text_length", config.text_length)
    report = rich.table.Table(title=f"compositionality, {config.preset}: {config.backbone}")
    for heading in ("model", "scored by", "negatives", "trained", "of the backbone"):
        report.add_column(heading, justify="right" if heading in ("trained", "of the backbone") else "left")
    for name in config.models or MODELS:
        model = MODELS[name]
        data = TaskData(SCORERS[model.scorer], {}, None)
        table = Comparison(shapes, data, config.budget, config.compute, mesh, Path()).table(variant(config, name))
        share = f"{table.share_of_backbone:.2f} %"
        report.add_row(model.title, model.scorer, ", ".join(model.negatives), f"{table.trained:,}", share)
    return report


def run(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Runs every model with every kind of negatives, and writes tables and figures anew after each."""
    backbone = load_backbone(config.backbone, dtype=config.storage)
    mesh = make_mesh(config.mesh)
    probe = SceneProbe(config.quadruples, SceneConfig(image_size=backbone.config.image_size))
    quadruples = [probe[place] for place in range(len(probe))]  # drawn once, looked at by every model
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    scores: dict[tuple[str, str], np.ndarray] = {}
    for scorer, task in SCORERS.items():
        for negatives in ("plain", "hard"):
            chosen = [name for name in config.models or MODELS if MODELS[name].scorer == scorer]
            chosen = [name for name in chosen if negatives in MODELS[name].negatives]
            if not chosen:
                continue
            data = _data(config, backbone, task, negatives, quadruples)
            folder = workdir / "runs" / f"{scorer}_{negatives}"
            comparison = Comparison(backbone, data, config.budget, config.compute, mesh, folder)
            for name in chosen:
                outcome = comparison.run(variant(config, name))
                found = outcome.predictions["quadruples"]["score"]
                scores[name, negatives] = as_scores(found, outcome.variant.modalities)
                rows[name, negatives] = _row(name, negatives, outcome, scores[name, negatives], probe)
                _compare(rows, scores)
                ordered = [rows[key] for key in _order(config) if key in rows] + [_constant(probe)]
                compositionality_report.write(ordered, config.backbone, workdir)
    rich.print(compositionality_report.table(ordered, config.backbone).terminal())
    rich.print(f"tables, figures and runs: {workdir}")
    return ordered


def _order(config: Config) -> list[tuple[str, str]]:
    return [(name, negatives) for name in config.models or MODELS for negatives in MODELS[name].negatives]


def _data(
    config: Config, backbone: Backbone, task: Task, negatives: Negatives, quadruples: list[dict[str, Any]]
) -> TaskData:
    """Twins as pairs to judge, and the quadruples."""
    sizes = {"train": config.twins, "validation": config.validation, "test": config.test}
    splits = twin_pairs(negatives, sizes, backbone, config.data_dir)
    transform = TransformExample(
        Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, config.text_length), label_key="label"
    )
    return TaskData(task, splits, transform, {"quadruples": Probe(QuadruplePairs(quadruples))})


def _row(name: str, negatives: str, outcome: Outcome, scores: np.ndarray, probe: SceneProbe) -> dict[str, Any]:
    """What the table says of one model."""
    model = MODELS[name]
    return {
        "name": name,
        "variant": model.title,
        "scorer": model.scorer,
        "negatives": negatives if outcome.variant.rules != "linear_probe" or model.scorer == "head" else "none",
        "group": "control" if len(model.modalities) == 1 else negatives,
        "trained": outcome.table.trained,
        "share": outcome.table.share_of_backbone / 100,
        "learning_rate": outcome.learning_rate,
        "pairs": accuracy(outcome.predictions["test"]["correct"]),
    } | _judged(scores, probe)


def _constant(probe: SceneProbe) -> dict[str, Any]:
    """The row of a judge that says the same of every pair."""
    told = {"name": "constant", "variant": "constant (control)", "scorer": "constant", "negatives": "none"}
    told |= {"group": "control", "trained": 0, "share": 0.0}
    judged = _judged(np.zeros((1, len(probe), 2, 2)), probe)
    del judged["difficulty"]  # it is nought everywhere
    return told | judged


def _judged(scores: np.ndarray, probe: SceneProbe) -> dict[str, Any]:
    """What scores ``[seeds, quadruples, captions, pictures]`` say of the quadruples."""
    judged, (swaps, objects) = winoground.evaluate(scores), probe.difficulty
    row: dict[str, Any] = {"difficulty": scene_probe.by_difficulty(scores, swaps, objects)}
    row |= {f"{part}_score": getattr(judged, part) for part in winoground.CHANCE}
    row |= {f"{part}_ties": getattr(judged, f"{part}_ties") for part in winoground.CHANCE}
    for swap in SWAPS:
        row[f"group_{swap}"] = winoground.evaluate(scores[..., np.flatnonzero(swaps == swap), :, :]).group
    return row


def _compare(rows: dict[tuple[str, str], dict[str, Any]], scores: dict[tuple[str, str], np.ndarray]) -> None:
    """Group scores against plain fine-tuning of the same kind, and fusion's against independent adapters'."""
    for (name, negatives), row in rows.items():
        plain = "full" if MODELS[name].scorer == "cosine" else "head_full"
        if (plain, "plain") in scores and (name, negatives) != (plain, "plain"):
            row["against_plain"] = winoground.compare(scores[name, negatives], scores[plain, "plain"])["group"]
        if name == "fusion" and ("head_adapters", negatives) in scores:
            apart = winoground.compare(scores[name, negatives], scores["head_adapters", negatives])
            row["against_independent"] = apart["group"]
