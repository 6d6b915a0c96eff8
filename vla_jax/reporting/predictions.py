"""What a trained model said of every example, as a file of rows, and what that amounts to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.stages import Source
from vla_jax.evaluation.statistics import CONFIDENCE, Interval, accuracy
from vla_jax.reporting.table import as_row, write_atomically
from vla_jax.task_kinds import MEASURES, Labels, annotation

_RESAMPLES = 2_000


def measured(kind: str, found: Mapping[str, np.ndarray], pictures: Sequence[str] | None) -> dict[str, Interval]:
    """The measures of a kind of task with their 95 % intervals, by field.

    Args:
        kind: of the task.
        found: predictions by field, ``[seeds, examples, ...]``.
        pictures: which picture each example is of; examples of one picture are drawn together. None where each example
            has its own.
    """
    intervals = {}
    for measure in MEASURES[kind]:
        if measure.field in found:
            intervals[measure.field] = interval_of(found[measure.field], pictures)
    return intervals


def interval_of(values: np.ndarray, pictures: Sequence[str] | None) -> Interval:
    """The mean of outcomes or numbers ``[seeds, examples]`` with its 95 % interval; of one picture all drawn together.

    Args:
        values: bool or numbers.
        pictures: which picture each example is of; None where each has its own.
    """
    return accuracy(values, pictures) if values.dtype == np.bool_ else _mean(values, pictures)


def _mean(values: np.ndarray, pictures: Sequence[str] | None) -> Interval:
    """The mean of numbers ``[seeds, examples]`` with a percentile bootstrap over pictures; seeds are kept."""
    values = values.astype(np.float64).mean(0)
    _, member = np.unique(np.arange(len(values)) if pictures is None else np.asarray(pictures), return_inverse=True)
    sums, sizes = np.bincount(member, values), np.bincount(member)
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, len(sizes), len(sizes)) for _ in range(_RESAMPLES)]
    means = [sums[chosen].sum() / sizes[chosen].sum() for chosen in drawn]
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(float(values.mean()), float(low), float(high))


def pictures_of(source: Source, index: np.ndarray) -> list[str] | None:
    """Which picture each example is of; None where the examples do not say."""
    if "image_id" not in annotation(source, int(index[0])):
        return None
    return [str(_text(annotation(source, int(place))["image_id"])) for place in index]


def write_predictions(
    path: Path, source: Source, found: Mapping[str, np.ndarray], labels: Labels, seeds: Sequence[int]
) -> Path:
    """Writes a line of JSON for each seed and example: what is said in the example, and what the model said.

    Beside the task's own fields a line has ``seed``, ``index`` (the example's place in its split), ``place`` (file and
    line, for data of one's own) and, where a head chooses from a list, ``predicted``, the name of its choice.
    """
    lines = []
    for row, seed in enumerate(seeds):
        for column, index in enumerate(found["index"][row].tolist()):
            example = {name: _text(value) for name, value in annotation(source, index).items() if name != "scene"}
            told = {name: values[row, column] for name, values in found.items() if name != "index"}
            if labels.names and "prediction" in told:
                told["predicted"] = labels.names[int(told["prediction"])]
            place = {"place": source.place(index)} if hasattr(source, "place") else {}
            line = as_row({"seed": seed, "index": index} | place | {"example": example} | told)
            lines.append(json.dumps(line, ensure_ascii=False))
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
