"""Tokens that adapters insert, and keys and values that they put in front: against CLIP written out by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_by_hand import image_by_hand, text_by_hand
from jax.sharding import NamedSharding, PartitionSpec
from small_clip import CONFIG as SMALL

from vla_jax import names
from vla_jax.adapters import CoCoOp, Fusion, Placement, Prefix, Prompt, place
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.transformer import Compute
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = dataclasses.replace(SMALL, context_length=12)  # 3 blocks of width 16 and 2 of width 12
LENGTHS = (3, 6, 4, 5)
DEEP = ("tokens", "prompts")

PLACEMENTS = {
    "shallow": [Placement(Prompt(3), slots=("tokens",))],
    "deep": [Placement(Prompt(3), slots=DEEP)],
    "deep_in_some_blocks": [Placement(Prompt(3), slots=DEEP, layers="first 2", towers=("vision",))],
    "two_prompts": [
        Placement(Prompt(2), "first", slots=("tokens",)),
        Placement(Prompt(3), "second", slots=("tokens",), towers=("text",)),
    ],
    "prefix": [Placement(Prefix(3), layers="-1")],
    "two_prefixes": [Placement(Prefix(2), "first"), Placement(Prefix(1), "second", layers="-2,-1")],
    "prompts_and_prefix": [Placement(Prompt(2), "prompt", slots=DEEP), Placement(Prefix(2), "prefix")],
}


def drawn(shapes, seed: int):
    """Noise of these shapes, with LayerNorms around one."""
    generator, flat = np.random.default_rng(seed), names.flatten(shapes)
    noise = {name: 0.5 * generator.standard_normal(leaf.shape).astype(np.float32) for name, leaf in flat.items()}
    return names.unflatten({name: leaf + name.endswith("scale") for name, leaf in noise.items()})


@functools.cache
def backbone():
    return drawn(abstract_params(CONFIG), 0)


@functools.cache
def planned(name: str, tasks: tuple[str, ...] = ()):
    """A plan, and what training might have made of its parameters."""
    plan = place([dataclasses.replace(placement, tasks=tasks) for placement in PLACEMENTS[name]], CONFIG.towers)
    return plan, drawn(plan.shapes(), 1)


@functools.cache
def batch(pad: int = 0):
    """Four images, four texts of different lengths padded on the right, and their mask. Ids 3 to 9 are in no text."""
    generator = np.random.default_rng(2)
    images = generator.standard_normal((4, 8, 8, 3)).astype(np.float32)
    tokens, mask = generator.integers(10, 38, (4, 6)), np.zeros((4, 6), bool)
    for row, length in enumerate(LENGTHS):
        tokens[row, length - 1] = 39
        tokens[row, length:] = pad
        mask[row, :length] = True
    return images, tokens.astype(np.int32), mask


@functools.cache
def program(plan=None, config=CONFIG):
    @jax.jit
    def run(params, adapters, images, tokens, mask, route, dropped):
        bound = None if plan is None else plan.bind(adapters, dropped)
        clip = CLIP(config)
        return clip.apply({"params": params}, images, tokens, mask, adapters=bound, route=route, hidden_states=True)

    return run


def outputs(plan=None, adapters=None, *, arrays=None, route=None, dropped=None, params=None, config=CONFIG):
    arrays = batch() if arrays is None else arrays
    return program(plan, config)(params or backbone(), adapters, *arrays, route, dropped)


def close(ours, theirs, tolerance=2e-6):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def added_by_hand(plan, adapters, tower: str):
    """By block, what stands for the inserted tokens there and what stands in front of its keys and values."""
    prompts, prefixes = {}, {}
    flat = {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(adapters).items()}
    for group in plan.groups:
        if group.site.tower != tower:
            continue
        own = {leaf.name: flat[leaf.path] for leaf in group.leaves}
        for row, layer in enumerate(group.layers[0]):
            nothing = np.zeros((0, group.site.widths[0]))
            if group.site.slot == "attn_kv":
                both = zip(("key", "value"), prefixes.get(layer, (nothing, nothing)), strict=True)
                prefixes[layer] = [np.concatenate([own[name][row], before]) for name, before in both]
            else:
                prompts[layer] = np.concatenate([prompts.get(layer, nothing), own["prompt"][row]])
    return prompts, prefixes


def assert_by_hand(out, row: int, plan, adapters, arrays) -> None:
    """One example's features and states are those that a tower written out by hand makes with the same additions."""
    images, tokens, mask = arrays
    image = image_by_hand(backbone(), CONFIG, images[row], *added_by_hand(plan, adapters, "vision"))
    own_mask = None if mask is None else mask[row]
    text = text_by_hand(backbone(), CONFIG, tokens[row], own_mask, *added_by_hand(plan, adapters, "text"))
    close(out.image_hidden[:, row], image.hidden)
    close(out.image_features[row], image.feature)
    close(out.text_hidden[:, row], text.hidden)
    close(out.text_features[row], text.feature)


