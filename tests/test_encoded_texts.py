"""A task's own texts are encoded once for a run where nothing that they pass through is trained, and only there."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from small_model import backbone, batch

from vla_jax.adapters import Fusion, LoRA, Placement, coop
from vla_jax.backbones.transformer import Compute
from vla_jax.comparison import Comparison, _VariantRun
from vla_jax.data.batches import Batches
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.data.pipeline import Pipeline
from vla_jax.model import AdaptedModel
from vla_jax.tasks.classification import ZeroShotClassification
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.training.step import init_state
from vla_jax.variants import Budget, TaskData, Variant

TEXTS = 4
TASK = ZeroShotClassification("named", tuple((3 + text, 9, 47, 0) for text in range(TEXTS)), (3,) * TEXTS, 2)
VISION = Placement(LoRA(rank=2), "vision", towers=("vision",), slots=("attn_q",))
UPPER_TEXT = Placement(LoRA(rank=2), "upper", towers=("text",), slots=("attn_q",), layers="last 1")
ALL_TEXT = Placement(LoRA(rank=2), "all", towers=("text",), slots=("attn_q",))
BUDGET = Budget(steps=3, batch_size=8, seeds=(0,), optimizer=OptimizerConfig(warmup_steps=1), log_every=1)


def _variant(*placements, **changes):
    return Variant("case", "case", placements=placements, learning_rates=(0.05,), **changes)


def _comparison(folder):
    splits = {}
    for seed, split in enumerate(("train", "validation", "test")):
        rows = batch(16, seed)
        splits[split] = ArraySource({name: rows[name] for name in ("image", "label")})
    # One device: how a sum is cut between devices is no matter of this module.
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Comparison(backbone(), TaskData(TASK, splits, as_rows), BUDGET, Compute(), mesh, folder)


def _compiled(comparison, variant):
    run = _VariantRun(comparison, variant)
    trainable, _ = run.table.split(run.model.init(jax.random.key(0)))
    sources, transform = run._sources
    state = init_state(trainable, run._optimizer(0.05, trainable), run.shardings)
    batches = Batches(iter(Pipeline(sources["train"], transform, 8, training=True)), run.shardings.batch)
    try:
        return run._train_program(state, batches)[0].program
    finally:
        batches.close()


@pytest.mark.parametrize(("placement", "whole"), [(VISION, True), (UPPER_TEXT, False)], ids=("features", "stream"))
def test_runs_are_the_same_and_their_steps_lack_what_is_encoded_before(tmp_path, monkeypatch, placement, whole):
    variant = _variant(placement)
    once = _comparison(tmp_path / "once")
    outcome, program = once.run(variant), _compiled(once, variant)
    assert "encoded_texts" not in once.parameters(outcome)  # they are no parameters, and are not saved as such
    monkeypatch.setattr(AdaptedModel, "encoded_as", lambda *_: None)
    each = _comparison(tmp_path / "each")
    expected, other = each.run(variant), _compiled(each, variant)
    for found, right in zip(jax.tree.leaves(outcome.trained), jax.tree.leaves(expected.trained), strict=True):
        # To rounding: these are two programs, and the compiler may fuse what is left of the step in another way.
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)
    for field, right in expected.predictions["test"].items():
        np.testing.assert_allclose(outcome.predictions["test"][field], right, rtol=1e-5)
    assert program.cost_analysis()["flops"] < other.cost_analysis()["flops"]
    assert "/text" in other.as_text()
    assert ("/text" in program.as_text()) is not whole


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (_variant(), "features"),
        (_variant(VISION), "features"),
        (_variant(UPPER_TEXT), "stream"),
        (_variant(ALL_TEXT), None),
        (_variant(Placement(Fusion(rank=4, heads=2), layers="last 1")), None),
        (_variant(coop(2)), None),
        (_variant(rules="full"), None),
    ],
    ids=("nothing", "vision", "upper text", "all text", "joined", "prompts", "everything trained"),
)
def test_what_is_encoded_before_is_what_no_trained_weight_touches(tmp_path, variant, expected):
    comparison = _comparison(tmp_path)
    trained = [row.name for row in comparison.table(variant).rows if row.train]
    assert comparison.model(variant).encoded_as(trained) == expected
    if expected is None:
        assert "encoded_texts" not in _VariantRun(comparison, variant)._given


def test_a_trained_text_leaf_alone_keeps_texts_in_the_step(tmp_path):
    model = _comparison(tmp_path).model(_variant())
    assert model.encoded_as(["backbone/text/projection/kernel"]) is None
    assert dataclasses.replace(model, modalities=("image",)).encoded_as([]) is None
