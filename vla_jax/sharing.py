"""Ways in which several tasks share one backbone, each trained on equal terms.

Every way sees the same examples of every task, each as often. Where tasks share something, a batch holds examples of
all of them; where each has a model of its own, that takes as many steps of the task's share of the batch. AdapterFusion
has two stages (Pfeiffer et al. 2021), which have half of the steps and half of the examples each: the first trains an
adapter for each task, the second, with these frozen, what weighs them for each task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from vla_jax.adapters import Placement, Plan, Share, fuse, place
from vla_jax.adapters.base import Method
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.comparison import Comparison
from vla_jax.data.cached import Chosen
from vla_jax.errors import UserError, unknown
from vla_jax.many_tasks import Sent, apart, as_one
from vla_jax.model import AdaptedModel
from vla_jax.names import Tree
from vla_jax.training.table import ResolvedTable
from vla_jax.variants import Budget, Outcome, Probe, TaskData, Variant


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of sharing.

    Attributes:
        title: in tables and figures.
        group: ``shared adapters``, ``adapters of their own``, or ``reference`` for what has no adapters.
        pace: which learning rates are tried: ``head``, ``adapters``, ``fusion`` or ``full``.
        rules: the preset of the parameter table that says what is trained.
        routed: whether each task has adapters of its own, picked by route.
        half: the half of a bottleneck that tasks share nevertheless, ``down`` or ``up``.
        own_models: whether each task has a whole model of its own.
    """

    title: str
    group: str
    pace: str = "adapters"
    rules: str = "adapters"
    routed: bool = False
    half: str = ""
    own_models: bool = False


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "frozen": Way("heads alone", "reference", pace="head", rules="linear_probe"),
        "one": Way("one adapter for all", "shared adapters"),
        "half_down": Way("half-shared (down)", "shared adapters", routed=True, half="down"),
        "half_up": Way("half-shared (up)", "shared adapters", routed=True, half="up"),
        "each": Way("one adapter each", "adapters of their own", routed=True),
        "fusion": Way("AdapterFusion", "adapters of their own", pace="fusion", rules="adapter_fusion", routed=True),
        "full": Way("one full model each", "reference", pace="full", rules="full", own_models=True),
    }
)
"""The ways of sharing by name, in the order of tables."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """What became of one way.

    Attributes:
        correct: by task, bool ``[seeds, examples]`` of its test examples.
        index: by task, int ``[examples]``, their places in the task's test source.
        stored: bytes on disk of what was trained for all tasks together.
        step_seconds: of a step in which every task has its share of the batch; the mean of both stages of
            AdapterFusion, the sum of all tasks' where they have models of their own.
        learning_rates: the chosen ones, by what they are of.
        sent: by task, as ``correct``, with the adapters that routes chose; None where no routes were given.
    """

    correct: Mapping[str, np.ndarray]
    index: Mapping[str, np.ndarray]
    stored: int
    step_seconds: float
    learning_rates: Mapping[str, float]
    sent: Mapping[str, np.ndarray] | None = None


class _Reading(Comparison):
    """Reads the pictures in every step, whatever is trained, so that times of steps compare.

    Below the lowest adapter is next to nothing here that could be computed once, and it would fill the memory.
    """

    def stored_blocks(self, model: AdaptedModel, table: ResolvedTable) -> None:
        """None: every step begins with the pictures."""


@dataclasses.dataclass(frozen=True, eq=False)
class _BegunModel(AdaptedModel):
    """A model whose adapters and heads do not begin anew."""

    begun: Tree = dataclasses.field(default_factory=dict)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """All parameters, as they were trained before."""
        return {"backbone": self.backbone.params} | dict(self.begun)


class _SecondStage(_Reading):
    """A comparison whose models begin with what the first stage has trained.

    Attributes:
        begun: adapters and heads.
    """

    begun: Tree

    def model(self, variant: Variant) -> AdaptedModel:
        """The variant's model."""
        plain = super().model(variant)
        return _BegunModel(plain.backbone, plain.task, plain.placements, plain.compute, begun=self.begun)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Trains the ways of sharing on the same tasks; nothing is computed before it is asked for.

    Attributes:
        backbone: the backbone.
        parts: the tasks with their data, by name; without splits they can be counted but not trained. All have as many
            training examples, unless shares say otherwise; where one has fewer validation examples, it counts less in
            the choice of learning rates.
        adapter: the bottleneck that sits on every block's MLP.
        budget: what every way gets; ``batch_size`` is that of all tasks together.
        rates: by pace, the learning rates from which one is chosen on validation data.
        compute: how the backbone is run.
        mesh: where.
        folder: where runs are kept.
        shares: each task's share of the training examples, by which it counts in the loss, and by which a model of its
            own gets its batch; equal if None.
    """

    backbone: Backbone
    parts: Mapping[str, TaskData]
    adapter: Method
    budget: Budget
    rates: Mapping[str, tuple[float, ...]]
    compute: Compute
    mesh: jax.sharding.Mesh
    folder: Path
    shares: Mapping[str, float] | None = None

    def __post_init__(self):
        if len(self.parts) < 2:
            raise UserError(f"sharing needs at least 2 tasks; got {', '.join(self.parts) or 'none'}")
        if self.shares is None and self.budget.batch_size % len(self.parts):
            raise UserError(
                f"batch_size {self.budget.batch_size} cannot be shared equally by {len(self.parts)} tasks; give a "
                f"multiple of {len(self.parts)}"
            )
        if self.budget.steps < 2:
            raise UserError("steps must be at least 2: AdapterFusion has two stages")
        sizes = {name: len(part.splits["train"]) for name, part in self.parts.items() if "train" in part.splits}
        if self.shares is None and len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size:,}" for name, size in sizes.items())
            raise UserError(f"tasks need equally many train examples; {told}. Ask for as many as all have")

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Each task's share of the batch: what a model of its own is trained with."""
        whole = self.budget.batch_size
        if self.shares is None:
            return dict.fromkeys(self.parts, whole // len(self.parts))
        return {task: max(1, round(whole * self.shares[task])) for task in self.parts}

    def drawn(self, name: str) -> dict[str, int]:
        """How many training examples of each task a run of a way takes, with the first seed; nothing is trained."""
        if _way(name).own_models:
            return {task: self.budget.steps * own for task, own in self.batch_sizes.items()}
        stages = [(as_one(self.parts, self.shares), self.budget.steps)]
        if WAYS[name].rules == "adapter_fusion":
            steps = self.budget.steps // 2
            stages = [(self._half(0), steps), (self._half(1), self.budget.steps - steps)]
        batch, seed = self.budget.batch_size, self.budget.seeds[0]
        counts = np.sum([data.splits["train"].drawn(steps * batch, seed) for data, steps in stages], axis=0)
        return dict(zip(self.parts, counts.tolist(), strict=True))

    def tables(self, name: str) -> list[ResolvedTable]:
        """What is trained in a way: a table for each model or stage; nothing is computed."""
        way = _way(name)
        if way.own_models:
            alone = [as_one({task: part}) for task, part in self.parts.items()]
            return [self._comparison(data, name).table(self._variant(name)) for data in alone]
        given = self._comparison(as_one(self.parts, self.shares), name)
        if way.rules != "adapter_fusion":
            return [given.table(self._variant(name))]
        return [given.table(self._first(name)), given.table(self._second(name, self._fused_plan()))]

    def trained(self, name: str) -> int:
        """The trained parameters of a way, of all tasks together; nothing is computed."""
        tables = self.tables(name)
        if WAYS[name].own_models:
            return sum(table.trained for table in tables)
        # Both stages of AdapterFusion train the heads, which are counted once.
        return sum({row.name: row.size for table in tables for row in table.rows if row.train}.values())

    def run(self, name: str, routes: np.ndarray | None = None) -> Shared:
        """Trains and tests a way, or reads what is finished of it.

        Args:
            name: one of :data:`WAYS`.
            routes: int ``[examples]``, for every task's test examples, one task after the other, whose adapters they
                are tested with once more; for ways that route.

        Raises:
            UserError: if there is no such way.
        """
        way = _way(name)
        if way.own_models:
            return self._run_own_models(name)
        if way.rules == "adapter_fusion":
            return self._run_fusion(name)
        data = as_one(self.parts, self.shares)
        if routes is not None:
            data = dataclasses.replace(data, probes={"sent": Probe(Sent(data.splits["test"], routes))})
        outcome = self._comparison(data, name).run(self._variant(name))
        return Shared(
            *self._by_task(outcome.predictions["test"]),
            stored=outcome.adapter_bytes,
            step_seconds=outcome.seconds_per_step,
            learning_rates={way.pace: outcome.learning_rate},
            sent=None if routes is None else self._by_task(outcome.predictions["sent"])[0],
        )

    def _run_own_models(self, name: str) -> Shared:
        """A model for each task, of its share of the batch."""
        budgets = {task: dataclasses.replace(self.budget, batch_size=own) for task, own in self.batch_sizes.items()}
        outcomes = {
            task: self._comparison(as_one({task: part}), f"{name}/{task}", budgets[task]).run(self._variant(name))
            for task, part in self.parts.items()
        }
        told = {task: outcome.predictions["test"] for task, outcome in outcomes.items()}
        return Shared(
            correct={task: found["correct"] for task, found in told.items()},
            index={task: found["index"][0] for task, found in told.items()},
            stored=sum(outcome.adapter_bytes for outcome in outcomes.values()),
            step_seconds=sum(outcome.seconds_per_step for outcome in outcomes.values()),
            learning_rates={task: outcome.learning_rate for task, outcome in outcomes.items()},
        )

    def _run_fusion(self, name: str) -> Shared:
        """An adapter for each task, and then what weighs them, for each seed over the adapters of that seed."""
        steps = self.budget.steps // 2
        half = dataclasses.replace(self.budget, steps=steps)
        first = self._comparison(self._half(0), f"{name}/first", half)
        begun = first.run(self._first(name))
        outcomes: list[Outcome] = []
        for seed in self.budget.seeds:
            params = first.parameters(begun, seed)
            plan, adapters = self._fused(params["adapters"], jax.random.key(seed))
            rates = (outcomes[0].learning_rate,) if outcomes else None
            budget = dataclasses.replace(self.budget, steps=self.budget.steps - steps, seeds=(seed,))
            second = self._comparison(self._half(1), f"{name}/second", budget, _SecondStage)
            second.begun = {"adapters": adapters, "heads": params["heads"]}
            outcomes.append(second.run(self._second(name, plan, rates)))
        seconds = [begun.seconds_per_step, np.mean([outcome.seconds_per_step for outcome in outcomes])]
        predictions = [outcome.predictions["test"] for outcome in outcomes]
        return Shared(
            *self._by_task({field: np.concatenate([p[field] for p in predictions]) for field in predictions[0]}),
            stored=begun.adapter_bytes + outcomes[0].adapter_bytes,
            step_seconds=float(np.mean(seconds)),
            learning_rates={"adapters": begun.learning_rate, "fusion": outcomes[0].learning_rate},
        )

    def _by_task(self, predictions: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What is right of each task's test examples, and their places in its source."""
        told = apart(self.parts, predictions, "test")
        correct = {task: own["correct"] for task, own in told.items()}
        return correct, {task: own["index"][0] for task, own in told.items()}

    def _comparison(
        self, data: TaskData, folder: str, budget: Budget | None = None, kind: type[_Reading] = _Reading
    ) -> _Reading:
        return kind(self.backbone, data, budget or self.budget, self.compute, self.mesh, self.folder / folder)

    def _variant(self, name: str) -> Variant:
        way = WAYS[name]
        placements = () if way.rules in ("linear_probe", "full") else (self._placement(way),)
        # Heads alone cost little, and what they reach is seen at the end.
        share = 1.0 if way.rules == "linear_probe" else None
        rates = self.rates[way.pace]
        return Variant(name, way.title, way.rules, placements, learning_rates=rates, selection_share=share)

    def _placement(self, way: Way) -> Placement:
        sharing = (Share(f"{way.half}/.*", ("tasks",)),) if way.half else ()
        tasks = tuple(self.parts) if way.routed else ()
        return Placement(self.adapter, "bottleneck", slots=("mlp_out",), sharing=sharing, tasks=tasks)

    def _first(self, name: str) -> Variant:
        """AdapterFusion's first stage: an adapter for each task."""
        plain = dataclasses.replace(self._variant(name), rules="adapters", learning_rates=self.rates["adapters"])
        return dataclasses.replace(plain, title=f"{plain.title}, first stage")

    def _second(self, name: str, plan: Plan, rates: tuple[float, ...] | None = None) -> Variant:
        """AdapterFusion's second stage."""
        rates = rates or self.rates["fusion"]
        return dataclasses.replace(self._variant(name), placements=plan.placements, learning_rates=rates)

    def _fused(self, adapters: Tree, key: jax.Array) -> tuple[Plan, dict[str, Any]]:
        """What the second stage begins with: the tasks' adapters, and for each task new weights over all of them."""
        towers = self.backbone.config.towers
        plan = place(self._placement(WAYS["fusion"]), towers)
        return fuse(plan, adapters, towers, key, tasks=tuple(self.parts))

    def _fused_plan(self) -> Plan:
        """The second stage's plan; nothing is computed."""
        found = []

        def begin(adapters: Tree) -> None:
            found.append(self._fused(adapters, jax.random.key(0))[0])

        jax.eval_shape(begin, place(self._placement(WAYS["fusion"]), self.backbone.config.towers).shapes())
        return found[0]

    def _half(self, stage: int) -> TaskData:
        """The tasks with the training examples of one stage of AdapterFusion."""
        halved = {}
        for task, part in self.parts.items():
            train = part.splits["train"]
            own = Chosen(train, np.arange(stage, len(train), 2))
            halved[task] = dataclasses.replace(part, splits={**part.splits, "train": own})
        return as_one(halved, self.shares)


def _way(name: str) -> Way:
    if name not in WAYS:
        raise unknown("way of sharing", name, WAYS)
    return WAYS[name]
