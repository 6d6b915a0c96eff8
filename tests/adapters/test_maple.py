"""MaPLe against its definition, its published count, and in a model with both towers by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from clip_by_hand import image_by_hand, text_by_hand
from settings import CONFIG, backbone, drawn, inputs, model, site

from vla_jax import names
from vla_jax.adapters import MaPLe, Placement, Prompt, maple, place, start_from_phrase
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT, VISION = 4, 6
BOTH = ("tokens", "prompts")


def at(tower: str, slot: str):
    width = {"vision": VISION, "text": TEXT}[tower]
    return site(slot, width, width, tower)._replace(streams=(("vision", VISION), ("text", TEXT)))


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def close(ours, theirs, tolerance=2e-6):
    assert np.linalg.norm(np.subtract(ours, theirs)) <= tolerance * np.linalg.norm(theirs)


def test_the_texts_tokens_are_the_parameter_itself():
    prompt, x, y = draw(2, TEXT), draw(3, TEXT), draw(1, TEXT)
    for slot, expected in (("tokens", [*y, *prompt]), ("prompts", prompt)):
        result = jax.jit(MaPLe(2).module(at("text", slot)).apply)({"params": {"prompt": prompt}}, x, y)
        np.testing.assert_array_equal(result, expected)


def test_the_images_tokens_are_a_linear_map_of_the_texts():
    params = {"prompt": draw(2, TEXT), "coupling": {"kernel": draw(TEXT, VISION), "bias": draw(VISION)}}
    expected = np.zeros((2, VISION))
    for token in range(2):
        for out in range(VISION):
            expected[token, out] = params["coupling"]["bias"][out] + sum(
                float(params["prompt"][token, i]) * float(params["coupling"]["kernel"][i, out]) for i in range(TEXT)
            )
    x, y = draw(3, VISION), draw(1, VISION)
    for slot, before in (("tokens", y), ("prompts", y[:0])):
        result = jax.jit(MaPLe(2).module(at("vision", slot)).apply)({"params": params}, x, y)
        np.testing.assert_array_equal(result[: len(before)], before)
        close(result[len(before) :], expected)


def test_published_parameters():
    plan = place(maple(), CLIPConfig.preset("vit_b_16").towers)
    # Two tokens 512 wide and a map to 768 at each of nine blocks; the paper says 3.55 M.
    assert plan.parameter_count() == 9 * (2 * 512 + 512 * 768 + 768) == 3_555_072
    assert names.count(plan.shapes()) == 3_555_072


def test_the_towers_share_the_tokens_and_nothing_else():
    shapes = names.flatten(place(maple(2, 2), CONFIG.towers).shapes())
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        "maple/shared/tokens/prompt": (1, 2, 24),
        "maple/shared/prompts/prompt": (1, 2, 24),
        "maple/vision/tokens/coupling/kernel": (1, 24, 32),
        "maple/vision/tokens/coupling/bias": (1, 32),
        "maple/vision/prompts/coupling/kernel": (1, 24, 32),
        "maple/vision/prompts/coupling/bias": (1, 32),
    }


def test_a_model_equals_both_towers_by_hand():
    plan = place(maple(2, 2), CONFIG.towers)  # two of the image tower's four blocks
    adapters = drawn(plan.shapes(), 1, 0.5)
    params, (images, tokens, mask) = backbone(CONFIG), inputs(CONFIG)

    @jax.jit
    def run(params, adapters):
        bound = plan.bind(adapters)
        return model(CONFIG).apply({"params": params}, images, tokens, mask, adapters=bound, hidden_states=True)

    out, shared, own = run(params, adapters), adapters["maple"]["shared"], adapters["maple"]["vision"]
    text_prompts, image_prompts = {}, {}
    for layer, slot in enumerate(BOTH):
        prompt = np.asarray(shared[slot]["prompt"][0], np.float64)
        text_prompts[layer] = prompt
        coupling = own[slot]["coupling"]
        image_prompts[layer] = prompt @ np.asarray(coupling["kernel"][0], np.float64) + coupling["bias"][0]
    for row in range(3):
        image = image_by_hand(params, CONFIG, images[row], image_prompts, {})
        text = text_by_hand(params, CONFIG, tokens[row], mask[row], text_prompts, {})
        close(out.image_hidden[:, row], image.hidden)
        close(out.image_features[row], image.feature)
        close(out.text_hidden[:, row], text.hidden)
        close(out.text_features[row], text.feature)


def test_a_phrase_starts_the_tokens_of_both_towers():
    plan = place(maple(2, 2), CONFIG.towers)
    new, table = drawn(plan.shapes(), 2, 0.5), draw(50, 24)
    started = start_from_phrase(plan, new, "maple", table, np.array([48, 3, 4, 49]), np.ones(4, bool))
    np.testing.assert_array_equal(started["maple"]["shared"]["tokens"]["prompt"], table[None, [3, 4]])
    changed = [name for name, leaf in names.flatten(started).items() if leaf is not names.flatten(new)[name]]
    assert changed == ["maple/shared/tokens/prompt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MaPLe(**settings)


def test_places_without_meaning_are_refused():
    with pytest.raises(UserError, match="have 3 and 1 layers with adapters"):
        place(Placement(MaPLe(), slots=BOTH), CONFIG.towers)
    with pytest.raises(
        UserError, match=r"no other adapter there the slot tokens \(tokens are inserted by: maple, other"
    ):
        place([maple(2, 2), Placement(Prompt(1), "other", slots=("tokens",))], CONFIG.towers)
