"""Examples with several pictures or texts against one pair at a time, with all kinds of adapters that matter here."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, LENGTH, backbone, batch, drawn_params, model

from vla_jax import names
from vla_jax.adapters import Bottleneck, Fusion, Placement
from vla_jax.model import AdaptedModel
from vla_jax.pairing import Pairing
from vla_jax.tasks.classification import ZeroShotClassification
from vla_jax.tasks.grounding import BoxPrediction
from vla_jax.tasks.matching import PairMatching
from vla_jax.tasks.ranking import TextRanking

pytestmark = pytest.mark.usefixtures("quick_compilation")

ADAPTERS = {
    "none": (),
    "bottleneck": (Placement(Bottleneck(rank=4), "own", slots=("mlp_out",), layers="last 1"),),
    "fusion": (Placement(Fusion(rank=4, heads=2), "fusion", layers="last 1"),),
    "routed": (Placement(Bottleneck(rank=4), "routed", slots=("mlp_out",), layers="last 1", tasks=("a", "b")),),
}
FIELDS = ("image_features", "text_features", "patch_features", "scale")
EXAMPLES, PICTURES, TEXTS = 4, 2, 3


def examples(pictures, texts):
    """A batch of examples with so many of each; one of either is no axis of its own."""
    drawn = batch(EXAMPLES * pictures * texts)
    rows = {"label": np.arange(EXAMPLES, dtype=np.int32) % 2, "route": np.array([0, 1, -1, 1], np.int32)}
    image = drawn["image"][: EXAMPLES * pictures].reshape(EXAMPLES, pictures, 16, 16, 3)
    rows["image"] = image if pictures > 1 else image[:, 0]
    for name in ("tokens", "text_mask"):
        text = drawn[name][: EXAMPLES * texts].reshape(EXAMPLES, texts, LENGTH)
        rows[name] = text if texts > 1 else text[:, 0]
    return rows


def one_by_one(rows, pictures, texts):
    """The same as a batch of pairs, in the order in which they come out."""
    image = rows["image"] if pictures > 1 else rows["image"][:, None]
    text = {name: rows[name] if texts > 1 else rows[name][:, None] for name in ("tokens", "text_mask")}
    places = [(b, p, t) for b in range(EXAMPLES) for p in range(pictures) for t in range(texts)]
    pairs = {name: np.stack([a[b, t] for b, _, t in places]) for name, a in text.items()}
    pairs["image"] = np.stack([image[b, p] for b, p, _ in places])
    pairs["route"] = np.array([rows["route"][b] for b, _, _ in places])
    return pairs


def apply(given, params, rows, fixed=None):
    program = jax.jit(functools.partial(given.apply, fixed=fixed))
    output = program(params, rows)
    return {name: getattr(output, name) for name in FIELDS}


SLOW = pytest.mark.slow
# Plain towers and weights by example are the same code as the others but for what goes in.
KINDS = ["bottleneck", "fusion", pytest.param("none", marks=SLOW), pytest.param("routed", marks=SLOW)]


@pytest.mark.parametrize("adapters", KINDS)
@pytest.mark.parametrize(("pictures", "texts"), [(PICTURES, 1), (1, TEXTS)])
def test_what_comes_out_is_that_of_one_pair_at_a_time(adapters, pictures, texts):
    given = model(ADAPTERS[adapters])
    params, rows = drawn_params(given), examples(pictures, texts)
    found, expected = apply(given, params, rows), apply(given, params, one_by_one(rows, pictures, texts))
    for name in FIELDS:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-4, err_msg=name)


def test_each_picture_goes_through_the_tower_once_where_nothing_needs_pairs():
    rows = examples(PICTURES, 1)
    counts = {}
    for adapters in ("bottleneck", "fusion"):
        given = model(ADAPTERS[adapters])
        shapes = jax.make_jaxpr(given.apply)(given.shapes(), rows)
        counts[adapters] = str(shapes).count(f"[{EXAMPLES},{LENGTH},32]")
    assert counts["bottleneck"] > counts["fusion"] == 0  # texts are repeated before the tower, or after it


@pytest.mark.parametrize("adapters", KINDS)
def test_fixed_texts_are_those_of_a_batch_that_repeats_them(adapters):
    given, rows = model(ADAPTERS[adapters]), examples(1, 1)
    params = drawn_params(given)
    drawn = batch(TEXTS, seed=9)
    fixed = drawn["tokens"], drawn["text_mask"]
    found = apply(given, params, rows, fixed)
    repeated = rows | {name: np.stack([a] * EXAMPLES) for name, a in zip(("tokens", "text_mask"), fixed, strict=True)}
    expected = apply(given, params, repeated)
    if adapters in ("none", "bottleneck"):
        assert found["image_features"].shape[0] == EXAMPLES
        assert found["text_features"].shape[0] == TEXTS
        expected["image_features"] = expected["image_features"][::TEXTS]
        expected["patch_features"] = expected["patch_features"][::TEXTS]
        expected["text_features"] = expected["text_features"][:TEXTS]
    for name in FIELDS:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-4, err_msg=name)


def zero_shot():
    drawn = batch(4, seed=9)
    tokens = tuple(map(tuple, drawn["tokens"].tolist()))
    return ZeroShotClassification("classes", tokens, tuple(drawn["text_mask"].sum(1).tolist()), 2)


TASKS = {
    "two pictures": (PairMatching(), PICTURES, 1),
    "ranking": (TextRanking(), 1, TEXTS),
    "zero-shot": (zero_shot(), 1, 1),
}


@pytest.mark.parametrize(
    ("task", "adapters"),
    [
        ("two pictures", "bottleneck"),
        pytest.param("ranking", "fusion", marks=SLOW),
        pytest.param("zero-shot", "bottleneck", marks=SLOW),
        pytest.param("two pictures", "fusion", marks=SLOW),
        pytest.param("ranking", "bottleneck", marks=SLOW),
        pytest.param("zero-shot", "fusion", marks=SLOW),
    ],
)
def test_tasks_train_and_go_on_from_streams_that_were_kept(task, adapters):
    task, pictures, texts = TASKS[task]
    given = AdaptedModel(backbone(), task, ADAPTERS[adapters])
    params, rows = drawn_params(given), jax.tree.map(jnp.asarray, examples(pictures, texts))
    frozen, trained = {"backbone": params["backbone"]}, {k: v for k, v in params.items() if k != "backbone"}

    @jax.jit
    def gradient(trained, rows):
        return jax.value_and_grad(lambda t: given.loss(frozen | t, rows, jax.random.key(0))[0])(trained)

    loss, slope = gradient(trained, rows)
    assert np.isfinite(loss)
    for name, leaf in names.flatten(slope["adapters"]).items():
        # Of so few pooled tokens a narrow bottleneck may have no active unit; what comes after it always moves.
        assert np.abs(leaf).max() > 0 or "/down/" in name or "/up/kernel" in name, name
    streams = jax.jit(given.prefix)(params, rows)
    kept = {name: array for name, array in rows.items() if name != "image"} | streams
    assert all(len(array) == EXAMPLES for array in streams.values())
    again, other = gradient(trained, kept)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(slope), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5)
    found = jax.jit(given.predict)(params, rows)
    assert found["correct"].shape == (EXAMPLES,)


def test_grounding_trains_with_an_adapter():
    given = AdaptedModel(backbone(), BoxPrediction(width=8), ADAPTERS["bottleneck"])
    params = drawn_params(given)
    rows = examples(1, 1) | {"box": np.tile(np.float32([0.1, 0.2, 0.5, 0.9]), (EXAMPLES, 1))}
    rows = jax.tree.map(jnp.asarray, rows)
    slope = jax.jit(jax.grad(lambda a: given.loss(params | {"adapters": a}, rows, jax.random.key(0))[0]))(
        params["adapters"]
    )
    moved = [np.abs(leaf).max() > 0 for name, leaf in names.flatten(slope).items() if name.endswith("up/bias")]
    assert len(moved) == 2
    assert all(moved)


def test_patch_features_are_the_towers_tokens_in_the_common_space():
    given = backbone()
    clip = model(()).clip
    output = jax.jit(clip.apply)({"params": given.params}, batch(3)["image"])
    assert output.patch_features.shape == (3, CONFIG.grid**2, CONFIG.projection)
    vision = jax.tree.map(lambda a: np.asarray(a, np.float64), given.params["vision"])
    for tokens, features in zip(np.asarray(output.image_tokens, np.float64), output.patch_features, strict=True):
        for token, feature in zip(tokens[1:], features, strict=True):
            centred = (token - token.mean()) / np.sqrt(token.var() + CONFIG.vision.norm_epsilon)
            normed = centred * vision["post_norm"]["scale"] + vision["post_norm"]["bias"]
            np.testing.assert_allclose(feature, normed @ vision["projection"]["kernel"], rtol=1e-3, atol=1e-3)


def test_one_of_each_is_left_as_it_is():
    plain = Pairing(1, 1)
    rows = np.zeros((3, 5))
    assert plain.images(rows, repeat=True) is rows
    assert plain.text(None, repeat=True) is None
    assert dataclasses.asdict(Pairing.of(np.zeros((2, 3, 8, 8, 3)), 4, np.zeros((2, 7)))) == {"pictures": 3, "texts": 1}
