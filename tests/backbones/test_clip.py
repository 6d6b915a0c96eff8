from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_clip import CONFIG

from vla_jax import names
from vla_jax.adapters import Bottleneck, Fusion, LoRA, Placement, place
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.clip_towers import pool_position
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.transformer import Compute
from vla_jax.errors import UserError

PLAIN = Compute()
EMPTY = place((), CONFIG.towers)
LAST = place(Placement(Bottleneck(rank=3), slots=("mlp_out",), layers="-1"), CONFIG.towers)
FUSED = place(Placement(Fusion(rank=4, heads=2), pairs=((1, 0),)), CONFIG.towers)
EMBED = place(Placement(Bottleneck(rank=3), slots=("embed",)), CONFIG.towers)


quick = pytest.mark.usefixtures("quick_compilation_of_a_test")


def drawn(shapes, seed: int):
    """Noise of these shapes, with LayerNorms around one."""
    generator, flat = np.random.default_rng(seed), names.flatten(shapes)
    noise = {name: 0.3 * generator.standard_normal(leaf.shape).astype(np.float32) for name, leaf in flat.items()}
    return names.unflatten({name: leaf + name.endswith("scale") for name, leaf in noise.items()})


@functools.cache
def backbone():
    return drawn(abstract_params(CONFIG), 0)


@functools.cache
def adapters(plan):
    return drawn(plan.shapes(), 1)


@functools.cache
def batch():
    """Four images, four texts of different lengths padded on the right, and their mask."""
    generator = np.random.default_rng(2)
    images = generator.standard_normal((4, 8, 8, 3)).astype(np.float32)
    tokens, mask = generator.integers(2, 38, (4, 6)), np.zeros((4, 6), bool)
    for row, length in enumerate((3, 6, 4, 5)):
        tokens[row, length - 1] = 39
        tokens[row, length:] = 0
        mask[row, :length] = True
    return images, tokens.astype(np.int32), mask


@functools.cache
def program(plan=None, cut=None, compute=PLAIN, hidden=False):
    """``run(params, adapters, images, tokens, mask)``, whole or in two parts cut after these blocks."""
    clip = CLIP(CONFIG, compute)

    @jax.jit
    def run(params, adapters, images, tokens, mask):
        bound = None if plan is None else plan.bind(adapters)
        after = None
        if cut is not None:
            layers = {"image_layers": cut[0], "text_layers": cut[1]}
            after = clip.apply({"params": params}, images, tokens, mask, **layers, method="prefix")
            images = None
        return clip.apply({"params": params}, images, tokens, mask, adapters=bound, after=after, hidden_states=hidden)

    return run


def outputs(plan=None, images_alone=False, **settings):
    arrays = (batch()[0], None, None) if images_alone else batch()
    return program(plan, **settings)(backbone(), None if plan is None else adapters(plan), *arrays)


def assert_close(ours, theirs, tolerance=2e-6):
    for name in ("image_features", "text_features", "image_tokens", "text_tokens", "image_pooled", "text_pooled"):
        mine, reference = (getattr(out, name) for out in (ours, theirs))
        if reference is None:
            assert mine is None
            continue
        mine, reference = np.asarray(mine, np.float32), np.asarray(reference, np.float32)
        assert np.linalg.norm(mine - reference) <= tolerance * np.linalg.norm(reference), name


def abstractly(plan=None, *arrays, **settings):
    """Traces a forward pass without compiling or computing anything."""

    def run(params, adapters):
        bound = None if plan is None else plan.bind(adapters)
        return CLIP(CONFIG).apply({"params": params}, *arrays, adapters=bound, **settings)

    return jax.eval_shape(run, backbone(), None if plan is None else adapters(plan))


# Nothing in the slots


