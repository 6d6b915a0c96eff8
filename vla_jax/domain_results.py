"""What adapting to new domains has shown so far: accuracies by labels, label ratios, and what is left of before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.evaluation.forgetting import MEASURES, Kept
from vla_jax.evaluation.label_ratio import label_ratio
from vla_jax.evaluation.statistics import Interval, accuracy, paired_difference

REFERENCE = "full"
"""The method that others are compared with."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """A domain and what is tried on it.

    Attributes:
        name: of the domain.
        title: in tables and figures.
        classes: how many there are.
        labels: numbers of labels a class, rising, all there are at the end.
        zero_shot: accuracy by the classes' names without training; None where these say nothing.
    """

    name: str
    title: str
    classes: int
    labels: Sequence[int]
    zero_shot: Interval | None = None


class DomainResults:
    """Rows for the tables and figures of :mod:`vla_jax.reporting.domain_report`.

    Attributes:
        methods: titles by name.
        rows: one a domain and number of labels.
        ratios: one a domain, method and number of labels of :data:`REFERENCE`, most labels first.
        forgotten: one a model that was asked about the old domain, the backbone first.
    """

    def __init__(self, methods: Mapping[str, str]):
        self.methods = dict(methods)
        self.rows: list[dict[str, Any]] = []
        self.ratios: list[dict[str, Any]] = []
        self.forgotten: list[dict[str, Any]] = []
        self._correct: dict[tuple[str, int, str], np.ndarray] = {}  # by domain, labels and method, [seeds, examples]

    def add(self, tried: Tried, labels: int, method: str, correct: np.ndarray, details: Mapping[str, Any]) -> None:
        """Takes up what a method reaches with so many labels.

        Args:
            tried: the domain.
            labels: labels a class.
            method: its name.
            correct: on the test split, bool ``[seeds, examples]``; methods have the same seeds.
            details: what else is told of it, by name.
        """
        row = self._row(tried, labels)
        self._correct[tried.name, labels, method] = correct
        row |= {method: accuracy(correct), f"{method}_by_seed": correct.mean(1).tolist()}
        row |= {f"{method}_{name}": value for name, value in details.items()}
        reference = self._correct.get((tried.name, labels, REFERENCE))
        for other in self.methods:
            found = self._correct.get((tried.name, labels, other))
            if other != REFERENCE and found is not None and reference is not None:
                row[f"{other}_difference"] = paired_difference(found, reference)
        self._compare(tried)

    def _row(self, tried: Tried, labels: int) -> dict[str, Any]:
        for row in self.rows:
            if (row["domain"], row["labels"]) == (tried.name, labels):
                return row
        row = {"domain": tried.name, "title": tried.title, "labels": labels, "chance": 1 / tried.classes}
        self.rows.append(row | {"zero_shot": tried.zero_shot})
        return self.rows[-1]

    def _compare(self, tried: Tried) -> None:
        """How many labels each method needs for what the reference reaches, of methods whose curves are whole."""
        curves = {
            method: np.stack([self._correct[tried.name, labels, method].mean(1) for labels in tried.labels], axis=1)
            for method in self.methods
            if all((tried.name, labels, method) in self._correct for labels in tried.labels)
        }
        self.ratios = [row for row in self.ratios if row["domain"] != tried.name]
        if REFERENCE not in curves:
            return
        last = self._row(tried, tried.labels[-1])
        for method, curve in curves.items():
            if method == REFERENCE:
                continue
            row = {"domain": tried.name, "title": tried.title, "name": method, "variant": self.methods[method]}
            row["trained"] = last.get(f"{method}_trained")
            for at in reversed(range(len(tried.labels))):
                self.ratios.append(row | {"found": label_ratio(tried.labels, curve, curves[REFERENCE], at)})

    def forget(self, tried: Tried, method: str, before: Kept, kept: Sequence[Kept]) -> None:
        """Takes up what models that were adapted with all labels still can do on the old domain.

        Args:
            tried: the domain they were adapted to.
            method: its name.
            before: the untouched backbone.
            kept: the adapted models, one a seed.
        """
        if not self.forgotten:
            self.forgotten.append(_asked("backbone", "untouched", None, before.right))
        title, adapters = f"{self.methods[method]}, after {tried.title}", kept[0].off is not None
        states = [("on" if adapters else None, [model.right for model in kept])]
        if adapters:
            states.append(("off", [model.off for model in kept]))
        for state, models in states:
            after = {name: np.stack([right[name] for right in models]) for name in MEASURES}
            row = _asked(title, tried.title, state, after)
            if state == "off":
                row["features"] = "as before, bitwise" if all(model.exact for model in kept) else "changed"
            for name, right in after.items():
                same = np.broadcast_to(before.right[name], right.shape)
                row[f"{name}_change"] = paired_difference(right, same)
            self.forgotten.append(row)


def _asked(variant: str, after: str, state: str | None, right: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A row of what a model, or one a seed, gets right on the old domain."""
    return {"variant": variant, "after": after, "state": state} | {name: accuracy(right[name]) for name in MEASURES}
