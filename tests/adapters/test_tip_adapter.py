"""Tip-Adapter against its definition, one number at a time, and Tip-Adapter-F against the same training in PyTorch."""

from __future__ import annotations

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.adapters import tip_adapter
from vla_jax.adapters.features import Labelled, checked_features, checked_labels, epoch_orders
from vla_jax.adapters.tip_adapter import TipAdapter, TipCache
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES, SHOTS, WIDTH = 3, 4, 6
SMALL = TipAdapter(scale=5.0, alpha_steps=6, beta_steps=5, epochs=4, batch_size=5, learning_rate=0.05, epsilon=1e-3)


def features_of(seed: int, examples: int, noise: float = 1.0) -> Labelled:
    """Features of lengths of all kinds around a centre a class."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((CLASSES, WIDTH))
    labels = generator.integers(0, CLASSES, examples).astype(np.int32)
    features = centres[labels] + noise * generator.standard_normal((examples, WIDTH))
    return Labelled((generator.uniform(0.2, 5, (examples, 1)) * features).astype(np.float32), labels)


TRAIN, VALIDATION = features_of(0, CLASSES * SHOTS), features_of(1, 40)
WEIGHTS = np.random.default_rng(2).standard_normal((CLASSES, WIDTH)).astype(np.float32)


def normal(features):
    features = np.asarray(features, np.float64)
    return np.array([row / math.sqrt(sum(x * x for x in row)) for row in features])


def logits_by_hand(features, keys, labels, scale, alpha, beta, weights=WEIGHTS):
    """The definition with loops, in float64; the keys are taken as they are."""
    features, weights, found = normal(features), normal(weights), np.zeros((len(features), CLASSES))
    for i, f in enumerate(features):
        for c in range(CLASSES):
            found[i, c] = scale * sum(f * weights[c])
        for k, label in zip(np.asarray(keys, np.float64), labels, strict=True):
            found[i, label] += alpha * math.exp(-beta * (1 - sum(f * k)))
    return found


def grid_by_hand(limit, steps):
    return [i * (limit - 0.1) / steps + 0.1 for i in range(steps)]


def test_logits_equal_the_definition():
    fit = SMALL.fit(TRAIN, VALIDATION, WEIGHTS)
    cache = fit.cache.replace(alpha=jnp.float32(1.3), beta=jnp.float32(2.5))
    expected = logits_by_hand(VALIDATION.features, normal(TRAIN.features), TRAIN.labels, 5.0, 1.3, 2.5)
    found = jax.jit(TipCache.logits)(cache, VALIDATION.features)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # A length changes nothing, and half precision is looked at in single.
    np.testing.assert_allclose(cache.logits(7 * VALIDATION.features), found, rtol=1e-5, atol=1e-5)
    assert cache.logits(jnp.bfloat16(VALIDATION.features)).dtype == jnp.float32


def test_alpha_of_zero_is_the_zero_shot_classifier():
    cache = SMALL.fit(TRAIN, VALIDATION, WEIGHTS).cache.replace(alpha=jnp.float32(0))
    expected = 5.0 * normal(VALIDATION.features) @ normal(WEIGHTS).T
    np.testing.assert_allclose(cache.logits(VALIDATION.features), expected, rtol=1e-5, atol=1e-5)


def test_defaults_are_the_published_ones():
    method = TipAdapter()
    assert (method.scale, method.alpha, method.beta) == (100.0, 1.17, 1.0)
    assert (method.epochs, method.batch_size, method.learning_rate, method.epsilon) == (20, 256, 1e-3, 1e-4)
    np.testing.assert_allclose(method.betas, grid_by_hand(7, 200), rtol=1e-6)
    np.testing.assert_allclose(method.alphas, grid_by_hand(3, 20), rtol=1e-6)


def search_by_hand(method, keys, labels, validation):
    """The first of the best points with beta in the outer loop, its accuracy, and how sure every comparison was."""
    best, chosen, margin = -1.0, None, math.inf
    for beta in grid_by_hand(method.beta_limit, method.beta_steps):
        for alpha in grid_by_hand(method.alpha_limit, method.alpha_steps):
            logits = logits_by_hand(validation.features, keys, labels, method.scale, alpha, beta)
            first, second = np.sort(logits, -1)[:, :-3:-1].T
            margin = min(margin, np.min(first - second))
            accuracy = np.mean(logits.argmax(-1) == validation.labels)
            if accuracy > best:
                best, chosen = accuracy, (alpha, beta)
    return chosen, best, margin


@pytest.mark.parametrize("chunk", [1024, 7])  # 40 examples: one chunk, and six of which the last is filled up
def test_search_finds_the_point_that_loops_find(monkeypatch, chunk):
    monkeypatch.setattr(tip_adapter, "_CHUNK", chunk)
    (alpha, beta), accuracy, margin = search_by_hand(SMALL, normal(TRAIN.features), TRAIN.labels, VALIDATION)
    assert margin > 1e-5  # no comparison that rounding could turn
    fit = SMALL.fit(TRAIN, VALIDATION, WEIGHTS)
    np.testing.assert_allclose([fit.cache.alpha, fit.cache.beta], [alpha, beta], rtol=1e-6)
    assert fit.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert 1 / CLASSES < accuracy < 1  # there was something to choose
    assert (fit.epoch, fit.epoch_accuracies.size, fit.epoch_losses.size) == (0, 0, 0)


def test_what_is_chosen_does_not_depend_on_anything_but_train_and_validation():
    # No test data can be given: the API has no place for them.
    for function in (TipAdapter.fit, TipAdapter.fit_keys):
        assert set(inspect.signature(function).parameters) <= {"self", "train", "validation", "class_weights", "key"}
    other = SMALL.fit(TRAIN, features_of(5, 40), WEIGHTS)
    np.testing.assert_array_equal(other.cache.keys, SMALL.fit(TRAIN, VALIDATION, WEIGHTS).cache.keys)


def torch_training(torch, method, key):
    """Keys after every epoch and the epochs' mean losses, with PyTorch's optimiser and schedule."""
    tensor = lambda a: torch.tensor(np.asarray(a), dtype=torch.float64)  # noqa: E731
    features, weights = tensor(normal(TRAIN.features)), tensor(normal(WEIGHTS))
    labels = torch.tensor(TRAIN.labels, dtype=torch.long)
    values = torch.nn.functional.one_hot(labels, CLASSES).double()
    keys = torch.nn.Parameter(features.clone())
    optimizer = torch.optim.AdamW([keys], lr=method.learning_rate, eps=method.epsilon)
    batches = -(-len(labels) // method.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, method.epochs * batches)
    trained, losses = [], []
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    for _ in range(method.epochs):
        order = generator.permutation(len(labels))
        total = 0.0
        for start in range(0, len(labels), method.batch_size):
            batch = torch.tensor(order[start : start + method.batch_size])
            affinity = features[batch] @ keys.T
            logits = method.scale * features[batch] @ weights.T
            logits = logits + method.alpha * torch.exp(-method.beta * (1 - affinity)) @ values
            loss = torch.nn.functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        trained.append(keys.detach().numpy().copy())
        losses.append(total / len(labels))
    return trained, losses


@pytest.mark.torch
@pytest.mark.parametrize("batch_size", [5, 256])  # 12 shots: two whole batches and a part, and one batch
def test_trained_keys_equal_those_of_pytorch(batch_size):
    torch = pytest.importorskip("torch")
    method, key = dataclasses.replace(SMALL, batch_size=batch_size, alpha=2.0, beta=3.0), jax.random.key(3)
    trained, losses = torch_training(torch, method, key)
    accuracies = []
    for keys in trained:
        logits = logits_by_hand(VALIDATION.features, keys, TRAIN.labels, 5.0, 2.0, 3.0)
        accuracies.append(np.mean(logits.argmax(-1) == VALIDATION.labels))
    best = int(np.argmax(accuracies))

    fit = method.fit_keys(TRAIN, VALIDATION, WEIGHTS, key)
    # Logits are of the order of ten, and single precision rounds them by up to 5e-7.
    np.testing.assert_allclose(fit.epoch_losses, losses, rtol=1e-5, atol=3e-6)
    np.testing.assert_allclose(fit.epoch_accuracies, accuracies, atol=1e-12)
    assert fit.epoch == best + 1
    np.testing.assert_allclose(fit.cache.keys, trained[best], rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(trained[best] - normal(TRAIN.features)) > 0.1  # they moved
    (alpha, beta), accuracy, margin = search_by_hand(method, trained[best], TRAIN.labels, VALIDATION)
    assert margin > 1e-5
    np.testing.assert_allclose([fit.cache.alpha, fit.cache.beta], [alpha, beta], rtol=1e-6)
    assert fit.accuracy == pytest.approx(accuracy, abs=1e-12)


def test_the_epoch_is_the_one_that_is_best_on_the_validation_data():
    # Labels turned round by one: what the shots teach is wrong there, and every epoch makes it worse.
    wrong = Labelled(VALIDATION.features, (VALIDATION.labels + 1) % CLASSES)
    method = dataclasses.replace(SMALL, epochs=12, learning_rate=0.3)
    fits = [method.fit_keys(TRAIN, given, WEIGHTS, jax.random.key(0)) for given in (VALIDATION, wrong)]
    for fit in fits:
        assert fit.epoch == 1 + int(np.argmax(fit.epoch_accuracies))
    assert fits[0].epoch != fits[1].epoch
    np.testing.assert_array_equal(fits[0].epoch_losses, fits[1].epoch_losses)  # training itself never saw them


def test_training_follows_its_key_and_compiles_once():
    before = tip_adapter._train._cache_size()
    method = dataclasses.replace(SMALL, epochs=3)
    first, again, other = (method.fit_keys(TRAIN, VALIDATION, WEIGHTS, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first.epoch_losses, again.epoch_losses)
    assert not np.array_equal(first.epoch_losses, other.epoch_losses)
    assert tip_adapter._train._cache_size() == before + 1


def test_cosine_falls_to_zero_and_training_lowers_the_loss():
    fit = dataclasses.replace(SMALL, epochs=30).fit_keys(TRAIN, VALIDATION, WEIGHTS, jax.random.key(0))
    assert fit.epoch_losses[-1] < 0.8 * fit.epoch_losses[0]
    changes = np.abs(np.diff(fit.epoch_losses))
    assert changes[-1] < 0.05 * changes[:5].max()


# What features and their order have in common


@pytest.mark.parametrize(("examples", "batch_size", "shape"), [(7, 3, (2, 3, 3)), (6, 3, (2, 2, 3)), (4, 9, (2, 1, 4))])
def test_every_epoch_holds_every_example_once(examples, batch_size, shape):
    orders = epoch_orders(jax.random.key(1), examples, batch_size, 2)
    assert orders.shape == shape
    assert orders.dtype == np.int32
    for epoch in orders.reshape(2, -1):
        np.testing.assert_array_equal(np.sort(epoch[:examples]), np.arange(examples))
        assert (epoch[examples:] == -1).all()
    assert examples < 6 or not np.array_equal(orders[0], orders[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha of Tip-Adapter must be positive, got 0.0"),
        ({"beta": -1.0}, "beta of Tip-Adapter must be positive, got -1.0"),
        ({"scale": 0.0}, "scale of Tip-Adapter must be positive"),
        ({"learning_rate": 0.0}, "learning_rate of Tip-Adapter must be positive"),
        ({"epsilon": 0.0}, "epsilon of Tip-Adapter must be positive"),
        ({"alpha_limit": 0.1}, "alpha_limit of Tip-Adapter must be above 0.1, where its grid begins; got 0.1"),
        ({"beta_steps": 0}, "beta_steps of Tip-Adapter must be at least 1, got 0"),
        ({"epochs": 0}, "epochs of Tip-Adapter must be at least 1, got 0"),
        ({"weight_decay": -0.1}, "weight_decay of Tip-Adapter must not be negative, got -0.1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TipAdapter(**settings)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            TRAIN._replace(features=TRAIN.features[:, :4]),
            VALIDATION,
            "few-shot examples have width 4; the width here is 6",
        ),
        (TRAIN, VALIDATION._replace(features=VALIDATION.features[0]), r"validation examples are \[examples, width\]"),
        (TRAIN._replace(labels=TRAIN.labels + 1), VALIDATION, "names no class; the 3 class weights have labels 0 to 2"),
        (TRAIN._replace(labels=TRAIN.labels - 1), VALIDATION, "label -1 in row"),
        (TRAIN, VALIDATION._replace(labels=VALIDATION.labels[:5]), "one for each of 40 examples; given int32"),
        (TRAIN, VALIDATION._replace(labels=VALIDATION.labels.astype(float)), "whole numbers"),
        (TRAIN, Labelled(np.zeros((0, WIDTH)), np.zeros(0, int)), "at least one example"),
    ],
)
def test_sets_that_do_not_fit_are_refused(train, validation, message):
    for fit in (SMALL.fit, lambda *given: SMALL.fit_keys(*given, jax.random.key(0))):
        with pytest.raises(UserError, match=message):
            fit(train, validation, WEIGHTS)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_features_that_cannot_be_normalised_are_refused(bad):
    features = np.ones((4, 3))
    features[2] = bad
    with pytest.raises(UserError, match="1 of 4 features of them are zero or not finite, the first in row 2"):
        checked_features("them", features)


def test_checked_sets_come_in_single_precision():
    assert checked_features("them", np.ones((2, 3), np.float64), 3).dtype == jnp.float32
    assert checked_labels("them", np.array([1, 0], np.int64), 2, 2, "the tasks").dtype == jnp.int32
