"""Many tasks on one backbone: how should their adapters share it?

    python launch.py --experiment=multitask
    python launch.py --experiment=multitask --config.preset=smoke
    python launch.py --experiment=multitask --config.tasks=easy_vqa,retrieval,statements --config.backbone=FOLDER
    python launch.py --experiment=multitask --config.tasks=scene_shapes,scene_vqa,retrieval,grounding,statements
    python launch.py --experiment=multitask --config.mixing.by=temperature --config.mixing.temperature=2

Classification (of textile defects, or with ``scene_shapes`` of generated scenes), visual question answering, retrieval,
grounding and statements at once over one frozen backbone, with one adapter for all tasks, one each, one each of which
half is shared (VL-Adapter; Sung et al. 2022), one each with AdapterFusion over them, and one each picked by a learned
router, which is not told the task. Heads alone are the floor, one fully fine-tuned model for each task is what they are
to replace. Every way sees the same examples of every task, and chooses its learning rate on validation data. All tasks
are seen equally often, unless ``--config.mixing`` gives them shares by their sizes, by a temperature, or as weights.

In the work directory: ``results.{md,csv,jsonl,png}`` and ``parameters.png``; of the router ``routing.{md,csv,jsonl}``;
of the tasks' shares ``mixture.{md,csv,jsonl}``. The same command goes on with what is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich
import rich.table

from vla_jax import names, task_mixing
from vla_jax.adapters import Bottleneck
from vla_jax.backbones.loading import Backbone, abstract_backbone, load_backbone
from vla_jax.data.mixing import Mixing
from vla_jax.data_sets import Generated
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation.statistics import Interval, accuracy, paired_difference
from vla_jax.evaluation.task_means import mean_accuracy, mean_difference
from vla_jax.reporting import multitask_report
from vla_jax.reporting.predictions import pictures_of
from vla_jax.reporting.table import write_atomically
from vla_jax.run_config import RunConfig
from vla_jax.sharing import WAYS, Shared, Sharing
from vla_jax.task_routes import TaskRoutes, learn_routes
from vla_jax.task_set import TASKS, member_data, member_examples
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import check_batch, make_mesh
from vla_jax.variants import Budget

ROUTED = "routed"
"""The row of adapters of their own, picked by the router."""

_ORDER = tuple(row for way in WAYS for row in ((way, ROUTED) if way == "each" else (way,)))

Outcomes = Mapping[str, np.ndarray]
"""By task, which test examples are right, bool ``[seeds, examples]``."""
Pictures = Mapping[str, list[str] | None]
"""By task, the picture of each test example; None where each has its own."""


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The whole experiment.

    Attributes:
        tasks: which of :data:`vla_jax.task_set.TASKS`, in the order of the table.
        ways: which of :data:`vla_jax.sharing.WAYS`, in the order in which they are trained.
        reduction: the width of the towers over that of the bottlenecks.
        head_rates: learning rates tried for heads alone, all to the end: they cost little.
        adapter_rates: learning rates tried for adapters.
        fusion_rates: learning rates tried for AdapterFusion's second stage.
        full_rates: learning rates tried for full fine-tuning, for each task by itself.
        budget: steps, batch of all tasks together, seeds and optimiser, the same for every way.
        sizes: examples of each task.
        mixing: how often each task is seen; those of textile defects, of which there are fewer than of others, are
            repeated for it. Weights stand in the order of the tasks. Unless tasks are balanced, every example counts
            the same in the loss, and a task as much as it has examples; balanced, every task counts the same.
        text_length: tokens a text; must hold the longest.
        router_examples: examples of each task that the router learns from.
        data_dir: where data sets are built and kept.
    """

    tasks: tuple[str, ...] = ("defects", "easy_vqa", "retrieval", "grounding", "statements")
    ways: tuple[str, ...] = tuple(WAYS)
    reduction: int = 4
    head_rates: tuple[float, ...] = (6e-3, 2e-2)
    adapter_rates: tuple[float, ...] = (2e-3, 6e-3)
    fusion_rates: tuple[float, ...] = (5e-4, 2e-3)
    full_rates: tuple[float, ...] = (3e-4, 1e-3)
    budget: Budget = dataclasses.field(
        default_factory=lambda: Budget(
            steps=200,
            selection_share=0.2,
            batch_size=160,
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
            head_rate=1e-2,
            checkpoint_every=50,
        )
    )
    sizes: Generated = dataclasses.field(default_factory=lambda: Generated(train=6_400, validation=400, test=2_000))
    mixing: Mixing = dataclasses.field(default_factory=lambda: Mixing(by="balanced"))
    text_length: int = 44
    router_examples: int = 500
    data_dir: str = "data"

    def __post_init__(self):
        for kind, given, known in (("task", self.tasks, TASKS), ("way of sharing", self.ways, WAYS)):
            for name in given:
                if name not in known:
                    raise unknown(kind, name, known)
            if len(set(given)) < len(given):
                raise UserError(f"a {kind} is named twice: {', '.join(given)}")
        if len(self.tasks) < 2 or not self.ways:
            raise UserError("the experiment needs at least two tasks and one way of sharing")
        if min(self.sizes.train, self.sizes.validation, self.sizes.test) < 2 or self.router_examples < 1:
            raise UserError("sizes must be at least 2 for every split, and router_examples at least 1")
        task_mixing.shares(self.examples, self.mixing)

    @property
    def examples(self) -> dict[str, int]:
        """Different training examples of each task."""
        return {task: member_examples(task, self.sizes) for task in self.tasks}


