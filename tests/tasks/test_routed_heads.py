"""Heads of several sizes in one batch, against each task's own classifier on its own examples."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BATCH, WIDTH, assert_sharded_equals_one_device, expected_logits, head, output

from vla_jax.errors import UserError
from vla_jax.tasks.classification import Classification
from vla_jax.tasks.routed_heads import RoutedClassification

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES = (5, 2, 3)
HEADS = RoutedClassification("answers", CLASSES)
ROUTE = np.array([0, 1, 2, -1, 0, 2, 2, 1, -1, 0, 0, 1, 2, 2, 1, 0], np.int32)
LABELS = np.array([4, 1, 2, 0, 3, 0, 1, 0, 0, 1, 2, 1, 2, 0, 0, 4], np.int32)
VALID = np.arange(BATCH) % 5 != 4
ROUTED = np.sum(ROUTE >= 0)
SINGLE = [head(4 * WIDTH, count, seed) for seed, count in enumerate(CLASSES)]


@functools.cache
def stacked():
    """The heads of all tasks, and noise where none of them has a class: the padding must not matter."""
    generator = np.random.default_rng(20)
    params = jax.tree.map(lambda a: jnp.asarray(generator.normal(size=a.shape), jnp.float32), HEADS.init(4 * WIDTH))
    for task, own in enumerate(SINGLE):
        full = jax.tree.map(np.array, params)
        for name, leaf in own["classifier"].items():
            full["classifier"][name][task, ..., : CLASSES[task]] = leaf
        params = jax.tree.map(jnp.asarray, full)
    return params


def batch(**more):
    return {"route": jnp.asarray(ROUTE), "label": jnp.asarray(LABELS)} | {k: jnp.asarray(v) for k, v in more.items()}


def alone(task):
    """A task's rows, and the loss of its own classifier on these alone, by head and by image features."""
    rows = np.flatnonzero(task == ROUTE)
    given, of_task = output(), {"label": jnp.asarray(LABELS[rows])}
    own = given.replace(image_features=given.image_features[rows], text_features=given.text_features[rows])

    def loss(head, image=own.image_features):
        classifier = Classification("alone", CLASSES[task])
        return classifier.loss(head, own.replace(image_features=image), of_task)[0]

    return rows, loss


def test_logits_are_those_of_each_examples_own_head():
    found = np.asarray(HEADS.logits(stacked(), output(), batch()))
    assert found.shape == (BATCH, 5)
    for row, task in enumerate(ROUTE):
        if task < 0:
            assert (found[row] == -np.inf).all()
            continue
        expected = expected_logits(SINGLE[task], output())[row]
        np.testing.assert_allclose(found[row, : CLASSES[task]], expected, rtol=1e-4, atol=1e-4)
        assert (found[row, CLASSES[task] :] == -np.inf).all()


def test_loss_and_accuracy_are_those_of_a_loop():
    for valid in (None, VALID):
        losses, right = [], []
        for row, task in enumerate(ROUTE):
            if task < 0 or (valid is not None and not valid[row]):
                continue
            logits = expected_logits(SINGLE[task], output())[row]
            losses.append(-np.log(np.exp(logits[LABELS[row]]) / sum(np.exp(logits))))
            right.append(logits.argmax() == LABELS[row])
        loss, metrics = HEADS.loss(stacked(), output(), batch() if valid is None else batch(valid=valid))
        np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


def test_gradients_of_a_mixed_batch_are_those_of_each_task_alone():
    gradient = jax.jit(jax.grad(lambda p: HEADS.loss(p, output(), batch())[0]))(stacked())["classifier"]
    for task, count in enumerate(CLASSES):
        rows, loss = alone(task)
        expected = jax.jit(jax.grad(loss))(SINGLE[task])["classifier"]
        for name, leaf in expected.items():
            # A mean over the whole batch weights a task by its share of it.
            own = np.asarray(gradient[name][task]) * ROUTED / len(rows)
            np.testing.assert_allclose(own[..., :count], leaf, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(own[..., count:], 0)
            assert np.abs(leaf).max() > 1e-3


def test_gradients_of_features_are_those_of_each_task_alone():
    given, params = output(), stacked()
    of_image = lambda image: HEADS.loss(params, given.replace(image_features=image), batch())[0]  # noqa: E731
    gradient = np.asarray(jax.jit(jax.grad(of_image))(given.image_features))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[ROUTE < 0], 0)
    for task in range(len(CLASSES)):
        rows, loss = alone(task)
        expected = jax.jit(jax.grad(loss, argnums=1))(SINGLE[task], given.image_features[rows])
        np.testing.assert_allclose(gradient[rows] * ROUTED / len(rows), expected, rtol=1e-4, atol=1e-6)


def test_heads_trained_together_become_those_trained_alone():
    @functools.partial(jax.jit, static_argnums=0)
    def train(loss, params, rate):
        step = lambda _, p: jax.tree.map(lambda a, g: a - rate * g, p, jax.grad(loss)(p))  # noqa: E731
        return jax.lax.fori_loop(0, 5, step, params)

    together = train(lambda p: HEADS.loss(p, output(), batch())[0], HEADS.init(4 * WIDTH), 1.0)
    for task, count in enumerate(CLASSES):
        rows, loss = alone(task)
        expected = train(loss, Classification("alone", count).init(4 * WIDTH), len(rows) / ROUTED)
        found = HEADS.select_task(together, task)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
        assert np.abs(expected["classifier"]["kernel"]).max() > 0.1


