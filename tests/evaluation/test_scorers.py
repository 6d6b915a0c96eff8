"""Scores of probes against the model applied by hand, pair after pair, on a small CLIP with random weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
import small_model
from scipy.spatial.distance import cosine

from vla_jax.adapters import Bottleneck, Fusion, Placement
from vla_jax.data.image import UnreadablePicture
from vla_jax.errors import UserError
from vla_jax.evaluation import controls, winoground
from vla_jax.evaluation.scorers import Asking, Parts, Reading, model_scorer
from vla_jax.tasks.classification import Classification
from vla_jax.training.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

LATE = Placement(Fusion(rank=4, heads=2), "fusion", layers="last 1")
ALONE = Placement(Bottleneck(rank=4), "bottleneck", slots=("mlp_out",))


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(16, 16, 3)).astype(np.float32)


def preprocess(given, generator):
    assert generator is None
    if given is None:
        raise UnreadablePicture("cannot be decoded")
    return small_grey() if given.dtype == np.uint8 else given


@functools.cache
def small_grey() -> np.ndarray:
    return np.full((16, 16, 3), 0.1, np.float32)


def tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Words are numbers; 1 starts and 47 ends."""
    ids = [1, *map(int, text.split()), small_model.CONFIG.eos_token_id]
    tokens = np.zeros(small_model.LENGTH, np.int32)
    tokens[: len(ids)] = ids
    return tokens, np.arange(small_model.LENGTH) < len(ids)


def quadruples(count: int) -> list[dict]:
    generator = np.random.default_rng(7)
    found = []
    for number in range(count):
        words = generator.choice(np.arange(2, 40), 3, replace=False).astype(str)
        captions = {"caption_0": " ".join(words), "caption_1": " ".join(words[::-1])}
        found.append(captions | {f"image_{image}": picture(2 * number + image) for image in (0, 1)} | {"tag": "Object"})
    return found


def choices(count: int) -> list[dict]:
    texts = ("5 6 7", "7 6 5", "5 6 7", "9", "6 5 7")
    return [{"image": picture(100 + number), "captions": texts} for number in range(count)]


ALL_DEVICES = Asking(Reading(preprocess, tokenize), batch_size=16)  # batches that are seldom full, on 8 devices
ASKING = dataclasses.replace(ALL_DEVICES, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))


@functools.cache
def made(placements=(), modalities=("image", "text")):
    """A model, its parameters, and what it gives for a batch; compiled once for all tests."""
    model = dataclasses.replace(small_model.model(placements), modalities=modalities)
    params = small_model.drawn_params(model)

    def give(params, batch):
        output = model.apply(params, batch)
        features = {"image": output.image_features, "text": output.text_features}
        return {name: f for name, f in features.items() if f is not None} | model.predict(params, batch)

    return model, params, jax.jit(give)


@functools.cache
def scorer_of(placements=(), modalities=("image", "text"), score="head"):
    model, params, _ = made(placements, modalities)
    return model_scorer(model, params, ASKING, score)


def by_hand(placements, pairs, modalities=("image", "text")) -> dict[str, np.ndarray]:
    """Features and the head's score of (text, picture) pairs, eight at a time."""
    _, params, give = made(placements, modalities)
    found = []
    for start in range(0, len(pairs), 8):
        part = (list(pairs[start : start + 8]) + [pairs[0]] * 8)[:8]
        rows = [tokenize(text) for text, _ in part]
        batch = {
            "image": np.stack([image for _, image in part]),
            "tokens": np.stack([tokens for tokens, _ in rows]),
            "text_mask": np.stack([mask for _, mask in rows]),
            "label": np.ones(8, np.int32),
            "route": np.zeros(8, np.int32),
        }
        found.append(give(params, batch))
    return {name: np.concatenate([part[name] for part in found])[: len(pairs)] for name in found[0]}


def all_pairs(source, captions, images) -> list:
    return [(example[c], example[i]) for example in source for c in captions for i in images]


QUADRUPLE = ("caption_0", "caption_1"), ("image_0", "image_1")


@pytest.mark.parametrize("placements", [(ALONE,), (LATE,)], ids=["independent", "fusion"])
def test_cosines_are_those_of_each_pair_by_itself(placements):
    assert made(placements)[0].plan.needs_pairs == (placements == (LATE,))
    source = quadruples(5)
    found = scorer_of(placements, score="cosine")(source)
    features = by_hand(placements, all_pairs(source, *QUADRUPLE))
    texts, images = (features[name].astype(np.float64) for name in ("text", "image"))
    expected = [1 - cosine(text, image) for text, image in zip(texts, images, strict=True)]
    assert found.shape == (5, 2, 2)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.reshape(expected, (5, 2, 2)), rtol=0, atol=2e-6)
    assert np.ptp(found) > 0.01


@pytest.mark.parametrize("placements", [(ALONE,), (LATE,)], ids=["independent", "fusion"])
def test_heads_judge_each_pair_by_itself(placements):
    source = quadruples(5)
    found = scorer_of(placements)(source)
    expected = by_hand(placements, all_pairs(source, *QUADRUPLE))["score"]
    np.testing.assert_allclose(found, np.reshape(expected, (5, 2, 2)), rtol=0, atol=2e-5)
    assert winoground.evaluate(found).examples == 5


