"""Work directories as experiments leave them, without an experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.reporting.drawing import new_figure, save
from vla_jax.reporting.table import Column, Table

COLUMNS = (
    Column.text("variant", "variant"),
    Column.number("trained", "trained", format=",d"),
    Column.accuracy("easy_vqa", "easy-VQA"),
    Column.difference("difference", "against plain"),
)
ROWS: tuple[dict[str, Any], ...] = (
    {"name": "plain", "variant": "plain | <b>one</b>", "trained": 513, "easy_vqa": (0.618, 0.597, 0.639)},
    {
        "name": "lora",
        "variant": "LoRA",
        "trained": 29_185,
        "easy_vqa": (0.933, 0.921, 0.944),
        "difference": (0.081, 0.068, 0.093),
    },
    {"name": "full", "variant": "full", "trained": 1_498_754, "easy_vqa": None, "difference": (-0.07, -0.088, -0.052)},
)


def rows(given: tuple[dict[str, Any], ...] = ROWS) -> list[dict[str, Any]]:
    """The rows with their intervals as an experiment's table takes them."""
    return [
        {
            name: dict(zip(("value", "low", "high"), value, strict=True)) if isinstance(value, tuple) else value
            for name, value in row.items()
        }
        for row in given
    ]


def write_run(
    folder: Path, losses: list[float], *, tested: bool = True, steps: int = 4, modalities=("image", "text"), **arrays
) -> Path:
    """A run that logged a loss at every step, and the rest only at the last one."""
    folder.mkdir(parents=True)
    records = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, start=1)]
    records[-1] |= {"train/learning_rate/head": 0.5, "seconds_per_step": 0.1}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"steps": steps, "model": {"modalities": list(modalities)}}
    (folder / "settings.json").write_text(json.dumps(settings))
    if tested:
        np.savez(folder / "test.npz", **{"correct": np.ones(2, bool), "index": np.arange(2)} | arrays)
    return folder


def write_work_directory(folder: Path, title: str = "Some methods on tiny") -> Path:
    """A work directory with three variants, of which one is not finished."""
    Table(COLUMNS, rows(), title=title).write(folder, "results")
    config = {"backbone": "tiny", "tasks": ["statements", "easy_vqa"], "budget": {"steps": 4, "seeds": [0, 1]}}
    (folder / "config.json").write_text(json.dumps(config | {"empty": []}))
    (folder / "versions.json").write_text(json.dumps({"jax": "0.10.2", "device": "cpu", "devices": 1}))
    figure, _ = new_figure()
    save(figure, folder / "results.png")
    for task in ("easy_vqa", "statements"):
        for seed in (0, 1):
            write_run(folder / f"runs/{task}/plain/learning_rate_0.1/seed_{seed}", [1.0 + seed, 0.75, 0.5, 0.25])
    write_run(folder / "runs/statements/plain/learning_rate_0.2/seed_0", [3.0], tested=False)
    write_run(folder / "runs/statements/lora/learning_rate_0.1/seed_0", [1.0, 0.9, 0.8, 0.7])
    write_run(folder / "runs/statements/full/learning_rate_0.1/seed_0", [2.0, 1.5], tested=False)
    write_run(folder / "runs/statements/full/learning_rate_0.02/seed_0", [2.0], tested=False)
    return folder
