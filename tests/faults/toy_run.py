"""A toy experiment, and a run of ``launch.py`` in a process that can be killed.

:func:`start` is run in a process of its own, which a server forks that has everything imported (``processes.py``).
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vla_jax import launching, names, workplace  # noqa: F401 - the last so that the server has it imported
from vla_jax.data.batches import Batches
from vla_jax.data.cached import ArraySource, as_rows, evaluate
from vla_jax.data.pipeline import Pipeline
from vla_jax.reporting.table import write_atomically
from vla_jax.training.checkpoint import Checkpointer
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.metrics import JsonLines, TensorBoard
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import preset
from vla_jax.training.sharding import MeshConfig, check_batch, make_mesh, place
from vla_jax.training.step import init_state, make_eval_step, make_train_step, step_shardings
from vla_jax.training.table import ParameterTable
from vla_jax.training.tolerance import Tolerance
from vla_jax.training.trainer import fit

WIDTH, CLASSES, BATCH = 6, 3, 8
EXAMPLES, HELD_OUT = 40, 21  # neither is a multiple of a batch


@dataclasses.dataclass(frozen=True)
class Config:
    """The toy experiment.

    Attributes:
        preset: its preset.
        steps: of the run.
        every: steps between checkpoints.
        wait: for each of them.
        log_every: steps between logged ones.
        seconds: that drawing a batch takes; changes no number.
        broken: places of training examples that are not finite.
        width: of the adapter; wide ones take longer to save.
        tolerance: of the run.
        mesh: the devices.
    """

    preset: Literal["default"] = "default"
    steps: int = 12
    every: int = 4
    wait: bool = False
    log_every: int = 1
    seconds: float = 0.0
    broken: tuple[int, ...] = ()
    width: int = 16
    tolerance: Tolerance = dataclasses.field(default_factory=Tolerance)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


PRESETS = {"default": Config()}


class Unhurried:
    """Batches that take their time."""

    def __init__(self, batches: Batches, seconds: float):
        self._batches, self._seconds = batches, seconds
        self.state, self.restore = batches.state, batches.restore

    def __next__(self) -> Any:
        time.sleep(self._seconds)
        return next(self._batches)


def arrays(count: int, seed: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return {"x": x, "label": (np.abs(x[:, :CLASSES]).argmax(1)).astype(np.int32)}


def params(width: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32) / 2

    return {
        "backbone": {"kernel": drawn(WIDTH, width)},
        "adapters": {"a": {"kernel": np.zeros((WIDTH, width), np.float32)}},
        "heads": {"h": {"kernel": drawn(width, CLASSES)}},
    }


def logits_of(tree: Mapping[str, Any], x: jax.Array) -> jax.Array:
    features = jnp.tanh(x @ (tree["backbone"]["kernel"] + tree["adapters"]["a"]["kernel"]))
    return features @ tree["heads"]["h"]["kernel"]


def loss_of(tree: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
    kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)  # by the row's place in the global batch
    logits = logits_of(tree, batch["x"] * kept)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


def predictions(tree: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    chosen = logits_of(tree, batch["x"]).argmax(-1)
    return {"chosen": chosen, "correct": chosen == batch["label"]}


def check(config: Config) -> str:
    check_batch(BATCH, make_mesh(config.mesh))
    return f"would run {config.steps} steps"


def compile_once() -> None:
    """Runs of the tests start many times: what one has compiled serves the others."""
    jax.config.update("jax_compilation_cache_dir", os.environ["TOY_COMPILED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def run(config: Config, workdir: Path) -> None:
    compile_once()
    mesh = make_mesh(config.mesh)
    tree = params(config.width)
    table = ParameterTable(preset("adapters")).resolve(tree)
    trainable, frozen = table.split(tree)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.05), table, trainable, config.steps)
    shardings = step_shardings(table, trainable, optimizer, mesh)
    state = init_state(jax.tree.map(jnp.asarray, trainable), optimizer, shardings)
    frozen = place(frozen, shardings.frozen)
    train = arrays(EXAMPLES, seed=1)
    train["x"][list(config.broken)] = np.nan
    pipeline = Pipeline(ArraySource(train), as_rows, BATCH, training=True, seed=7)
    batches = Batches(iter(pipeline), shardings.batch)
    identity = Identity("toy", "0", {"width": config.width})
    with Checkpointer(workdir / "checkpoints", identity, every=config.every, wait=config.wait) as checkpointer:
        fitted = fit(
            state,
            frozen,
            make_train_step(loss_of, optimizer, seed=3, shardings=shardings),
            Unhurried(batches, config.seconds),
            config.steps,
            checkpointer=checkpointer,
            log_every=config.log_every,
            writers=[JsonLines(workdir / "metrics.jsonl"), TensorBoard(workdir / "tensorboard")],
            skipped=JsonLines(workdir / "skipped.jsonl"),
            tolerance=config.tolerance,
        )
    batches.close()
    program = make_eval_step(predictions, shardings=shardings)
    found = evaluate(
        Pipeline(ArraySource(arrays(HELD_OUT, seed=2)), as_rows, BATCH, training=False),
        lambda batch: program(fitted.state.trainable, frozen, batch),
        shardings.batch,
        description="held out",
    )
    told = {name: found[name].tolist() for name in ("index", "chosen")}
    write_atomically(workdir / "result.json", json.dumps(told | {"accuracy": float(found["correct"].mean())}))
    content = io.BytesIO()
    np.savez(content, **names.flatten(jax.device_get(fitted.state.trainable)))
    write_atomically(workdir / "trained.npz", content.getvalue())
    print("finished")


def start(arguments: Sequence[str], output: str, devices: int, unprivileged: bool) -> None:
    """Does what ``launch.py`` does.

    Args:
        arguments: of the command line.
        output: file that takes what the process says.
        devices: how many virtual devices it has.
        unprivileged: whether a folder's permissions bind it although it may be root's.
    """
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    jax.config.update("jax_num_cpu_devices", devices)
    if unprivileged:
        _without_overriding_permissions()
    launching.load_experiment = importlib.import_module
    try:
        launching.command(arguments)
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out, and JAX's processes part in


def _without_overriding_permissions() -> None:
    """Takes CAP_DAC_OVERRIDE from this process: Linux's capget and capset, version 3."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(1 << 1)  # of the effective ones
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
