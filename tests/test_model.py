from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, PLACEMENTS, backbone, batch, drawn_params, model

from vla_jax import names
from vla_jax.adapters import Bottleneck, Fusion, Placement
from vla_jax.backbones.convert import abstract_params
from vla_jax.errors import UserError
from vla_jax.tasks.classification import Classification
from vla_jax.tasks.matching import Matching

pytestmark = pytest.mark.usefixtures("quick_compilation")


LATE = (Placement(Fusion(rank=4, heads=2), "fusion", layers="last 1"),)
TASKS = (Placement(Bottleneck(rank=4), "routed", slots=("mlp_out",), tasks=("a", "b")),)


_program = functools.cache(lambda given: jax.jit(given.predict))


def _predict(given, params, rows):
    return {name: np.asarray(value) for name, value in _program(given)(params, rows).items()}


def test_names_of_the_tree():
    flat = names.flatten(model().shapes())
    assert {name.split("/")[0] for name in flat} == {"backbone", "adapters", "heads"}
    own = {name for name in flat if name.startswith("backbone/")}
    assert own == {f"backbone/{name}" for name in names.flatten(abstract_params(CONFIG))}
    assert {name.split("/")[1] for name in flat if name.startswith("adapters/")} == {"bottleneck", "lora", "fusion"}
    assert "adapters/bottleneck/vision/mlp_out/down/kernel" in flat
    assert flat["heads/matching/classifier/kernel"].shape == (4 * CONFIG.projection, 1)


def test_without_adapters_there_is_no_branch_for_them():
    assert set(model(()).shapes()) == {"backbone", "heads"}


def test_shapes_are_those_of_init_and_nothing_is_computed():
    shapes = names.flatten(model().shapes())
    made = names.flatten(jax.jit(model().init)(jax.random.key(0)))  # jit puts the names in another order
    assert shapes.keys() == made.keys()
    for name, leaf in made.items():
        assert isinstance(shapes[name], jax.ShapeDtypeStruct)
        assert (shapes[name].shape, shapes[name].dtype) == (leaf.shape, leaf.dtype), name
    # A backbone of shapes alone will do.
    hollow = dataclasses.replace(backbone(), params=abstract_params(CONFIG))
    assert names.flatten(model(backbone=hollow).shapes()) == shapes


def test_init_keeps_the_backbone_and_draws_the_rest_by_the_key():
    given = model(PLACEMENTS[:1])
    params, again, other = (given.init(jax.random.key(k)) for k in (0, 0, 1))
    assert params["backbone"] is given.backbone.params
    flat = names.flatten(params["adapters"])
    for name, leaf in names.flatten(again["adapters"]).items():
        np.testing.assert_array_equal(leaf, flat[name])
    assert any(not np.array_equal(leaf, flat[name]) for name, leaf in names.flatten(other["adapters"]).items())


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_model_shown_one_modality_does_not_see_the_other(modality):
    alone, rows, others = model((), modalities=(modality,)), batch(), batch(seed=1)
    params = drawn_params(alone)
    assert params["heads"]["matching"]["classifier"]["kernel"].shape == (CONFIG.projection, 1)
    hidden = ("image",) if modality == "text" else ("tokens", "text_mask")
    first = _predict(alone, params, rows)["score"]
    np.testing.assert_array_equal(first, _predict(alone, params, rows | {k: others[k] for k in hidden})["score"])
    seen = {k: others[k] for k in ("image", "tokens", "text_mask") if k not in hidden}
    assert not np.allclose(first, _predict(alone, params, rows | seen)["score"], rtol=1e-3)
    # What is hidden need not even be there.
    np.testing.assert_array_equal(
        first, _predict(alone, params, {k: rows[k] for k in rows if k not in hidden})["score"]
    )


