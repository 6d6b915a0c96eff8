"""The optimiser: AdamW with a schedule, groups, a decay mask, clipping and accumulation, from one configuration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import optax

from vla_jax import names
from vla_jax.errors import UserError, unknown
from vla_jax.training.table import DEFAULT_GROUP, ResolvedTable

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class GroupConfig:
    """What one group of parameters has of its own; what is left out is as in :class:`OptimizerConfig`.

    Attributes:
        name: the group's name, as rules of the parameter table give it.
        learning_rate: its peak learning rate.
        schedule: its schedule; warm-up and final share are everybody's.
        weight_decay: its weight decay.
        learning_rate_ratio: its peak learning rate as a multiple of the optimiser's, instead of ``learning_rate``.
    """

    name: str
    learning_rate: float | None = None
    schedule: Schedule | None = None
    weight_decay: float | None = None
    learning_rate_ratio: float | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise UserError(f"optimiser group name {self.name!r} cannot be used; allowed: any name without '/'")
        _check(f"optimiser group {self.name!r}", self.learning_rate, self.schedule, self.weight_decay)
        if self.learning_rate_ratio is not None and self.learning_rate_ratio < 0:
            ratio = self.learning_rate_ratio
            raise UserError(f"learning_rate_ratio of optimiser group {self.name!r} is {ratio}; allowed: 0 or more")
        if self.learning_rate is not None and self.learning_rate_ratio is not None:
            raise UserError(
                f"optimiser group {self.name!r} has both learning_rate={self.learning_rate} and "
                f"learning_rate_ratio={self.learning_rate_ratio}; set one of them"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with warm-up, clipping, accumulation and groups.

    Attributes:
        learning_rate: the peak learning rate, reached at the end of the warm-up.
        schedule: how it falls after the warm-up: half a cosine, a line, or not at all.
        warmup_share: linear warm-up from zero, as a share of all updates; rounded to whole updates.
        warmup_steps: the same in updates; set one of the two.
        final_share: the learning rate at the end, as a share of the peak; not used by ``constant``.
        weight_decay: decoupled decay, times the learning rate; only where the table says that a leaf decays.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        clip_norm: the largest global norm of the trainable leaves' gradients; None does not clip.
        accumulate: steps whose gradients are averaged into one update.
        groups: groups with values of their own.
    """

    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup_share: float = 0.0
    warmup_steps: int = 0
    final_share: float = 0.0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    accumulate: int = 1
    groups: tuple[GroupConfig, ...] = ()

    def __post_init__(self) -> None:
        _check("the optimiser", self.learning_rate, self.schedule, self.weight_decay)
        for field in ("warmup_share", "final_share", "b1", "b2"):
            value = getattr(self, field)
            if not 0 <= value <= 1 or (value == 1 and field in ("b1", "b2")):
                limit = "0 up to but without 1" if field in ("b1", "b2") else "0 to 1"
                raise UserError(f"{field} of the optimiser is {value}; allowed: {limit}")
        if self.warmup_share and self.warmup_steps:
            raise UserError(
                f"both warmup_share={self.warmup_share} and warmup_steps={self.warmup_steps} are set; set one to 0"
            )
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps of the optimiser is {self.warmup_steps}; allowed: 0 or more updates")
        if self.eps <= 0:
            raise UserError(f"eps of the optimiser is {self.eps}; allowed: above 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"clip_norm is {self.clip_norm}; allowed: above 0, or None for no clipping")
        if self.accumulate < 1:
            raise UserError(f"accumulate is {self.accumulate}; allowed: 1 (no accumulation) or more steps an update")
        for name, times in Counter(group.name for group in self.groups).items():
            if times > 1:
                raise UserError(f"optimiser group {name!r} is given {times} times; give it once")
            if name == DEFAULT_GROUP:
                raise UserError(
                    f"optimiser group {name!r} cannot be given: its values are those of the optimiser itself; set those"
                )

    def group(self, name: str) -> GroupConfig:
        """The values of one group, with what it leaves out filled in from this configuration."""
        own = next((group for group in self.groups if group.name == name), GroupConfig(name))
        if own.learning_rate_ratio is not None:
            rate = own.learning_rate_ratio * self.learning_rate
            own = replace(own, learning_rate=rate, learning_rate_ratio=None)
        common = {field: getattr(self, field) for field in ("learning_rate", "schedule", "weight_decay")}
        return replace(own, **{field: value for field, value in common.items() if getattr(own, field) is None})


def make_schedule(config: OptimizerConfig, group: str, updates: int) -> optax.Schedule:
    """The learning rate of a group by update, counted from 0.

    Args:
        config: the optimiser's configuration.
        group: the group's name.
        updates: updates of the whole run; afterwards the learning rate stays where it ended.

    Raises:
        UserError: if the warm-up leaves no update after it.
    """
    relative, peak = _relative_schedule(config, group, updates), config.group(group).learning_rate
    return lambda update: peak * relative(update)


def _relative_schedule(config: OptimizerConfig, group: str, updates: int) -> optax.Schedule:
    """The learning rate over its peak."""
    warmup = config.warmup_steps or round(config.warmup_share * updates)
    if warmup and warmup >= updates:
        raise UserError(
            f"the warm-up takes {warmup} of {updates} updates and leaves none; set warmup_steps or warmup_share lower, "
            f"or train for more than {warmup * config.accumulate} steps"
        )
    rest, schedule = updates - warmup, config.group(group).schedule
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(1.0, rest, alpha=config.final_share)
    elif schedule == "linear":
        after = optax.linear_schedule(1.0, config.final_share, rest)
    else:
        after = optax.constant_schedule(1.0)
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup]) if warmup else after


