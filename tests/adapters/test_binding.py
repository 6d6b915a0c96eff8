from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import CONFIG, backbone, drawn, inputs, model

from vla_jax import names
from vla_jax.adapters import Bottleneck, Fusion, LoRA, Placement, place
from vla_jax.adapters.base import Method
from vla_jax.adapters.binding import apply, where_on
from vla_jax.errors import UserError
from vla_jax.slots import TowerShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOWERS = CONFIG.towers  # vision: 4 blocks of width 32; text: 2 blocks of width 24


def numbered(plan):
    """Parameters in which each row of a stack holds nothing but its own number."""
    shapes = plan.shapes()
    rows = lambda leaf: np.broadcast_to(np.arange(len(leaf)).reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)  # noqa: E731
    return jax.tree.map(lambda leaf: rows(leaf).astype(np.float32), shapes)


def rows_of(tree) -> list[list[int]]:
    """For each occupant of a segment, the rows of its stack that the segment's blocks see."""
    found = []
    for occupant in tree:
        rows = {tuple(leaf.reshape(len(leaf), -1)[:, 0].tolist()) for leaf in jax.tree.leaves(occupant["params"])}
        assert len(rows) == 1
        found.append([int(row) for row in rows.pop()])
    return found


# Segments


def test_a_tower_is_cut_where_its_occupants_change():
    plan = place(
        [
            Placement(LoRA(rank=2), "one", slots=("attn_q",), layers="0,3", towers=("vision",)),
            Placement(Bottleneck(rank=2), "two", slots=("mlp_out",), layers="2:", towers=("vision",)),
            Placement(Bottleneck(rank=2), "three", slots=("mlp_out",), towers=("text",)),
        ],
        TOWERS,
    )
    occupancy = plan.bind(numbered(plan)).occupy(None, None)
    found = {
        tower: [(segment.start, segment.stop, rows_of(segment.tree)) for segment in segments]
        for tower, segments in occupancy.segments.items()
    }
    assert found == {
        "vision": [(0, 1, [[0]]), (1, 2, []), (2, 3, [[0]]), (3, 4, [[1], [1]])],
        "text": [(0, 2, [[0, 1]])],
    }
    assert occupancy.joints == ()


def test_equal_layers_make_one_segment_and_are_not_copied():
    plan = place(Placement(LoRA(rank=2), slots=("attn_q", "mlp_fc1")), TOWERS)
    params = numbered(plan)
    for tower, segments in plan.bind(params).occupy(None, None).segments.items():
        (segment,) = segments
        for slot, occupant in zip(("attn_q", "mlp_fc1"), segment.tree, strict=True):
            assert occupant["params"]["a"] is params["adapter"][tower][slot]["a"]


def test_tied_towers_see_the_same_rows_at_their_own_layers():
    towers = {"vision": TowerShape(6, 32, 64), "text": TowerShape(3, 32, 64)}
    plan = place(Placement(LoRA(rank=2), slots=("attn_v",), layers="last 2", tied=True), towers)
    occupancy = plan.bind(numbered(plan)).occupy(None, None)
    for tower, expected in (("vision", [(0, 4, []), (4, 6, [[0, 1]])]), ("text", [(0, 1, []), (1, 3, [[0, 1]])])):
        assert [(s.start, s.stop, rows_of(s.tree)) for s in occupancy.segments[tower]] == expected


def test_ranks_that_differ_see_the_rows_of_their_own_stacks():
    placement = Placement(LoRA(rank=4), slots=("attn_v",), towers=("vision",), ranks=((r".*/[03]", 2),))
    plan = place(placement, TOWERS)
    segments = plan.bind(numbered(plan)).occupy(None, None).segments["vision"]
    assert [(s.start, s.stop, rows_of(s.tree)) for s in segments] == [(0, 1, [[0]]), (1, 3, [[0, 1]]), (3, 4, [[1]])]
    assert [s.tree[0]["params"]["a"].shape[-1] for s in segments] == [2, 4, 2]


def test_other_slots_of_a_block_stay_untouched():
    plan = place(Placement(LoRA(rank=2), slots=("attn_q",), towers=("vision",)), TOWERS)
    (segment,) = plan.bind(numbered(plan)).occupy(None, None).segments["vision"]
    slot = segment.fill(jax.tree.map(lambda a: a[1], segment.tree))
    x = y = jnp.ones((2, 3, 32))
    assert slot("attn_k", x, y) is y
    assert not np.array_equal(slot("attn_q", x, y), y)