# Against towers written out by hand


@pytest.mark.parametrize(("name", "masked"), [*((name, True) for name in PLACEMENTS), ("prompts_and_prefix", False)])
def test_every_state_is_the_one_made_by_hand(name, masked):
    images, tokens, mask = batch()
    arrays = (images, tokens, mask if masked else None)
    plan, adapters = planned(name)
    out = outputs(plan, adapters, arrays=arrays)
    for row in range(3):
        assert_by_hand(out, row, plan, adapters, arrays)
    plain = outputs(arrays=arrays)
    assert np.linalg.norm(out.image_features - plain.image_features) > 1e-2 * np.linalg.norm(plain.image_features)


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("deep", True),
        ("two_prompts", False),
        ("two_prefixes", True),
        ("two_prefixes", False),
        ("prompts_and_prefix", True),
        ("prompts_and_prefix", False),
    ],
)
def test_examples_of_one_batch_go_their_own_ways(name, masked):
    images, tokens, mask = batch()
    arrays = (images, tokens, mask if masked else None)
    plan, adapters = planned(name, ("a", "b"))
    out, plain = outputs(plan, adapters, arrays=arrays, route=np.array([1, -1, 0, -1])), outputs(arrays=arrays)
    for row, task in ((0, 1), (2, 0)):
        assert_by_hand(out, row, plan.single(), plan.select_task(adapters, task), arrays)
    bare = np.array([1, 3])
    for part in ("image_features", "text_features", "image_pooled", "text_pooled", "image_tokens", "text_tokens"):
        close(getattr(out, part)[bare], getattr(plain, part)[bare], 1e-6)
    for part in ("image_hidden", "text_hidden"):
        close(getattr(out, part)[:, bare], getattr(plain, part)[:, bare], 1e-6)


def test_one_set_of_tokens_serves_every_route_but_minus_one():
    plan, adapters = planned("prompts_and_prefix")
    out, plain = outputs(plan, adapters, route=np.array([-1, 5, -1, 0])), outputs()
    for row in (1, 3):
        assert_by_hand(out, row, plan, adapters, batch())
    bare = np.array([0, 2])
    close(out.image_features[bare], plain.image_features[bare], 1e-6)
    close(out.text_features[bare], plain.text_features[bare], 1e-6)