def plain_forward(params, images, tokens, mask, *, config):
    """CLIP written straight down, block after block, without slots, segments or scans."""

    def norm(weights, x):
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False).apply({"params": weights}, x)

    def linear(weights, x):
        return nn.Dense(weights["kernel"].shape[-1], use_bias="bias" in weights).apply({"params": weights}, x)

    def run(tower, shape, stream, bias):
        batch_size, length, width = stream.shape
        for layer in range(shape.depth):
            block = jax.tree.map(lambda a, layer=layer: a[layer], tower["blocks"])
            attention = block["attn"]
            x = norm(block["norm1"], stream)
            split = (batch_size, length, shape.heads, width // shape.heads)
            query, key, value = (linear(attention[n], x).reshape(split).swapaxes(1, 2) for n in "qkv")
            scores = query * (width // shape.heads) ** -0.5 @ key.swapaxes(2, 3)
            scores = scores if bias is None else scores + bias
            mixed = (jax.nn.softmax(scores) @ value).swapaxes(1, 2).reshape(stream.shape)
            stream = stream + linear(attention["out"], mixed)
            hidden = linear(block["mlp"]["fc1"], norm(block["norm2"], stream))
            quick_gelu = shape.activation == "quick_gelu"
            hidden = hidden * jax.nn.sigmoid(1.702 * hidden) if quick_gelu else jax.nn.gelu(hidden, approximate=False)
            stream = stream + linear(block["mlp"]["fc2"], hidden)
        return stream

    vision, text, patch = params["vision"], params["text"], config.patch_size
    patches = images.reshape(len(images), config.grid, patch, config.grid, patch, 3).swapaxes(2, 3)
    patches = patches.reshape(len(images), config.grid**2, -1)
    patches = patches @ vision["patch_embedding"]["kernel"].reshape(-1, config.vision.width)
    first = jnp.broadcast_to(vision["class_embedding"], (len(images), 1, config.vision.width))
    stream = jnp.concatenate([first, patches], 1) + vision["position_embedding"]
    image = run(vision, config.vision, norm(vision["pre_norm"], stream), None)

    length = tokens.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None] & mask[:, None, None, :]
    stream = jnp.take(text["token_embedding"], tokens, axis=0) + text["position_embedding"][:length]
    words = run(text, config.text, stream, jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min))
    words = norm(text["post_norm"], words)
    last = jnp.argmax(tokens == config.eos_token_id, axis=-1)
    pooled = jnp.take_along_axis(words, last[:, None, None], axis=1)[:, 0]
    return linear(vision["projection"], norm(vision["post_norm"], image[:, 0])), linear(text["projection"], pooled)


def test_without_adapters_the_compiled_program_is_the_plain_models():
    shallow = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, depth=2))
    params = drawn(abstract_params(shallow), 0)
    unrolled, empty_plan = CLIP(shallow, Compute(unroll=2)), place((), shallow.towers)

    def ours(plan, params, images, tokens, mask):
        bound = None if plan is None else plan.bind({})
        out = unrolled.apply({"params": params}, images, tokens, mask, adapters=bound)
        return out.image_features, out.text_features

    arguments = (params, *batch())
    without, empty = (jax.jit(functools.partial(ours, plan)).lower(*arguments) for plan in (None, empty_plan))
    assert without.as_text() == empty.as_text()
    plain = jax.jit(functools.partial(plain_forward, config=shallow))
    ours_compiled, plain_compiled = without.compile(), plain.lower(*arguments).compile()
    ours_cost, plain_cost = ours_compiled.cost_analysis(), plain_compiled.cost_analysis()
    assert plain_cost["flops"] > 1e5
    assert ours_cost["flops"] == plain_cost["flops"]
    assert ours_cost["transcendentals"] == plain_cost["transcendentals"]
    for mine, reference in zip(ours_compiled(*arguments), plain_compiled(*arguments), strict=True):
        np.testing.assert_array_equal(mine, reference)


@quick
def test_an_empty_plan_gives_the_plain_outputs_bit_for_bit():
    for mine, reference in zip(jax.tree.leaves(outputs(EMPTY)), jax.tree.leaves(outputs()), strict=True):
        np.testing.assert_array_equal(mine, reference)


@quick
def test_one_modality_gives_its_part_and_batches_may_differ():
    images, tokens, mask = batch()
    whole, image = outputs(), outputs(images_alone=True)
    text = program()(backbone(), None, None, tokens[1:], mask[1:])
    assert image.text_features is image.text_tokens is text.image_features is text.image_pooled is None
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(image.image_features, whole.image_features)
    close(text.text_features, whole.text_features[1:])
    shapes = abstractly(None, images, tokens[1:], mask[1:])
    assert (shapes.image_features.shape, shapes.text_features.shape) == ((4, 10), (3, 10))


@quick
def test_logits_are_scaled_cosines():
    out = outputs()
    image, text = (np.asarray(f, np.float64) for f in (out.image_features, out.text_features))
    cosines = np.array([[i @ t / np.linalg.norm(i) / np.linalg.norm(t) for t in text] for i in image])
    scale = np.exp(np.float64(backbone()["logit_scale"]))
    np.testing.assert_allclose(out.logits, scale * cosines, rtol=1e-5)
    np.testing.assert_allclose(out.pair_logits, scale * np.diag(cosines), rtol=1e-5)