def test_joints_come_in_the_order_in_which_both_towers_reach_them():
    towers = {"vision": TowerShape(8, 32, 64), "text": TowerShape(8, 24, 48)}
    plan = place(
        [
            Placement(Fusion(rank=4), "late", pairs=((5, 5), (7, 6))),
            Placement(Fusion(rank=4), "early", pairs=((0, 1), (5, 5))),
            Placement(Fusion(rank=4), "between", pairs=((5, 4),)),
        ],
        towers,
    )
    joints = plan.bind(numbered(plan)).occupy(None, None).joints
    assert [(j.vision_layer, j.text_layer) for j in joints] == [(0, 1), (5, 4), (5, 5), (5, 5), (7, 6)]
    assert [j.call.args[0].group.path[0] for j in joints] == ["early", "between", "late", "early", "late"]
    assert [j.call.args[1] for j in joints] == [0, 0, 0, 1, 1]  # which row of its own stack


# Routes


def scaled(params, key, x, y):
    del key
    return y + params["scale"] * x


BATCH = {"x": np.arange(10.0, dtype=np.float32).reshape(5, 2, 1) + 1, "y": np.full((5, 2, 1), 100.0, np.float32)}


def routed(params, route, by_task=True):
    new = apply(scaled, params, {"scale": by_task}, tuple(BATCH.values()), route, None)
    return where_on(route >= 0, new, BATCH["y"])


def test_every_example_meets_the_weights_of_its_own_task():
    params = {"scale": jnp.array([1.0, 10.0, 1000.0])}
    route = jnp.array([2, -1, 0, 1, 0])
    result = routed(params, route)
    factors = np.array([1000.0, 0.0, 1.0, 10.0, 1.0]).reshape(-1, 1, 1)
    np.testing.assert_array_equal(result, BATCH["y"] + factors * BATCH["x"])


def test_a_route_beyond_the_last_task_is_not_a_number_for_that_example_alone():
    params = {"scale": jnp.array([1.0, 10.0])}
    route = jnp.array([0, 2, 1, 77, -1])
    result = routed(params, route)
    np.testing.assert_array_equal(np.isnan(result).all((1, 2)), [False, True, False, True, False])
    np.testing.assert_array_equal(np.isnan(result).any((1, 2)), [False, True, False, True, False])


def test_one_set_of_weights_serves_every_route_but_minus_one():
    result = routed({"scale": 3.0}, jnp.array([0, -1, 5, 1, -1]), by_task=False)
    on = np.array([1, 0, 1, 1, 0]).reshape(-1, 1, 1)
    np.testing.assert_array_equal(result, BATCH["y"] + 3 * on * BATCH["x"])


def test_weights_of_several_tasks_ask_for_a_route():
    with pytest.raises(UserError, match=r"need a route, int32 \[batch\]"):
        apply(scaled, {"scale": jnp.ones(2)}, {"scale": True}, tuple(BATCH.values()), None, None)


# Dropout keys


def test_examples_draw_alike_in_whatever_batch_they_come():
    def draw(params, key, x, y):
        return y + jax.random.uniform(key, y.shape)

    def run(n):
        zeros = jnp.zeros((n, 3))
        return np.asarray(apply(draw, {}, {}, (zeros, zeros), None, jax.random.key(4)))

    large = run(6)
    assert len(np.unique(large)) == large.size
    np.testing.assert_array_equal(run(4), large[:4])


def test_every_place_has_a_dropout_key_of_its_own():
    towers = {"vision": TowerShape(3, 32, 64), "text": TowerShape(3, 32, 64)}
    plan = place(
        [
            Placement(LoRA(rank=2, dropout=0.5), "one", slots=("attn_q", "attn_v"), tied=True),
            Placement(LoRA(rank=2, dropout=0.5), "two", slots=("attn_q",)),
            Placement(Bottleneck(rank=2), "three", slots=("mlp_out",)),
        ],
        towers,
    )

    def keys(seed):
        occupancy = plan.bind(numbered(plan)).occupy(None, jax.random.key(seed))
        trees = [occupant for segments in occupancy.segments.values() for s in segments for occupant in s.tree]
        assert [("keys" in tree) for tree in trees] == [True, True, True, False] * 2
        return np.concatenate([jax.random.key_data(tree["keys"]) for tree in trees if "keys" in tree])

    drawn_keys = keys(0)
    assert len(np.unique(drawn_keys, axis=0)) == len(drawn_keys) == 2 * 3 * 3  # towers, adapters' slots, layers
    np.testing.assert_array_equal(keys(0), drawn_keys)
    assert not (keys(1) == drawn_keys).all(1).any()


def test_without_a_key_no_place_has_one():
    plan = place(Placement(LoRA(rank=2, dropout=0.5), slots=("attn_q",)), TOWERS)
    for segments in plan.bind(numbered(plan)).occupy(None, None).segments.values():
        assert [set(occupant) for segment in segments for occupant in segment.tree] == [{"params"}]


