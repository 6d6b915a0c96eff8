"""Tip-Adapter and Tip-Adapter-F (Zhang et al., ECCV 2022): few-shot features beside CLIP's zero-shot classifier.

For a feature f of length one, with class weights W (one text feature a class), keys K (the few-shot features) and
values V (their labels as one-hot rows), both of length one row by row (equations 3 to 5 of the paper)::

    logits = 100 f W^T + alpha exp(-beta (1 - f K^T)) V

Tip-Adapter trains nothing. Tip-Adapter-F trains the keys, which then need not keep length one.

The published code chooses the epoch of Tip-Adapter-F on the test split and reports the better of two test accuracies.
Here alpha, beta and the epoch are chosen on validation data, and nothing takes test data: the chosen :class:`TipCache`
is what is tested. The published code also averages the keys over ten augmented views and trains -F on augmented views;
features are frozen here, so whoever wants the first gives the average of the views' features as ``train``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from vla_jax.adapters.features import AnyArray, Labelled, checked_features, checked_labels, epoch_orders, unit
from vla_jax.errors import UserError

# Validation examples looked at together: it bounds the memory of the search, whatever the size of the split.
_CHUNK = 1024


@flax.struct.dataclass
class TipCache:
    """A classifier: the zero-shot one with few-shot features beside it. A pytree, to be given to compiled functions.

    Attributes:
        keys: float32 ``[shots, width]``.
        labels: int32 ``[shots]``; the values V are their one-hot rows.
        class_weights: float32 ``[classes, width]``, of length one.
        scale: float32 ``[]``, what the zero-shot cosines are multiplied with.
        alpha: float32 ``[]``, the weight of what the few-shot features say.
        beta: float32 ``[]``, how quickly it falls with the distance from them.
    """

    keys: jax.Array
    labels: jax.Array
    class_weights: jax.Array
    scale: jax.Array
    alpha: jax.Array
    beta: jax.Array

    def logits(self, features: Float[AnyArray, "batch width"]) -> Float[Array, "batch classes"]:
        """One logit a class, of features of any length."""
        features = unit(features)
        return self._zero_shot(features) + self.alpha * self._votes(features @ self.keys.T, self.beta)

    def _zero_shot(self, features: jax.Array) -> jax.Array:
        return self.scale * features @ self.class_weights.T

    def _votes(self, affinity: jax.Array, beta: jax.Array) -> jax.Array:
        values = jax.nn.one_hot(self.labels, len(self.class_weights))
        return jnp.exp(-beta * (1 - affinity)) @ values

    def right(
        self,
        features: Float[AnyArray, "chunks rows width"],
        labels: Int[AnyArray, "chunks rows"],
        betas: Float[AnyArray, "betas"],
        alphas: Float[AnyArray, "alphas"],
    ) -> Int[Array, "betas alphas"]:
        """How many examples every beta with every alpha gets right; labels of -1 never are.

        Args:
            features: of length one, in chunks that are looked at one after the other.
            labels: of these.
            betas: in place of the cache's own.
            alphas: in place of the cache's own.
        """

        def of_chunk(counts: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            features, labels = chunk
            zero_shot, affinity = self._zero_shot(features), features @ self.keys.T

            def of_beta(beta: jax.Array) -> jax.Array:
                votes = self._votes(affinity, beta)
                predicted = lambda alpha: jnp.argmax(zero_shot + alpha * votes, -1)  # noqa: E731
                return jax.lax.map(lambda alpha: jnp.sum(predicted(alpha) == labels), alphas)

            return counts + jax.lax.map(of_beta, betas), None

        none = jnp.zeros((len(betas), len(alphas)), jnp.int32)
        return jax.lax.scan(of_chunk, none, (features, labels))[0]


class TipFit(NamedTuple):
    """What came of fitting.

    Attributes:
        cache: the classifier, with the keys, alpha and beta that were chosen.
        accuracy: of ``cache`` on the validation data.
        epoch: the chosen epoch, counted from 1; 0 where no keys were trained.
        epoch_accuracies: float ``[epochs]``, on the validation data after each epoch, with the alpha and beta of
            training; empty where no keys were trained.
        epoch_losses: float ``[epochs]``, mean cross-entropy of each epoch; empty where no keys were trained.
    """

    cache: TipCache
    accuracy: float
    epoch: int
    epoch_accuracies: np.ndarray
    epoch_losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class TipAdapter:
    """Settings of both forms; the defaults are those of the published code for ImageNet.

    The grid of the search is the published one: ``0.1 + i (limit - 0.1) / steps`` for i = 0 to steps - 1, so that the
    limit itself is not in it; the first of equally good points wins, with beta in the outer loop.

    Attributes:
        scale: what the zero-shot cosines are multiplied with; 100 is CLIP's own.
        alpha: in training.
        beta: in training.
        alpha_limit: where the grid of alpha ends.
        alpha_steps: points of it.
        beta_limit: where the grid of beta ends.
        beta_steps: points of it.
        epochs: of training.
        batch_size: of training; an epoch's last batch may be smaller.
        learning_rate: the first one, which falls to zero along half a cosine, update by update.
        weight_decay: of AdamW, times the learning rate.
        epsilon: of AdamW.
    """

    scale: float = 100.0
    alpha: float = 1.17
    beta: float = 1.0
    alpha_limit: float = 3.0
    alpha_steps: int = 20
    beta_limit: float = 7.0
    beta_steps: int = 200
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    epsilon: float = 1e-4

    def __post_init__(self):
        for name in ("scale", "alpha", "beta", "learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} of Tip-Adapter must be positive, got {getattr(self, name)}")
        for name in ("alpha_limit", "beta_limit"):
            if not getattr(self, name) > 0.1:
                raise UserError(
                    f"{name} of Tip-Adapter must be above 0.1, where its grid begins; got {getattr(self, name)}"
                )
        for name in ("alpha_steps", "beta_steps", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of Tip-Adapter must be at least 1, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay of Tip-Adapter must not be negative, got {self.weight_decay}")

    @property
    def alphas(self) -> np.ndarray:
        """The grid of alpha, float32 ``[alpha_steps]``."""
        return _grid(self.alpha_limit, self.alpha_steps)

    @property
    def betas(self) -> np.ndarray:
        """The grid of beta, float32 ``[beta_steps]``."""
        return _grid(self.beta_limit, self.beta_steps)

    def fit(self, train: Labelled, validation: Labelled, class_weights: ArrayLike) -> TipFit:
        """Tip-Adapter: the few-shot features as they are, alpha and beta chosen on the validation data.

        Args:
            train: the few-shot examples; all features may have any length.
            validation: what alpha and beta are chosen on.
            class_weights: ``[classes, width]``, one text feature a class.

        Raises:
            UserError: for features or labels that do not fit each other, or are zero or not finite.
        """
        cache, chunks = self._prepared(train, validation, class_weights)
        return self._searched(cache, chunks, 0, np.zeros(0), np.zeros(0))

    def fit_keys(self, train: Labelled, validation: Labelled, class_weights: ArrayLike, key: jax.Array) -> TipFit:
        """Tip-Adapter-F: trains the keys, takes the epoch that is best on the validation data, then alpha and beta.

        Args:
            train: as in :meth:`fit`; at once the first keys and what they are trained on.
            validation: what the epoch (the first of the best), alpha and beta are chosen on.
            class_weights: as in :meth:`fit`.
            key: of the order of the examples; see :func:`vla_jax.adapters.features.epoch_orders`.

        Raises:
            UserError: as :meth:`fit` does.
        """
        cache, chunks = self._prepared(train, validation, class_weights)
        orders = epoch_orders(key, len(cache.labels), self.batch_size, self.epochs)
        keys, epoch, right, losses = _train(self, cache, *chunks, orders)
        accuracies = np.asarray(right) / len(np.asarray(validation.labels))
        return self._searched(cache.replace(keys=keys), chunks, int(epoch) + 1, accuracies, np.asarray(losses))

    def _prepared(
        self, train: Labelled, validation: Labelled, class_weights: ArrayLike
    ) -> tuple[TipCache, tuple[jax.Array, jax.Array]]:
        """The cache before anything is chosen, and the validation data in chunks."""
        weights = checked_features("the classes", class_weights)
        classes, width = weights.shape
        sets = []
        for what, given in (("the few-shot examples", train), ("the validation examples", validation)):
            features = checked_features(what, given.features, width)
            labels = checked_labels(what, given.labels, len(features), classes, f"the {classes} class weights")
            sets.append((unit(features), labels))
        (keys, values), (features, labels) = sets
        cache = TipCache(keys, values, unit(weights), *(jnp.float32(x) for x in (self.scale, self.alpha, self.beta)))

        rows = min(_CHUNK, len(labels))
        chunks = -(-len(labels) // rows)
        rest = chunks * rows - len(labels)
        features = jnp.pad(features, ((0, rest), (0, 0))).reshape(chunks, rows, width)
        return cache, (features, jnp.pad(labels, (0, rest), constant_values=-1).reshape(chunks, rows))

    def _searched(
        self,
        cache: TipCache,
        chunks: tuple[jax.Array, jax.Array],
        epoch: int,
        accuracies: np.ndarray,
        losses: np.ndarray,
    ) -> TipFit:
        right = np.asarray(_right(cache, *chunks, self.betas, self.alphas))
        beta, alpha = np.unravel_index(np.argmax(right), right.shape)
        chosen = cache.replace(alpha=jnp.asarray(self.alphas[alpha]), beta=jnp.asarray(self.betas[beta]))
        examples = int(np.sum(np.asarray(chunks[1]) >= 0))
        return TipFit(chosen, float(right[beta, alpha] / examples), epoch, accuracies, losses)


def _grid(limit: float, steps: int) -> np.ndarray:
    return (0.1 + np.arange(steps) * (limit - 0.1) / steps).astype(np.float32)


_right = jax.jit(TipCache.right)


@functools.partial(jax.jit, static_argnums=0)
def _train(
    settings: TipAdapter, cache: TipCache, features: jax.Array, labels: jax.Array, orders: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The keys of the best epoch, that epoch, and of every epoch how many of the chunks are right and the mean loss."""
    shots, shot_labels = cache.keys, cache.labels
    schedule = optax.cosine_decay_schedule(settings.learning_rate, orders.shape[0] * orders.shape[1])
    optimizer = optax.adamw(schedule, eps=settings.epsilon, weight_decay=settings.weight_decay)

    def total_loss(keys: jax.Array, batch: jax.Array) -> jax.Array:
        logits = cache.replace(keys=keys).logits(shots[batch])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, shot_labels[batch])
        return jnp.sum(losses * (batch >= 0))

    def update(state: tuple, batch: jax.Array) -> tuple[tuple, jax.Array]:
        keys, moments = state
        total, gradient = jax.value_and_grad(total_loss)(keys, batch)
        # The mean over the examples that there are: the last batch of an epoch is filled up.
        gradient = gradient / jnp.sum(batch >= 0)
        updates, moments = optimizer.update(gradient, moments, keys)
        return (optax.apply_updates(keys, updates), moments), total

    def epoch(state: tuple, order: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        current, best_keys, best = state
        current, totals = jax.lax.scan(update, current, order)
        trained = cache.replace(keys=current[0])
        right = trained.right(features, labels, cache.beta[None], cache.alpha[None])[0, 0]
        best_keys = jnp.where(right > best, current[0], best_keys)
        return (current, best_keys, jnp.maximum(best, right)), (right, totals.sum() / len(shots))

    start = ((cache.keys, optimizer.init(cache.keys)), cache.keys, jnp.int32(-1))
    (_, best_keys, _), (right, losses) = jax.lax.scan(epoch, start, orders)
    return best_keys, jnp.argmax(right), right, losses
