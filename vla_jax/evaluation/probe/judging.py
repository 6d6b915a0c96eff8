"""The published probes: how each is read from its folder, and what scores of its captions and pictures amount to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vla_jax.evaluation import aro, choices, sugarcrepe, valse, winoground
from vla_jax.evaluation.choices import Accuracy
from vla_jax.evaluation.winoground import report as winoground_report
from vla_jax.evaluation.winoground.examples import groups_of_examples
from vla_jax.reporting.table import Column, Table, as_row

Scores = Mapping[str, np.ndarray]
"""By name, float64 ``[examples, captions, images]``."""

_COLUMNS = (
    Column.text("scorer", "scored by"),
    Column.text("group", "examples"),
    Column.number("examples", "count", format=",d"),
    Column.accuracy("accuracy", "accuracy", "range"),
    Column.percent("ties", "ties"),
    Column.difference("difference", "against the first"),
)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A published probe.

    Attributes:
        title: its name.
        read: reads it from a folder with annotations and one with pictures; every example's files are checked.
        right: the place of the right caption, where there is one picture and several captions; None for quadruples.
        judge: what one model's scores ``[examples, captions]`` amount to, by group.
    """

    title: str
    read: Callable[[Path, Path], Any]
    right: int | None = None
    judge: Callable[[Any, np.ndarray], Mapping[str, Accuracy]] | None = None


def _all_and(
    groups: Mapping[str, Accuracy], scores: np.ndarray, right: int, pictures: np.ndarray
) -> dict[str, Accuracy]:
    return {"all examples": choices.evaluate(scores, right, pictures)} | dict(groups)


def _pictures(examples: Any) -> np.ndarray:
    names = ("filename", "image")
    return np.array([str(next(getattr(each, name) for name in names if hasattr(each, name))) for each in examples])


def _class_mean(found: aro.ClassMean, examples: int) -> dict[str, Accuracy]:
    return {"mean of kinds": Accuracy(found.mean, found.ties, examples)} | dict(found.kinds)


PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        "winoground": Probe("Winoground", lambda data, images: winoground.Winoground(data)),
        "sugarcrepe": Probe("SugarCrepe", sugarcrepe.SugarCrepe, sugarcrepe.RIGHT, sugarcrepe.evaluate),
        "aro_relation": Probe(
            "ARO, relations",
            lambda data, images: aro.Aro(data, "relation").check_boxes(),
            aro.RIGHT,
            lambda examples, scores: _class_mean(aro.evaluate_relations(examples, scores), len(examples)),
        ),
        "aro_attribution": Probe(
            "ARO, attributes",
            lambda data, images: aro.Aro(data, "attribution").check_boxes(),
            aro.RIGHT,
            lambda examples, scores: _class_mean(aro.evaluate_attributes(examples, scores), len(examples)),
        ),
        "valse": Probe("VALSE", valse.Valse, valse.RIGHT, valse.evaluate),
    }
)
"""The probes by name."""


def judged(probe: Probe, source: Any, scores: Scores, controls: Scores) -> tuple[dict[str, Any], list[Table]]:
    """What scores amount to.

    Args:
        probe: the probe.
        source: as it was read.
        scores: of models; the first is compared with each other one on the same examples.
        controls: of what cannot bind words to things.

    Returns:
        Everything JSON-able, fractions at full precision, and tables for people.
    """
    if probe.right is None:
        content = winoground_report.report(scores, groups_of_examples(source.examples), controls)
        return content, winoground_report.tables(content)
    first = next(iter(scores))
    pictures = _pictures(source.examples)
    rows = []
    for name, values in (dict(scores) | dict(controls)).items():
        own = values[..., 0]
        groups = probe.judge(source.examples, own)
        for group, found in _all_and(groups, own, probe.right, pictures).items():
            row = {"scorer": name, "group": group, "examples": found.examples}
            row |= {"accuracy": found.accuracy, "ties": found.ties}
            if group == "all examples" and name != first and name in scores:
                row["difference"] = choices.compare(own, scores[first][..., 0], probe.right, pictures)
            rows.append(row)
    content = {"examples": len(source), "rows": [as_row(row) for row in rows]}
    return content, [Table(_COLUMNS, rows, f"{probe.title}: {len(source):,} examples, 95 % intervals")]
