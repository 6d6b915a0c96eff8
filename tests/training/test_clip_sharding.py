"""CLIP with adapters on every mesh: the single device's losses, an untouched backbone, and what crosses the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, batch, drawn_params, model

from vla_jax import names
from vla_jax.data.batches import Batches
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.data.pipeline import Pipeline
from vla_jax.tasks.contrastive import contrastive_loss
from vla_jax.training.checkpoint import Checkpointer
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.hlo import collective_bytes
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import preset
from vla_jax.training.sharding import MeshConfig, make_mesh, place
from vla_jax.training.step import Step, StepShardings, TrainState, init_state, make_train_step, step_shardings
from vla_jax.training.table import ParameterTable
from vla_jax.training.trainer import fit

pytestmark = pytest.mark.slow

BATCH, STEPS = 16, 20
# The machine code matters little to programs this small, and making it well takes most of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5)
MODEL = model()
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 4": MeshConfig(data=2, tensor=4),
    "tensor 8": MeshConfig(data=1, tensor=8),  # two parts a head
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


class Killed(BaseException):
    """Stands for a process that dies: no handler runs."""


class Setting(NamedTuple):
    """A compiled step and what it starts from; a step takes its state's buffers, so each run starts anew."""

    step: Step
    start: Callable[[], TrainState]
    frozen: Any
    shardings: StepShardings | None


class Run(NamedTuple):
    setting: Setting
    before: Any
    state: TrainState
    losses: list[float]


