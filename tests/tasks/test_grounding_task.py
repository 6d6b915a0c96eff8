"""Grounding against loops over patches and boxes; that heads can learn; gradients where nothing can be seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pairs import BATCH, WIDTH, assert_sharded_equals_one_device, output

from vla_jax.errors import UserError
from vla_jax.evaluation import grounding as evaluation
from vla_jax.tasks.grounding import BoxPrediction, RegionScoring, heat_map, pointed
from vla_jax.tasks.regions import centres, coverage, overlaps

pytestmark = pytest.mark.usefixtures("quick_compilation")

GRID, PLACES = 4, 5


def given(seed=0):
    drawn = np.random.default_rng(seed).normal(size=(BATCH, GRID * GRID, WIDTH))
    return output(seed).replace(patch_features=jnp.asarray(drawn, jnp.float32), scale=jnp.float32(4))


def boxes(shape, seed=0, low=-0.2, high=1.2):
    corners = np.random.default_rng(seed).uniform(low, high, (*shape, 2, 2))
    corners = np.sort(corners, axis=-2)
    corners[..., 1, :] += 0.05
    return corners.reshape(*shape, 4).astype(np.float32)


def batch(seed=0):
    """Every second example has a candidate that is nearly the annotated box; one has two candidates alone."""
    rows = {"box": boxes((BATCH,), seed), "boxes": boxes((BATCH, PLACES), seed + 1)}
    rows["boxes"][::2, 3] = rows["box"][::2] + 0.005
    mask = np.ones((BATCH, PLACES), bool)
    mask[5, 2:] = False
    return {name: jnp.asarray(a) for name, a in (rows | {"boxes_mask": mask}).items()}


def test_overlaps_are_those_of_the_evaluation_and_of_the_definition():
    first, second = boxes((200,), 0), boxes((200,), 1)
    iou, generalised = overlaps(jnp.asarray(first), jnp.asarray(second))
    np.testing.assert_allclose(iou, evaluation.iou(first, second), rtol=1e-4, atol=1e-6)
    for one, other, found, plain in zip(first, second, generalised, iou, strict=True):
        outer = np.concatenate([np.minimum(one[:2], other[:2]), np.maximum(one[2:], other[2:])])
        area = lambda box: float((box[2] - box[0]) * (box[3] - box[1]))  # noqa: E731
        inner = float(plain) / (1 + float(plain)) * (area(one) + area(other))
        union = area(one) + area(other) - inner
        assert found == pytest.approx(float(plain) - (area(outer) - union) / area(outer), abs=1e-4)


def test_known_generalised_overlaps():
    """Two unit squares side by side, and with a gap as wide as they are."""
    square = jnp.array([0.0, 0, 1, 1])
    assert overlaps(square, square + jnp.array([1.0, 0, 1, 0]))[1] == pytest.approx(0)
    assert overlaps(square, square + jnp.array([2.0, 0, 2, 0]))[1] == pytest.approx(-1 / 3)


def test_coverage_is_a_share_of_each_patchs_points():
    for box in boxes((8,), 3):
        points = (np.arange(GRID * 60) + 0.5) / (GRID * 60)
        inside = ((points >= box[1]) & (points <= box[3]))[:, None] & ((points >= box[0]) & (points <= box[2]))[None]
        expected = inside.reshape(GRID, 60, GRID, 60).mean((1, 3)).ravel()
        np.testing.assert_allclose(coverage(jnp.asarray(box), GRID), expected, atol=0.05)
    np.testing.assert_allclose(
        coverage(jnp.array([0.25, 0, 0.5, 0.375]), GRID)[:8], [0, 1, 0, 0, 0, 0.5, 0, 0], atol=1e-6
    )


def test_patches_go_row_by_row():
    np.testing.assert_allclose(centres(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])


def test_heat_is_the_cosine_of_each_patch():
    out = given()
    for row, patches, text in zip(heat_map(out), out.patch_features, out.text_features, strict=True):
        expected = [p @ text / np.sqrt((p @ p) * (text @ text)) for p in np.asarray(patches, np.float64)]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


def _scores(out, rows):
    """The cosine of each candidate's mean patch with the text, times four; minus infinity where there is none."""
    scores, shares = np.full((BATCH, PLACES), -np.inf), np.asarray(coverage(rows["boxes"], GRID))
    for i in range(BATCH):
        patches = np.asarray(out.patch_features[i], np.float64)
        patches /= np.linalg.norm(patches, axis=1, keepdims=True)
        text = np.asarray(out.text_features[i], np.float64)
        for k in range(PLACES):
            if rows["boxes_mask"][i, k]:
                mean = sum(s * p for s, p in zip(shares[i, k], patches, strict=True))
                scores[i, k] = 4 * mean @ text / np.linalg.norm(mean) / np.linalg.norm(text) if mean.any() else 0
    return scores


