"""A comparison of a linear head on a small model with itself, at two learning rates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from small_model import backbone, batch
from toy_run import compile_once

from vla_jax.backbones.transformer import Compute
from vla_jax.comparison import Comparison
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.reporting.table import write_atomically
from vla_jax.tasks.matching import Matching
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import MeshConfig, check_batch, make_mesh
from vla_jax.variants import Budget, TaskData, Variant

VARIANT = Variant("linear", "linear head alone", rules="linear_probe", learning_rates=(0.0, 0.3))


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["default"] = "default"
    batch_size: int = 8
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


PRESETS = {"default": Config()}


def source(count: int, seed: int) -> ArraySource:
    """Rows whose label says whether the picture is bright."""
    rows = batch(count, seed)
    del rows["valid"]
    rows["image"] = 0.1 * rows["image"] + np.where(rows["label"], 1.0, -1.0)[:, None, None, None].astype(np.float32)
    return ArraySource(rows)


def check(config: Config) -> str:
    check_batch(config.batch_size, make_mesh(config.mesh))
    return "would compare"


def run(config: Config, workdir: Path) -> None:
    compile_once()
    jax.config.update("jax_disable_most_optimizations", True)
    budget = Budget(
        steps=6,
        selection_share=0.5,
        batch_size=config.batch_size,
        optimizer=OptimizerConfig(warmup_steps=1),
        checkpoint_every=2,
        log_every=1,
    )
    sizes = {"train": 40, "validation": 21, "test": 19}
    splits = {split: source(count, seed) for seed, (split, count) in enumerate(sizes.items())}
    data = TaskData(Matching("bright"), splits, as_rows)
    comparison = Comparison(backbone(), data, budget, Compute(), make_mesh(config.mesh), workdir / "runs")
    outcome = comparison.run(VARIANT)
    test = {name: np.asarray(found).tolist() for name, found in outcome.predictions["test"].items()}
    told = {
        "rate": outcome.learning_rate,
        "validation": outcome.validation,
        "correct": test["correct"],
        "index": test["index"],
    }
    write_atomically(workdir / "outcome.json", json.dumps(told))
