"""Vectors that a network makes, against loops and peft; and the network folded away, whatever places share of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_layer import assign
from settings import backbone, count, drawn, equal_towers, inputs, model, site

from vla_jax import names
from vla_jax.adapters import LoRA, Placement, Prefix, Prompt, Share, fold, place
from vla_jax.adapters.plan import example
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH = 5
CONFIG = equal_towers()
PREFIX = Placement(Prefix(2, hidden=5))
PROMPT = Placement(Prompt(2, hidden=3), "prompt", slots=("tokens", "prompts"))
OTHER = Placement(LoRA(rank=2), "other", slots=("attn_q",))


def made_by_hand(params, vector: str) -> np.ndarray:
    """What a network makes, number by number; ``params`` by the leaves' names."""
    rows = []
    for embedding in params["embedding"]:
        hidden = [
            np.tanh(float(bias) + sum(float(e) * float(w) for e, w in zip(embedding, column, strict=True)))
            for column, bias in zip(params["down/kernel"].T, params["down/bias"], strict=True)
        ]
        rows.append(
            [
                float(bias) + sum(h * float(w) for h, w in zip(hidden, column, strict=True))
                for column, bias in zip(params[f"to_{vector}/kernel"].T, params[f"to_{vector}/bias"], strict=True)
            ]
        )
    return np.array(rows)


def close(ours, theirs, tolerance=1e-6):
    assert np.shape(ours) == np.shape(theirs)
    assert np.linalg.norm(np.subtract(ours, theirs)) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("method", "slot"),
    [(Prompt(3, hidden=7), "tokens"), (Prompt(3, hidden=7), "prompts"), (Prefix(3, hidden=7), "attn_kv")],
)
def test_a_network_makes_the_vectors(method, slot):
    place_ = site(slot, WIDTH, WIDTH)
    shapes = {"embedding": (3, WIDTH), "down/kernel": (WIDTH, 7), "down/bias": (7,)}
    for vector in method.vectors:
        shapes |= {f"to_{vector}/kernel": (7, WIDTH), f"to_{vector}/bias": (WIDTH,)}
    assert method.parameter_counts(place_) == {name: int(np.prod(shape)) for name, shape in shapes.items()}
    generator = np.random.default_rng(1)
    flat = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    apply = jax.jit(method.module(place_).apply)
    result = apply({"params": names.unflatten(flat)}, *example(method, place_, tokens=0))
    for vector, made in zip(method.vectors, jax.tree.leaves(result), strict=True):
        close(made, made_by_hand(flat, vector))


@pytest.mark.parametrize(
    ("placement", "kept"),
    [
        (PREFIX, ()),
        (PROMPT, ()),
        (dataclasses.replace(PREFIX, layers="-1"), ()),
        (dataclasses.replace(PREFIX, tied=True), (Share(".*", ("towers",)),)),
        (dataclasses.replace(PREFIX, sharing=(Share("embedding|down/.*", ("layers", "towers")),)), ()),
        (dataclasses.replace(PREFIX, sharing=(Share(".*", ("layers",)),)), (Share(".*", ("layers",)),)),
        (dataclasses.replace(PREFIX, tasks=("a", "b")), ()),
        (dataclasses.replace(PREFIX, tasks=("a", "b"), sharing=(Share("to_.*", ("tasks",)),)), ()),
        (dataclasses.replace(PREFIX, tasks=("a", "b"), sharing=(Share(".*", ("tasks",)),)), (Share(".*", ("tasks",)),)),
    ],
    ids=["prefix", "prompt", "last", "tied", "half_tied", "one_for_all", "tasks", "half_shared", "shared"],
)
def test_folded_vectors_are_those_that_the_network_makes(placement, kept):
    plan = place([placement, OTHER], CONFIG.towers)
    adapters = drawn(plan.shapes(), 1, 0.5)
    plain, folded = fold(plan, adapters)
    method = dataclasses.replace(placement.method, hidden=None)
    assert plain.placements == (dataclasses.replace(placement, method=method, sharing=kept, tied=False), OTHER)
    assert plain == place(plain.placements, CONFIG.towers)
    flat, flat_folded = names.flatten(adapters), names.flatten(folded)
    shapes = {name: leaf.shape for name, leaf in names.flatten(plain.shapes()).items()}
    assert {name: leaf.shape for name, leaf in flat_folded.items()} == shapes

    def one(leaf, tree, row, task):
        value = tree[leaf.path]
        value = value[row] if leaf.by_layer else value
        return np.asarray(value[task] if leaf.by_task else value)

    for before, after in zip(plan.groups, plain.groups, strict=True):
        for row in range(before.depth):
            for task in range(max(1, before.tasks)):
                own = {leaf.name: one(leaf, flat, row, task) for leaf in before.leaves}
                for leaf in after.leaves:
                    ours = one(leaf, flat_folded, row, task)
                    if before.path[0] == "other":
                        np.testing.assert_array_equal(ours, own[leaf.name])
                    else:
                        close(ours, made_by_hand(own, leaf.name))


def test_folding_changes_no_output():
    tasks = ("a", "b")
    plan = place([dataclasses.replace(placement, tasks=tasks) for placement in (PREFIX, PROMPT)], CONFIG.towers)
    adapters, batch, route = drawn(plan.shapes(), 1, 0.5), inputs(CONFIG), np.array([0, 1, -1, 1, 0, 0, 1, 1])

    def features(plan, adapters):
        run = jax.jit(
            lambda params, adapters: model(CONFIG).apply(
                {"params": params}, *batch, adapters=plan.bind(adapters), route=route
            )
        )
        out = run(backbone(CONFIG), adapters)
        return out.image_features, out.text_features

    for ours, theirs in zip(features(*fold(plan, adapters)), features(plan, adapters), strict=True):
        close(ours, theirs)