# Prefixes


@quick
@pytest.mark.parametrize(
    ("plan", "cut", "images_alone"),
    [
        (None, (1, 2), False),
        (None, (3, 0), False),
        (FUSED, (2, 1), False),  # the joint stands right at the cut
        (LAST, (1, 0), True),
        (EMBED, (0, 0), True),
    ],
    ids=["inside", "ends", "joint_at", "adapters_behind", "embeddings"],
)
def test_prefix_and_what_comes_after_are_the_whole(plan, cut, images_alone):
    whole = outputs(plan, images_alone)
    assert_close(outputs(plan, images_alone, cut=cut), whole)
    if plan is not None:
        assert np.linalg.norm(whole.image_features - outputs(None, images_alone).image_features) > 0.01


def prefix_of(image_layers: int, text_layers: int):
    images, tokens, mask = batch()
    layers = {"image_layers": image_layers, "text_layers": text_layers}
    clip = CLIP(CONFIG)
    return jax.eval_shape(
        lambda params: clip.apply({"params": params}, images, tokens, mask, **layers, method="prefix"), backbone()
    )


@pytest.mark.parametrize(
    ("plan", "cut", "tower"),
    [
        (LAST, (3, 1), "vision"),
        (LAST, (1, 2), "text"),
        (FUSED, (3, 1), "vision"),
        (FUSED, (1, 2), "text"),
        (EMBED, (1, 0), "vision"),
        (EMBED, (0, 1), "text"),
    ],
)
def test_a_prefix_that_has_passed_an_adapter_is_refused(plan, cut, tower):
    _, tokens, mask = batch()
    after = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), prefix_of(*cut))
    with pytest.raises(UserError, match=f"passed {max(cut)} blocks of the {tower} tower"):
        abstractly(plan, None, tokens, mask, after=after)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ((4, 0), "image_layers 4 is outside 0 to 3"),
        ((-1, 0), "image_layers -1 is outside 0 to 3"),
        ((0, 3), "text_layers 3 is outside 0 to 2"),
    ],
)
def test_a_prefix_of_blocks_that_do_not_exist_is_refused(cut, message):
    with pytest.raises(UserError, match=message):
        prefix_of(*cut)


def test_joints_need_both_modalities():
    images, tokens, mask = batch()
    with pytest.raises(UserError, match="need images and tokens together; got no tokens"):
        abstractly(FUSED, images)
    with pytest.raises(UserError, match="need images and tokens together; got no images"):
        abstractly(FUSED, None, tokens, mask)


# Hidden states, masks and pooling


