"""Compositions against their definitions written out in NumPy, the laws they obey, and what they refuse."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import CONFIG, backbone, drawn, inputs, model, site

from vla_jax import names
from vla_jax.adapters import (
    PHM,
    Average,
    Bottleneck,
    CoCoOp,
    Fuse,
    Fusion,
    LoRA,
    Parallel,
    Placement,
    Prefix,
    Prompt,
    Share,
    Split,
    Stack,
    place,
)
from vla_jax.adapters.base import Method, method_from_description
from vla_jax.adapters.plan import leaf_shapes
from vla_jax.errors import UserError
from vla_jax.slots import LinearWeights

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS, WIDTH = 5, 6
SITE = site("mlp_out", WIDTH, WIDTH)
NARROW, WIDE = Bottleneck(rank=2), Bottleneck(rank=4, parallel=True, scale=3.0)
TWO = (("narrow", NARROW), ("wide", WIDE))


def example():
    """What stands before and behind a sublayer, ``[tokens, width]`` each."""
    generator = np.random.default_rng(1)
    return tuple(generator.standard_normal((TOKENS, WIDTH)).astype(np.float32) for _ in range(2))


def parameters(method, place_=SITE, seed=2):
    """Parameters as training might leave them."""
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaf_shapes(method, place_).items()}
    return names.unflatten(drawn(shapes, seed, 0.5))


def run(method, params, *arrays, place_=SITE):
    return jax.tree.map(np.asarray, jax.jit(method.module(place_).apply)({"params": params}, *arrays))


def bottleneck(method, params, x, y):
    """The definition of a bottleneck, in float64."""
    flat = {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(params).items()}
    hidden = np.maximum((x if method.parallel else y) @ flat["down/kernel"] + flat["down/bias"], 0)
    return y + method.scale * (hidden @ flat["up/kernel"] + flat["up/bias"])


def close(ours, theirs, tolerance=2e-6):
    assert np.linalg.norm(np.subtract(ours, theirs)) <= tolerance * np.linalg.norm(theirs)


@dataclasses.dataclass(frozen=True)
class Mean(Method):
    """Adds to each token the scaled mean of all tokens that it is shown."""

    kind: ClassVar[str] = "mean"
    slots: ClassVar[tuple[str, ...]] = ("mlp_out",)

    def module(self, site) -> nn.Module:
        return MeanModule(parent=None)

    def parameter_counts(self, site) -> dict[str, int]:
        return {"scale": site.widths[0]}

    @property
    def starts_as_identity(self) -> bool:
        return True


class MeanModule(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        return y + self.param("scale", nn.initializers.zeros, x.shape[-1:]) * x.mean(0)


# Definitions


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_stack_applies_its_children_in_their_order(order):
    (x, y), method = example(), Stack(tuple(TWO[k] for k in order))
    params, expected = parameters(method), {}
    for first, second in (order, order[::-1]):
        by_name = [(TWO[k][1], params[TWO[k][0]]) for k in (first, second)]
        expected[first] = bottleneck(*by_name[1], x, bottleneck(*by_name[0], x, y))
    result = run(method, params, x, y)
    close(result, expected[order[0]])
    # The other order is another function of the same parameters.
    assert np.linalg.norm(result - expected[order[1]]) > 0.1 * np.linalg.norm(result)


def test_parallel_adds_what_children_change():
    (x, y), method = example(), Parallel(TWO)
    params = parameters(method)
    expected = y + sum(bottleneck(child, params[name], x, y) - y for name, child in TWO)
    close(run(method, params, x, y), expected)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, (0.5, 0.5)),
        ({"weights": (3.0, 1.0)}, (0.75, 0.25)),
        ({"weights": (3.0, -1.0)}, (1.5, -0.5)),
        ({"weights": (3.0, 1.0), "normalised": False}, (3.0, 1.0)),
        ({"normalised": False}, (1.0, 1.0)),
    ],
)
def test_an_average_weighs_what_children_change(settings, factors):
    (x, y), method = example(), Average(TWO, **settings)
    params = parameters(method)
    changes = [bottleneck(child, params[name], x, y) - y for name, child in TWO]
    close(run(method, params, x, y), y + sum(f * change for f, change in zip(factors, changes, strict=True)))
    assert method.factors == factors


@pytest.mark.parametrize("ranges", [((0, 1), (1, None)), ((1, 2), (3, 4)), ((0, 2), (4, None)), ((2, 4), (4, 5))])
def test_a_split_gives_each_child_tokens_of_its_own(ranges):
    (x, y), method = example(), Split((("narrow", NARROW), ("mixer", Mean())), ranges=ranges)
    params = parameters(method)
    owned = [slice(start, TOKENS if stop is None else stop) for start, stop in ranges]
    expected = np.array(y, np.float64)
    expected[owned[0]] = bottleneck(NARROW, params["narrow"], x[owned[0]], y[owned[0]])
    # This child mixes tokens: it must see no others than its own.
    expected[owned[1]] = y[owned[1]] + params["mixer"]["scale"] * x[owned[1]].mean(0)
    result = run(method, params, x, y)
    close(result, expected)
    untouched = np.ones(TOKENS, bool)
    for own in owned:
        untouched[own] = False
    np.testing.assert_array_equal(result[untouched], y[untouched])


def test_compositions_of_compositions():
    x, y = example()
    method = Stack((("both", Parallel(TWO)), ("mean", Average((("a", NARROW), ("last", Stack(TWO)))))))
    params = parameters(method)
    both, mean = params["both"], params["mean"]
    middle = y + sum(bottleneck(child, both[name], x, y) - y for name, child in TWO)
    one = bottleneck(NARROW, mean["a"], x, middle)
    other = bottleneck(WIDE, mean["last"]["wide"], x, bottleneck(NARROW, mean["last"]["narrow"], x, middle))
    close(run(method, params, x, y), (one + other) / 2)


def test_a_stack_is_two_adapters_in_one_slot():
    # Two placements go through the backbone's slot one after the other, a stack through its own module.
    children = (("one", LoRA(rank=2)), ("two", Bottleneck(rank=3, layer_norm=True)))
    stacked = place(Placement(Stack(children), "stack", slots=("attn_out",)), CONFIG.towers)
    apart = place([Placement(method, name, slots=("attn_out",)) for name, method in children], CONFIG.towers)
    params = drawn(stacked.shapes(), 3, 0.3)
    moved = {
        name: {tower: {"attn_out": params["stack"][tower]["attn_out"][name]} for tower in ("vision", "text")}
        for name, _ in children
    }

    def logits(plan, adapters):
        @jax.jit
        def run(weights, adapters):
            return model(CONFIG).apply({"params": weights}, *inputs(CONFIG), adapters=plan.bind(adapters)).logits

        return run(backbone(CONFIG), adapters)

    close(logits(stacked, params), logits(apart, moved))


# Laws


@pytest.mark.parametrize("composite", [Stack, Parallel, Average])
@pytest.mark.parametrize("child", [WIDE, PHM(n=2, rank=4), Stack(TWO)], ids=lambda child: child.kind)
def test_a_composite_of_one_is_that_one(composite, child):
    params = parameters(child)
    close(run(composite((("only", child),)), {"only": params}, *example()), run(child, params, *example()))


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_the_average_of_copies_is_the_one(copies):
    params, labels = parameters(WIDE), [f"copy{k}" for k in range(copies)]
    method = Average(tuple((label, WIDE) for label in labels), weights=tuple(range(1, copies + 1)))
    close(run(method, dict.fromkeys(labels, params), *example()), run(WIDE, params, *example()))


def test_an_average_with_all_weight_on_one_is_that_one():
    params = parameters(Average(TWO))
    for weights, (name, child) in zip(((1.0, 0.0), (0.0, 1.0)), TWO, strict=True):
        close(run(Average(TWO, weights=weights), params, *example()), run(child, params[name], *example()))


def test_parallel_and_average_do_not_ask_for_the_order():
    params = parameters(Parallel(TWO))
    for composite in (Parallel, Average):
        close(run(composite(TWO[::-1]), params, *example()), run(composite(TWO), params, *example()))


def test_a_split_of_one_function_into_ranges_is_that_function():
    # A bottleneck treats each token alike, so that cutting the tokens changes nothing.
    params = parameters(NARROW)
    method = Split((("a", NARROW), ("b", NARROW)), ranges=((0, 3), (3, None)))
    close(run(method, {"a": params, "b": params}, *example()), run(NARROW, params, *example()))


# Tokens, keys and values, streams of two towers


def test_prompts_are_stacked_or_averaged():
    place_ = site("tokens", WIDTH, WIDTH)
    x, before = example()[0], example()[1][:2]
    children = (("a", Prompt(3)), ("b", Prompt(3)))
    params = parameters(Stack(children), place_)
    a, b = params["a"]["prompt"], params["b"]["prompt"]
    assert a.shape == (3, WIDTH)
    np.testing.assert_array_equal(
        run(Stack(children), params, x, before, place_=place_), np.concatenate([before, a, b])
    )
    mean = run(Average(children, weights=(1.0, 3.0)), params, x, before, place_=place_)
    np.testing.assert_array_equal(mean[:2], before)
    close(mean[2:], (a + 3 * b) / 4)
    deep = run(Average(children), params, x, example()[1][:3], place_=site("prompts", WIDTH, WIDTH))
    close(deep, (a + b) / 2)


def test_prefixes_are_stacked_or_averaged():
    place_ = site("attn_kv", WIDTH, WIDTH)
    (x, keys), values = example(), example()[0] + 1
    children = (("a", Prefix(2)), ("b", Prefix(2)))
    params = parameters(Stack(children), place_)
    stacked = run(Stack(children), params, x, (keys, values), place_=place_)
    averaged = run(Average(children), params, x, (keys, values), place_=place_)
    for part, own, after, mean in zip(("key", "value"), (keys, values), stacked, averaged, strict=True):
        a, b = params["a"][part], params["b"][part]
        np.testing.assert_array_equal(after, np.concatenate([b, a, own]))
        np.testing.assert_array_equal(mean[2:], own)
        close(mean[:2], (a + b) / 2)


def test_means_of_different_numbers_of_tokens_are_refused_before_anything_is_computed():
    for children, slots in (
        ((("a", Prompt(2)), ("b", Prompt(3))), ("tokens",)),
        ((("a", Prefix(2)), ("b", Prefix(3))), ("attn_kv",)),
    ):
        with pytest.raises(UserError, match=rf"at vision/{slots[0]} make different numbers of tokens.*a \d, b \d"):
            place(Placement(Average(children), slots=slots), CONFIG.towers)


@pytest.mark.parametrize("composite", [Stack, Parallel, Average])
def test_children_that_join_the_towers(composite):
    place_ = site("block_out", WIDTH, 4)._replace(tower="joint")
    image, text = example()[0], example()[1][:3, :4]
    words = np.array([True, True, False])
    children = (("gate", Fusion(rank=2, mix="gate")), ("heads", Fusion(rank=4, heads=2)))
    method = composite(children)
    assert method.joint
    assert method.slots == ("block_out",)
    params = parameters(method, place_)
    one = run(children[0][1], params["gate"], image, text, words, place_=place_)
    start = one if composite is Stack else (image, text)
    two = run(children[1][1], params["heads"], *start, words, place_=place_)
    result = run(method, params, image, text, words, place_=place_)
    share = 0.5 if composite is Average else 1.0
    for ours, y, a, b in zip(result, (image, text), one, two, strict=True):
        close(ours, b if composite is Stack else y + share * (a - y) + share * (b - y))


# What children need


def test_frozen_weights_reach_the_children_that_use_them():
    place_, (x, _) = site("attn_q", WIDTH, WIDTH), example()
    kernel = np.random.default_rng(4).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    weights = LinearWeights(jnp.asarray(kernel), jnp.zeros(WIDTH))
    children = (("plain", LoRA(rank=2)), ("dora", LoRA(rank=2, decomposed=True)))
    method = Parallel(children)
    assert method.uses_weights
    assert not Parallel(children[:1]).uses_weights
    y = x @ kernel
    init = jax.jit(method.module(place_).init)(jax.random.key(0), x, y, weights)["params"]
    close(init["dora"]["magnitude"], np.linalg.norm(kernel, axis=0))
    params = {"plain": parameters(children[0][1], place_), "dora": parameters(children[1][1], place_)}
    expected = run(children[0][1], params["plain"], x, y, place_=place_) - y
    expected = expected + run(children[1][1], params["dora"], x, y, weights, place_=place_)
    close(run(method, params, x, y, weights, place_=place_), expected)


def test_the_images_feature_reaches_the_children_that_follow_it():
    place_, x = site("tokens", WIDTH, WIDTH, "text"), example()[0]
    image = np.random.default_rng(4).standard_normal(CONFIG.projection).astype(np.float32)
    children = (("free", Prompt(1)), ("following", CoCoOp(2, reduction=4)))
    method = Stack(children)
    assert method.conditioned
    params = parameters(method, place_)
    following = run(children[1][1], params["following"], x, x[:0], image, place_=place_)
    expected = np.concatenate([params["free"]["prompt"], following])
    close(run(method, params, x, x[:0], image, place_=place_), expected)


def test_dropout_of_children_is_drawn_apart():
    place_ = site("attn_q", WIDTH, WIDTH)
    child = LoRA(rank=WIDTH, alpha=float(WIDTH), dropout=0.5)
    method = Parallel((("a", child), ("b", child)))
    assert method.uses_dropout
    assert not Parallel(TWO).uses_dropout
    ones, identity = jnp.ones((200, WIDTH)), {"a": jnp.eye(WIDTH), "b": jnp.eye(WIDTH)}
    result = method.module(place_).apply(
        {"params": {"a": identity, "b": identity}}, ones, 0 * ones, rngs={"dropout": jax.random.key(0)}
    )
    # Each keeps half of its inputs, doubled: sums are 0, 2 and 4 where the two draw apart, 0 and 4 where together.
    shares = [float(np.mean(np.isclose(result, value))) for value in (0, 2, 4)]
    deviation = (0.25 * 0.75 / result.size) ** 0.5
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=6 * deviation)


def test_children_share_what_their_method_or_a_placement_says():
    method = Parallel((("compacter", PHM(n=2, rank=4)), ("plain.1", Bottleneck(rank=2))))
    sharing = (Share(r"plain\.1/down/.*", ("tasks", "towers")),)
    placement = Placement(method, "mine", slots=("mlp_out",), layers="last 2", tasks=("x", "y", "z"), sharing=sharing)
    equal = {"vision": CONFIG.towers["vision"], "text": CONFIG.towers["vision"]}
    shapes = {name: leaf.shape for name, leaf in names.flatten(place(placement, equal).shapes()).items()}
    assert shapes["mine/shared/mlp_out/plain.1/down/kernel"] == (2, 32, 2)
    assert shapes["mine/vision/mlp_out/plain.1/up/kernel"] == (2, 3, 2, 32)
    # Compacter's rule is shared by definition: what holds for it alone holds for it as a child.
    alone = Placement(PHM(n=2, rank=4), "mine", slots=("mlp_out",), layers="last 2", tasks=("x", "y", "z"))
    own = {name: leaf.shape for name, leaf in names.flatten(place(alone, equal).shapes()).items()}
    as_child = {name.replace("compacter/", ""): shape for name, shape in shapes.items() if "compacter/" in name}
    assert as_child == own
    assert any(share.over for share in PHM(n=2, rank=4).sharing)


@pytest.mark.parametrize(
    "composite", [Stack, Parallel, Average, functools.partial(Split, ranges=((0, 1), (1, 3))), Fuse]
)
def test_a_new_composite_changes_nothing_if_none_of_its_children_does(composite):
    assert composite(TWO).starts_as_identity
    assert not composite((TWO[0], ("drawn", Bottleneck(rank=2, init="normal")))).starts_as_identity


# Descriptions


NESTED = (
    Stack(
        (("a", Parallel((*TWO, ("c", PHM(n=2, rank=4))))), ("b", Average(TWO, weights=(1.0, 2.0), normalised=False)))
    ),
    Fuse((("a", Split(TWO, ranges=((0, 1), (1, None)))), ("b", Stack((("c", Fuse(TWO, heads=2)),)))), heads=3),
    Parallel((("a", Fusion(rank=4, heads=2)), ("b", Stack((("c", Fusion(rank=2, mix="none")),))))),
)


@pytest.mark.parametrize("method", NESTED, ids=lambda method: method.kind)
def test_a_nested_description_survives_json(method):
    again = method_from_description(json.loads(json.dumps(method.describe())))
    assert again == method
    assert hash(again) == hash(method)


def test_descriptions_of_children_are_checked_like_others():
    description = {"kind": "stack", "children": [["a", {"kind": "lora", "rnak": 4}]]}
    with pytest.raises(UserError, match="unknown setting of lora 'rnak'; did you mean 'rank'"):
        method_from_description(description)
    with pytest.raises(UserError, match="stack needs at least one child"):
        method_from_description({"kind": "stack"})


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stack(()), "stack needs at least one child"),
        (lambda: Stack((("a/b", NARROW),)), "name 'a/b' of a child must be made of letters"),
        (lambda: Parallel((("a", NARROW), ("a", WIDE))), "two children of parallel are named 'a'"),
        (lambda: Fuse((("fuse", NARROW), ("b", WIDE))), "fuse keeps parameters of its own below 'fuse'"),
        (
            lambda: Stack((("a", LoRA()), ("b", Prefix(2)))),
            r"no slot in common: a \(lora\) in .*; b \(prefix\) in attn_kv",
        ),
        (lambda: Stack((("a", Fusion()), ("b", NARROW))), "'a' joins the towers and 'b' sits in one of them"),
        (lambda: Fuse((("a", Fusion()),)), "fuse cannot take 'a', which joins the towers: a query belongs to one"),
        (lambda: Split((("a", Fusion()),), ranges=((0, 1),)), "split cannot take 'a', .*: one range cannot name"),
        (lambda: Average(TWO, weights=(1.0,)), "1 weights were given for 2 children"),
        (lambda: Average(TWO, weights=(1.0, -1.0)), "weights that add up to 0 have no mean"),
        (lambda: Average(TWO, weights=(1.0, float("nan"))), "weights must be finite"),
        (lambda: Split(TWO), "0 ranges were given for 2 children"),
        (lambda: Split(TWO, ranges=((0, 2), (1, 3))), "ranges must ascend from 0, without overlap.*got 0:2, 1:3"),
        (lambda: Split(TWO, ranges=((0, None), (1, 3))), "ranges must ascend"),
        (lambda: Split(TWO, ranges=((0, 1), (2, 2))), "none empty"),
        (lambda: Split(TWO, ranges=((-1, 1), (2, 3))), "ranges must ascend from 0"),
        (lambda: Fuse(TWO, heads=0), "heads must be at least 1, got 0"),
        (lambda: Stack(TWO).with_rank(2), "stack has no rank that a table could set"),
    ],
)
def test_composites_without_meaning_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


PROMPTS = (("a", Prompt(2)), ("b", Prompt(2)))
PREFIXES = (("a", Prefix(2)), ("b", Prefix(2)))
RANGES = ((0, 1), (1, None))


@pytest.mark.parametrize(
    ("method", "slot", "reason"),
    [
        (Stack(PROMPTS), "prompts", "the last child's would be all that is left"),
        (Parallel(PROMPTS), "tokens", "cannot be added up; Stack puts them one after the other"),
        (Parallel(PROMPTS), "prompts", "take the place of the tokens there"),
        (Parallel(PREFIXES), "attn_kv", "cannot be added up"),
        (Split(PROMPTS, ranges=RANGES), "tokens", "belong to no range"),
        (Split(PREFIXES, ranges=RANGES), "attn_kv", "belong to no range"),
        (Split((("a", LoRA()), ("b", LoRA())), ranges=RANGES), "projection", "a tower has a single token there"),
        (Fuse(PROMPTS), "tokens", "put tokens of their own there"),
        (Fuse(PROMPTS), "prompts", "take the place of the tokens there"),
        (Fuse(PREFIXES), "attn_kv", "put tokens of their own there"),
        # However deep.
        (Stack((("outer", Stack((("inner", Fuse(PREFIXES)),))),)), "attn_kv", "put tokens of their own there"),
    ],
)
def test_slots_without_meaning_are_refused_with_the_reason(method, slot, reason):
    slots = ("tokens", "prompts") if slot == "prompts" else (slot,)
    order = slots[::-1]  # so that what is refused at prompts is not refused at tokens already
    with pytest.raises(UserError, match=rf"has no meaning at slot '{slot}': .*{reason}"):
        place(Placement(method, slots=order), CONFIG.towers)


def test_a_child_that_does_not_fit_says_so():
    with pytest.raises(UserError, match="rank 40 exceeds the map"):
        place(Placement(Stack((("a", LoRA(rank=40)),)), slots=("attn_q",)), CONFIG.towers)
    with pytest.raises(UserError, match="the width 24 at text/mlp_out does not divide into 16 heads"):
        place(Placement(Fuse(TWO, heads=16), slots=("mlp_out",)), CONFIG.towers)


@pytest.mark.parametrize(("ranges", "shown"), [(((0, 1), (1, 9)), "1:9"), (((0, 1), (5, None)), "5:")])
def test_tokens_that_do_not_exist_are_refused_before_compilation(ranges, shown):
    method = Split(TWO, ranges=ranges)
    message = f"tokens {shown} of 'wide' reach beyond the 5 at vision/mlp_out"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(method.module(SITE).apply, {"params": parameters(method)}, *example())
