"""CLIP-Adapter against its definition, against PyTorch, and at the end of a model's image tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import CONFIG, backbone, count, drawn, inputs, model, site

from vla_jax.adapters import CLIPAdapter, Placement, clip_adapter, place
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEATURES = 8
SITE = site("projection", 5, FEATURES)


def example(reduction: int = 4):
    """A pooled token, a feature, and what training might have made of the bottleneck."""
    generator = np.random.default_rng(1)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    hidden = FEATURES // reduction
    params = {"down": {"kernel": draw(FEATURES, hidden)}, "up": {"kernel": draw(hidden, FEATURES)}}
    return draw(1, 5), draw(1, FEATURES), params


def close(ours, theirs, tolerance=2e-6):
    assert np.linalg.norm(np.subtract(ours, theirs)) <= tolerance * np.linalg.norm(theirs)


def by_hand(params, feature, ratio):
    """One feature, number by number."""
    down, up = params["down"]["kernel"], params["up"]["kernel"]
    hidden = [max(0.0, sum(float(f) * float(w) for f, w in zip(feature, column, strict=True))) for column in down.T]
    adapted = [max(0.0, sum(h * float(w) for h, w in zip(hidden, column, strict=True))) for column in up.T]
    return [ratio * a + (1 - ratio) * float(f) for a, f in zip(adapted, feature, strict=True)]


@pytest.mark.parametrize("method", [CLIPAdapter(), CLIPAdapter(reduction=2, ratio=0.6), CLIPAdapter(ratio=1.0)])
def test_module_equals_the_definition(method):
    x, y, params = example(method.reduction)
    result = jax.jit(method.module(SITE).apply)({"params": params}, x, y)
    close(result[0], by_hand(params, y[0], method.ratio))


@pytest.mark.torch
def test_output_and_gradients_equal_pytorchs():
    torch = pytest.importorskip("torch")
    x, y, params = example()
    slope = np.random.default_rng(2).standard_normal((1, FEATURES)).astype(np.float32)
    layers = [
        torch.nn.Linear(FEATURES, FEATURES // 4, bias=False),
        torch.nn.Linear(FEATURES // 4, FEATURES, bias=False),
    ]
    with torch.no_grad():
        for layer, name in zip(layers, ("down", "up"), strict=True):
            layer.weight.copy_(torch.tensor(params[name]["kernel"].T.copy()))
    feature = torch.tensor(y)
    expected = 0.2 * layers[1](layers[0](feature).relu()).relu() + 0.8 * feature
    (expected * torch.tensor(slope)).sum().backward()

    def forward(params):
        return jax.jit(CLIPAdapter().module(SITE).apply)({"params": params}, x, y)

    close(forward(params), expected.detach().numpy())
    gradient = jax.grad(lambda p: jnp.sum(forward(p) * slope))(params)
    for layer, name in zip(layers, ("down", "up"), strict=True):
        assert np.abs(layer.weight.grad.numpy()).max() > 0
        close(gradient[name]["kernel"], layer.weight.grad.numpy().T)
    assert sum(layer.weight.numel() for layer in layers) == count(CLIPAdapter(), SITE)


def test_parameters_on_b_16():
    plan = place(clip_adapter(), CLIPConfig.preset("vit_b_16").towers)
    assert plan.parameter_count() == 2 * 512 * 128
    assert {leaf.shape for leaf in jax.tree.leaves(plan.shapes())} == {(1, 512, 128), (1, 128, 512)}


def test_it_stands_behind_the_image_tower():
    plan = place(clip_adapter(), CONFIG.towers)
    adapters = drawn(plan.shapes(), 1, 0.5)
    params, batch = backbone(CONFIG), inputs(CONFIG)

    @jax.jit
    def run(params, adapters, dropped):
        bound = None if adapters is None else plan.bind(adapters, dropped)
        return model(CONFIG).apply({"params": params}, *batch, adapters=bound)

    out, plain = run(params, adapters, None), run(params, None, None)
    own = jax.tree.map(lambda a: a[0], adapters["clip_adapter"]["vision"]["projection"])
    close(out.image_features, [by_hand(own, feature, 0.2) for feature in plain.image_features])
    np.testing.assert_array_equal(out.text_features, plain.text_features)
    np.testing.assert_array_equal(out.image_pooled, plain.image_pooled)
    # Adapters dropped from all blocks leave the one behind them.
    np.testing.assert_array_equal(run(params, adapters, np.int32(4)).image_features, out.image_features)
    # All that lies before it can be computed once.
    assert plan.first_layers() == {"vision": 4, "text": 2}
    assert not plan.inserts_tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"ratio": 0.0}, "ratio must be above 0 and at most 1, got 0.0"),
        ({"ratio": 1.5}, "ratio must be above 0 and at most 1, got 1.5"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        CLIPAdapter(**settings)


def test_features_too_narrow_to_reduce_are_refused():
    with pytest.raises(UserError, match="reduction 32 leaves nothing of features 16 wide"):
        place(Placement(CLIPAdapter(reduction=32)), CONFIG.towers)
