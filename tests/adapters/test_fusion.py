"""Fusion against its definition, one token and one head at a time, for every mix and direction."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import count, drawn, site

from vla_jax import names
from vla_jax.adapters import Fusion, Placement, place
from vla_jax.adapters.fusion import DIRECTIONS, MIXES
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE_TOKENS, TEXT_TOKENS, VISION, TEXT, RANK = 5, 4, 7, 6, 4
SITE = site("block_out", VISION, TEXT)
WORDS = np.array([True, True, True, False])


CASES = [("none", "both")] + [(mix, direction) for mix in MIXES if mix != "none" for direction in DIRECTIONS]


def example(text_width: int = TEXT):
    """Both streams of one example."""
    generator = np.random.default_rng(1)
    image = generator.normal(0.2, 1.0, (IMAGE_TOKENS, VISION)).astype(np.float32)
    text = generator.normal(-0.1, 1.0, (TEXT_TOKENS, text_width)).astype(np.float32)
    return image, text


def parameters(method: Fusion):
    """Parameters as training might leave them."""
    image, text = example(VISION if method.shared else TEXT)
    shapes = jax.eval_shape(method.module(SITE).init, jax.random.key(0), image, text, WORDS)["params"]
    return drawn(shapes, 2, 0.6)


@functools.cache
def compiled(method: Fusion):
    return jax.jit(lambda params, image, text, words: method.module(SITE).apply({"params": params}, image, text, words))


def run(method: Fusion, params, image, text, words=WORDS):
    return tuple(np.asarray(stream) for stream in compiled(method)(params, image, text, words))


def exact_gelu(v: float) -> float:
    return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))


def reference(method: Fusion, params, image, text, words=WORDS):
    """The definition: each stream's tokens go down, hear the other stream's visible tokens, and come up again."""
    flat = {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(params).items()}
    sides = ("shared", "shared") if method.shared else ("vision", "text")
    streams = [np.asarray(image, np.float64), np.asarray(text, np.float64)]
    visible = [np.ones(len(image), bool), words]
    hears = [method.direction in ("both", "to_vision"), method.direction in ("both", "to_text")]

    def linear(name, v):
        return v @ flat[f"{name}/kernel"] + flat.get(f"{name}/bias", 0.0)

    def down(side, token):
        if method.layer_norm:
            token = (token - token.mean()) / math.sqrt(token.var() + 1e-5)
            token = token * flat[f"{side}/norm/scale"] + flat[f"{side}/norm/bias"]
        return linear(f"{side}/reduce", token)

    hidden = [[down(side, token) for token in stream] for side, stream in zip(sides, streams, strict=True)]

    def attend(side, h, others):
        query, size, result = linear(f"{side}/query", h), RANK // method.heads, []
        keys = [linear(f"{side}/key", other) for other in others]
        values = [linear(f"{side}/value", other) for other in others]
        for head in range(method.heads):
            part = slice(head * size, (head + 1) * size)
            scores = [math.exp(query[part] @ key[part] / math.sqrt(size)) for key in keys]
            result.append(sum(s * value[part] for s, value in zip(scores, values, strict=True)) / sum(scores))
        return np.concatenate(result)

    outputs = []
    for me, (side, stream) in enumerate(zip(sides, streams, strict=True)):
        others = [h for h, seen in zip(hidden[1 - me], visible[1 - me], strict=True) if seen]
        result = []
        for token, h in zip(stream, hidden[me], strict=True):
            mixed = h
            if method.mix != "none" and hears[me]:
                heard = sum(others) / len(others) if method.mix == "gate" else attend(side, h, others)
                if method.mix in ("gate", "gate_attention"):
                    heard = heard / (1 + np.exp(-linear(f"{side}/gate", np.concatenate([h, heard]))))
                mixed = h + heard
            result.append(token + method.scale * linear(f"{side}/expand", np.array([exact_gelu(v) for v in mixed])))
        outputs.append(np.array(result))
    return outputs


def close(ours, theirs, tolerance=2e-6):
    for mine, reference_ in zip(ours, theirs, strict=True):
        assert mine.shape == reference_.shape
        assert np.linalg.norm(mine - reference_) <= tolerance * np.linalg.norm(reference_)


@pytest.mark.parametrize(("mix", "direction"), CASES)
def test_module_equals_the_definition(mix, direction):
    method, streams = Fusion(rank=RANK, heads=2, mix=mix, direction=direction), example()
    params = parameters(method)
    close(run(method, params, *streams), reference(method, params, *streams))


@pytest.mark.parametrize(
    "method",
    [
        Fusion(rank=RANK, heads=1, layer_norm=False, scale=3.0),
        Fusion(rank=RANK, heads=4),
        Fusion(rank=RANK, heads=2, shared=True),
        Fusion(rank=RANK, heads=1, shared=True, mix="gate", direction="to_text", scale=-1.0),
        Fusion(rank=RANK, heads=4, shared=True, mix="attention", direction="to_vision"),
    ],
    ids=["one_head_no_norm", "four_heads", "shared", "shared_gate_to_text", "shared_attention_to_vision"],
)
def test_heads_norm_scale_and_shared_weights_equal_the_definition(method):
    streams = example(VISION if method.shared else TEXT)
    params = parameters(method)
    assert set(params) == ({"shared"} if method.shared else {"vision", "text"})
    close(run(method, params, *streams), reference(method, params, *streams))


@pytest.mark.parametrize("mix", MIXES)
def test_padded_words_have_no_influence(mix):
    method, (image, text) = Fusion(rank=RANK, heads=2, mix=mix), example()
    params = parameters(method)
    before = run(method, params, image, text)
    changed = np.where(WORDS[:, None], text, 100.0 * text[::-1] + 7.0).astype(np.float32)
    after = run(method, params, image, changed)
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1][WORDS], before[1][WORDS])
    # Nor does it matter that they are there at all.
    close(reference(method, params, image, text[WORDS], WORDS[WORDS]), [before[0], before[1][WORDS]])


@pytest.mark.parametrize(("mix", "direction"), CASES)
def test_only_the_stream_that_hears_depends_on_the_other(mix, direction):
    method, (image, text) = Fusion(rank=RANK, heads=2, mix=mix, direction=direction), example()
    params = parameters(method)
    base = run(method, params, image, text)
    # A LayerNorm would hide a shift common to all channels.
    other_text = run(method, params, image, text * np.linspace(-1, 2, TEXT, dtype=np.float32))
    other_image = run(method, params, image * np.linspace(-1, 2, VISION, dtype=np.float32), text)
    assert np.array_equal(base[0], other_text[0]) != (mix != "none" and direction != "to_text")
    assert np.array_equal(base[1], other_image[1]) != (mix != "none" and direction != "to_vision")


def test_shared_weights_treat_both_streams_alike():
    method, (image, text) = Fusion(rank=RANK, heads=2, shared=True), example(VISION)
    image = image[:TEXT_TOKENS]
    params, all_words = parameters(method), np.ones(TEXT_TOKENS, bool)
    first = run(method, params, image, text, all_words)
    second = run(method, params, text, image, all_words)
    close(first, second[::-1])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Bottlenecks: 7 r + r + r 7 + 7 and 6 r + r + r 6 + 6 with r = 4; LayerNorms 2 (7 + 6); attention 3 r^2 and
        # gate 2 r^2 + r for each stream that hears.
        (Fusion(rank=4, mix="none", layer_norm=False), 67 + 58),
        (Fusion(rank=4, mix="none"), 67 + 58 + 26),
        (Fusion(rank=4, mix="gate"), 67 + 58 + 26 + 2 * 36),
        (Fusion(rank=4, mix="attention"), 67 + 58 + 26 + 2 * 48),
        (Fusion(rank=4), 67 + 58 + 26 + 2 * 84),
        (Fusion(rank=4, direction="to_vision"), 67 + 58 + 26 + 84),
        (Fusion(rank=4, direction="to_text", mix="gate"), 67 + 58 + 26 + 36),
        (Fusion(rank=None, reduction=3, heads=2, mix="none", layer_norm=False), 7 * 4 + 2 + 7 + 6 * 4 + 2 + 6),
    ],
)
def test_parameter_count_by_hand(method, expected):
    assert count(method, SITE) == expected
    shapes = jax.eval_shape(method.module(SITE).init, jax.random.key(0), *example(), WORDS)["params"]
    assert names.count(shapes) == expected


def test_shared_parameter_count_by_hand():
    assert count(Fusion(rank=4, shared=True), site("block_out", 7, 7)) == 67 + 14 + 84


def test_streams_keep_their_precision():
    method, (image, text) = Fusion(rank=RANK, heads=2), example()
    params = parameters(method)
    result = compiled(method)(params, jnp.bfloat16(image), jnp.bfloat16(text), WORDS)
    assert {stream.dtype for stream in result} == {jnp.dtype("bfloat16")}
    # About sixteen roundings to 8 bits lie one behind the other.
    close([np.asarray(s, np.float32) for s in result], reference(method, params, image, text), tolerance=16 * 2**-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": "gated"}, "unknown fusion mix 'gated'; did you mean 'gate'"),
        ({"direction": "to_image"}, "unknown fusion direction 'to_image'.*to_vision"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": None, "reduction": None}, "either rank or reduction"),
        ({"activation": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Fusion(**settings)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Fusion(rank=6), "common width 6 does not divide into 4 heads"),
        (Fusion(reduction=100), "reduction 100 leaves nothing of a width of 24"),
        (Fusion(rank=4, shared=True), "shared fusion weights need towers of one width, got 32 and 24"),
    ],
)
def test_widths_that_do_not_fit_are_refused_when_placed(method, message):
    towers = {"vision": TowerShape(4, 32, 64), "text": TowerShape(2, 24, 48)}
    with pytest.raises(UserError, match=message):
        place(Placement(method), towers)


def test_heads_do_not_matter_where_nothing_attends():
    assert Fusion(rank=6, mix="gate").common_width(32, 24) == 6
    assert Fusion(mix="none").common_width(64, 48) == 3