PRESETS = {
    "default": Config(),
    "smoke": Config(
        preset="smoke",
        tasks=("easy_vqa", "grounding"),
        ways=("each", "fusion", "full"),
        adapter_rates=(2e-3,),
        fusion_rates=(2e-3,),
        full_rates=(3e-4,),
        budget=Budget(steps=10, batch_size=32, head_rate=1e-2, checkpoint_every=5, log_every=5),
        sizes=Generated(train=160, validation=48, test=96),
        router_examples=64,
    ),
    "full": Config(
        preset="full",
        tasks=("defects", "easy_vqa", "scene_vqa", "retrieval", "grounding", "statements"),
        adapter_rates=(1e-3, 2e-3, 6e-3),
        fusion_rates=(2e-4, 5e-4, 2e-3),
        full_rates=(1e-4, 3e-4, 1e-3),
        budget=Budget(
            steps=4_000,
            selection_share=0.3,
            batch_size=384,
            seeds=(0, 1, 2),
            optimizer=OptimizerConfig(warmup_share=0.05, weight_decay=0.01),
            head_rate=1e-2,
        ),
        sizes=Generated(train=32_000, validation=1_000, test=4_000),
        router_examples=4_000,
    ),
}


def _sharing(config: Config, backbone: Backbone, folder: Path, read: bool = True) -> Sharing:
    given = (config.sizes, config.text_length, config.data_dir, backbone)
    parts = {name: member_data(name, *given, read=read) for name in config.tasks}
    own = None if config.mixing.by == "balanced" else task_mixing.shares(config.examples, config.mixing)
    if own is not None and read:
        parts = task_mixing.mixed(parts, config.examples, config.mixing)
    rates = {
        "head": config.head_rates,
        "adapters": config.adapter_rates,
        "fusion": config.fusion_rates,
        "full": config.full_rates,
    }
    adapter = Bottleneck(reduction=config.reduction, parallel=True, scale=4.0)
    mesh = make_mesh(config.mesh)
    return Sharing(backbone, parts, adapter, config.budget, rates, config.compute, mesh, folder, own)


def check(config: Config) -> Any:
    """Refuses what cannot be run, before anything is compiled; returns the table for ``--dry_run``."""
    shapes = abstract_backbone(config.backbone)
    sharing = _sharing(config, shapes, Path(), read=False)
    for batch_size in (config.budget.batch_size, *sharing.batch_sizes.values()):
        check_batch(batch_size, sharing.mesh)
    shapes.config.check_text_length("text_length", config.text_length)
    report = rich.table.Table(title=f"multitask, {config.preset}: {config.backbone}; {', '.join(config.tasks)}")
    for heading in ("way of sharing", "trained", "a task"):
        report.add_column(heading, justify="left" if heading == "way of sharing" else "right")
    for name in config.ways:
        trained = sharing.trained(name)
        report.add_row(WAYS[name].title, f"{trained:,}", f"{trained / len(config.tasks):,.0f}")
    return report