def test_regions_are_scored_by_their_mean_patch():
    task, out, rows = RegionScoring(), given(), batch()
    expected = _scores(out, rows)
    np.testing.assert_allclose(task.logits(task.init(1), out, rows), expected, rtol=1e-3, atol=1e-4)
    overlap = np.where(rows["boxes_mask"], evaluation.iou(rows["boxes"], np.asarray(rows["box"])[:, None]), -1)
    losses, right = [], []
    for i in range(BATCH):
        near = overlap[i] >= 0.5
        wrong = expected[i][~near]
        right.append(near.any() and expected[i][near].max() > (wrong.max() if len(wrong) else -np.inf))
        if near.any():
            losses.append(np.log(np.exp(expected[i]).sum()) - expected[i, overlap[i].argmax()])
    loss, metrics = task.loss(task.init(1), out, rows)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)
    found = task.predict(task.init(1), out, rows)
    best = expected.argmax(1)
    np.testing.assert_array_equal(found["prediction"], best)
    np.testing.assert_array_equal(found["correct"], right)
    np.testing.assert_allclose(found["box"], np.asarray(rows["boxes"])[np.arange(BATCH), best])
    np.testing.assert_allclose(found["iou"], overlap[np.arange(BATCH), best], rtol=1e-4, atol=1e-5)
    assert 0 < np.mean(right) < 1


def test_equal_candidates_find_nothing():
    rows = batch() | {"boxes": jnp.tile(jnp.array([0.0, 0, 1, 1]), (BATCH, PLACES, 1))}
    rows["boxes"] = rows["boxes"].at[:, 0].set(rows["box"])
    out = given().replace(patch_features=jnp.ones((BATCH, GRID * GRID, WIDTH)))
    small = np.asarray(overlaps(rows["boxes"][:, 1], rows["box"])[0]) < 0.5
    assert not RegionScoring().predict({"log_scale": jnp.float32(0)}, out, rows)["correct"][small].any()


def _box_head(seed=0):
    task = BoxPrediction(width=8)
    generator = np.random.default_rng(seed)
    return task, jax.tree.map(
        lambda a: jnp.asarray(generator.normal(0, 0.5, a.shape), jnp.float32), task.init(4 * WIDTH)
    )


