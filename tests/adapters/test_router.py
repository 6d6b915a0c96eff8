"""The learned router: what it learns, with labels and without, when it abstains, what its weights mix."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import batch, drawn_params, model

from vla_jax.adapters import Placement, clip_adapter, router_training
from vla_jax.adapters.features import Labelled
from vla_jax.adapters.router import Router, calibrate, router_features
from vla_jax.adapters.router_training import RouterConfig, WithLosses, importance_balance, switch_balance
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASKS, WIDTH = ("counting", "colours", "relations"), 8
CONFIG = RouterConfig(TASKS, epochs=30, batch_size=32, learning_rate=0.05)


def drawn(seed: int, examples: int, noise: float = 0.5) -> Labelled:
    """Normalised features around a direction a task; the tasks are separable where there is little noise."""
    generator = np.random.default_rng(seed)
    centres = 2 * np.eye(len(TASKS), WIDTH)
    labels = generator.integers(0, len(TASKS), examples).astype(np.int32)
    features = centres[labels] + noise * generator.standard_normal((examples, WIDTH))
    return Labelled(np.asarray(router_features(jnp.asarray(features, jnp.float32))), labels)


def losses_of(given: Labelled, seed: int) -> WithLosses:
    """What adapters would lose: each least on its own task, on top of how hard an example is for all of them."""
    generator = np.random.default_rng(seed)
    hard = generator.uniform(0, 3, (len(given.labels), 1))
    own = np.arange(len(TASKS)) == given.labels[:, None]
    return WithLosses(given.features, hard + np.where(own, 0.2, 1.0) + 0.05 * generator.standard_normal(own.shape))


TRAIN, HELD_OUT = drawn(0, 200), drawn(1, 100)


def router_with(logits: np.ndarray, threshold: float = 0.0) -> Router:
    """A router that gives example i (a one-hot feature) the i-th row of logits."""
    params = {"out": {"kernel": jnp.asarray(logits, jnp.float32), "bias": jnp.zeros(logits.shape[1])}}
    return Router(params, jnp.float32(threshold), tuple(f"task{k}" for k in range(logits.shape[1])))


# Learning


def test_separable_tasks_are_told_apart_from_labels():
    fit = CONFIG.fit(TRAIN, HELD_OUT, jax.random.key(0))
    assert fit.accuracy >= 0.98
    found = np.asarray(fit.router.route(HELD_OUT.features))
    assert fit.accuracy == pytest.approx(np.mean(found == HELD_OUT.labels), abs=1e-6)
    np.testing.assert_allclose(fit.shares, np.bincount(found, minlength=3) / len(found), atol=1e-12)
    assert fit.epoch_losses[0] > 2 * fit.epoch_losses[-1]


def test_a_hidden_layer_learns_what_no_line_separates():
    generator = np.random.default_rng(4)
    features = generator.choice([-1.0, 1.0], (400, 2)) + 0.1 * generator.standard_normal((400, 2))
    labels = (features[:, 0] * features[:, 1] > 0).astype(np.int32)
    train, held_out = Labelled(features[:300], labels[:300]), Labelled(features[300:], labels[300:])
    config = RouterConfig(("same", "other"), epochs=60, batch_size=64, learning_rate=0.03)
    accuracy = {
        hidden: dataclasses.replace(config, hidden=hidden).fit(train, held_out, jax.random.key(1)).accuracy
        for hidden in (None, 16)
    }
    assert accuracy[16] >= 0.98
    assert accuracy[None] < 0.8


def test_tasks_are_found_from_losses_alone():
    config = dataclasses.replace(CONFIG, balance="switch")
    fit = config.fit_losses(losses_of(TRAIN, 2), losses_of(HELD_OUT, 3), jax.random.key(0))
    assert np.mean(np.asarray(fit.router.route(HELD_OUT.features)) == HELD_OUT.labels) >= 0.98
    assert fit.accuracy >= 0.98


def test_what_is_reported_without_labels_is_the_expected_loss():
    held_out = losses_of(HELD_OUT, 3)
    fit = CONFIG.fit_losses(losses_of(TRAIN, 2), held_out, jax.random.key(0))
    expected = np.mean(np.sum(np.asarray(fit.router.probabilities(held_out.features)) * held_out.losses, axis=1))
    assert fit.loss == pytest.approx(expected, rel=1e-5)
    # As good as knowing the task would be, and better than any one task for all.
    assert fit.loss < held_out.losses.min(1).mean() + 0.1
    assert fit.loss < held_out.losses.mean(0).min() - 0.3


def test_balance_keeps_a_router_from_one_task_for_all():
    # One adapter is a little better on every example: alone, the expected loss sends everything there.
    generator = np.random.default_rng(6)
    losses = np.tile([0.9, 1.0, 1.0], (200, 1)) + 0.02 * generator.standard_normal((200, 3))
    given = WithLosses(TRAIN.features, losses)
    shares = {}
    for balance, weight in (("none", 0.0), ("importance", 1.0), ("switch", 1.0)):
        config = dataclasses.replace(CONFIG, balance=balance, balance_weight=weight, batch_size=200)
        fit = config.fit_losses(given, given, jax.random.key(0))
        shares[balance] = np.asarray(fit.router.probabilities(TRAIN.features)).mean(0).max()
        if balance == "none":
            np.testing.assert_array_equal(fit.shares, [1, 0, 0])
    assert shares["none"] > 0.95
    assert shares["importance"] < 0.5
    assert shares["switch"] < 0.5


def test_training_follows_its_key():
    config = dataclasses.replace(CONFIG, hidden=4, epochs=2)
    first, again, other = (config.fit(TRAIN, HELD_OUT, jax.random.key(k)).router.params for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["out"]["kernel"], other["out"]["kernel"])


def test_held_out_data_change_nothing_but_the_report():
    config = dataclasses.replace(CONFIG, epochs=2)
    one, other = (config.fit(TRAIN, given, jax.random.key(0)) for given in (HELD_OUT, drawn(7, 30)))
    jax.tree.map(np.testing.assert_array_equal, one.router, other.router)


@pytest.mark.parametrize(("labelled", "hidden"), [(True, None), (False, 8)])
def test_tasks_in_another_order_give_the_same_router_in_that_order(labelled, hidden):
    order = np.array([2, 0, 1])  # the task that stands at each place afterwards
    config = dataclasses.replace(CONFIG, hidden=hidden, epochs=5, balance="importance")
    turned = dataclasses.replace(config, tasks=tuple(TASKS[k] for k in order))
    if labelled:
        place = np.argsort(order)
        sets = [(given, given._replace(labels=place[given.labels])) for given in (TRAIN, HELD_OUT)]
    else:
        with_losses = [losses_of(TRAIN, 2), losses_of(HELD_OUT, 3)]
        sets = [(given, given._replace(losses=given.losses[:, order])) for given in with_losses]
    fit = "fit" if labelled else "fit_losses"
    before = getattr(config, fit)(sets[0][0], sets[1][0], jax.random.key(0)).router
    after = getattr(turned, fit)(sets[0][1], sets[1][1], jax.random.key(0)).router
    expected = np.asarray(before.probabilities(HELD_OUT.features))
    assert expected.std() > 0.1
    np.testing.assert_allclose(after.probabilities(HELD_OUT.features), expected[:, order], rtol=1e-4, atol=1e-6)
    names = [np.array(router.tasks)[np.asarray(router.route(HELD_OUT.features))] for router in (before, after)]
    np.testing.assert_array_equal(*names)


# Balance


PROBABILITIES = np.random.default_rng(8).dirichlet([1, 2, 3, 4], 9).astype(np.float32)
VALID = np.arange(9) % 4 != 2


def test_importance_by_hand():
    sums = [sum(float(p[k]) for p, v in zip(PROBABILITIES, VALID, strict=True) if v) for k in range(4)]
    mean = sum(sums) / 4
    expected = sum((s - mean) ** 2 for s in sums) / 4 / mean**2
    assert float(importance_balance(jnp.asarray(PROBABILITIES), jnp.asarray(VALID))) == pytest.approx(
        expected, rel=1e-5
    )


def test_switch_by_hand():
    rows = [p for p, v in zip(PROBABILITIES, VALID, strict=True) if v]
    expected = 0.0
    for k in range(4):
        share = sum(max(range(4), key=lambda i, p=p: p[i]) == k for p in rows) / len(rows)
        expected += 4 * share * sum(float(p[k]) for p in rows) / len(rows)
    np.testing.assert_allclose(switch_balance(jnp.asarray(PROBABILITIES), jnp.asarray(VALID)), expected, rtol=1e-5)


@pytest.mark.parametrize(("term", "least", "most"), [(importance_balance, 0, 3), (switch_balance, 1, 4)])
def test_balance_is_least_when_spread_evenly_and_greatest_for_one_task(term, least, most):
    valid = jnp.ones(8, bool)
    assert float(term(jnp.tile(jnp.eye(4), (2, 1)), valid)) == pytest.approx(least, abs=1e-6)
    assert float(term(jnp.tile(jnp.eye(4)[:1], (8, 1)), valid)) == pytest.approx(most, rel=1e-6)


# Routes and mixtures


def test_abstention_is_exact_at_the_threshold():
    logits = np.array([[2.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [0, 0, 0.3]])
    router, features = router_with(logits), np.eye(4, dtype=np.float32)
    top = np.asarray(router.probabilities(features)).max(1)
    assert top[1] == top[2]
    np.testing.assert_array_equal(router.route(features), [0, 1, 1, 2])
    at = router.replace(threshold=jnp.asarray(top[1]))
    np.testing.assert_array_equal(at.route(features), [0, 1, 1, -1])  # equal is not below
    above = router.replace(threshold=jnp.asarray(np.nextafter(top[1], np.float32(1))))
    np.testing.assert_array_equal(above.route(features), [0, -1, -1, -1])
    assert above.route(features).dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(above.mix(features)).sum(1)[1:], [0, 0, 0])


def test_mixture_weights_are_the_distribution_where_the_router_is_sure():
    logits = np.random.default_rng(9).standard_normal((6, 3))
    router, features = router_with(logits, 0.5), np.eye(6, dtype=np.float32)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sure = expected.max(1) >= 0.5
    assert 0 < sure.sum() < 6
    np.testing.assert_allclose(router.mix(features), np.where(sure[:, None], expected, 0), rtol=1e-5)
    np.testing.assert_allclose(router.probabilities(features), expected, rtol=1e-5)


def test_its_weights_mix_what_the_tasks_adapters_do():
    # At a tower's last map nothing follows, so that mixed features are the mean of the tasks' features by definition.
    placement = Placement(clip_adapter().method, "feature", slots=("projection",), tasks=("a", "b", "c"))
    given = model((placement,))
    params, rows = drawn_params(given), batch(6)
    logits = np.random.default_rng(11).standard_normal((6, 3))
    weights = np.asarray(router_with(logits, 0.5).mix(np.eye(6, dtype=np.float32)))
    assert 0 < (weights.sum(1) > 0).sum() < 6

    @jax.jit
    def features(**route):
        output = given.apply(params, {k: v for k, v in rows.items() if k != "route"} | route)
        return jnp.stack([output.image_features, output.text_features])

    alone = np.stack([features(route=np.full(6, k, np.int32)) for k in range(-1, 3)])
    assert np.abs(np.diff(alone, axis=0)).min(axis=(0, 1)).max() > 1e-3
    weights_of_all = np.concatenate([1 - weights.sum(1, keepdims=True), weights], axis=1)
    expected = np.einsum("ktbw,bk->tbw", alone, weights_of_all)
    np.testing.assert_allclose(features(mixture=weights), expected, rtol=1e-4, atol=1e-5)


def test_weights_for_another_number_of_tasks_are_refused():
    given = model((Placement(clip_adapter().method, "feature", slots=("projection",), tasks=("a", "b", "c")),))
    with pytest.raises(UserError, match=r"\[batch, 3 tasks\].*\(16, 2\)"):
        jax.eval_shape(given.apply, given.shapes(), batch() | {"mixture": np.ones((16, 2), np.float32)})


def test_another_threshold_compiles_nothing_anew():
    run = jax.jit(Router.route)
    router, features = router_with(np.eye(3)), np.eye(3, dtype=np.float32)
    for threshold in (0.0, 0.4, 0.9):
        run(router.replace(threshold=jnp.float32(threshold)), features)
    assert run._cache_size() == 1


# Calibration


def of_certainty(top: np.ndarray, right: np.ndarray) -> tuple[Router, Labelled]:
    """A router of two tasks with these top probabilities, and labels with which it is right where it should be."""
    router = router_with(np.stack([np.log(top / (1 - top)), np.zeros(len(top))], axis=1))
    return router, Labelled(np.eye(len(top), dtype=np.float32), np.where(right, 0, 1))


def test_threshold_keeps_the_accuracy_and_routes_as_many_as_it_can():
    top = np.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.52])
    right = np.array([1, 0, 1, 1, 1, 0, 1, 0, 0, 0], bool)
    router, validation = of_certainty(top, right)
    for wanted in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0):
        # Every number of the surest that keeps the accuracy; the largest is wanted.
        counts = [n for n in range(1, 11) if right[:n].mean() >= wanted]
        found = calibrate(router, validation, wanted)
        assert found.coverage == pytest.approx(max(counts) / 10)
        assert found.accuracy == pytest.approx(right[: max(counts)].mean())
        routed = np.asarray(found.router.route(validation.features))
        np.testing.assert_array_equal(routed >= 0, np.arange(10) < max(counts))


def test_all_are_routed_where_all_together_are_accurate_enough():
    router, validation = of_certainty(np.array([0.9, 0.8, 0.6]), np.array([1, 0, 1], bool))
    found = calibrate(router.replace(threshold=jnp.float32(0.99)), validation, 0.6)
    assert float(found.router.threshold) == 0
    assert found.coverage == 1


def test_equally_sure_examples_are_routed_together():
    router, validation = of_certainty(np.array([0.9, 0.8, 0.8, 0.6]), np.array([1, 1, 0, 0], bool))
    found = calibrate(router, validation, 0.9)
    assert (found.accuracy, found.coverage) == (1.0, 0.25)


def test_neighbouring_levels_are_kept_apart():
    router, validation = of_certainty(np.array([0.8, 0.6]), np.array([1, 0], bool))
    level = np.asarray(router.probabilities(validation.features)).max(1)[0]
    close = np.array([level, np.nextafter(level, np.float32(0))])

    class Fixed(Router):
        def probabilities(self, features):
            return jnp.stack([close, 1 - close], axis=1)

    fixed = Fixed(router.params, router.threshold, router.tasks)
    found = calibrate(fixed, validation, 1.0)
    assert found.coverage == 0.5
    np.testing.assert_array_equal(found.router.route(validation.features), [0, -1])


def test_calibration_of_a_trained_router_holds_on_data_of_its_own():
    noisy = [drawn(seed, 400, noise=1.1) for seed in (11, 12, 13, 14)]
    fit = CONFIG.fit(noisy[0], noisy[1], jax.random.key(0))
    assert fit.accuracy < 0.9
    found = calibrate(fit.router, noisy[2], 0.9)
    route = np.asarray(found.router.route(noisy[3].features))
    routed = route >= 0
    assert 0.2 < found.coverage < 1
    # Within three standard errors on data that no choice was made on.
    share = np.mean(route[routed] == noisy[3].labels[routed])
    assert share > 0.9 - 3 * np.sqrt(0.9 * 0.1 / routed.sum())


def test_an_accuracy_that_no_threshold_keeps_is_refused():
    router, validation = of_certainty(np.array([0.9, 0.8, 0.6]), np.array([0, 1, 1], bool))
    with pytest.raises(UserError, match=r"keeps an accuracy of 0\.9 .* 0\.6667, is that of the 3 surest of 3"):
        calibrate(router, validation, 0.9)


@pytest.mark.parametrize("accuracy", [0.0, 1.1, float("nan")])
def test_an_accuracy_without_meaning_is_refused(accuracy):
    router, validation = of_certainty(np.array([0.9, 0.8]), np.array([1, 1], bool))
    with pytest.raises(UserError, match="above 0 and at most 1"):
        calibrate(router, validation, accuracy)


# Features and bad input


def test_features_of_both_towers_stand_one_behind_the_other():
    generator = np.random.default_rng(15)
    image, text = (jnp.asarray(generator.standard_normal((5, w)), jnp.float32) for w in (6, 4))
    found = np.asarray(router_features(image, text))
    for part, given in ((found[:, :6], image), (found[:, 6:], text)):
        expected = np.asarray(given, np.float64)
        expected = expected / np.sqrt((expected**2).mean(1, keepdims=True))
        np.testing.assert_allclose(part, expected, rtol=1e-5)
    np.testing.assert_array_equal(router_features(text=text), found[:, 6:])
    np.testing.assert_allclose(router_features(3 * image, text / 7), found, rtol=1e-5)


def test_features_of_nothing_or_of_other_examples_are_refused():
    with pytest.raises(UserError, match="image, of the text or of both; none are given"):
        router_features()
    with pytest.raises(UserError, match="5 images and of 4 texts"):
        router_features(jnp.ones((5, 2)), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("one",)}, "at least 2 tasks, got one"),
        ({"tasks": ()}, "at least 2 tasks, got none"),
        ({"tasks": ("a", "b", "a")}, "a name of their own each; got 'a', 'b', 'a'"),
        ({"tasks": ("a", "")}, "a name of their own each"),
        ({"hidden": 0}, "hidden of a router must be at least 1, got 0"),
        ({"epochs": 0}, "epochs of a router must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size of a router must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate of a router must be positive, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay of a router must not be negative"),
        ({"balance_weight": -1.0}, "balance_weight of a router must not be negative"),
        ({"balance": "swich"}, "unknown balance of a router 'swich'; did you mean 'switch'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RouterConfig(**({"tasks": TASKS} | settings))


def test_data_that_do_not_fit_are_refused():
    key = jax.random.key(0)
    with pytest.raises(UserError, match="training examples names no class; the tasks have labels 0 to 2"):
        CONFIG.fit(TRAIN._replace(labels=TRAIN.labels + 1), HELD_OUT, key)
    with pytest.raises(UserError, match="held-out examples have width 5; the width here is 8"):
        CONFIG.fit(TRAIN, HELD_OUT._replace(features=HELD_OUT.features[:, :5]), key)
    given = losses_of(TRAIN, 0)
    with pytest.raises(UserError, match=r"held-out examples are \[examples, tasks\], here \[200, 3\]; given \[200, 2"):
        CONFIG.fit_losses(given, given._replace(losses=given.losses[:, :2]), key)
    broken = np.array(given.losses)
    broken[[4, 9], 1] = np.nan
    with pytest.raises(UserError, match=r"2 rows of the losses of the training examples are not finite, .* row 4"):
        CONFIG.fit_losses(given._replace(losses=broken), given, key)
    router = CONFIG.init(key, WIDTH)
    with pytest.raises(UserError, match=r"takes features \[batch, 8\]; given \(4, 5\)"):
        router.route(jnp.ones((4, 5)))
    with pytest.raises(UserError, match="validation examples have width 5; the width here is 8"):
        calibrate(router, Labelled(np.ones((4, 5)), np.zeros(4, int)), 0.5)


def test_a_new_router_finds_every_task_equally_likely():
    for hidden in (None, 5):
        router = dataclasses.replace(CONFIG, hidden=hidden).init(jax.random.key(0), WIDTH)
        np.testing.assert_allclose(router.probabilities(TRAIN.features), 1 / 3, rtol=1e-6)
        assert router.width == WIDTH
    assert router_training.RouterConfig(TASKS).init(jax.random.key(0), 4).tasks == TASKS
