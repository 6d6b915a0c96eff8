"""How a router learns: from task labels, or without, from what each task's adapter loses on each example.

Without labels it minimises the expected loss of its choice. That can end with one task for all; two published terms
for mixtures of experts work against it, both smallest where a batch is spread evenly over the tasks:

- ``importance`` (Shazeer et al. 2017, equations 6 and 7): the squared coefficient of variation of the batch's summed
  probabilities;
- ``switch`` (Fedus, Zoph and Shazeer 2022, equations 4 to 6): N sum_i f_i P_i, with f_i the share of examples whose
  top task is i and P_i the mean probability of i.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from vla_jax.adapters.features import Labelled, checked_features, checked_labels, epoch_orders
from vla_jax.adapters.router import Router
from vla_jax.errors import UserError, unknown

Balance = Literal["none", "importance", "switch"]

Objective = Callable[[Float[Array, "batch tasks"], Any], tuple[Float[Array, "batch"], Bool[Array, "batch"]]]
"""``(logits, targets) -> (losses, whether the top task is right)``."""


class WithLosses(NamedTuple):
    """Frozen features with what each task's adapter loses on each example.

    Attributes:
        features: float ``[examples, width]``.
        losses: float ``[examples, tasks]``.
    """

    features: ArrayLike
    losses: ArrayLike


class RouterFit(NamedTuple):
    """What came of training.

    Attributes:
        router: the router after the last epoch; it never abstains until it is calibrated.
        accuracy: on the held-out data without abstaining: how often it picks the labelled task, or one whose adapter
            loses least.
        loss: the objective on the held-out data, without the balance: mean cross-entropy, or mean expected loss.
        shares: float ``[tasks]``, how often it picks each task there; a single one is a router that collapsed.
        epoch_losses: float ``[epochs]``, the mean objective of each epoch, balance included.
    """

    router: Router
    accuracy: float
    loss: float
    shares: np.ndarray
    epoch_losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a router is built and trained.

    Attributes:
        tasks: the tasks' names, in the order of labels and of the columns of losses.
        hidden: units of the one hidden layer (relu); None for a linear router.
        epochs: how often it sees the training data.
        batch_size: of training; an epoch's last batch may be smaller.
        learning_rate: of AdamW, the first one; it falls to zero along half a cosine.
        weight_decay: of AdamW, times the learning rate.
        balance: the term against one task for all.
        balance_weight: its weight.
    """

    tasks: tuple[str, ...]
    hidden: int | None = None
    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    balance: Balance = "none"
    balance_weight: float = 0.01

    def __post_init__(self):
        if len(self.tasks) < 2:
            raise UserError(f"a router chooses among at least 2 tasks, got {', '.join(self.tasks) or 'none'}")
        for task in self.tasks:
            if self.tasks.count(task) > 1 or not task:
                raise UserError(
                    f"tasks of a router have a name of their own each; got {', '.join(map(repr, self.tasks))}"
                )
        for name in ("hidden", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} of a router must be at least 1, got {value}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate of a router must be positive, got {self.learning_rate}")
        for name in ("weight_decay", "balance_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} of a router must not be negative, got {getattr(self, name)}")
        if self.balance not in get_args(Balance):
            raise unknown("balance of a router", self.balance, get_args(Balance))

    def init(self, key: jax.Array, width: int) -> Router:
        """A new router for features of this width, which finds every task equally likely and never abstains."""
        last = width if self.hidden is None else self.hidden
        params = {"out": _linear(jnp.zeros((last, len(self.tasks))))}
        if self.hidden is not None:
            params["hidden"] = _linear(jax.nn.initializers.he_normal()(key, (width, self.hidden)))
        return Router(params, jnp.float32(0), self.tasks)

    def fit(self, train: Labelled, held_out: Labelled, key: jax.Array) -> RouterFit:
        """Trains on task labels, with cross-entropy.

        Args:
            train: features as :func:`router_features` gives them, and the number of each one's task.
            held_out: what accuracy and loss are reported on; it changes nothing else.
            key: of the first weights and of the order of the examples.

        Raises:
            UserError: for features or labels that do not fit each other, or are zero or not finite.
        """
        known = self._labelled("the training examples", train)
        return self._fit(
            _cross_entropy, known, self._labelled("the held-out examples", held_out, known[0].shape[1]), key
        )

    def fit_losses(self, train: WithLosses, held_out: WithLosses, key: jax.Array) -> RouterFit:
        """Trains without task labels: minimises the expected loss, sum over tasks of probability times loss.

        Args:
            train: features as :func:`router_features` gives them, and the loss of each task's adapter on each example.
            held_out: what accuracy and loss are reported on; it changes nothing else.
            key: of the first weights and of the order of the examples.

        Raises:
            UserError: for features or losses that do not fit each other or are not finite.
        """
        known = self._with_losses("the training examples", train)
        return self._fit(
            _expected_loss, known, self._with_losses("the held-out examples", held_out, known[0].shape[1]), key
        )

    def _labelled(self, what: str, given: Labelled, width: int | None = None) -> tuple[jax.Array, jax.Array]:
        features = checked_features(what, given.features, width)
        return features, checked_labels(what, given.labels, len(features), len(self.tasks), "the tasks")

    def _with_losses(self, what: str, given: WithLosses, width: int | None = None) -> tuple[jax.Array, jax.Array]:
        features, losses = checked_features(what, given.features, width), np.asarray(given.losses, np.float32)
        if losses.shape != (len(features), len(self.tasks)):
            raise UserError(
                f"losses of {what} are [examples, tasks], here {[len(features), len(self.tasks)]}; "
                f"given {list(losses.shape)}"
            )
        bad = np.flatnonzero(~np.isfinite(losses).all(1))
        if bad.size:
            raise UserError(f"{bad.size} rows of the losses of {what} are not finite, the first is row {bad[0]}")
        return features, jnp.asarray(losses)

    def _fit(
        self, objective: Objective, train: Sequence[jax.Array], held_out: Sequence[jax.Array], key: jax.Array
    ) -> RouterFit:
        router = self.init(jax.random.fold_in(key, 1), train[0].shape[1])
        orders = epoch_orders(key, len(train[0]), self.batch_size, self.epochs)
        router, epoch_losses = _train(self, objective, router, *train, orders)
        losses, right, picked = (np.asarray(a) for a in _judge(objective, router, *held_out))
        shares = np.bincount(picked, minlength=len(self.tasks)) / len(picked)
        return RouterFit(router, float(right.mean()), float(losses.mean()), shares, np.asarray(epoch_losses))