@quick
def test_hidden_states_are_the_embeddings_and_every_blocks_output():
    out = outputs(hidden=True)
    assert_close(out, outputs())
    assert out.image_hidden.shape == (1 + 3, 4, 1 + 4, 16)
    assert out.text_hidden.shape == (1 + 2, 4, 6, 12)
    np.testing.assert_array_equal(out.image_hidden[-1], out.image_tokens)
    params, (images, tokens, _) = backbone(), batch()

    def norm(x, weights):
        x = np.asarray(x, np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights["scale"] + weights["bias"]

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(norm(out.text_hidden[-1], params["text"]["post_norm"]), out.text_tokens)
    close(norm(out.image_hidden[-1][:, 0], params["vision"]["post_norm"]), out.image_pooled)
    text = params["text"]
    close(out.text_hidden[0], text["token_embedding"][tokens] + text["position_embedding"][:6])
    vision, patches = params["vision"], np.zeros((4, 5, 16))
    patches[:, 0] = vision["class_embedding"]
    for row in range(2):
        for column in range(2):
            patch = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            patches[:, 1 + 2 * row + column] = np.einsum("bhwc,hwcd->bd", patch, vision["patch_embedding"]["kernel"])
    close(out.image_hidden[0], norm(patches + vision["position_embedding"], vision["pre_norm"]))


def test_hidden_states_are_not_kept_unless_asked_for():
    out = abstractly(None, *batch())
    assert out.image_hidden is out.text_hidden is None


@quick
def test_padding_on_the_right_does_not_matter_to_the_pooled_feature():
    images, tokens, mask = batch()
    masked = outputs()
    seen = program()(backbone(), None, images, tokens, np.ones_like(mask))
    np.testing.assert_array_equal(seen.text_features, masked.text_features)
    other = np.where(mask, tokens, 17)
    np.testing.assert_array_equal(program()(backbone(), None, images, other, mask).text_features, masked.text_features)
    # Yet the mask does hide what it names.
    hidden = mask & (np.arange(6) != 1)
    assert not np.allclose(program()(backbone(), None, images, tokens, hidden).text_features, masked.text_features)


@quick
def test_a_word_reaches_itself_and_what_comes_after_it():
    images, tokens, mask = batch()
    run = lambda tokens: np.asarray(program()(backbone(), None, images, tokens, np.ones_like(mask)).text_tokens)  # noqa: E731
    before = run(tokens)
    for place_ in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[:, place_] = (tokens[:, place_] + 1) % 40
        differs = (run(changed) != before).any(-1)  # [texts, tokens]
        np.testing.assert_array_equal(differs, np.broadcast_to(np.arange(6) >= place_, differs.shape))


@pytest.mark.parametrize(
    ("pooling", "eos", "expected"),
    [("first_eos", 7, [1, 3, 0, 2]), ("first_eos", 9, [3, 0, 2, 0]), ("largest_id", 7, [3, 3, 2, 0])],
)
def test_pooled_position_by_hand(pooling, eos, expected):
    tokens = jnp.array([[1, 7, 3, 9], [5, 2, 6, 7], [7, 7, 9, 0], [8, 6, 7, 7]])
    config = dataclasses.replace(CONFIG, pooling=pooling, eos_token_id=eos)
    np.testing.assert_array_equal(pool_position(config, tokens), expected)


# How it is run


@quick
@pytest.mark.slow
def test_recomputation_changes_the_work_and_not_the_gradients():
    def loss(params, remat):
        clip = CLIP(CONFIG, Compute(remat=remat))
        out = clip.apply({"params": backbone() | {"text": params}}, None, *batch()[1:])
        return jnp.sum(out.text_features**2)

    params = backbone()["text"]
    gradients, products = {}, {}
    for remat in ("none", "dots", "full"):
        gradient = jax.jit(jax.grad(functools.partial(loss, remat=remat)))
        products[remat] = str(gradient.trace(params).jaxpr).count("dot_general")
        gradients[remat] = names.flatten(gradient(params))
    # The attention's two products of activations are redone for "dots", and the weight products too for "full".
    assert products["none"] < products["dots"] < products["full"]
    largest = max(map(np.linalg.norm, gradients["none"].values()))
    for remat in ("dots", "full"):
        for name, reference in gradients["none"].items():
            # Against the largest leaf's too, since the keys' biases have a gradient of zero but for rounding.
            error = np.linalg.norm(gradients[remat][name] - reference)
            assert error <= 1e-6 * max(np.linalg.norm(reference), largest), (remat, name)


def test_what_comes_out_of_a_narrow_adapter_is_not_kept_for_the_backward_pass():
    """A block keeps the results of its maps, and of adapters what is as narrow as their rank."""
    plan = place(Placement(LoRA(rank=1), slots=("attn_q", "attn_v"), towers=("vision",)), CONFIG.towers)
    images, tower = jnp.asarray(batch()[0]), CONFIG.vision

    def features(params):
        clip = CLIP(CONFIG, Compute(remat="dots"))
        return clip.apply({"params": backbone()}, images, None, None, adapters=plan.bind(params)).image_features

    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(features, params)[1], adapters(plan)))
    activations = [leaf.shape for leaf in kept if leaf.shape[:3] == (tower.depth, *images.shape[:1], 5)]
    # Beside the block's input: queries, keys, values, out, fc1; after fc2 there is only the sum.
    assert sorted(shape[3] for shape in activations) == sorted([1, 1, *[tower.width] * 5, tower.mlp_width])


@quick
def test_half_precision_differs_by_its_roundings():
    half, full = outputs(FUSED, compute=Compute(dtype="bfloat16")), outputs(FUSED)
    assert {half.image_tokens.dtype, half.text_features.dtype} == {jnp.dtype("bfloat16")}
    assert half.logits.dtype == jnp.float32
    # Each block rounds about ten times to 8 bits, each way independently: errors add up as a root.
    roundings = 10 * (3 + 2)
    assert_close(half, full, tolerance=roundings**0.5 * 2**-8)
    with pytest.raises(AssertionError):
        assert_close(half, full, tolerance=2**-12)
