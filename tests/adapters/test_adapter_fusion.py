"""AdapterFusion against its definition in NumPy and in PyTorch, its attention in a CLIP, and its two stages."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from settings import BATCH, CONFIG, backbone, count, drawn, inputs, model, site

from vla_jax import names
from vla_jax.adapters import Average, Bottleneck, Fuse, Ladder, LoRA, Placement, Share, Stack, compose, fuse, place
from vla_jax.adapters.adapter_fusion import value_penalty
from vla_jax.adapters.plan import leaf_shapes
from vla_jax.errors import UserError
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import preset
from vla_jax.training.step import init_state, make_train_step
from vla_jax.training.table import ParameterTable

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS, WIDTH = 5, 6
SITE = site("mlp_out", WIDTH, WIDTH)
CHILDREN = (("a", Bottleneck(rank=2)), ("b", Bottleneck(rank=4, parallel=True, scale=3.0)), ("c", Bottleneck(rank=3)))


def example():
    """What stands before and behind a sublayer, ``[tokens, width]`` each."""
    generator = np.random.default_rng(1)
    return tuple(generator.standard_normal((TOKENS, WIDTH)).astype(np.float32) for _ in range(2))


def parameters(method, seed=2, size=0.5):
    """Parameters as training might leave them."""
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaf_shapes(method, SITE).items()}
    return names.unflatten(drawn(shapes, seed, size))


def run(method, params, *arrays):
    return np.asarray(jax.jit(method.module(SITE).apply)({"params": params}, *arrays))


def changes(params, x, y):
    """What each child of CHILDREN changes, ``[tokens, children, width]``, in float64."""
    made = []
    for name, child in CHILDREN:
        flat = {leaf: np.asarray(value, np.float64) for leaf, value in names.flatten(params[name]).items()}
        hidden = np.maximum((x if child.parallel else y) @ flat["down/kernel"] + flat["down/bias"], 0)
        made.append(child.scale * (hidden @ flat["up/kernel"] + flat["up/bias"]))
    return np.stack(made, axis=1)


def fused(params, x, y, heads):
    """The definition, one token and one head at a time, and the attention ``[heads, tokens, children]``."""
    own = {name: np.asarray(leaf, np.float64) for name, leaf in names.flatten(params["fuse"]).items()}
    z, result, attention = changes(params, x, y), np.array(y, np.float64), np.zeros((heads, TOKENS, len(CHILDREN)))
    for token in range(TOKENS):
        query = y[token] @ own["query/kernel"] + own["query/bias"]
        keys = [change @ own["key/kernel"] + own["key/bias"] for change in z[token]]
        values = [change @ own["value/kernel"] for change in z[token]]
        for head in range(heads):
            part = slice(head * WIDTH // heads, (head + 1) * WIDTH // heads)
            scores = np.exp([query[part] @ key[part] for key in keys])
            attention[head, token] = scores / scores.sum()
            result[token, part] += sum(w * value[part] for w, value in zip(attention[head, token], values, strict=True))
    return result, attention


def close(ours, theirs, tolerance=2e-6):
    assert np.linalg.norm(np.subtract(ours, theirs)) <= tolerance * np.linalg.norm(theirs)


# The module


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_module_equals_the_definition(heads):
    (x, y), method = example(), Fuse(CHILDREN, heads=heads)
    params = parameters(method)
    expected, attention = fused(params, x, y, heads)
    result, sown = jax.jit(functools.partial(method.module(SITE).apply, mutable=["intermediates"]))(
        {"params": params}, x, y
    )
    close(result, expected)
    (weights,) = sown["intermediates"]["attention"]
    close(weights, attention[0] if heads == 1 else attention)
    assert weights.dtype == jnp.float32
    # It attends: no child has the same weight everywhere.
    assert np.ptp(attention, axis=1).min() > 1e-3


@pytest.mark.torch
def test_output_and_gradients_equal_pytorchs():
    torch = pytest.importorskip("torch")
    (x, y), method = example(), Fuse(CHILDREN)
    params = parameters(method)
    slope = np.random.default_rng(5).standard_normal((TOKENS, WIDTH)).astype(np.float32)
    tensor = lambda a: torch.tensor(np.array(a), requires_grad=True)  # noqa: E731
    theirs = {name: tensor(leaf) for name, leaf in names.flatten(params).items()}
    stream = tensor(y)
    z = []
    for name, child in CHILDREN:
        read = torch.tensor(x) if child.parallel else stream
        hidden = torch.relu(read @ theirs[f"{name}/down/kernel"] + theirs[f"{name}/down/bias"])
        z.append(child.scale * (hidden @ theirs[f"{name}/up/kernel"] + theirs[f"{name}/up/bias"]))
    z = torch.stack(z, dim=1)
    query = stream @ theirs["fuse/query/kernel"] + theirs["fuse/query/bias"]
    key = z @ theirs["fuse/key/kernel"] + theirs["fuse/key/bias"]
    weights = torch.softmax((key @ query.unsqueeze(2)).squeeze(2), dim=-1)
    expected = stream + (weights.unsqueeze(1) @ (z @ theirs["fuse/value/kernel"])).squeeze(1)
    (expected * torch.tensor(slope)).sum().backward()

    def forward(params, y):
        return method.module(SITE).apply({"params": params}, jnp.asarray(x), y)

    close(jax.jit(forward)(params, jnp.asarray(y)), expected.detach().numpy())
    loss = jax.jit(jax.grad(lambda p, y: jnp.sum(forward(p, y) * slope), argnums=(0, 1)))
    gradient, by_stream = loss(params, y)
    close(by_stream, stream.grad.numpy(), 1e-5)
    for name, value in names.flatten(gradient).items():
        if name == "fuse/key/bias":
            continue  # adds the same to all scores of a token: zero but for rounding
        close(value, theirs[name].grad.numpy(), 1e-5)
    scale = np.abs(gradient["fuse"]["query"]["bias"]).max()
    assert np.abs(gradient["fuse"]["key"]["bias"]).max() < 1e-5 * scale


def test_new_parameters():
    place_ = site("mlp_out", 300, 300)
    method = Fuse((("a", Bottleneck(rank=1)), ("b", Bottleneck(rank=2))))
    new = names.flatten(jax.jit(method.module(place_).init)(jax.random.key(0), *[jnp.zeros((1, 300))] * 2)["params"])
    own = {name: leaf for name, leaf in new.items() if name.startswith("fuse/")}
    assert {name: leaf.shape for name, leaf in own.items()} == {
        "fuse/query/kernel": (300, 300),
        "fuse/query/bias": (300,),
        "fuse/key/kernel": (300, 300),
        "fuse/key/bias": (300,),
        "fuse/value/kernel": (300, 300),
    }
    value = np.array(own["fuse/value/kernel"])
    np.testing.assert_array_equal(np.diag(value), 1.0)
    np.testing.assert_array_equal(value[~np.eye(300, dtype=bool)], np.float32(1e-6))
    for part in ("query", "key"):
        assert not np.any(own[f"fuse/{part}/bias"])
        # 90,000 normal draws: the deviation's own standard error is 0.24 %.
        assert np.std(own[f"fuse/{part}/kernel"]) == pytest.approx(0.02, rel=0.015)
    assert not np.array_equal(own["fuse/query/kernel"], own["fuse/key/kernel"])
    children = 2 * 300 * 3 + 3 + 2 * 300
    assert count(method, place_) == children + 3 * 300**2 + 2 * 300 == sum(leaf.size for leaf in new.values())


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_the_fusion_of_copies_is_at_first_the_one(copies):
    (x, y), width = example(), WIDTH
    child = CHILDREN[0][1]
    labels = [f"copy{k}" for k in range(copies)]
    method = Fuse(tuple((label, child) for label in labels))
    params = parameters(child)
    own = jax.jit(method.module(SITE).init)(jax.random.key(0), x, y)["params"]["fuse"]
    alone = run(child, params, x, y)
    result = run(method, dict.fromkeys(labels, params) | {"fuse": own}, x, y)
    # With V = (1 - e) I + e 11', e = 1e-6: z V - z = e (sum(z) - z), of a length of at most e (width - 1) |z|.
    change = (alone - y).astype(np.float64)
    expected = 1e-6 * (change.sum(-1, keepdims=True) - change)
    rounding = 8 * np.finfo(np.float32).eps * np.abs(alone).max()
    assert np.abs(result - alone - expected).max() <= rounding
    assert np.linalg.norm(result - alone) <= 1e-6 * (width - 1) * np.linalg.norm(change) + rounding * change.size**0.5


def test_products_follow_the_stream_in_half_precision():
    (x, y), method = example(), Fuse(CHILDREN)
    params = parameters(method)
    result = run(method, params, jnp.bfloat16(x), jnp.bfloat16(y))
    assert result.dtype == jnp.bfloat16
    # A child's change is as coarse as y and the child's output are, 2^-9 of them; scores multiply it by q W_K.
    exact, _ = fused(params, x, y, 1)
    assert np.linalg.norm(result.astype(np.float32) - exact) <= 2**-5 * np.linalg.norm(exact)


# The penalty


def test_the_penalty_adds_up_over_layers_towers_and_fusions():
    nested = Stack((("one", Fuse(CHILDREN[:2])), ("low", Bottleneck(rank=2))))
    placements = [Placement(Fuse(CHILDREN), "f", slots=("mlp_out",)), Placement(nested, "g", slots=("attn_out",))]
    plan = place(placements, CONFIG.towers)
    params = drawn(plan.shapes(), 3, 0.4)
    kernels = [
        np.asarray(layer, np.float64)
        for tower in ("vision", "text")
        for stack in (params["f"][tower]["mlp_out"], params["g"][tower]["attn_out"]["one"])
        for layer in stack["fuse"]["value"]["kernel"]
    ]
    assert len(kernels) == 2 * (4 + 2)
    expected = sum(np.sum((np.eye(len(kernel)) - kernel) ** 2) for kernel in kernels)
    assert float(value_penalty(params)) == pytest.approx(0.01 * expected, rel=1e-6)
    assert float(value_penalty({"adapters": params}, weight=2.0)) == pytest.approx(2 * expected, rel=1e-6)
    # At first nothing but the 1e-6 off the diagonal is left of it.
    start = jax.jit(plan.init)(jax.random.key(0))
    entries = sum(len(kernel) * (len(kernel) - 1) for kernel in kernels)
    assert float(value_penalty(start)) == pytest.approx(0.01 * 1e-12 * entries, rel=1e-5)
    assert float(value_penalty({"a": {"value": {"kernel": jnp.ones((2, 2))}}})) == 0


# Attention, as a CLIP hands it out


def attention_of(plan, params, unroll=1, route=None, config=CONFIG):
    @jax.jit
    def go(weights, params, route):
        bound = plan.bind(params, inspect=True)
        out = model(config, unroll).apply({"params": weights}, *inputs(config), adapters=bound, route=route)
        return out.readings, out.logits

    return go(backbone(config), params, route)


def test_attention_weights_of_every_layer_example_and_token():
    placement = Placement(Fuse(CHILDREN[:2]), "fused", slots=("mlp_out", "attn_sublayer"))
    heads = Placement(Fuse(CHILDREN, heads=2), "heads", slots=("block_out",), layers="1:3", towers=("vision",))
    plan = place([placement, heads], CONFIG.towers)
    params = drawn(plan.shapes(), 4, 0.4)
    readings, logits = attention_of(plan, params)
    shapes = {tower: {name: value.shape for name, value in found.items()} for tower, found in readings.items()}
    # The vision tower is cut into three segments by the second adapter, and read as one all the same.
    assert shapes == {
        "vision": {
            "fused/vision/mlp_out/attention": (4, BATCH, 5, 2),
            "fused/vision/attn_sublayer/attention": (4, BATCH, 5, 2),
            "heads/vision/block_out/attention": (2, BATCH, 2, 5, 3),
        },
        "text": {
            "fused/text/mlp_out/attention": (2, BATCH, 6, 2),
            "fused/text/attn_sublayer/attention": (2, BATCH, 6, 2),
        },
    }
    for found in readings.values():
        for weights in found.values():
            np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
            assert np.std(np.asarray(weights)[..., 0]) > 1e-3
    unrolled, same = attention_of(plan, params, unroll=4)
    close(same, logits, 1e-5)
    for tower, found in readings.items():
        for name, weights in found.items():
            close(unrolled[tower][name], weights, 1e-5)


def test_attention_weights_are_those_of_the_layer_by_hand():
    # The first block's embed slot is the stream itself, so that x and y of a layer's module are known.
    placement = Placement(Fuse(CHILDREN[:2]), "fused", slots=("block_out",), towers=("vision",), layers="last 1")
    plan = place(placement, CONFIG.towers)
    params = drawn(plan.shapes(), 4, 0.4)
    readings, _ = attention_of(plan, params)
    run = lambda weights: model(CONFIG).apply({"params": weights}, *inputs(CONFIG), hidden_states=True)  # noqa: E731
    plain = jax.jit(run)(backbone(CONFIG)).image_hidden
    own = jax.tree.map(lambda a: a[0], params["fused"]["vision"]["block_out"])
    module = placement.method.module(site("block_out", 32, 32))
    call = functools.partial(module.apply, {"params": own}, mutable=["intermediates"])
    _, sown = jax.jit(jax.vmap(call))(plain[-2], plain[-1])
    close(readings["vision"]["fused/vision/block_out/attention"][0], sown["intermediates"]["attention"][0], 1e-5)


def test_attention_weights_of_a_routed_batch():
    tasks = ("x", "y")
    placement = Placement(Fuse(CHILDREN[:2]), "fused", slots=("mlp_out",), tasks=tasks)
    plan = place(placement, CONFIG.towers)
    params, route = drawn(plan.shapes(), 4, 0.4), jnp.array([0, 1, -1, 1, 0, -1, 0, 1])
    mixed, _ = attention_of(plan, params, route=route)
    for task in range(2):
        alone, _ = attention_of(plan.single(), plan.select_task(params, task))
        rows = np.flatnonzero(route == task)
        for tower in ("vision", "text"):
            name = f"fused/{tower}/mlp_out/attention"
            close(mixed[tower][name][:, rows], alone[tower][name][:, rows], 1e-5)


def test_attention_weights_over_side_networks():
    ladders = (("a", Ladder(rank=8, heads=2)), ("b", Ladder(rank=4, heads=1, rungs="every 2nd")))
    plan = place(Placement(Fuse(ladders), "fused", towers=("vision",)), CONFIG.towers)
    params = drawn(plan.shapes(), 4, 0.4)
    readings, _ = attention_of(plan, params)
    assert not readings["text"]
    (name,) = readings["vision"]
    assert name == "fused/vision/side/attention"
    np.testing.assert_allclose(readings["vision"][name].sum(-1), 1, rtol=1e-6)
    assert np.std(np.asarray(readings["vision"][name])[..., 0]) > 1e-3
    # The side network leaves the frozen tower's states as they are.
    run = lambda weights: model(CONFIG).apply({"params": weights}, *inputs(CONFIG), hidden_states=True)  # noqa: E731
    states = jax.jit(run)(backbone(CONFIG)).image_hidden
    group = plan.groups[0]
    own = jax.tree.map(lambda a: a[0], params["fused"]["vision"]["side"])
    call = functools.partial(group.method.module(group.site).apply, {"params": own}, mutable=["intermediates"])
    seen = jnp.ones((BATCH, *[states.shape[2]] * 2), bool)
    _, sown = jax.jit(jax.vmap(call))(states.swapaxes(0, 1), states[-1], seen)
    close(readings["vision"][name][0], sown["intermediates"]["attention"][0], 1e-5)


def test_a_nested_fusion_has_its_own_name():
    inner = Fuse(CHILDREN[:2])
    placement = Placement(Fuse((("inner", inner), ("c", Bottleneck(rank=2)))), "outer", slots=("mlp_out",))
    plan = place(placement, CONFIG.towers)
    readings, _ = attention_of(plan, drawn(plan.shapes(), 4, 0.4))
    assert set(readings["text"]) == {"outer/text/mlp_out/attention", "outer/text/mlp_out/inner/attention"}


def test_without_inspection_nothing_is_handed_out():
    plan = place(Placement(Fuse(CHILDREN), slots=("mlp_out",)), CONFIG.towers)
    bound = plan.bind(drawn(plan.shapes(), 4, 0.4))
    out = jax.eval_shape(lambda: model(CONFIG).apply({"params": backbone(CONFIG)}, *inputs(CONFIG), adapters=bound))
    assert out.readings == {"vision": {}, "text": {}}


# Two stages


STAGE_ONE = Placement(Bottleneck(rank=3), "first", slots=("mlp_out",), layers="last 1", tasks=("vqa", "nlvr"))


def logits(plan, params):
    @jax.jit
    def run(weights, params):
        return model(CONFIG).apply({"params": weights}, *inputs(CONFIG), adapters=plan.bind(params)).logits

    return np.asarray(run(backbone(CONFIG), params))


def test_tasks_become_children():
    plan = place(dataclasses.replace(STAGE_ONE, sharing=(Share("down/.*", ("tasks",)),)), CONFIG.towers)
    params = drawn(plan.shapes(), 4, 0.4)
    second, begun = fuse(plan, params, CONFIG.towers, jax.random.key(0), heads=2)
    assert second.placements[0].method == Fuse((("vqa", Bottleneck(rank=3)), ("nlvr", Bottleneck(rank=3))), heads=2)
    assert {name: leaf.shape for name, leaf in names.flatten(begun).items()} == {
        name: leaf.shape for name, leaf in names.flatten(second.shapes()).items()
    }
    for tower in ("vision", "text"):
        trained, child = params["first"][tower]["mlp_out"], begun["fusion"][tower]["mlp_out"]
        for task, name in enumerate(("vqa", "nlvr")):
            np.testing.assert_array_equal(child[name]["up"]["kernel"], trained["up"]["kernel"][:, task])
            # What tasks shared, each child has.
            np.testing.assert_array_equal(child[name]["down"]["bias"], trained["down"]["bias"])


def test_placements_trained_apart_become_children_and_share_what_they_shared():
    towers = {"vision": CONFIG.towers["vision"], "text": CONFIG.towers["vision"]}
    one = Placement(Bottleneck(rank=3), "one", slots=("mlp_out",), layers="last 2", tied=True)
    two = Placement(LoRA(rank=2), "two", slots=("attn_out",), layers="last 2")
    plans = [place(dataclasses.replace(placement, slots=("attn_out",)), towers) for placement in (one, two)]
    params = [drawn(plan.shapes(), seed, 0.4) for seed, plan in enumerate(plans)]
    together = place([*plans[0].placements, *plans[1].placements], towers)
    second, begun = fuse(together, names.merge(*params), towers, jax.random.key(0), name="both")
    flat = names.flatten(begun)
    for leaf in ("down/kernel", "up/bias"):
        source = names.flatten(params[0])[f"one/shared/attn_out/{leaf}"]
        np.testing.assert_array_equal(flat[f"both/shared/attn_out/one/{leaf}"], source)
    np.testing.assert_array_equal(flat["both/text/attn_out/two/b"], params[1]["two"]["text"]["attn_out"]["b"])
    assert [group.layers for group in second.groups] == [((2, 3),), ((2, 3),)]


def test_a_fusion_for_each_task_over_the_same_children():
    plan = place(STAGE_ONE, CONFIG.towers)
    params = drawn(plan.shapes(), 4, 0.4)
    second, begun = fuse(plan, params, CONFIG.towers, jax.random.key(0), tasks=("x", "y", "z"))
    shapes = {name: leaf.shape for name, leaf in names.flatten(begun).items() if "/text/" in name}
    assert shapes["fusion/text/mlp_out/vqa/up/kernel"] == (1, 3, 24)
    assert shapes["fusion/text/mlp_out/fuse/query/kernel"] == (1, 3, 24, 24)
    for leaf in second.leaves().values():
        assert leaf.by_task == leaf.name.startswith("fuse/")


def test_fusing_one_adapter_twice_starts_as_that_adapter():
    single = dataclasses.replace(STAGE_ONE, tasks=())
    plans = [place(dataclasses.replace(single, name=name), CONFIG.towers) for name in ("a", "b")]
    params = drawn(plans[0].shapes(), 4, 0.4)
    together = place([plan.placements[0] for plan in plans], CONFIG.towers)
    second, begun = fuse(together, {"a": params["a"], "b": params["a"]}, CONFIG.towers, jax.random.key(0))
    # 1e-6 (width - 1) of what the adapter changes, and what a tower's rounding makes of it.
    close(logits(second, begun), logits(plans[0], params), 1e-6 * 31 + 1e-6)


def test_other_composites_of_trained_adapters():
    plan = place(STAGE_ONE, CONFIG.towers)
    params = drawn(plan.shapes(), 4, 0.4)
    build = functools.partial(Average, weights=(0.0, 1.0))
    second, begun = compose(plan, params, CONFIG.towers, build, jax.random.key(0), name="mean")
    close(logits(second, begun), logits(plan.single(), plan.select_task(params, 1)), 1e-5)


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        ([], "the plan has no adapters to put together"),
        (
            [Placement(LoRA(), "a", slots=("attn_q",)), Placement(LoRA(), "b", slots=("attn_v",), layers="-1")],
            "adapters 'a' and 'b' differ in slots, layers; only adapters in the same places",
        ),
        (
            [Placement(LoRA(), "a", slots=("attn_q",), ranks=(("vision/.*", 2),))],
            "adapter 'a' has a table of ranks or alphas",
        ),
    ],
)
def test_adapters_that_do_not_go_together_are_refused(placements, message):
    plan = place(placements, CONFIG.towers)
    with pytest.raises(UserError, match=message):
        fuse(plan, {}, CONFIG.towers, jax.random.key(0))


def test_the_second_stage_trains_the_attention_and_the_head_alone():
    towers = small_model.CONFIG.towers
    plan = place(dataclasses.replace(STAGE_ONE, layers="all"), towers)
    trained = drawn(plan.shapes(), 4, 0.2)
    second, begun = fuse(plan, trained, towers, jax.random.key(0))
    given = small_model.model(second.placements)
    assert given.plan == second
    params = small_model.drawn_params(given) | {"adapters": begun}
    table = ParameterTable(preset("adapter_fusion")).resolve(params)
    own = {row.name for row in table.rows if row.train}
    assert own == {
        *(
            f"adapters/fusion/{tower}/mlp_out/fuse/{leaf}"
            for tower in ("vision", "text")
            for leaf in ("query/kernel", "query/bias", "key/kernel", "key/bias", "value/kernel")
        ),
        "heads/matching/classifier/kernel",
        "heads/matching/classifier/bias",
    }
    trainable, frozen = table.split(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), table, trainable, 2)
    step = make_train_step(given.loss, optimizer, seed=0)
    before = jax.tree.map(np.array, trainable)
    state, metrics = init_state(trainable, optimizer), {}
    for seed in range(2):
        state, metrics = step(state, frozen, small_model.batch(seed=seed))
    for name, leaf in names.flatten(state.trainable).items():
        assert not np.array_equal(leaf, names.flatten(before)[name]) or name.endswith("key/bias"), name
    assert np.isfinite(metrics["loss"])


def test_the_loss_of_a_model_has_the_penalty():
    given = small_model.model((Placement(Fuse(CHILDREN), "fusion", slots=("mlp_out",), layers="last 1"),))
    params, rows = small_model.drawn_params(given), jax.tree.map(jnp.asarray, small_model.batch())

    def both(adapters, rest):
        whole = rest | {"adapters": adapters}
        alone = given.task.loss(whole["heads"]["matching"], given.apply(whole, rows), rows)[0]
        return given.loss(whole, rows, jax.random.key(0))[0], alone

    (loss, alone), gradient = jax.jit(jax.value_and_grad(both, has_aux=True))(params["adapters"], params)
    penalty = float(value_penalty(params))
    assert penalty > 1
    assert float(loss) == pytest.approx(float(alone) + penalty, rel=1e-6)
    kernel = np.asarray(params["adapters"]["fusion"]["vision"]["mlp_out"]["fuse"]["value"]["kernel"])
    slope = gradient["fusion"]["vision"]["mlp_out"]["fuse"]["value"]["kernel"]
    pull = -0.02 * (np.eye(32) - kernel)
    assert np.linalg.norm(slope - pull) < np.linalg.norm(slope)


def test_the_second_stage_needs_a_fusion():
    params = small_model.model(small_model.PLACEMENTS[:1]).shapes()
    with pytest.raises(UserError, match=r"fuse/.* matches no parameter"):
        ParameterTable(preset("adapter_fusion")).resolve(params)