def run(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Trains and tests every way, and writes tables and figures anew after each."""
    backbone = load_backbone(config.backbone, dtype=config.storage)
    _same_mixture(workdir / "mixture.json", config)
    sharing = _sharing(config, backbone, workdir / "runs")
    drawn = {name: sharing.drawn(name) for name in config.ways}
    task_mixing.report(config.examples, config.mixing, drawn).write(workdir, "mixture")
    titles = {task: TASKS[task].title for task in config.tasks}
    rows: dict[str, dict[str, Any]] = {}
    correct: dict[str, Outcomes] = {}
    routing: list[dict[str, Any]] = []
    for name in config.ways:
        routes = _routes(config, sharing) if name == "each" else None
        found = sharing.run(name, None if routes is None else routes.routes)
        pictures = _pictures(sharing, found)
        correct[name] = found.correct
        trained = sharing.trained(name)
        rows[name] = _row(sharing, name, found, trained, found.stored) | _measured(found.correct, pictures)
        if routes is not None:
            correct[ROUTED] = found.sent
            sizes = trained + routes.parameters, found.stored + routes.stored
            rows[ROUTED] = _row(sharing, name, found, *sizes) | _measured(found.sent, pictures)
            rows[ROUTED] |= {"name": ROUTED, "variant": "one each, by a router", "step_seconds": None}
            routing = _routing(sharing, found, routes, pictures)
        _compare(rows, correct, pictures)
        ordered = [rows[name] for name in _ORDER if name in rows]
        verdict = multitask_report.write(ordered, routing, titles, config.backbone, workdir)
    rich.print(multitask_report.table(ordered, titles, config.backbone).terminal())
    if routing:
        rich.print(multitask_report.routing_table(routing).terminal())
    rich.print(f"{verdict}\ntables, figures and runs: {workdir}")
    return ordered


def _same_mixture(path: Path, config: Config) -> None:
    """Refuses a work directory whose runs saw the tasks with other shares: their totals may be the same."""
    mine = json.loads(json.dumps(dataclasses.asdict(config.mixing)))
    stored = json.loads(path.read_text()) if path.is_file() else mine
    if stored != mine:
        raise UserError(
            f"{path.parent} belongs to a run that mixed tasks by {stored}; now {mine} is asked for. Choose another "
            "--workdir, the old setting, or delete that folder"
        )
    write_atomically(path, json.dumps(mine))


def _routes(config: Config, sharing: Sharing) -> TaskRoutes:
    return learn_routes(
        sharing.backbone,
        sharing.parts,
        config.router_examples,
        sharing.folder / "routes.npz",
        batch_size=config.budget.batch_size,
        seed=config.budget.seeds[0],
        compute=config.compute,
        mesh=sharing.mesh,
    )


def _pictures(sharing: Sharing, found: Shared) -> Pictures:
    return {task: pictures_of(sharing.parts[task].splits["test"], index) for task, index in found.index.items()}


def _row(sharing: Sharing, name: str, found: Shared, trained: int, stored: int) -> dict[str, Any]:
    """What the table says of a way beside what it reaches."""
    tasks = len(sharing.parts)
    return {
        "name": name,
        "variant": WAYS[name].title,
        "group": WAYS[name].group,
        "trained": trained,
        "parameters_per_task": trained / tasks,
        "share_per_task": trained / tasks / names.count(sharing.backbone.params),
        "bytes_per_task": stored / tasks,
        "step_seconds": found.step_seconds,
        "learning_rates": found.learning_rates,
    }


def _measured(correct: Outcomes, pictures: Pictures) -> dict[str, Any]:
    """Accuracy on every task, and the mean."""
    by_task = {task: accuracy(own, pictures[task]) for task, own in correct.items()}
    return by_task | {"mean": mean_accuracy(list(correct.values()), list(pictures.values()))}


def _compare(rows: dict[str, dict[str, Any]], correct: Mapping[str, Outcomes], pictures: Pictures) -> None:
    """Which way of sharing adapters has the highest mean, and how all others differ from that and from one each."""

    def apart(name: str, other: str) -> Interval:
        first, second = (list(correct[each].values()) for each in (name, other))
        return mean_difference(first, second, list(pictures.values()))

    sharing = [name for name, row in rows.items() if name != ROUTED and row["group"] != "reference"]
    best = max(sharing, key=lambda name: rows[name]["mean"].value, default=None)
    for name, row in rows.items():
        row["best"] = name == best
        row["against_best"] = None if best in (None, name) else apart(name, best)
        row["against_each"] = apart(name, "each") if "each" in rows and name != "each" else None


def _routing(sharing: Sharing, each: Shared, routes: TaskRoutes, pictures: Pictures) -> list[dict[str, Any]]:
    """What the router's table says of every task."""
    rows, start = [], 0
    for number, (task, clusters) in enumerate(pictures.items()):
        given, sent = each.correct[task], each.sent[task]
        right = np.broadcast_to(routes.routes[start + each.index[task]] == number, given.shape)
        start += len(sharing.parts[task].splits["test"])
        rows.append(
            {
                "task": TASKS[task].title,
                "router": accuracy(right[:1], clusters),
                "given": accuracy(given, clusters),
                "sent": accuracy(sent, clusters),
                "difference": paired_difference(sent, given, clusters),
                "strict": accuracy(sent & right, clusters),
            }
        )
    return rows
