"""The tables of score files: every model on all examples and on each group, controls beside it, and pairs of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.statistics import bootstrap_accuracy
from vla_jax.evaluation.winoground.judging import CHANCE, compare, compare_trained, evaluate, evaluate_groups
from vla_jax.reporting.table import Column, Table, as_row

CONSTANT = "constant scorer"
FEWEST_SHOWN = 10
_TITLES = {"text": "Text", "image": "Image", "group": "Group"}


def report(
    scores: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    controls: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Everything about some models' scores, JSON-able; all numbers are fractions.

    Intervals are bootstraps over examples, as in the authors' tables; a score of 0 or 1 has Wilson's.

    Args:
        scores: by model float [examples, 2 captions, 2 images], the same examples in the same order.
        groups: by name, positions of examples.
        controls: scores of what cannot bind words to things, beside the constant scorer.

    Returns:
        ``examples``; ``chance``; ``models`` and ``controls``, each with ``all`` and by group the scores, their
        intervals and the shares of ties; ``comparisons`` of the first model with each other one, with the difference,
        its interval and McNemar's table and exact p value.
    """
    if not scores:
        raise UserError("a report needs the scores of at least one model")
    first, *others = scores
    examples = len(scores[first])
    return {
        "examples": examples,
        "chance": CHANCE,
        "models": {name: _parts(values, groups) for name, values in scores.items()},
        "controls": {
            name: _parts(values, {})
            for name, values in ({CONSTANT: np.zeros((examples, 2, 2))} | dict(controls or {})).items()
        },
        "comparisons": [_comparison(first, other, scores[first], scores[other]) for other in others],
    }


def _parts(scores: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, Any]:
    by_group = evaluate_groups(scores, groups, bootstrap_accuracy)
    return {
        "all": as_row(evaluate(scores, bootstrap_accuracy)),
        "groups": {name: as_row(found) for name, found in by_group.items()},
    }


def _comparison(name_a: str, name_b: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    differences, tests = compare(a, b), compare_trained(a, b)
    found: dict[str, Any] = {"a": name_a, "b": name_b}
    for part in CHANCE:
        interval = {key: getattr(differences[part], key) for key in ("value", "low", "high")}
        found[part] = interval | dataclasses.asdict(tests[part])
    return found


def tables(content: Mapping[str, Any]) -> list[Table]:
    """A report for people: a table a model, and one of the comparisons.

    Of the fine-grained tags those with fewer than ``FEWEST_SHOWN`` examples are left out; their intervals would be as
    wide as the scale.
    """
    shown = [_model_table(name, parts, content) for name, parts in content["models"].items()]
    return [*shown, _comparison_table(content["comparisons"])] if content["comparisons"] else shown


def _model_table(name: str, parts: Mapping[str, Any], content: Mapping[str, Any]) -> Table:
    rows: list[dict[str, Any]] = [{"which": "all examples"} | parts["all"]]
    for group, found in parts["groups"].items():
        if not group.startswith("tag: ") or found["examples"] >= FEWEST_SHOWN:
            rows.append({"which": group} | found)
    rows += [{"which": f"control: {control}"} | found["all"] for control, found in content["controls"].items()]
    rows.append({"which": "control: chance"} | dict(content["chance"]))
    columns = [
        Column.text("which", "Examples"),
        Column.number("examples", "Count", format=",d"),
        *(Column(part, title, "range", "%", ".2f", 100) for part, title in _TITLES.items()),
        *(Column.percent(f"{part}_ties", f"{title} ties", ".2f") for part, title in _TITLES.items()),
    ]
    return Table(columns, rows, f"{name}: {content['examples']} examples, 95 % intervals")


def _comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        {"pair": f"{found['a']} against {found['b']}", "part": title, "difference": found[part]} | found[part]
        for found in comparisons
        for part, title in _TITLES.items()
    ]
    columns = [
        Column.text("pair", "Models"),
        Column.text("part", "Score"),
        Column("difference", "Difference", "difference", "points", ".2f", 100),
        Column.number("both", "Both right", format=",d"),
        Column.number("only_a", "First alone", format=",d"),
        Column.number("only_b", "Second alone", format=",d"),
        Column.number("neither", "Neither", format=",d"),
        Column.number("p_value", "p, McNemar exact", format=".2g"),
    ]
    return Table(columns, rows, "Paired comparison on the same examples")