# Keys and values with something in front


@dataclasses.dataclass(frozen=True)
class Prepended(Method):
    """Learned keys and values in front of a block's own, as prefix tuning has them."""

    kind: ClassVar[str] = "prepended"
    slots: ClassVar[tuple[str, ...]] = ("attn_kv",)

    length: int = 3

    def module(self, site) -> nn.Module:
        return PrependedModule(self.length, parent=None)

    def parameter_counts(self, site) -> dict[str, int]:
        return dict.fromkeys(("keys", "values"), self.length * site.widths[1])

    @property
    def starts_as_identity(self) -> bool:
        return False


class PrependedModule(nn.Module):
    length: int

    @nn.compact
    def __call__(self, x, y):
        keys, values = y
        more = [self.param(n, nn.initializers.normal(1.0), (self.length, x.shape[-1])) for n in ("keys", "values")]
        return jnp.concatenate([more[0], keys]), jnp.concatenate([more[1], values])


def norm(v, scale, bias):
    return (v - v.mean()) / math.sqrt(v.var() + 1e-5) * scale + bias


def block_by_hand(weights, stream, visible, heads, before):
    """One block for one example, token by token and head by head; ``before`` are keys and values in front, or None."""
    tokens, width = stream.shape
    x = np.array([norm(v, weights["norm1/scale"], weights["norm1/bias"]) for v in stream])
    query, key, value = (x @ weights[f"attn/{n}/kernel"] + weights[f"attn/{n}/bias"] for n in "qkv")
    mixed = np.zeros_like(stream)
    for token in range(tokens):
        seen = [other for other in range(tokens) if visible[token, other]]
        keys, values = key[seen], value[seen]
        if before is not None:
            keys, values = np.concatenate([before[0], keys]), np.concatenate([before[1], values])
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = np.exp(keys[:, part] @ query[token, part] / math.sqrt(width // heads))
            mixed[token, part] = scores @ values[:, part] / scores.sum()
    stream = stream + mixed @ weights["attn/out/kernel"] + weights["attn/out/bias"]
    x = np.array([norm(v, weights["norm2/scale"], weights["norm2/bias"]) for v in stream])
    hidden = x @ weights["mlp/fc1/kernel"] + weights["mlp/fc1/bias"]
    hidden = hidden / (1 + np.exp(-1.702 * hidden))
    return stream + hidden @ weights["mlp/fc2/kernel"] + weights["mlp/fc2/bias"]


def test_prepended_keys_and_values_are_seen_by_every_token():
    plan = place(
        [
            Placement(Prepended(3), "image", towers=("vision",), layers="1,2"),
            Placement(Prepended(2), "words", towers=("text",)),
        ],
        TOWERS,
    )
    shapes = plan.shapes()
    assert names.count(shapes) == plan.parameter_count() == 2 * (2 * 3 * 32) + 2 * (2 * 2 * 24)
    adapters, params = drawn(shapes, 1, 1.0), backbone(CONFIG)
    images, tokens, mask = inputs(CONFIG)

    @jax.jit
    def run(params, adapters):
        bound = plan.bind(adapters)
        out = model(CONFIG).apply({"params": params}, images, tokens, mask, adapters=bound, hidden_states=True)
        return out.image_hidden, out.text_hidden

    image_hidden, text_hidden = (np.asarray(hidden, np.float64) for hidden in run(params, adapters))
    before = {("vision", k): adapters["image"]["vision"]["attn_kv"] for k in (1, 2)}
    before |= {("text", k): adapters["words"]["text"]["attn_kv"] for k in (0, 1)}
    for tower, hidden, config in (("vision", image_hidden, CONFIG.vision), ("text", text_hidden, CONFIG.text)):
        stacked = names.flatten(params[tower]["blocks"])
        for layer in range(config.depth):
            weights = {name: np.asarray(leaf[layer], np.float64) for name, leaf in stacked.items()}
            learned = before.get((tower, layer))
            if learned is not None:
                row = layer - 1 if tower == "vision" else layer
                learned = [np.asarray(learned[n][row], np.float64) for n in ("keys", "values")]
            for example in range(3):
                length = hidden.shape[2]
                visible = np.ones((length, length), bool)
                if tower == "text":
                    visible = np.tril(visible) & np.asarray(mask[example])
                expected = block_by_hand(weights, hidden[layer, example], visible, config.heads, learned)
                error = np.linalg.norm(hidden[layer + 1, example] - expected)
                assert error <= 2e-6 * np.linalg.norm(expected), (tower, layer, example)
                if learned is not None:
                    bare = block_by_hand(weights, hidden[layer, example], visible, config.heads, None)
                    assert np.linalg.norm(bare - expected) > 1e-2 * np.linalg.norm(expected)
