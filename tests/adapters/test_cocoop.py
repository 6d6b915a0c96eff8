"""CoCoOp against its definition, against PyTorch, and in a model whose texts follow their images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_by_hand import image_by_hand, text_by_hand
from settings import CONFIG, backbone, count, drawn, inputs, model, site

from vla_jax.adapters import CoCoOp, Placement, cocoop, place, vpt_shallow
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, FEATURES = 6, 8
SITE = site("tokens", WIDTH, WIDTH, "text")._replace(features=FEATURES)
METHOD = CoCoOp(3, reduction=2)


def example():
    """Embedded tokens, tokens inserted before, an image's feature, and what training might have made of the rest."""
    generator = np.random.default_rng(1)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    params = {
        "prompt": draw(3, WIDTH),
        "down": {"kernel": draw(FEATURES, 4), "bias": draw(4)},
        "up": {"kernel": draw(4, WIDTH), "bias": draw(WIDTH)},
    }
    return draw(5, WIDTH), draw(2, WIDTH), 3.0 * draw(FEATURES), params


def close(ours, theirs, tolerance=2e-6):
    assert np.linalg.norm(np.subtract(ours, theirs)) <= tolerance * np.linalg.norm(theirs)


def context_by_hand(params, feature):
    """The context, number by number."""
    feature = np.asarray(feature, np.float64)
    feature = feature / np.sqrt(sum(number**2 for number in feature))
    down, up = params["down"], params["up"]
    hidden = [
        max(0.0, float(bias) + sum(f * float(down["kernel"][i, h]) for i, f in enumerate(feature)))
        for h, bias in enumerate(down["bias"])
    ]
    shift = [
        float(bias) + sum(a * float(up["kernel"][h, o]) for h, a in enumerate(hidden))
        for o, bias in enumerate(up["bias"])
    ]
    return np.asarray(params["prompt"], np.float64) + np.array(shift)


def test_module_equals_the_definition():
    x, y, image, params = example()
    result = jax.jit(METHOD.module(SITE).apply)({"params": params}, x, y, image)
    np.testing.assert_array_equal(result[:2], y)
    close(result[2:], context_by_hand(params, image))


def test_a_feature_of_zeros_moves_the_context_by_the_bias_alone():
    x, y, _, params = example()
    result = jax.jit(METHOD.module(SITE).apply)({"params": params}, x, y, np.zeros(FEATURES, np.float32))
    hidden = np.maximum(params["down"]["bias"], 0)
    close(result[2:], params["prompt"] + hidden @ params["up"]["kernel"] + params["up"]["bias"])


@pytest.mark.torch
def test_output_and_gradients_equal_pytorchs():
    torch = pytest.importorskip("torch")
    x, y, image, params = example()
    slope = np.random.default_rng(2).standard_normal((3, WIDTH)).astype(np.float32)
    tensors = jax.tree.map(lambda a: torch.tensor(a, requires_grad=True), params)
    feature = torch.tensor(image)
    feature = feature / feature.norm()
    hidden = torch.nn.functional.linear(feature, tensors["down"]["kernel"].T, tensors["down"]["bias"]).relu()
    shift = torch.nn.functional.linear(hidden, tensors["up"]["kernel"].T, tensors["up"]["bias"])
    expected = tensors["prompt"] + shift
    (expected * torch.tensor(slope)).sum().backward()

    def forward(params):
        return jax.jit(METHOD.module(SITE).apply)({"params": params}, x, y, image)[2:]

    close(forward(params), expected.detach().numpy())
    gradient = jax.grad(lambda p: jnp.sum(forward(p) * slope))(params)
    jax.tree.map(lambda ours, theirs: close(ours, theirs.grad.numpy()), gradient, tensors)


def test_published_parameters():
    plan = place(cocoop(), CLIPConfig.preset("vit_b_16").towers)
    assert plan.parameter_count() == 35_360  # as MaPLe's paper counts it
    assert sum(leaf.size for leaf in jax.tree.leaves(plan.shapes())) == 35_360
    assert count(METHOD, SITE) == 3 * WIDTH + FEATURES * 4 + 4 + 4 * WIDTH + WIDTH


def test_every_text_follows_the_image_beside_it():
    # Image prompts are there too: the feature that a text follows is the adapted one.
    plan = place([Placement(CoCoOp(2, reduction=4), "cocoop", towers=("text",)), vpt_shallow(2)], CONFIG.towers)
    adapters = drawn(plan.shapes(), 1, 0.5)
    params, (images, tokens, mask) = backbone(CONFIG), inputs(CONFIG)
    run = jax.jit(
        lambda params, adapters, images: model(CONFIG).apply(
            {"params": params}, images, tokens, mask, adapters=plan.bind(adapters)
        )
    )
    out = run(params, adapters, images)
    own = jax.tree.map(lambda a: a[0], adapters["cocoop"]["text"]["tokens"])
    behind = {0: adapters["vpt_shallow"]["vision"]["tokens"]["prompt"][0]}
    for row in range(3):
        image = image_by_hand(params, CONFIG, images[row], behind, {})
        context = context_by_hand(own, image.feature)
        text = text_by_hand(params, CONFIG, tokens[row], mask[row], {0: context}, {})
        close(out.image_features[row], image.feature)
        close(out.text_features[row], text.feature)
    # Another image beside them changes the texts, and only those beside it.
    other = run(params, adapters, jnp.concatenate([images[1:2], images[1:]]))
    assert np.abs(other.text_features[0] - out.text_features[0]).max() > 1e-2
    np.testing.assert_array_equal(other.text_features[1:], out.text_features[1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"std": -1.0}, "std must be positive, got -1.0"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        CoCoOp(**settings)


def test_places_without_meaning_are_refused():
    with pytest.raises(UserError, match=r"give towers=\('text',\) and slots=\('tokens',\), not vision/tokens"):
        place(Placement(CoCoOp()), CONFIG.towers)
    with pytest.raises(UserError, match="reduction 17 leaves nothing of features 16 wide"):
        place(Placement(CoCoOp(reduction=17), towers=("text",)), CONFIG.towers)