def test_predictions_are_the_largest_of_a_tasks_own_logits():
    params = jax.tree.map(lambda a: a, stacked())
    params["classifier"]["bias"] = params["classifier"]["bias"].at[1, 2:].set(1e6)  # in the padding
    found = HEADS.predict(params, output(), batch())
    for row, task in enumerate(ROUTE):
        expected = -1 if task < 0 else expected_logits(SINGLE[task], output())[row].argmax()
        assert found["prediction"][row] == expected
        assert bool(found["correct"][row]) == (task >= 0 and expected == LABELS[row])
    assert found["prediction"].dtype == jnp.int32


def test_new_heads_find_every_class_of_a_task_equally_likely():
    logits = HEADS.logits(HEADS.init(4 * WIDTH), output(), batch())
    probabilities = np.asarray(jax.nn.softmax(logits, -1))
    for row, task in enumerate(ROUTE):
        if task >= 0:
            np.testing.assert_allclose(probabilities[row, : CLASSES[task]], 1 / CLASSES[task], rtol=1e-6)
            np.testing.assert_array_equal(probabilities[row, CLASSES[task] :], 0)


def test_a_batch_without_any_task_has_no_loss_and_no_gradient():
    none = batch() | {"route": jnp.full(BATCH, -1)}
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: HEADS.loss(p, output(), none)[0]))(stacked())
    assert loss == 0
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), gradient)


def test_a_route_beyond_the_last_task_is_not_a_number():
    beyond = batch() | {"route": jnp.asarray(np.where(np.arange(BATCH) == 5, 3, ROUTE))}
    logits = np.asarray(HEADS.logits(stacked(), output(), beyond))
    np.testing.assert_array_equal(np.isnan(logits).any(1), np.arange(BATCH) == 5)
    assert np.isnan(HEADS.loss(stacked(), output(), beyond)[0])


def test_a_label_that_a_task_has_no_class_for_makes_the_loss_infinite():
    wrong = batch() | {"label": jnp.asarray(np.where(np.arange(BATCH) == 1, 4, LABELS))}  # of 2 classes
    assert np.isinf(HEADS.loss(stacked(), output(), wrong)[0])


def test_the_loss_is_a_mean_over_all_devices():
    assert_sharded_equals_one_device(HEADS, stacked(), batch(valid=VALID))


# A bank whose tasks come and go


def test_fewer_classes_than_a_place_has_room_for_are_those_of_a_smaller_head():
    places = RoutedClassification("answers", (5, 5, 5))
    params = places.init(4 * WIDTH)
    for task, own in enumerate(SINGLE):
        params = places.set_task(params, task, own)
    sizes = jnp.where(jnp.asarray(ROUTE) >= 0, jnp.asarray(CLASSES)[ROUTE], 0)
    with_sizes = batch() | {"classes": sizes}
    np.testing.assert_allclose(
        places.logits(params, output(), with_sizes), HEADS.logits(stacked(), output(), batch()), rtol=1e-5, atol=1e-5
    )
    loss = HEADS.loss(stacked(), output(), batch())[0]
    np.testing.assert_allclose(places.loss(params, output(), with_sizes)[0], loss, rtol=1e-6)


def test_another_head_in_a_place_compiles_nothing_anew():
    places = RoutedClassification("answers", (5, 5))
    params, given = places.init(4 * WIDTH), output()
    step = jax.jit(lambda p, b: places.loss(p, given, b)[0])
    route = jnp.asarray(np.arange(BATCH) % 2)
    for own, count in zip(SINGLE, CLASSES, strict=True):
        params = places.set_task(params, 1, own)
        step(params, {"route": route, "label": route, "classes": jnp.where(route == 1, count, 5)})
    assert step._cache_size() == 1


def test_a_head_comes_back_as_it_was_set():
    params = stacked()
    jax.tree.map(np.testing.assert_array_equal, HEADS.select_task(params, 2), SINGLE[2])
    other = head(4 * WIDTH, 3, seed=9)
    changed = HEADS.set_task(params, 2, other)
    jax.tree.map(np.testing.assert_array_equal, HEADS.select_task(changed, 2), other)
    jax.tree.map(np.testing.assert_array_equal, HEADS.select_task(changed, 0), SINGLE[0])
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize(
    ("classes", "message"), [((), "classes of at least one task"), ((3, 1), "at least 2 classes, got 1 for task 1")]
)
def test_numbers_of_classes_without_meaning_are_refused(classes, message):
    with pytest.raises(UserError, match=message):
        RoutedClassification("answers", classes)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"a head of 24 features and 3 classes does not fit .* task 1 has 24 features"):
        HEADS.set_task(stacked(), 1, SINGLE[2])
    with pytest.raises(UserError, match="a head of 6 features and 2 classes does not fit"):
        HEADS.set_task(stacked(), 1, head(WIDTH, 2))
    for call in (lambda: HEADS.set_task(stacked(), 3, SINGLE[1]), lambda: HEADS.select_task(stacked(), -1)):
        with pytest.raises(UserError, match="heads 'answers' have tasks 0 to 2, got"):
            call()