def test_the_box_is_a_weighted_mean_of_what_patches_say():
    task, params = _box_head()
    out = given()
    found, weights = task.boxes(params, out)
    for i in range(BATCH):
        text = np.asarray(out.text_features[i], np.float64)
        v = text / np.linalg.norm(text) * np.sqrt(WIDTH)
        said, votes = [], []
        for n, patch in enumerate(np.asarray(out.patch_features[i], np.float64)):
            u = patch / np.linalg.norm(patch) * np.sqrt(WIDTH)
            hidden = np.concatenate([u, u * v]) @ np.asarray(params["hidden"]["kernel"]) + params["hidden"]["bias"]
            out_n = np.asarray(jax.nn.gelu(hidden)) @ np.asarray(params["boxes"]["kernel"]) + params["boxes"]["bias"]
            x, y = (n % GRID + 0.5) / GRID, (n // GRID + 0.5) / GRID
            left, up, right, down = np.log1p(np.exp(out_n[1:])) / 4
            said.append([x - left, y - up, x + right, y + down])
            votes.append(np.exp(out_n[0]))
        np.testing.assert_allclose(found[i], np.average(said, axis=0, weights=votes), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(weights[i], votes / np.sum(votes), rtol=1e-3, atol=1e-5)


def test_a_new_head_says_the_middle_of_the_square():
    task = BoxPrediction(width=8)
    box, _ = task.boxes(task.init(4 * WIDTH), given())
    np.testing.assert_allclose((box[:, :2] + box[:, 2:]) / 2, 0.5, atol=1e-6)


def test_the_loss_is_distance_and_overlap_with_what_is_seen():
    task, params = _box_head()
    rows = batch()
    rows["box"] = rows["box"].at[3].set(jnp.array([1.1, 0.1, 1.3, 0.4]))  # beyond the square's edge
    found, _ = task.boxes(params, given())
    losses = []
    for i in range(BATCH):
        truth = np.clip(rows["box"][i], 0, 1)
        if (truth[2:] > truth[:2]).all():
            generalised = float(overlaps(found[i], jnp.asarray(truth))[1])
            losses.append(5 * np.abs(found[i] - truth).mean() + 2 * (1 - generalised))
    loss, metrics = task.loss(params, given(), rows)
    assert len(losses) < BATCH
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    iou = evaluation.iou(found, rows["box"])
    np.testing.assert_allclose(metrics["iou"], iou.mean(), rtol=1e-4)
    predicted = task.predict(params, given(), rows)
    np.testing.assert_allclose(predicted["iou"], iou, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(predicted["correct"], iou >= 0.5)


def test_pointing_agrees_with_the_evaluation_and_needs_a_peak():
    heat = np.random.default_rng(5).normal(size=(BATCH, GRID * GRID)).astype(np.float32)
    truth = boxes((BATCH,), 2)
    found = pointed(jnp.asarray(heat), jnp.asarray(truth))
    points = evaluation.peaks(heat)
    expected = ((points >= truth[:, :2]) & (points <= truth[:, 2:])).all(1)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.mean() < 1
    flat = pointed(jnp.zeros((BATCH, GRID * GRID)), jnp.tile(jnp.array([0.0, 0, 0.8, 1]), (BATCH, 1)))
    assert not flat.any()


def test_a_box_can_be_learnt_where_the_phrases_patch_stands_out():
    generator = np.random.default_rng(0)
    place = generator.integers(0, GRID * GRID, BATCH)
    patches = 0.3 * generator.normal(size=(BATCH, GRID * GRID, WIDTH))
    out = output()
    patches[np.arange(BATCH), place] += np.asarray(out.text_features)
    out = out.replace(patch_features=jnp.asarray(patches, jnp.float32))
    middle = np.asarray(centres(GRID))[place]
    rows = {"box": jnp.asarray(np.concatenate([middle - 0.12, middle + 0.12], axis=1), jnp.float32)}
    task = BoxPrediction(width=32)
    params = task.init(4 * WIDTH)
    optimizer = optax.adam(2e-2)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: task.loss(p, out, rows)[0])(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(150):
        params, state = step(params, state)
    found = task.predict(params, out, rows)
    assert found["correct"].mean() > 0.9
    assert found["pointed"].mean() > 0.9


def test_gradients_are_numbers_where_nothing_is_seen():
    hidden = batch() | {"box": jnp.tile(jnp.array([1.2, 0, 1.4, 1]), (BATCH, 1))}
    hidden["boxes_mask"] = jnp.zeros_like(hidden["boxes_mask"])
    box_task, params = _box_head()
    for task, head in ((box_task, params), (RegionScoring(), {"log_scale": jnp.float32(0)})):
        loss, gradient = jax.jit(jax.value_and_grad(lambda h, task=task: task.loss(h, given(), hidden)[0]))(head)
        assert loss == 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("kind", ["boxes", "regions"])
def test_the_loss_is_a_mean_over_all_devices(kind, monkeypatch):
    monkeypatch.setattr("pairs.output", given)
    task, params = _box_head() if kind == "boxes" else (RegionScoring(), {"log_scale": jnp.float32(0.1)})
    assert_sharded_equals_one_device(task, params, batch() | {"valid": jnp.arange(BATCH) % 5 != 3})


def test_one_modality_is_refused():
    with pytest.raises(UserError, match="both modalities"):
        BoxPrediction().boxes({}, output(text=False))
    with pytest.raises(UserError, match="must be at least 1"):
        BoxPrediction(width=0)
    with pytest.raises(UserError, match="must not be negative"):
        BoxPrediction(distance_weight=-1)
