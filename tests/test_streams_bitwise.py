"""Training from frozen streams is that of whole towers to the last bit, as compiled normally for one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from small_model import backbone, batch

from vla_jax import names
from vla_jax.adapters import LoRA, Placement
from vla_jax.data.batches import Batches
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.data.pipeline import Pipeline
from vla_jax.frozen_streams import frozen_streams
from vla_jax.model import AdaptedModel
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import preset
from vla_jax.training.sharding import MeshConfig, make_mesh, place
from vla_jax.training.step import init_state, make_train_step, step_shardings
from vla_jax.training.table import ParameterTable
from vla_jax.variants import TaskData

STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By where examples come from, the losses of all steps and the trained leaves after them."""
    rows = batch(16, 0)
    source = ArraySource({name: rows[name] for name in ("image", "tokens", "text_mask")})
    model = AdaptedModel(backbone(), Retrieval(), (Placement(LoRA(rank=2), slots=("attn_q",), layers="last 1"),))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = model.init(jax.random.key(0))
    table = ParameterTable(preset("adapters")).resolve(params)
    trainable, frozen = table.split(params)
    optimizer = make_optimizer(OptimizerConfig(1e-2, "constant"), table, trainable, STEPS)
    shardings = step_shardings(table, trainable, optimizer, mesh)
    frozen = place(frozen, shardings.frozen)
    step = make_train_step(model.loss, optimizer, seed=0, shardings=shardings)

    def run(examples):
        state = init_state(trainable, optimizer, shardings)
        batches = Batches(iter(Pipeline(examples, as_rows, 8, training=True)), shardings.batch)
        losses = []
        for _ in range(STEPS):
            state, metrics = step(state, frozen, next(batches))
            losses.append(float(metrics["loss"]))
        batches.close()
        return losses, {name: np.asarray(leaf) for name, leaf in names.flatten(state.trainable).items()}

    def streams(folder):
        return frozen_streams(model, TaskData(Retrieval(), {"train": source}, as_rows, streams=folder), 8, mesh)[
            "train"
        ]

    folder = tmp_path_factory.mktemp("streams")
    streams(folder)
    return {"whole": run(source), "memory": run(streams(None)), "disk": run(streams(folder))}


@pytest.mark.parametrize(("one", "other"), [("whole", "memory"), ("memory", "disk")])
def test_losses_and_trained_leaves_are_the_same_to_the_last_bit(trained, one, other):
    (losses, leaves), (expected, others) = trained[one], trained[other]
    assert len(set(losses)) == STEPS, "training changes nothing"
    np.testing.assert_array_equal(losses, expected)
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, others[name], err_msg=name)