def test_several_captions_of_one_picture_on_all_devices():
    model, params, _ = made((ALONE,))
    source = choices(3)
    found = model_scorer(model, params, ALL_DEVICES)(source)
    assert found.shape == (3, 5, 1)
    pairs = [(text, example["image"]) for example in source for text in example["captions"]]
    np.testing.assert_allclose(found.ravel(), by_hand((ALONE,), pairs)["score"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("placements", "score"), [((ALONE,), "cosine"), ((LATE,), "head")])
def test_equal_captions_score_equal_to_the_last_bit(placements, score):
    found = scorer_of(placements, score=score)(choices(20))
    np.testing.assert_array_equal(found[:, 0], found[:, 2])
    assert (found[:, 0] != found[:, 1]).all()


def test_a_caption_that_stands_twice_is_asked_once():
    """A model that gives each row its place in the probe would tell equal captions apart."""

    def place(params, batch):
        return {"result": batch["index"]}

    found = ASKING(place, {}, choices(2), ("image", "text"))
    assert found[..., 0].tolist() == [[0, 1, 0, 3, 4], [5, 6, 5, 8, 9]]
    assert ASKING(place, {}, quadruples(1), ("image", "text")).tolist() == [[[0, 1], [2, 3]]]


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_model_of_one_modality_ties_exactly_wherever_the_other_differs(modality):
    source = quadruples(20)
    found = scorer_of((ALONE,), (modality,))(source)
    assert found.shape == (20, 2, 2)
    # [examples, values of what it sees, values of what it does not see]
    seen = found if modality == "text" else found.swapaxes(1, 2)
    np.testing.assert_array_equal(seen[:, :, 0], seen[:, :, 1])
    assert (seen[:, 0] != seen[:, 1]).all()
    judged = winoground.evaluate(found)
    assert (judged.text.value, judged.image.value) == (0, 0)
    assert (judged.text_ties, judged.image_ties) == {"text": (0, 1), "image": (1, 0)}[modality]
    expected = by_hand((ALONE,), all_pairs(source, *QUADRUPLE), (modality,))["score"]
    np.testing.assert_allclose(found, np.reshape(expected, (20, 2, 2)), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=f"a cosine needs both features, and this model is shown the {modality} alone"):
        scorer_of((ALONE,), (modality,), "cosine")


def test_all_controls_stand_beside_the_model():
    scorer, other = scorer_of((LATE,)), scorer_of((ALONE,), score="cosine")
    source = quadruples(6)
    found = controls.with_controls(scorer, source, {"plain": other})
    assert list(found) == ["model", "constant", "text only", "image only", "plain"]
    assert {scores.shape for scores in found.values()} == {(6, 2, 2)}
    np.testing.assert_array_equal(found["model"], scorer(source))
    np.testing.assert_array_equal(found["plain"], other(source))
    assert not found["constant"].any()
    grey = [(example[c], small_grey()) for example in source for c in QUADRUPLE[0]]
    expected = np.reshape(by_hand((LATE,), grey)["score"], (6, 2, 1))
    np.testing.assert_allclose(found["text only"], np.broadcast_to(expected, (6, 2, 2)), rtol=0, atol=2e-5)
    silent = [("", example[i]) for example in source for i in QUADRUPLE[1]]
    expected = np.reshape(by_hand((LATE,), silent)["score"], (6, 1, 2))
    np.testing.assert_allclose(found["image only"], np.broadcast_to(expected, (6, 2, 2)), rtol=0, atol=2e-5)
    judged = {name: winoground.evaluate(scores) for name, scores in found.items()}
    assert {judged[name].group.value for name in ("constant", "text only", "image only")} == {0}
    assert [judged[name].text_ties for name in ("constant", "text only", "image only")] == [1, 0, 1]
    with pytest.raises(UserError, match="the name 'constant' is that of a control"):
        controls.with_controls(scorer, source, {"constant": other})


def test_parts_count_examples_then_captions_then_pictures():
    source = quadruples(2)
    parts = Parts(source)
    assert (len(parts), parts.shape) == (8, (2, 2, 2))
    place = 0
    for example in source:
        for number, caption in enumerate(QUADRUPLE[0]):
            for image in QUADRUPLE[1]:
                assert (parts[place]["text"], parts[place]["same_as"]) == (example[caption], number)
                assert parts[place]["image"] is example[image]
                place += 1
    assert Parts(source, ("image",)).shape == (2, 1, 2)
    assert Parts(choices(2), ("text",))[7] == {"text": "5 6 7", "same_as": 0}


def test_what_cannot_be_scored_is_named():
    model, params, _ = made((ALONE,))
    scorer = scorer_of((ALONE,))
    source = quadruples(4)
    source[2]["image_1"] = None
    with pytest.raises(UserError, match="pictures of 1 of 4 examples cannot be decoded, first of example 2"):
        scorer(source)
    uneven = choices(2)
    uneven[1] = uneven[1] | {"captions": ("5", "6")}
    with pytest.raises(UserError, match="example 1 of the probe has 2 captions and the first one 5"):
        scorer(uneven)
    with pytest.raises(UserError, match="the probe holds no example"):
        scorer([])
    with pytest.raises(UserError, match="unknown score 'cosines'; did you mean 'cosine'"):
        model_scorer(model, params, ASKING, "cosines")
    classifier = dataclasses.replace(model, task=Classification("classes", 3))
    with pytest.raises(UserError, match="the task 'classes' gives no score of a pair"):
        model_scorer(classifier, small_model.drawn_params(classifier), ASKING)(quadruples(1))
