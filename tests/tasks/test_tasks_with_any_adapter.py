"""Every kind of task is trained with any adapter and any composition: one gradient moves all that is added."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import LENGTH, backbone, batch, drawn_params

from vla_jax import names
from vla_jax.adapters import Average, Bottleneck, Fuse, Fusion, LoRA, Parallel, Placement, Split, Stack
from vla_jax.model import MODALITIES, AdaptedModel
from vla_jax.tasks.classification import Classification, PrototypeClassification, ZeroShotClassification
from vla_jax.tasks.grounding import BoxPrediction, RegionScoring
from vla_jax.tasks.matching import Matching, PairMatching
from vla_jax.tasks.ranking import TextRanking
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.tasks.vqa import AnswerClassification

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXAMPLES, CLASSES, CANDIDATES = 8, 3, 3

# Of smooth units, none of which is off for every token.
ONE = Bottleneck(rank=4, activation="gelu")
TWO = (("one", ONE), ("two", Bottleneck(rank=2, parallel=True, activation="gelu")))
SLOTS = ("mlp_out",)
ADAPTERS = {
    "bottleneck": Placement(ONE, slots=SLOTS),
    "lora": Placement(LoRA(rank=2), slots=("attn_q", "attn_v")),
    "stack": Placement(Stack(TWO), slots=SLOTS),
    "parallel": Placement(Parallel(TWO), slots=SLOTS),
    "average": Placement(Average(TWO, weights=(1.0, 3.0)), slots=SLOTS),
    "split": Placement(Split(TWO, ranges=((0, 2), (2, None))), slots=SLOTS),
    "adapter_fusion": Placement(Fuse(TWO), slots=SLOTS),
    "fusion": Placement(Fusion(rank=4, heads=2, activation="gelu"), layers="last 1"),
}


def named_classes():
    """Two texts a class, of their own."""
    drawn = batch(2 * CLASSES, seed=9)
    tokens = tuple(map(tuple, drawn["tokens"].tolist()))
    return ZeroShotClassification("names", tokens, tuple(drawn["text_mask"].sum(1).tolist()), CLASSES)


TASKS = {
    "linear": Classification("linear", CLASSES),
    "names": named_classes(),
    "prototypes": PrototypeClassification("prototypes", CLASSES),
    "vqa": AnswerClassification("vqa", CLASSES),
    "ranking": TextRanking(),
    "matching": Matching(),
    "two_pictures": PairMatching(),
    "retrieval": Retrieval(),
    "boxes": BoxPrediction(width=8),
    "regions": RegionScoring(),
}
# Features of one pair are not compared with those of another where they depend on each other; and a joint method has
# nothing to join in a model that is shown pictures alone.
WITHOUT_PAIRS = {"retrieval", "prototypes"}
FITTING = [
    (task, adapter) for task in TASKS for adapter in ADAPTERS if adapter != "fusion" or task not in WITHOUT_PAIRS
]
# Every task with two to four adapters, and every adapter with three tasks or more: neither knows of the other, and
# compiling all pairs takes minutes. Fusion adapters, which join the towers that some tasks read apart, are with all.
CASES = [
    case
    for case in FITTING
    if case[1] == "fusion" or (list(TASKS).index(case[0]) + list(ADAPTERS).index(case[1])) % 3 == 0
]


def rows_for(task):
    """A batch that has what any task asks for; several pictures or texts an example where the task is about them."""
    generator = np.random.default_rng(3)
    rows = batch(EXAMPLES, seed=4)
    rows["label"] = generator.integers(0, CLASSES, EXAMPLES).astype(np.int32)
    if task in ("matching", "two_pictures"):
        rows["label"] = np.arange(EXAMPLES, dtype=np.int32) % 2
    if task == "two_pictures":
        rows["image"] = generator.normal(size=(EXAMPLES, 2, 16, 16, 3)).astype(np.float32)
    if task == "ranking":
        texts = batch(EXAMPLES * CANDIDATES, seed=5)
        for name in ("tokens", "text_mask"):
            rows[name] = texts[name].reshape(EXAMPLES, CANDIDATES, LENGTH)
    rows["answer_ids"] = np.tile(np.array([0, 2], np.int32), (EXAMPLES, 1))
    rows["answer_counts"] = np.tile(np.array([2, 1], np.int32), (EXAMPLES, 1))
    rows["boxes"] = np.tile(np.float32([[0, 0, 0.5, 1], [0.4, 0, 1, 1], [0, 0, 1, 0.5]]), (EXAMPLES, 1, 1))
    rows["boxes_mask"] = np.tile([True, True, False], (EXAMPLES, 1))
    rows["box"] = np.tile(np.float32([0.1, 0, 0.5, 1]), (EXAMPLES, 1))
    return jax.tree.map(jnp.asarray, rows)


@pytest.mark.parametrize(
    ("task", "adapter"),
    [
        pytest.param(*case, marks=() if case in (("linear", "bottleneck"), ("ranking", "fusion")) else pytest.mark.slow)
        for case in CASES
    ],
)
def test_a_step_moves_everything_that_was_added(task, adapter):
    placement = ADAPTERS[adapter]
    modalities = ("image",) if task == "prototypes" else MODALITIES
    if modalities == ("image",):
        placement = dataclasses.replace(placement, towers=("vision",))
    given = AdaptedModel(backbone(), TASKS[task], (placement,), modalities=modalities)
    # Weights as training might leave them: maps that start at zero would hold back the gradients of those before.
    params = drawn_params(given, size=0.3)
    rows = rows_for(task)

    @jax.jit
    def step(added):
        whole = {"backbone": params["backbone"]} | added
        return jax.value_and_grad(lambda added: given.loss(whole | added, rows, jax.random.key(0))[0])(added)

    added = {part: params[part] for part in ("adapters", "heads")}
    loss, slope = step(added)
    assert np.isfinite(loss)
    flat = names.flatten(slope["adapters"])
    assert flat
    # A bias of all keys adds one number to all of a query's scores, which the softmax takes away again.
    moving = {name: leaf for name, leaf in flat.items() if not name.endswith("fuse/key/bias")}
    assert not [name for name, leaf in moving.items() if not np.abs(leaf).max() > 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope["heads"]))
    # A small enough step down the slope lowers the loss.
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(slope)))
    lower, _ = step(jax.tree.map(lambda leaf, down: leaf - 1e-3 * down / norm, added, slope))
    assert lower < loss