def make_optimizer(
    config: OptimizerConfig, table: ResolvedTable, trainable: names.Tree, steps: int
) -> optax.GradientTransformation:
    """The optimiser of the trainable leaves.

    It clips by the global norm over these leaves alone, of the accumulated gradient; then each group has AdamW with its
    own learning rate and weight decay.

    Args:
        config: the optimiser's configuration.
        table: the resolved table, for groups and decay.
        trainable: the trained leaves, as arrays or as shapes.
        steps: steps of the whole run, each with one batch; ``accumulate`` of them make one update.

    Raises:
        UserError: if nothing is trained, a group stands only in the table or only in the configuration, ``steps`` is
            not a positive multiple of ``accumulate``, or the warm-up is too long.
    """
    labels = table.labels(trainable)
    used = set(jax.tree.leaves(labels))
    given = {group.name for group in config.groups}
    if not used:
        raise UserError("the parameter table trains nothing; let a rule set train=True for some parameter")
    if missing := sorted(used - given - {DEFAULT_GROUP}):
        raise unknown("optimiser group in the parameter table", missing[0], sorted(given | {DEFAULT_GROUP}))
    if unused := sorted(given - used):
        raise unknown("optimiser group in the configuration", unused[0], sorted(used), "No trained parameter has it.")
    if steps < 1 or steps % config.accumulate:
        below = max(steps, 0) // config.accumulate * config.accumulate
        near = [str(number) for number in (below, below + config.accumulate) if number > 0]
        raise UserError(
            f"{steps} steps do not make whole updates of accumulate={config.accumulate} steps each; "
            f"nearest numbers that do: {' and '.join(near)}"
        )
    decays = table.decay_mask(trainable)

    def adamw(group: str) -> optax.GradientTransformation:
        # inject_hyperparams keeps both factors of the learning rate in the state: the step finds there what was used,
        # and runs that differ in the peak alone share one compiled program.
        schedule = _relative_schedule(config, group, steps // config.accumulate)
        return optax.chain(
            optax.scale_by_adam(config.b1, config.b2, config.eps),
            optax.add_decayed_weights(config.group(group).weight_decay, mask=decays),
            optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=schedule),
            optax.inject_hyperparams(optax.scale)(step_size=config.group(group).learning_rate),
        )

    optimizer = optax.partition({group: adamw(group) for group in sorted(used)}, labels)
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def learning_rates(state: Any) -> dict[str, jax.Array]:
    """The learning rates of the last update, read from the state of :func:`make_optimizer`'s optimiser.

    Returns:
        ``learning_rate`` of the default group, or of the alphabetically first if no leaf has the default; and
        ``learning_rate/<group>`` of every other group. Before the first update, that of the first. float32 [].
    """
    rates: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if path[-2:-1] == (jax.tree_util.GetAttrKey("hyperparams"),):
            group = path[path.index(jax.tree_util.GetAttrKey("inner_states")) + 1].key
            rates[group] = rates.get(group, 1.0) * leaf  # the peak, and where the schedule stands
    order = sorted(rates, key=lambda group: (group != DEFAULT_GROUP, group))
    return {"learning_rate" if i == 0 else f"learning_rate/{group}": rates[group] for i, group in enumerate(order)}


def _check(where: str, learning_rate: float | None, schedule: str | None, weight_decay: float | None) -> None:
    if learning_rate is not None and learning_rate < 0:
        raise UserError(f"learning_rate of {where} is {learning_rate}; allowed: 0 or more")
    if schedule is not None and schedule not in get_args(Schedule):
        raise unknown(f"schedule of {where}", schedule, get_args(Schedule))
    if weight_decay is not None and weight_decay < 0:
        raise UserError(f"weight_decay of {where} is {weight_decay}; allowed: 0 or more")
