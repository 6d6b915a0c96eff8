import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vla_jax.data.cached import ArraySource, as_rows, evaluate
from vla_jax.data.image import UnreadablePicture
from vla_jax.data.pipeline import Pipeline
from vla_jax.training.sharding import MeshConfig, batch_sharding, make_mesh

COUNT, BATCH = 21, 8


def _pipeline(source, transform, training=False):
    return Pipeline(source, transform, BATCH, training=training)


def _compute(batch):
    return {"square": batch["x"] ** 2, "sum": batch["x"].sum(-1)}


@pytest.fixture(scope="module")
def arrays():
    generator = np.random.default_rng(0)
    return {"x": generator.normal(size=(COUNT, 3)).astype(np.float32), "label": np.arange(COUNT, dtype=np.int32)}


@pytest.fixture(scope="module")
def sharding():
    return batch_sharding(make_mesh(MeshConfig()))


def test_rows_come_back_as_they_were(arrays):
    source = ArraySource(arrays)
    assert len(source) == COUNT
    for index in (0, 7, COUNT - 1):
        row = as_rows(source[index])
        assert set(row) == {"x", "label"}
        np.testing.assert_array_equal(row["x"], arrays["x"][index])
        assert row["label"] == index


def test_results_are_in_the_sources_order_without_the_padding_of_the_last_batch(arrays, sharding):
    found = evaluate(_pipeline(ArraySource(arrays), as_rows), jax.jit(_compute), sharding, keep=("label",))
    np.testing.assert_array_equal(found["index"], np.arange(COUNT))
    np.testing.assert_array_equal(found["label"], np.arange(COUNT))
    np.testing.assert_allclose(found["square"], arrays["x"] ** 2, rtol=1e-6)
    np.testing.assert_allclose(found["sum"], [row.sum() for row in arrays["x"]], rtol=1e-5)
    assert "valid" not in found


def test_what_cannot_be_read_is_missing_and_index_says_so(arrays, sharding):
    broken = {4, 8}

    def transform(example, generator=None):
        if int(example["label"]) in broken:
            raise UnreadablePicture("is broken")
        return as_rows(example)

    pipeline = Pipeline(ArraySource(arrays), transform, BATCH, training=False, max_bad_share=0.5)
    found = evaluate(pipeline, jax.jit(_compute), sharding)
    left = [i for i in range(COUNT) if i not in broken]
    np.testing.assert_array_equal(found["index"], left)
    np.testing.assert_allclose(found["square"], arrays["x"][left] ** 2, rtol=1e-6)


def test_training_batches_hold_rows_of_the_source(arrays):
    batch = next(iter(_pipeline(ArraySource(arrays), as_rows, training=True)))
    np.testing.assert_array_equal(batch["label"], batch["index"])
    np.testing.assert_array_equal(batch["x"], arrays["x"][batch["index"]])


def test_a_failing_function_ends_the_pass(arrays, sharding):
    def fails(batch):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        evaluate(_pipeline(ArraySource(arrays), as_rows), fails, sharding)


@pytest.mark.parametrize("examples", [16, 21])
def test_every_process_finds_all_results_once_in_the_sources_order(tmp_path, examples):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = Path(__file__).with_name("evaluate_in_processes.py")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    paths = [tmp_path / f"{index}.npz" for index in range(2)]
    processes = [
        subprocess.Popen([sys.executable, script, address, "2", str(index), str(examples), path], env=environment)
        for index, path in enumerate(paths)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for path in paths:
        with np.load(path) as found:
            np.testing.assert_array_equal(found["index"], np.arange(examples))
            np.testing.assert_array_equal(found["double"], 2 * np.arange(3.0 * examples).reshape(examples, 3))