def importance_balance(probabilities: Float[Array, "batch tasks"], valid: Bool[Array, "batch"]) -> Float[Array, ""]:
    """The squared coefficient of variation of the tasks' summed probabilities (Shazeer et al. 2017); 0 at its best."""
    importance = jnp.sum(probabilities * valid[:, None], axis=0)
    return jnp.var(importance) / jnp.mean(importance) ** 2


def switch_balance(probabilities: Float[Array, "batch tasks"], valid: Bool[Array, "batch"]) -> Float[Array, ""]:
    """N sum_i f_i P_i (Fedus, Zoph and Shazeer 2022); 1 at its best. No gradient goes through the picks f."""
    tasks, examples = probabilities.shape[1], valid.sum()
    picked = jax.nn.one_hot(jnp.argmax(probabilities, -1), tasks)
    shares = jnp.sum(picked * valid[:, None], axis=0) / examples
    means = jnp.sum(probabilities * valid[:, None], axis=0) / examples
    return tasks * jnp.sum(shares * means)


_BALANCES = {"importance": importance_balance, "switch": switch_balance}


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), jnp.argmax(logits, -1) == labels


def _expected_loss(logits: jax.Array, losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    picked = jnp.take_along_axis(losses, jnp.argmax(logits, -1)[:, None], axis=1)[:, 0]
    return jnp.sum(jax.nn.softmax(logits, -1) * losses, axis=-1), picked == losses.min(1)


def _linear(kernel: jax.Array) -> dict[str, jax.Array]:
    return {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}


@functools.partial(jax.jit, static_argnums=0)
def _judge(
    objective: Objective, router: Router, features: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits = router.logits(features)
    return *objective(logits, targets), jnp.argmax(logits, -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
    config: RouterConfig,
    objective: Objective,
    router: Router,
    features: jax.Array,
    targets: jax.Array,
    orders: jax.Array,
) -> tuple[Router, jax.Array]:
    """The router after the last epoch, and every epoch's mean objective."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, orders.shape[0] * orders.shape[1])
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits, valid = router.replace(params=params).logits(features[batch]), batch >= 0
        losses, _ = objective(logits, targets[batch])
        mean = jnp.sum(losses * valid) / valid.sum()
        if config.balance != "none":
            mean += config.balance_weight * _BALANCES[config.balance](jax.nn.softmax(logits, -1), valid)
        return mean

    def update(state: tuple, batch: jax.Array) -> tuple[tuple, jax.Array]:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradient, moments, params)
        examples = jnp.sum(batch >= 0)
        return (optax.apply_updates(params, updates), moments), value * examples

    def epoch(state: tuple, order: jax.Array) -> tuple[tuple, jax.Array]:
        state, totals = jax.lax.scan(update, state, order)
        return state, totals.sum() / len(features)

    (params, _), losses = jax.lax.scan(epoch, (router.params, optimizer.init(router.params)), orders)
    return router.replace(params=params), losses
