"""The compiled step: what it trains, what it spends on frozen weights (nothing), and that every mesh gives the same."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_transformer import PATCHES, PROJECTION, classification_loss, features, make_batch, make_params, mixed_loss

from vla_jax import names
from vla_jax.errors import UserError
from vla_jax.training.hlo import collective_bytes
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import preset
from vla_jax.training.sharding import MeshConfig, make_mesh, place
from vla_jax.training.step import TrainState, as_stored, init_state, make_eval_step, make_train_step, step_shardings
from vla_jax.training.table import ParameterTable, ResolvedTable

BATCH, STEPS = 16, 20
# The machine code matters little to programs this small, and making it well takes most of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5)
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 2": MeshConfig(data=4, tensor=2),
    "tensor 4": MeshConfig(data=2, tensor=4),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


class Run(NamedTuple):
    table: ResolvedTable
    compiled: jax.stages.Compiled
    before: tuple[Any, Any]
    state: TrainState
    frozen: Any
    first_moments: list[jax.Array]
    metrics: list[dict[str, float]]


@cache
def run(mesh: str | None = None, trained: str = "adapters", steps: int = STEPS, loss: Any = mixed_loss) -> Run:
    """Trains the toy and keeps the compiled step; each setting is compiled once for all tests."""
    params = make_params()
    table = ParameterTable(preset(trained)).resolve(params)
    trainable, frozen = table.split(params)
    optimizer = make_optimizer(OPTIMIZER, table, trainable, STEPS)
    shardings = step_shardings(table, trainable, optimizer, make_mesh(MESHES[mesh])) if mesh else None
    state = init_state(trainable, optimizer, shardings)
    frozen = place(frozen, shardings.frozen) if mesh else frozen
    before = jax.tree.map(np.array, (state.trainable, frozen))
    step = make_train_step(partial(loss, rate=0.1), optimizer, seed=7, shardings=shardings)
    batches = [make_batch(BATCH, seed) for seed in range(4)]
    batches = [place(batch, shardings.batch) for batch in batches] if mesh else batches
    compiled = step.lower(state, frozen, batches[0]).compile(QUICK)
    metrics, first_moments = [], []
    for i in range(steps):
        state, found = compiled(state, frozen, batches[i % len(batches)], *step.constants)
        metrics.append({name: float(value) for name, value in found.items()})
        if i == 0:
            leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
            first_moments = [np.array(leaf) for path, leaf in leaves if jax.tree_util.GetAttrKey("mu") in path]
    return Run(table, compiled, before, state, frozen, first_moments, metrics)


@pytest.mark.parametrize(
    "mesh",
    ["data 8", "fsdp 8"] + [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("tensor 2", "tensor 4", "mixed")],
)
def test_twenty_steps_are_the_same_on_every_mesh(mesh: str):
    alone, cut = run(), run(mesh)
    for name in ("loss", "gradient_norm", "accuracy"):
        values = [[metrics[name] for metrics in one.metrics] for one in (cut, alone)]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
    # The runs are worth comparing: the loss falls on the batches it has seen.
    assert np.mean([m["loss"] for m in alone.metrics[-4:]]) < np.mean([m["loss"] for m in alone.metrics[:4]]) - 0.1
    assert int(cut.state.step) == STEPS


def test_frozen_leaves_stay_bitwise_and_every_trained_leaf_moves():
    done = run()
    jax.tree.map(np.testing.assert_array_equal, done.frozen, done.before[1])
    for name, leaf in names.flatten(done.state.trainable).items():
        assert done.table.trainable(name)
        assert not np.array_equal(leaf, names.flatten(done.before[0])[name]), name


def test_nothing_is_kept_or_handed_back_for_frozen_leaves():
    """Memory analysis of the compiled step: its outputs are the trained leaves and two moments of each."""
    frozen, full = run(), run(trained="full", steps=0)
    trained_bytes, all_bytes = (names.size_in_bytes(one.before[0]) for one in (frozen, full))
    backbone_bytes = names.size_in_bytes(frozen.before[1])
    assert all_bytes == trained_bytes + backbone_bytes
    memory, full_memory = frozen.compiled.memory_analysis(), full.compiled.memory_analysis()
    small = 1024  # scalars and metrics
    assert 3 * trained_bytes < memory.output_size_in_bytes < 3 * trained_bytes + small
    assert 3 * all_bytes < full_memory.output_size_in_bytes < 3 * all_bytes + small
    # Moments are arguments too, so freezing takes two copies of the backbone from them; its gradient is a temporary.
    saved = full_memory.argument_size_in_bytes - memory.argument_size_in_bytes
    assert abs(saved - 2 * backbone_bytes) < small
    assert full_memory.temp_size_in_bytes - memory.temp_size_in_bytes > backbone_bytes

    kept = jax.tree.map(
        lambda leaf: leaf.shape, [leaf for leaf in jax.tree.leaves(frozen.state.optimizer) if leaf.ndim]
    )
    assert sorted(kept) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(frozen.state.trainable)])


def test_the_norm_is_of_the_trained_leaves_alone_and_clips_them():
    """Against gradients of the whole tree, taken apart from the step."""
    done, params, batch = run(), make_params(), make_batch(BATCH, 0)
    key = jax.random.fold_in(jax.random.key(7), 0)
    gradient = jax.jit(jax.grad(lambda params: mixed_loss(params, batch, key, rate=0.1)[0]))
    gradients = gradient.lower(params).compile(QUICK)(params)
    square = {name: float((np.asarray(leaf, np.float64) ** 2).sum()) for name, leaf in names.flatten(gradients).items()}
    own = sum(value for name, value in square.items() if not name.startswith("backbone")) ** 0.5
    assert own > OPTIMIZER.clip_norm
    assert sum(square.values()) ** 0.5 > 1.5 * own
    np.testing.assert_allclose(done.metrics[0]["gradient_norm"], own, rtol=1e-5)


def test_the_first_moments_are_a_tenth_of_the_clipped_gradient():
    moments = run().first_moments
    assert len(moments) == len(jax.tree.leaves(run().state.trainable))
    norm = sum((leaf.astype(np.float64) ** 2).sum() for leaf in moments) ** 0.5
    np.testing.assert_allclose(norm, (1 - OPTIMIZER.b1) * OPTIMIZER.clip_norm, rtol=1e-5)


def test_data_parallel_sums_the_trained_bytes_and_gathers_the_features():
    done = run("data 8")
    trained_bytes = names.size_in_bytes(done.before[0])
    feature_bytes, vector_bytes = BATCH * PROJECTION * 4, BATCH * 4
    found = collective_bytes(done.compiled)
    # The contrastive loss: the text features are gathered; maximum and sum of each text's row are summed and gathered.
    # The scalars are loss and accuracy.
    assert trained_bytes <= found["all-reduce"] <= trained_bytes + 4 * vector_bytes + 64
    assert found["all-gather"] <= feature_bytes + 4 * vector_bytes
    assert found["reduce-scatter"] == found["all-to-all"] == found["collective-permute"] == 0


@pytest.mark.slow
def test_data_parallel_of_a_loss_without_features_sums_the_trained_bytes_and_two_scalars():
    done = run("data 8", steps=0, loss=classification_loss)
    found = collective_bytes(done.compiled)
    assert found.pop("all-reduce") == names.size_in_bytes(done.before[0]) + 2 * 4
    assert set(found.values()) == {0}


def test_fsdp_gathers_weights_layer_by_layer_and_sums_no_activation():
    done = run("fsdp 8")
    found = collective_bytes(done.compiled)
    blocks = names.flatten(done.before[1]["backbone"]["vision"]["blocks"])
    kernels = sum(leaf.nbytes for name, leaf in blocks.items() if name.endswith("kernel"))
    activation = BATCH * PATCHES * 32 * 4
    # Forward and backward gather each layer's kernels once; small things of the loss come on top.
    assert 2 * kernels <= found["all-gather"] < 2 * kernels + 6000
    assert found["all-reduce"] < names.size_in_bytes(done.before[0]) + 2000 < activation
    # At rest each device holds an eighth of the kernels.
    held = names.flatten(done.frozen)["backbone/vision/blocks/attn/q/kernel"].addressable_shards[0].data
    assert held.nbytes * 8 == blocks["attn/q/kernel"].nbytes


def test_moments_and_accumulated_gradients_live_where_their_parameters_live():
    params = make_params()
    table = ParameterTable(preset("full")).resolve(params)
    optimizer = make_optimizer(OptimizerConfig(accumulate=2), table, params, STEPS)
    shardings = step_shardings(table, params, optimizer, make_mesh(MESHES["mixed"]))
    state = init_state(params, optimizer, shardings)
    where = {name: leaf.sharding for name, leaf in names.flatten(state.trainable).items() if leaf.ndim}
    assert len({sharding.spec for sharding in where.values()}) == 6
    seen = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        if leaf.ndim:
            keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            seen.append("/".join(keys[keys[0] == "default" :]))
            assert leaf.sharding == where[seen[-1]], path
        else:
            assert leaf.is_fully_replicated
    assert sorted(seen) == sorted(3 * list(where))


def small_setting(loss: Any = None, optimizer: Any = None, seed: int = 0) -> tuple[Any, TrainState, Any]:
    """One matrix, trained, behind a frozen one."""
    frozen = {"backbone": {"kernel": jnp.ones((3, 3))}}
    trainable = {"heads": {"kernel": jnp.ones((3, 2), jnp.bfloat16)}}
    optimizer = optimizer or optax.sgd(0.1)

    def product(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        y = batch["x"] @ params["backbone"]["kernel"] @ params["heads"]["kernel"]
        return (y**2).mean(), {"noise": jax.random.uniform(key)}

    return make_train_step(loss or product, optimizer, seed=seed), init_state(trainable, optimizer), frozen


def test_keys_follow_the_seed_and_the_number_of_the_step():
    batch = {"x": np.ones((4, 3), np.float32)}
    step, state, frozen = small_setting(seed=5)
    noise = []
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        noise.append(float(metrics["noise"]))
    key = jax.random.key(5)
    np.testing.assert_array_equal(noise, [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(3)])
    # Resumed at step 2, the third key comes again.
    step, state, frozen = small_setting(seed=5)
    assert float(step(state.replace(step=jnp.int32(2)), frozen, batch)[1]["noise"]) == noise[2]
    step, state, frozen = small_setting(seed=6)
    assert float(step(state, frozen, batch)[1]["noise"]) != noise[0]


def test_trained_leaves_are_float32_and_the_given_ones_survive():
    optimizer = optax.sgd(0.1)
    given = {"heads": {"kernel": jnp.ones((3, 2)), "steps": jnp.zeros((), jnp.int32)}}
    state = init_state(as_stored(given, jnp.bfloat16), optimizer)
    assert jax.tree.map(lambda leaf: str(leaf.dtype), state.trainable) == {
        "heads": {"kernel": "float32", "steps": "int32"}
    }

    given = {"heads": {"kernel": jnp.ones((3, 2))}}
    step, _, frozen = small_setting(optimizer=optimizer)
    step(init_state(given, optimizer), frozen, {"x": np.ones((4, 3), np.float32)})
    np.testing.assert_array_equal(given["heads"]["kernel"], 1)


def test_frozen_leaves_may_be_bfloat16_while_updates_stay_float32():
    """A float32 master moves by less than bfloat16 could hold."""
    step, state, frozen = small_setting(optimizer=optax.sgd(1e-6))
    frozen = as_stored(frozen, jnp.bfloat16)
    state, _ = step(state, frozen, {"x": np.ones((4, 3), np.float32)})
    kernel = np.asarray(state.trainable["heads"]["kernel"])
    assert kernel.dtype == np.float32
    # d mean(y^2) / d kernel = 2 y x / 2 with y = 9 in both columns and x = 3 after the frozen ones.
    np.testing.assert_array_equal(kernel, np.float32(1) - np.float32(1e-6) * np.float32(27))
    assert frozen["backbone"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("broken", ["loss", "gradient alone"])
def test_a_step_that_is_not_finite_changes_nothing(broken: str, accumulate: int) -> None:
    """Three batches with a broken one between them are the three batches, moments, counts and schedule included."""
    tree = {"heads": {"kernel": jnp.ones((3, 2))}, "backbone": {"kernel": jnp.ones((3, 3))}}
    table = ParameterTable(preset("linear_probe")).resolve(tree)
    trainable, frozen = table.split(tree)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, accumulate=accumulate), table, trainable, 4)

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        y = batch["x"] @ params["backbone"]["kernel"] @ params["heads"]["kernel"]
        # At zero the root is finite, and its slope is not.
        root = jnp.sqrt(jnp.abs(params["heads"]["kernel"][0, 0]) * batch["root"])
        return (y**2).mean() + root, {}

    step = make_train_step(loss, optimizer, seed=0)
    generator = np.random.default_rng(0)
    batches = [{"x": generator.normal(size=(4, 3)).astype(np.float32), "root": np.float32(1)} for _ in range(3)]
    bad = dict(batches[0])
    if broken == "loss":
        bad["x"] = bad["x"] * np.float32(np.nan)
    else:
        bad["root"] = np.float32(0)

    def run(given: list[Any]) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        state, told = init_state(trainable, optimizer), []
        for batch in given:
            state, metrics = step(state, frozen, batch)
            told.append(metrics)
        return state, told

    clean, told = run(batches)
    assert [int(metrics["skipped"]) for metrics in told] == [0, 0, 0]
    state, told = run([batches[0], bad, *batches[1:]])
    assert [int(metrics["skipped"]) for metrics in told] == [0, 1, 0, 0]
    assert np.isfinite(told[1]["loss"]) == (broken != "loss")
    assert not np.isfinite(told[1]["gradient_norm"])
    assert told[1]["learning_rate"] == told[0]["learning_rate"]
    assert (int(clean.step), int(state.step)) == (3, 4)
    jax.tree.map(np.testing.assert_array_equal, state.replace(step=clean.step), clean)


def test_own_metric_names_and_seeds_out_of_range_are_refused():
    def taken(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = params["heads"]["kernel"].sum()
        return loss, {"loss": loss}

    step, state, frozen = small_setting(taken)
    with pytest.raises(UserError, match=r"own names \['loss'\]"):
        step(state, frozen, {"x": np.ones((4, 3), np.float32)})
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed {seed} is out of range"):
            make_train_step(taken, optax.sgd(0.1), seed=seed)


def test_evaluation_gives_the_merged_trees_results_whole():
    params, batch = make_params(), make_batch(BATCH)
    table = ParameterTable(preset("adapters")).resolve(params)
    trainable, frozen = table.split(params)
    key = jax.random.key(0)
    mesh = make_mesh(MESHES["data 8"])
    shardings = step_shardings(table, trainable, optax.sgd(0.1), mesh)

    def image_features(params: Any, batch: Any) -> dict[str, jax.Array]:
        return {"image": features(params, batch, key, 0.0)[0]}

    wanted = make_eval_step(image_features)(trainable, frozen, batch)
    placed = place(trainable, shardings.state.trainable), place(frozen, shardings.frozen), place(batch, shardings.batch)
    got = make_eval_step(image_features, shardings=shardings)(*placed)
    assert got["image"].is_fully_replicated
    assert got["image"].shape == (BATCH, PROJECTION)
    np.testing.assert_allclose(got["image"], wanted["image"], rtol=1e-4, atol=1e-6)