@pytest.mark.parametrize(("pooling", "masked"), [("first_eos", True), ("largest_id", True), ("largest_id", False)])
def test_text_prompts_are_words_with_embeddings_of_their_own(pooling, masked):
    # The plain backbone reads words that no text uses, whose embeddings are the prompt's.
    config = dataclasses.replace(CONFIG, pooling=pooling)
    plan = place(Placement(Prompt(3), towers=("text",), slots=("tokens",)), config.towers)
    adapters = drawn(plan.shapes(), 3)
    # Padding with the end token is what CLIP's tokenizer does: the first of several is the text's own.
    images, tokens, mask = batch(pad=39)
    edited, text = backbone(), dict(backbone()["text"])
    text["token_embedding"] = text["token_embedding"].copy()
    text["token_embedding"][[5, 3, 8]] = adapters["adapter"]["text"]["tokens"]["prompt"][0]
    longer = np.concatenate([tokens[:, :1], np.tile(np.int32([5, 3, 8]), (4, 1)), tokens[:, 1:]], axis=1)
    longer_mask = np.concatenate([mask[:, :1], np.ones((4, 3), bool), mask[:, 1:]], axis=1)
    ours = outputs(plan, adapters, arrays=(images, tokens, mask if masked else None), config=config)
    theirs = outputs(
        arrays=(images, longer, longer_mask if masked else None), params=edited | {"text": text}, config=config
    )
    close(ours.text_features, theirs.text_features, 1e-6)
    close(ours.text_pooled, theirs.text_pooled, 1e-6)
    close(ours.text_tokens, np.delete(theirs.text_tokens, [1, 2, 3], axis=1), 1e-6)
    close(ours.text_hidden, np.delete(theirs.text_hidden, [1, 2, 3], axis=2), 1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("eos", [49, 2], ids=["first_eos", "largest_id"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
def test_text_prompts_are_words_of_transformers_model(eos, padded, tmp_path):
    torch = pytest.importorskip("torch")
    from hub_clip import random_clip, random_texts, save_clip, small_settings

    from vla_jax.backbones.loading import load_backbone

    model = random_clip(small_settings(text_eos_token_id=eos))
    loaded = load_backbone(save_clip(model, tmp_path))
    assert loaded.config.pooling == ("largest_id" if eos == 2 else "first_eos")
    plan = place(Placement(Prompt(2), towers=("text",), slots=("tokens",)), loaded.config.towers)
    adapters = drawn(plan.shapes(), 4)
    tokens, mask = random_texts(50, 9, 49, (9, 5, 3) if padded else (9, 9, 9), pad=49)
    tokens = np.where(np.isin(tokens, (7, 11)), 12, tokens)  # 7 and 11 become the prompt's
    longer = np.concatenate([tokens[:, :1], np.tile([7, 11], (3, 1)), tokens[:, 1:]], axis=1)
    longer_mask = np.concatenate([mask[:, :1], np.ones((3, 2), bool), mask[:, 1:]], axis=1)
    with torch.no_grad():
        table = model.text_model.embeddings.token_embedding.weight
        table[[7, 11]] = torch.tensor(adapters["adapter"]["text"]["tokens"]["prompt"][0])
        theirs = model.get_text_features(
            input_ids=torch.tensor(longer, dtype=torch.long),
            attention_mask=torch.tensor(longer_mask, dtype=torch.long) if padded else None,
        )
    ours = jax.jit(
        lambda params, adapters: (
            CLIP(loaded.config)
            .apply({"params": params}, None, tokens, mask if padded else None, adapters=plan.bind(adapters))
            .text_features
        )
    )(loaded.params, adapters)
    close(ours, getattr(theirs, "pooler_output", theirs).numpy(), 1e-5)


# What they do not touch


def test_words_see_the_prompt_and_the_start_token_does_not():
    plan, adapters = planned("shallow")
    one = outputs(plan, adapters)
    changed = jax.tree.map(lambda a: a.copy(), adapters)
    changed["adapter"]["text"]["tokens"]["prompt"][0, -1, 0] += 1.0
    other = outputs(plan, changed)
    differs = (np.asarray(one.text_hidden) != np.asarray(other.text_hidden)).any(-1)  # [states, texts, tokens]
    np.testing.assert_array_equal(differs[0], False)
    np.testing.assert_array_equal(differs[1:], np.broadcast_to(np.arange(6) > 0, (2, 4, 6)))
    np.testing.assert_array_equal(one.image_hidden, other.image_hidden)


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_have_the_plain_shapes(name, dtype):
    plan, adapters = planned(name)

    def run(plan, params, adapters):
        bound = None if plan is None else plan.bind(adapters)
        clip = CLIP(CONFIG, Compute(dtype=dtype))
        return clip.apply({"params": params}, *batch(), adapters=bound, hidden_states=True)

    ours, plain = (jax.eval_shape(functools.partial(run, p), backbone(), adapters) for p in (plan, None))
    assert ours == plain
    assert ours.text_tokens.dtype == dtype


def test_deep_prompts_that_are_dropped_leave_the_tokens_to_the_blocks():
    plan, adapters = planned("deep")
    out, arrays = outputs(plan, adapters, dropped=np.int32(2)), batch()
    prompts = {tower: added_by_hand(plan, adapters, tower)[0] for tower in ("vision", "text")}
    assert [sorted(own) for own in prompts.values()] == [[0, 1, 2], [0, 1]]
    for own in prompts.values():
        del own[1]
    close(out.image_hidden[:, 0], image_by_hand(backbone(), CONFIG, arrays[0][0], prompts["vision"], {}).hidden)
    close(
        out.text_hidden[:, 0], text_by_hand(backbone(), CONFIG, arrays[1][0], arrays[2][0], prompts["text"], {}).hidden
    )


# How it is run


@pytest.mark.slow
def test_recomputation_and_sharding_change_no_gradient():
    plan, adapters = planned("deep", ("a", "b"))
    twice = jax.tree.map(lambda a: np.concatenate([a, a]), batch())
    arguments = (adapters, backbone(), *twice, np.array([0, 1, -1, 1, -1, 0, 0, 1]))

    def loss(adapters, params, images, tokens, mask, route, *, compute):
        clip = CLIP(CONFIG, compute)
        out = clip.apply({"params": params}, images, tokens, mask, adapters=plan.bind(adapters), route=route)
        return jnp.mean(out.pair_logits**2)

    def gradient(compute, arguments):
        return names.flatten(jax.jit(jax.grad(functools.partial(loss, compute=compute)))(*arguments))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    sharded = jax.device_put(arguments, (everywhere, everywhere, *[over_batch] * 4))
    reference = gradient(Compute(), arguments)
    assert all(np.abs(value).max() > 0 for value in reference.values())
    for compute, given in ((Compute(remat="dots"), arguments), (Compute(remat="full"), sharded)):
        for name, value in gradient(compute, given).items():
            close(value, reference[name], 5e-6)


# What is refused


def abstractly(placements, images, tokens, mask, config=CONFIG, **settings):
    """Traces a forward pass without compiling or computing anything."""
    plan = place(placements, config.towers)

    def run(params, adapters):
        clip = CLIP(config)
        return clip.apply({"params": params}, images, tokens, mask, adapters=plan.bind(adapters), **settings)

    return jax.eval_shape(run, abstract_params(config), plan.shapes())


def test_prompts_that_leave_the_context_too_short_are_refused():
    placement = Placement(Prompt(6), towers=("text",), slots=("tokens",))
    abstractly(placement, *batch())  # 6 and 6 fill the 12 places
    more = dataclasses.replace(placement, method=Prompt(7))
    with pytest.raises(UserError, match="texts of 6 tokens and 7 inserted ones exceed the context of 12; use shorter"):
        abstractly(more, *batch())


CONDITIONED = Placement(CoCoOp(2, reduction=2), towers=("text",))


def test_prompts_that_follow_the_image_need_one_for_each_text():
    images, tokens, mask = batch()
    with pytest.raises(UserError, match="need the image beside each text; got no images"):
        abstractly(CONDITIONED, None, tokens, mask)
    with pytest.raises(UserError, match="read image i beside text i, and got 3 images and 4 texts"):
        abstractly(CONDITIONED, images[:3], tokens, mask)
    assert abstractly(CONDITIONED, images, None, None).text_features is None


def test_fusion_needs_one_image_for_each_text():
    images, tokens, mask = batch()
    with pytest.raises(UserError, match="got 4 images and 2 texts"):
        abstractly(Placement(Fusion(rank=4)), images, tokens[:2], mask[:2])


def test_prompts_that_follow_the_image_do_not_go_with_fusion():
    with pytest.raises(UserError, match="fusion adapters run both towers in step; use one of the two"):
        abstractly([CONDITIONED, Placement(Fusion(rank=4), "fusion")], *batch())


@pytest.mark.parametrize(("tower", "cut"), [("vision", (0, 2)), ("text", (3, 0))])
def test_a_stream_without_the_tokens_cannot_be_gone_on_from(tower, cut):
    images, tokens, mask = batch()
    placement = Placement(Prompt(2), towers=(tower,), slots=("tokens",))
    layers = {"image_layers": cut[0], "text_layers": cut[1]}
    prefix = jax.eval_shape(
        lambda params: CLIP(CONFIG).apply({"params": params}, images, tokens, mask, **layers, method="prefix"),
        abstract_params(CONFIG),
    )
    after = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), prefix)
    with pytest.raises(UserError, match=f"blocks of the {tower} tower without the adapters that sit there"):
        abstractly(placement, None, tokens, mask, after=after)