def matching_and_contrastive(params: Any, rows: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Both at once: the one needs its own rows alone, the other the whole global batch."""
    output = MODEL.apply(params, rows, key)
    loss, metrics = MODEL.task.loss(params["heads"]["matching"], output, rows)
    return loss + contrastive_loss(output.logits), metrics


def rows_of(seed: int, size: int = BATCH) -> dict[str, np.ndarray]:
    """A batch without padding."""
    return {name: array for name, array in batch(size, seed).items() if name != "valid"}


@cache
def setting(mesh: str | None, loss: Any = matching_and_contrastive) -> Setting:
    """On a mesh, or (None) on one device."""
    if mesh is not None and jax.device_count() != 8:
        pytest.skip("needs 8 devices")
    params = drawn_params(MODEL)
    table = ParameterTable(preset("adapters")).resolve(params)
    trainable, frozen = table.split(params)
    optimizer = make_optimizer(OPTIMIZER, table, trainable, STEPS)
    shardings = step_shardings(table, trainable, optimizer, make_mesh(MESHES[mesh])) if mesh else None
    frozen = place(frozen, shardings.frozen) if mesh else frozen
    rows = place(rows_of(0), shardings.batch) if mesh else rows_of(0)
    start = partial(init_state, trainable, optimizer, shardings)
    step = make_train_step(loss, optimizer, seed=7, shardings=shardings)
    compiled = step.lower(start(), frozen, rows).compile(QUICK)
    return Setting(dataclasses.replace(step, program=compiled), start, frozen, shardings)


@cache
def run(mesh: str | None) -> Run:
    """Twenty steps on four batches in turn."""
    given = setting(mesh)
    state, losses = given.start(), []
    before = jax.tree.map(np.array, state.trainable)
    for i in range(STEPS):
        rows = place(rows_of(i % 4), given.shardings.batch) if mesh else rows_of(i % 4)
        state, metrics = given.step(state, given.frozen, rows)
        losses.append(float(metrics["loss"]))
    return Run(given, before, state, losses)


@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_steps_are_the_single_devices(mesh: str):
    alone, cut = run(None), run(mesh)
    np.testing.assert_allclose(cut.losses, alone.losses, rtol=1e-5)
    # The runs are worth comparing: something is learnt on the way.
    assert np.mean(alone.losses[-4:]) < np.mean(alone.losses[:4]) - 0.1


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_the_backbone_stays_bitwise_on_every_device_and_every_adapter_moves(mesh: str | None):
    done, backbone = run(mesh), names.flatten(MODEL.backbone.params)
    frozen = names.flatten(done.setting.frozen)
    assert frozen.keys() == {f"backbone/{name}" for name in backbone}
    for name, leaf in frozen.items():
        for shard in leaf.addressable_shards:
            expected = np.asarray(backbone[name.removeprefix("backbone/")])[shard.index]
            np.testing.assert_array_equal(shard.data, expected, err_msg=f"{name} on {shard.device}")
    for name, leaf in names.flatten(done.state.trainable).items():
        assert not np.array_equal(leaf, names.flatten(done.before)[name]), name


@pytest.mark.parametrize("mesh", MESHES)
def test_every_device_holds_the_same_adapters(mesh: str):
    for name, leaf in names.flatten(run(mesh).state.trainable).items():
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf.addressable_shards[0].data, err_msg=name)


def test_data_parallel_sums_the_trained_bytes_and_gathers_the_features():
    done = run("data 8")
    trained = names.size_in_bytes(done.before)
    features, vector = BATCH * CONFIG.projection * 4, BATCH * 4
    found = collective_bytes(done.setting.step.program)
    # Of the contrastive loss: text features are gathered and their gradients summed; so are a few numbers an example.
    assert trained <= found["all-reduce"] <= trained + features + 4 * vector + 64
    assert 0 < found["all-gather"] <= features + 8 * vector
    assert found["reduce-scatter"] == found["all-to-all"] == found["collective-permute"] == 0
    assert sum(found.values()) < names.size_in_bytes(done.setting.frozen) / 4


def test_data_parallel_of_matching_sums_the_trained_bytes_and_two_scalars():
    found = collective_bytes(setting("data 8", MODEL.loss).step.program)
    assert found.pop("all-reduce") == names.size_in_bytes(run("data 8").before) + 2 * 4  # loss and accuracy
    assert set(found.values()) == {0}


def test_fsdp_gathers_weights_and_sums_nothing_that_data_parallel_does_not():
    """Forward and backward gather a layer's kernels once each; no activation is summed."""
    fsdp, data = (collective_bytes(run(mesh).setting.step.program) for mesh in ("fsdp 8", "data 8"))
    frozen = names.flatten(run("fsdp 8").setting.frozen)
    cut = {name: leaf.nbytes for name, leaf in frozen.items() if not leaf.is_fully_replicated}
    kernels = sum(size for name, size in cut.items() if "/blocks/" in name)
    others = sum(cut.values()) - kernels
    # The loss may sum a few more numbers an example; a stream has hundreds.
    assert data["all-reduce"] <= fsdp["all-reduce"] <= data["all-reduce"] + 4 * BATCH * 4
    # Beside the blocks there are embedding and projections; the compiler may send what they take or give instead.
    elsewhere = sum(fsdp.values()) - fsdp["all-reduce"] - 2 * kernels
    assert fsdp["all-gather"] >= 2 * kernels
    assert elsewhere <= 2 * others + data["all-gather"]


@pytest.mark.parametrize(
    ("mesh", "parts"), [("data 8", 1), ("fsdp 8", 8), ("tensor 4", 4), ("tensor 8", 8), ("mixed", 4)]
)
def test_a_device_holds_its_part_of_the_blocks(mesh: str, parts: int):
    for name, leaf in names.flatten(run(mesh).setting.frozen).items():
        if "/blocks/" in name and name.endswith("kernel"):
            assert parts * leaf.addressable_shards[0].data.nbytes == leaf.nbytes, name


def test_nothing_is_kept_or_handed_back_for_the_frozen_backbone():
    """Memory analysis of the compiled step: its outputs are the trained leaves and two moments of each."""
    given = setting(None)
    trained, frozen = names.size_in_bytes(given.start().trainable), names.size_in_bytes(given.frozen)
    assert frozen > 5 * trained
    memory = given.step.program.memory_analysis()
    small = 2048  # scalars, metrics, and the rounding up of small leaves
    assert 3 * trained < memory.output_size_in_bytes < 3 * trained + small
    rows = sum(array.nbytes for array in rows_of(0).values())
    assert memory.argument_size_in_bytes < 3 * trained + frozen + rows + small
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(given.start().optimizer) if leaf.ndim)
    assert kept == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(given.start().trainable)])


