"""What a comparison is made of: variants, the budget they share, a task with its data, and what became of a variant."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vla_jax.adapters import Placement
from vla_jax.data.stages import Source, Transform
from vla_jax.errors import UserError
from vla_jax.model import MODALITIES, Task
from vla_jax.names import Tree
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.profile import Span
from vla_jax.training.table import ResolvedTable
from vla_jax.training.tolerance import Tolerance


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of the things compared.

    Attributes:
        name: of its folder and in the tables' data.
        title: in tables and figures.
        rules: the preset of the parameter table that says what is trained.
        placements: what sits in the slots.
        modalities: what the model is shown.
        robust_drop: the most layers whose adapters a training batch goes without; see :class:`AdaptedModel`.
        group: the family it is drawn with.
        learning_rates: the grid from which its own is chosen on validation data.
        selection_share: share of the steps after which it is chosen; the budget's if None. What costs little can afford
            to be looked at after all of them.
    """

    name: str
    title: str
    rules: str = "adapters"
    placements: tuple[Placement, ...] = ()
    modalities: tuple[str, ...] = MODALITIES
    robust_drop: int = 0
    group: str = "adapters"
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    selection_share: float | None = None

    def __post_init__(self):
        if self.selection_share is not None:
            _check_share(self.selection_share)
        if not self.learning_rates:
            raise UserError(f"variant {self.name!r} has no learning rate to choose from")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every variant gets.

    Attributes:
        steps: training steps of a run.
        selection_share: share of the steps after which the learning rate is chosen; runs go on from there.
        batch_size: examples of a step.
        seeds: of parameters, order of the data and dropout; the first one serves the choice.
        optimizer: everything else of the optimiser.
        head_rate: learning rate of the head beside adapters or a backbone, which then have the searched one alone.
            Where it is None they share one, and a method that learns best slowly has a head that has learnt little.
        checkpoint_every: steps between checkpoints.
        checkpoint_wait: whether training waits until a checkpoint is complete on disk, so that a kill without warning
            costs ``checkpoint_every`` steps at most; otherwise also those that ran while it was being saved.
        log_every: steps between logged ones.
        workers: processes that read and decode examples; 0 does it in threads. They take examples in another order.
        max_bad_share: the share of pictures that cannot be decoded above which a run ends; others are passed over.
        tolerance: what runs bear before they stop.
        profile: steps of which each variant's first run writes a profile, such as ``10:15``; none if empty.
    """

    steps: int = 400
    selection_share: float = 0.25
    batch_size: int = 64
    seeds: tuple[int, ...] = (0,)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    head_rate: float | None = None
    checkpoint_every: int = 200
    checkpoint_wait: bool = False
    log_every: int = 20
    workers: int = 0
    max_bad_share: float = 0.01
    tolerance: Tolerance = dataclasses.field(default_factory=Tolerance)
    profile: str = ""

    def __post_init__(self):
        Span.parse(self.profile)
        if not self.seeds:
            raise UserError("a comparison needs at least one seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds name one twice: {', '.join(map(str, self.seeds))}")
        if self.workers < 0:
            raise UserError(f"workers {self.workers} is negative; allowed: 0 (threads of this process) or more")
        if not 0 <= self.max_bad_share < 1:
            raise UserError(f"max_bad_share {self.max_bad_share} is not a share; allowed: 0 up to, not including, 1")
        if min(self.steps, self.batch_size, self.checkpoint_every, self.log_every) < 1:
            raise UserError("steps, batch_size, checkpoint_every and log_every must be at least 1")
        if self.head_rate is not None and not self.head_rate > 0:
            raise UserError(f"head_rate must be positive, or None for the searched rate; got {self.head_rate}")
        _check_share(self.selection_share)

    def selection_steps(self, variant: Variant) -> int:
        """The step after which a variant's learning rate is chosen."""
        share = self.selection_share if variant.selection_share is None else variant.selection_share
        return max(1, round(share * self.steps))


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(f"selection_share is a share of the steps, above 0 and at most 1; got {share}")


@dataclasses.dataclass(frozen=True)
class Probe:
    """Further examples that chosen runs make predictions for.

    Attributes:
        source: raw examples.
        transform: makes a row of one; that of the task's data if None.
        task: what makes the predictions, from the features alone; the trained task if None.
        pairs: whether a prediction speaks of the pair it was made for. Where it does not, but compares features of one
            pair with those of another, models whose features depend on what stands beside them are left out.
    """

    source: Source
    transform: Transform | None = None
    task: Task | None = None
    pairs: bool = True


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task with its data.

    Attributes:
        task: head, loss and metrics.
        splits: raw examples of ``train``, ``validation`` and ``test``.
        transform: makes a row of a raw example.
        probes: by name, what else every chosen run makes predictions for.
        streams: folder in which is kept, for later runs, what frozen blocks make of pictures and texts; in memory
            alone if None.
    """

    task: Task
    splits: Mapping[str, Source]
    transform: Transform
    probes: Mapping[str, Probe] = dataclasses.field(default_factory=dict)
    streams: Path | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a variant.

    Attributes:
        variant: the variant.
        table: its parameters and which of them are trained.
        learning_rate: the chosen one.
        validation: accuracy on validation data by learning rate, when the rate was chosen.
        validated: accuracy on validation data of the finished run of the first seed.
        predictions: by name (``test`` and the probes that apply) and field ``[seeds, examples]``: the task's
            predictions, and ``index``, the examples' places in their source.
        seconds_per_step: mean of the chosen runs.
        step_bytes: arguments and temporaries of the compiled step, by the compiler's account.
        stored_blocks: blocks of all towers that each example went through once, before training; neither time nor bytes
            of a step contain them.
        adapter_bytes: size on disk of the first chosen run's trained parameters.
        trained: the first chosen run's trained parameters.
    """

    variant: Variant
    table: ResolvedTable
    learning_rate: float
    validation: dict[float, float]
    validated: float
    predictions: dict[str, dict[str, np.ndarray]]
    seconds_per_step: float
    step_bytes: int
    stored_blocks: int
    adapter_bytes: int
    trained: Tree