@pytest.mark.parametrize(
    "placements",
    [
        pytest.param((), id="none"),
        pytest.param(LATE, id="late"),
        pytest.param(PLACEMENTS[:1], id="from the bottom", marks=pytest.mark.slow),
    ],
)
def test_going_on_from_a_prefix_is_the_whole_way(placements):
    whole = model(placements)
    params, rows = drawn_params(whole), batch()
    streams = jax.jit(whole.prefix)(params, rows)
    assert {name: array.shape[:2] for name, array in streams.items()} == {
        "image_stream": (16, 5),
        "text_stream": (16, 6),
    }
    cached = {name: array for name, array in rows.items() if name != "image"} | streams
    frozen = {"backbone": params["backbone"]}

    @jax.jit
    def gradient(trained, rows):
        return jax.value_and_grad(lambda t: whole.loss(frozen | t, rows, jax.random.key(3))[0])(trained)

    trained = {name: tree for name, tree in params.items() if name != "backbone"}
    (loss, slope), (other, other_slope) = gradient(trained, rows), gradient(trained, cached)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    for name, leaf in names.flatten(slope).items():
        expected = names.flatten(other_slope)[name]
        assert np.linalg.norm(leaf - expected) <= 1e-5 * np.linalg.norm(expected), name
    first, second = _predict(whole, params, rows), _predict(whole, params, cached)
    np.testing.assert_allclose(second["score"], first["score"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(second["correct"], first["correct"])


def test_a_model_shown_pictures_alone_goes_on_from_the_image_stream():
    late = (Placement(Bottleneck(rank=4), "late", towers=("vision",), slots=("mlp_out",), layers="last 1"),)
    whole = model(late, modalities=("image",), task=Classification("shapes", 2))
    params, rows = drawn_params(whole), batch()
    seen = {name: rows[name] for name in rows if name not in ("tokens", "text_mask")}
    streams = jax.jit(whole.prefix)(params, seen)
    assert {name: array.shape[:2] for name, array in streams.items()} == {"image_stream": (16, 5)}
    cached = {name: array for name, array in seen.items() if name != "image"} | streams
    first, second = _predict(whole, params, seen), _predict(whole, params, cached)
    np.testing.assert_allclose(second["confidence"], first["confidence"], rtol=1e-5)
    np.testing.assert_array_equal(second["prediction"], first["prediction"])


def test_the_prefix_of_adapters_at_the_bottom_is_the_embeddings_and_without_adapters_the_last_block():
    rows, given = batch(), backbone()
    params = {"backbone": given.params}
    apply = jax.jit(functools.partial(model(()).clip.apply, hidden_states=True))
    outputs = apply({"params": given.params}, rows["image"], rows["tokens"], rows["text_mask"])
    for placements, block in ((PLACEMENTS[:1], 0), (LATE, CONFIG.vision.depth), ((), CONFIG.vision.depth)):
        streams = jax.jit(model(placements).prefix)(params, rows)
        np.testing.assert_allclose(streams["image_stream"], outputs.image_hidden[block], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(streams["text_stream"], outputs.text_hidden[block], rtol=1e-5, atol=1e-6)


def test_only_adapters_with_tasks_ask_for_the_route():
    rows = batch()
    routeless = {name: array for name, array in rows.items() if name != "route"}
    plain = model(PLACEMENTS[:1])
    params = drawn_params(plain)
    bare = rows | {"route": np.full(16, -1, np.int32)}
    np.testing.assert_array_equal(_predict(plain, params, bare)["score"], _predict(plain, params, routeless)["score"])

    routed = model(TASKS)
    params = drawn_params(routed)
    scores = [_predict(routed, params, rows | {"route": np.full(16, r, np.int32)})["score"] for r in (-1, 0, 1)]
    assert all(not np.allclose(scores[i], scores[j], rtol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))
    mixed = np.arange(16) % 3 - 1
    found = _predict(routed, params, rows | {"route": mixed.astype(np.int32)})["score"]
    np.testing.assert_allclose(found, np.stack(scores)[mixed + 1, np.arange(16)], rtol=1e-4, atol=1e-5)


def test_dropout_follows_the_key_in_training_and_is_off_in_predictions():
    given, rows = model(PLACEMENTS[1:2]), batch()
    params = drawn_params(given)
    on_device = jax.tree.map(jnp.asarray, rows)
    loss = jax.jit(lambda key: given.loss(params, on_device, key)[0])
    first, again, other = (float(loss(jax.random.key(k))) for k in (0, 0, 1))
    assert first == again != other
    # Without a key nothing is dropped.
    one, two = (_predict(given, params, rows)["score"] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    valid, sign = rows["valid"], 2 * rows["label"] - 1
    silent = np.log1p(np.exp(-sign * one.astype(np.float64)))[valid].mean()
    assert min(abs(silent - first), abs(silent - other)) > 1e-4 * silent


def test_the_description_goes_through_json_and_tells_models_apart():
    described = model().description()
    assert json.loads(json.dumps(described)) == described
    others = [
        model(PLACEMENTS[:2]),
        model(task=Matching("other")),
        model(task=Classification("matching", 2)),
        model((), modalities=("text",)),
        model(()),
    ]
    texts = {json.dumps(one.description(), sort_keys=True) for one in (model(), *others)}
    assert len(texts) == 6
    assert model(backbone=backbone()).description() == described


def test_modalities_are_checked():
    with pytest.raises(UserError, match="unknown modality 'images'; did you mean 'image'"):
        model((), modalities=("images",))
    with pytest.raises(UserError, match="at least one modality"):
        model((), modalities=())
