"""What a step computes by formula is what its traced program multiplies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from small_model import CONFIG, LENGTH, batch, model

from vla_jax import names
from vla_jax.adapters import LoRA, Placement
from vla_jax.flop import batch_flop, blocks_flop, pair_flop, peak_flop_per_second
from vla_jax.model import AdaptedModel
from vla_jax.training.presets import preset
from vla_jax.training.table import ParameterTable, ResolvedTable

RANK = 3  # no other axis of the small model has this size, so that an adapter's own products can be told
PAIRS = 16


def _products(jaxpr: Any, times: int = 1, scanned: bool = False) -> Iterator[tuple[tuple[int, ...], int, bool]]:
    """Every matrix product of a program: its operands' axes, its FLOP, and whether it is inside a scan over blocks."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, right = (variable.aval.shape for variable in equation.invars)
            summed = math.prod(left[axis] for axis in contracted)
            yield (*left, *right), times * 2 * summed * math.prod(equation.outvars[0].aval.shape), scanned
        scan = equation.primitive.name == "scan"
        inside = times * equation.params["length"] if scan else times
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from _products(part, inside, scanned or scan)


def _traced(given: AdaptedModel, table: ResolvedTable) -> int:
    """FLOP of the products in loss and gradient.

    Left out are those of the head, of adapters, and the features of patches, which nothing here uses.
    """
    trainable, frozen = table.split(given.shapes())

    def loss(trainable: Any, frozen: Any, rows: Any) -> jax.Array:
        return given.loss(names.merge(trainable, frozen), rows, jax.random.key(0))[0]

    traced = jax.make_jaxpr(jax.value_and_grad(loss))(trainable, frozen, batch(PAIRS))
    found = list(_products(traced.jaxpr))
    patches = (PAIRS, CONFIG.grid**2, CONFIG.vision.width, CONFIG.vision.width, CONFIG.projection)
    beside = [axes == patches or (4 * CONFIG.projection in axes and not scanned) for axes, _, scanned in found]
    return sum(flop for (axes, flop, _), other in zip(found, beside, strict=True) if not other and RANK not in axes)


@pytest.mark.parametrize(
    ("rules", "placements"),
    [
        ("linear_probe", ()),
        ("bitfit", ()),
        ("full", ()),
        ("adapters", (Placement(LoRA(rank=RANK), slots=("attn_q", "mlp_fc2")),)),
        ("adapters", (Placement(LoRA(rank=RANK), towers=("text",), slots=("attn_q",), layers="last 1"),)),
        ("adapters", (Placement(LoRA(rank=RANK), slots=("projection",)),)),
    ],
    ids=["head", "biases", "full", "every block", "last block of the text tower", "projection"],
)
def test_the_formula_counts_what_is_traced(rules: str, placements: tuple[Placement, ...]) -> None:
    given = model(placements)
    table = ParameterTable(preset(rules)).resolve(given.shapes())
    assert batch_flop(given, table, batch(PAIRS)) == _traced(given, table)


def test_streams_cost_nothing_below_the_first_adapter() -> None:
    given = model((Placement(LoRA(rank=RANK), slots=("attn_q",), layers="last 1"),))
    table = ParameterTable(preset("adapters")).resolve(given.shapes())
    rows = batch(PAIRS)
    streams = {"image_stream": rows["image"].reshape(PAIRS, 5 - 1, -1)[..., :32], "tokens": rows["tokens"]}
    saved = batch_flop(given, table, rows) - batch_flop(given, table, streams)
    embedding = 2 * 4 * (8 * 8 * 3) * 32
    below = sum(blocks_flop(CONFIG.vision, tokens) / 2 for tokens in (5, LENGTH))  # one of two blocks, forward
    assert saved == PAIRS * (embedding + below)


def test_a_pair_is_a_row_of_a_batch() -> None:
    for rules, placements in (("full", ()), ("adapters", (Placement(LoRA(rank=RANK), slots=("attn_q",)),))):
        given = model(placements)
        table = ParameterTable(preset(rules)).resolve(given.shapes())
        expected = batch_flop(given, table, batch(PAIRS)) / PAIRS
        assert pair_flop(CONFIG, LENGTH, full=rules == "full") == expected


@pytest.mark.parametrize(
    ("device", "teraflop"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v4", 275),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_published_rates_go_by_the_longest_name(device: str, teraflop: float | None) -> None:
    peak = peak_flop_per_second(device)
    assert peak == (None if teraflop is None else teraflop * 1e12)