def test_the_norm_that_is_clipped_is_the_adapters_own():
    given = setting(None)
    rows = rows_of(0)
    whole = names.merge(given.start().trainable, given.frozen)
    key = jax.random.fold_in(jax.random.key(7), 0)
    gradient = jax.jit(jax.grad(lambda params, rows: matching_and_contrastive(params, rows, key)[0]))
    gradients = names.flatten(gradient.lower(whole, rows).compile(QUICK)(whole, rows))
    square = {name: float((np.asarray(leaf, np.float64) ** 2).sum()) for name, leaf in gradients.items()}
    own = sum(value for name, value in square.items() if not name.startswith("backbone")) ** 0.5
    assert sum(square.values()) ** 0.5 > 1.2 * own
    _, metrics = given.step(given.start(), given.frozen, rows)
    np.testing.assert_allclose(metrics["gradient_norm"], own, rtol=1e-5)


def test_adapters_are_float32_over_a_backbone_kept_in_bfloat16():
    given = setting(None)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), given.frozen)
    table = ParameterTable(preset("adapters")).resolve(names.merge(given.start().trainable, half))
    optimizer = make_optimizer(OPTIMIZER, table, given.start().trainable, STEPS)
    step = make_train_step(matching_and_contrastive, optimizer, seed=7)
    state = init_state(given.start().trainable, optimizer)
    before = jax.tree.map(np.array, half)
    program = dataclasses.replace(step, program=step.lower(state, half, rows_of(0)).compile(QUICK))
    losses = []
    for i in range(4):
        state, metrics = program(state, half, rows_of(i))
        losses.append(float(metrics["loss"]))
    for leaf in jax.tree.leaves((state.trainable, state.optimizer)):
        assert leaf.dtype == jnp.float32 or not jnp.issubdtype(leaf.dtype, jnp.floating)
    for mine, theirs in zip(jax.tree.leaves(half), jax.tree.leaves(before), strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(mine), theirs)
    # Each weight is rounded by at most 2^-9 of itself, and these roundings do not add up in one direction.
    np.testing.assert_allclose(losses, run(None).losses[:4], rtol=2e-2)
    assert losses != run(None).losses[:4]


def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_that_was_not_stopped(tmp_path):
    given = setting("data 8", MODEL.loss)
    source = ArraySource(rows_of(0, 4 * BATCH))
    identity = Identity(MODEL.backbone.name, MODEL.backbone.fingerprint, MODEL.description())

    def fitted(folder: str, stop: int | None = None) -> tuple[TrainState, list[dict[str, Any]]]:
        batches = Batches(iter(Pipeline(source, as_rows, BATCH, training=True, seed=3)), given.shardings.batch)
        drawn = []

        def step(state: TrainState, frozen: Any, rows: Any) -> Any:
            if len(drawn) == stop:
                raise Killed
            drawn.append(rows.pop("index"))
            return given.step(state, frozen, {name: array for name, array in rows.items() if name != "valid"})

        try:
            with Checkpointer(tmp_path / folder, identity, every=4) as saver:
                done = fit(given.start(), given.frozen, step, batches, 12, checkpointer=saver, log_every=1)
        finally:
            batches.close()
        return done.state, [(record["step"], record["train/loss"]) for record in done.history]

    whole, losses = fitted("whole")
    with pytest.raises(Killed):
        fitted("stopped", stop=6)
    resumed, later = fitted("stopped")
    assert later == losses[4:]  # from the checkpoint of step 4 on
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