# Against peft


def peft_encoder(kind: str, settings: dict, weights: dict[str, np.ndarray]):
    """peft's module of this name and these settings, with these weights; skips without peft."""
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    sizes = {"num_virtual_tokens": 3, "token_dim": WIDTH, "num_attention_heads": 1, "num_transformer_submodules": 1}
    if kind == "PrefixEncoder":
        encoder = peft.PrefixEncoder(peft.PrefixTuningConfig(task_type="CAUSAL_LM", **sizes, **settings))
    else:
        encoder = peft.PromptEmbedding(peft.PromptTuningConfig(task_type="CAUSAL_LM", **sizes, **settings), None)
    parameters = dict(encoder.named_parameters())
    assert set(parameters) == set(weights)
    for name, parameter in parameters.items():
        assign(parameter, weights[name])
    return encoder


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.torch
def test_the_network_of_a_prefix_and_its_gradients_equal_pefts():
    torch = pytest.importorskip("torch")
    depth, hidden = 4, 7
    plan = place(Placement(Prefix(3, hidden=hidden), towers=("vision",)), {"vision": TowerShape(depth, WIDTH, WIDTH)})
    adapters = drawn(plan.shapes(), 1, 0.7)
    own = names.flatten(adapters["adapter"]["vision"]["attn_kv"])
    # One map makes all of them: for each layer its keys, then its values.
    joined = lambda flat, part: np.stack(  # noqa: E731
        [flat[f"to_{vector}/{part}"][layer] for layer in range(depth) for vector in ("key", "value")], -2
    )
    theirs = lambda flat: {  # noqa: E731
        "embedding.weight": flat["embedding"],
        "transform.0.weight": flat["down/kernel"].T,
        "transform.0.bias": flat["down/bias"],
        "transform.2.weight": joined(flat, "kernel").reshape(hidden, -1).T,
        "transform.2.bias": joined(flat, "bias").reshape(-1),
    }
    settings = {"prefix_projection": True, "num_layers": depth, "encoder_hidden_size": hidden}
    encoder = peft_encoder("PrefixEncoder", settings, theirs(own))
    made = encoder(torch.arange(3)[None])[0].unflatten(-1, (depth, 2, WIDTH))  # [length, layers, 2, width]
    slope = draw(2, 3, depth, 2, WIDTH)
    (made**2 * torch.tensor(slope)).sum().backward()

    @jax.jit
    def run(adapters):
        def loss(adapters):
            vectors = fold(plan, adapters)[1]["adapter"]["vision"]["attn_kv"]  # [layers, length, width] each
            ours = jnp.stack([vectors["key"], vectors["value"]], 1).transpose(2, 0, 1, 3)
            return jnp.sum(ours**2 * slope), ours

        (_, ours), gradient = jax.value_and_grad(loss, has_aux=True)(adapters)
        return ours, gradient

    ours, gradient = run(adapters)
    close(ours, made.detach().numpy())
    for name, value in theirs(names.flatten(gradient["adapter"]["vision"]["attn_kv"])).items():
        close(value, dict(encoder.named_parameters())[name].grad.numpy())


@pytest.mark.torch
def test_prompts_and_their_gradients_equal_pefts():
    torch = pytest.importorskip("torch")
    prompt, words, slope = draw(1, 3, WIDTH), draw(2, 4, 6, WIDTH), draw(3, 4, 9, WIDTH)
    encoder = peft_encoder("PromptEmbedding", {}, {"embedding.weight": prompt})
    # Before a batch of texts, as peft puts them; what follows mixes tokens, so that each gradient depends on all.
    stream = torch.cat([encoder(torch.arange(3).expand(4, -1)), torch.tensor(words)], 1)
    scores = torch.softmax(stream @ stream.transpose(1, 2), -1)
    expected = scores @ stream
    (expected * torch.tensor(slope)).sum().backward()

    @jax.jit
    def run(params):
        def loss(params):
            module = Prompt(3).module(site("tokens", WIDTH, WIDTH))
            inserted = jax.vmap(lambda x: module.apply({"params": params}, x, x[:0]))(jnp.asarray(words))
            stream = jnp.concatenate([inserted, words], 1)
            mixed = jax.nn.softmax(stream @ stream.swapaxes(1, 2), -1) @ stream
            return jnp.sum(mixed * slope), mixed

        (_, mixed), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return mixed, gradient

    ours, gradient = run({"prompt": prompt})
    close(ours, expected.detach().numpy(), 2e-6)
    close(gradient["prompt"], encoder.embedding.weight.grad.numpy(), 2e-6)


# Without a network


def test_vectors_learned_directly_stay_as_they_are():
    plan = place([Placement(Prefix(2)), OTHER], CONFIG.towers)
    adapters = drawn(plan.shapes(), 1, 0.5)
    again, same = fold(plan, adapters)
    assert again == plan
    jax.tree.map(np.testing.assert_array_equal, same, adapters)


def test_counts_by_hand():
    assert count(Prompt(3), site("tokens", 7, 7)) == 3 * 7
    assert count(Prefix(3), site("attn_kv", 7, 7)) == 2 * 3 * 7
    assert count(Prompt(3, hidden=4), site("tokens", 7, 7)) == 3 * 7 + 7 * 4 + 4 + 4 * 7 + 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"std": 0.0}, "std must be positive, got 0.0; tokens that start equal stay equal"),
        ({"hidden": 0}, "hidden must be at least 1, or None for tokens learned directly; got 0"),
    ],
)
@pytest.mark.parametrize("method", [Prompt, Prefix])
def test_settings_without_meaning_are_refused(method, settings, message):
    with pytest.raises(UserError, match=message):
        method(**settings)
