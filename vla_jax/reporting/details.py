"""What predictions say beside a task's main measures: by class and kind, among whole splits, and how sure they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.data.builders.easy_vqa import QUESTION_KINDS
from vla_jax.data.stages import Source
from vla_jax.evaluation import retrieval, vqa
from vla_jax.evaluation.calibration import calibration
from vla_jax.evaluation.exact_ranks import Before, count_before
from vla_jax.evaluation.statistics import accuracy
from vla_jax.reporting.predictions import interval_of, pictures_of
from vla_jax.reporting.table import Column
from vla_jax.reranking import SecondStage
from vla_jax.task_kinds import MEASURES, Labels, annotation

GROUPED = (
    Column.text("split", "split"),
    Column.text("by", "by"),
    Column.text("group", ""),
    Column.number("examples", "examples", format=",d"),
    Column.accuracy("accuracy", "accuracy", "range"),
)
"""Columns of :func:`grouped`."""

AT = (1, 5, 10)
RETRIEVED = (
    Column.text("split", "split"),
    Column.text("ranked_by", "ranked by"),
    Column.text("query", "query"),
    Column.number("queries", "queries", format=",d"),
    Column.number("candidates", "candidates", format=",d"),
    *(Column.accuracy(f"recall_{k}", f"R@{k}", "range") for k in AT),
    Column.number("median_rank", "median rank"),
    Column.percent("mean_average_precision", "mAP"),
)
"""Columns of :func:`retrieved`."""

MORE: Mapping[str, tuple[Column, ...]] = {
    "classification": (
        Column.percent("class_mean", "mean of classes"),
        Column.percent("calibration_error", "calibration error"),
    ),
    "vqa": (Column.accuracy("published", "VQA accuracy, published script", "range"),),
}
"""By kind of task, columns of :func:`summarised`."""


def summarised(kind: str, found: Mapping[str, np.ndarray], source: Source, labels: Labels) -> dict[str, Any]:
    """Further numbers of a split.

    Args:
        kind: of the task.
        found: predictions by field, ``[seeds, examples]`` each, and ``index``, their places in the source.
        source: the split's raw examples.
        labels: what the head chooses from.

    Returns:
        ``class_mean``, the accuracy's mean over the classes that there are, and ``calibration_error`` (Guo et al. 2017)
        of a classifier; ``published``, what the published script makes of answers as texts, which compares them as they
        are where all annotators said the same (:mod:`vla_jax.evaluation.vqa`). Nothing for other kinds. Of several
        seeds the mean.
    """
    told = [annotation(source, int(place)) for place in found["index"][0]]
    if kind == "classification":
        classes = np.array([int(each["label"]) for each in told])
        by_class = [found["correct"][:, classes == label].mean() for label in np.unique(classes)]
        errors = [
            calibration(np.minimum(sure, 1.0), right).error
            for sure, right in zip(found["confidence"], found["correct"], strict=True)
        ]
        return {"class_mean": float(np.mean(by_class)), "calibration_error": float(np.mean(errors))}
    if kind == "vqa":
        answers = [each[labels.key] for each in told]
        answers = [[given] if isinstance(given, str | bytes) else given for given in answers]
        scores = np.array(
            [
                [vqa.accuracy(labels.names[int(said)], given) for said, given in zip(row, answers, strict=True)]
                for row in found["prediction"]
            ]
        )
        return {"published": interval_of(scores, pictures_of(source, found["index"][0]))}
    return {}


def grouped(kind: str, found: Mapping[str, np.ndarray], source: Source, labels: Labels) -> list[dict[str, Any]]:
    """The task's first measure by class, and by every field of the examples that says of what kind they are.

    Args:
        kind: of the task.
        found: as :func:`summarised` takes them.
        source: the split's raw examples.
        labels: what the head chooses from.

    Returns:
        Rows of ``by``, ``group``, ``examples`` and ``accuracy``, an interval; none where examples say nothing.
    """
    field = MEASURES[kind][0].field
    if field not in found:
        return []
    told = [annotation(source, int(place)) for place in found["index"][0]]
    pictures = pictures_of(source, found["index"][0])
    rows = []
    for by, names in _groupings(kind, told, labels):
        for group in sorted(set(names), key=labels.names.index if by == "class" else None):
            member = np.array([name == group for name in names])
            own = (
                None if pictures is None else [picture for picture, here in zip(pictures, member, strict=True) if here]
            )
            rows.append(
                {
                    "by": by,
                    "group": group,
                    "examples": int(member.sum()),
                    "accuracy": interval_of(found[field][:, member], own),
                }
            )
    return rows


def _groupings(kind: str, told: Sequence[Mapping[str, Any]], labels: Labels) -> Iterator[tuple[str, list[str]]]:
    """What examples can be told apart by, and the group of each."""
    if kind == "classification":
        yield "class", [labels.names[int(each["label"])] for each in told]
    for field in sorted({name for each in told for name in each if name.endswith("_kind")}):
        yield field.replace("_", " "), [_kind(each.get(field, "")) for each in told]


def _kind(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, str) else QUESTION_KINDS[int(value)]  # of easy-VQA, as a number


def retrieved(
    images: np.ndarray,
    texts: np.ndarray,
    owner: np.ndarray,
    second: tuple[str, SecondStage] | None = None,
) -> list[dict[str, Any]]:
    """Both directions over a whole split, with all captions of a picture.

    Args:
        images: float ``[seeds, pictures, width]``, of length one.
        texts: float ``[seeds, captions, width]``, of length one.
        owner: int ``[captions]``, which picture each belongs to.
        second: the name of a second stage, if there is one, and what it makes of the ranks.

    Returns:
        Two rows of ``ranked_by``, ``query``, ``queries``, ``candidates``, ``recall_1``, ``recall_5`` and ``recall_10``
        as far as there are so many candidates, with intervals, ``median_rank`` and ``mean_average_precision``; of
        several seeds the mean. Two more for the second stage.
    """
    before = [count_before(image, text, owner) for image, text in zip(images, texts, strict=True)]
    rows = _by_direction("features", before, owner)
    if second is not None:
        name, stage = second
        after = [stage(*each) for each in zip(before, images, texts, strict=True)]
        rows += _by_direction(name, after, owner)
    return rows


def _by_direction(ranked_by: str, before: Sequence[Before], owner: np.ndarray) -> list[dict[str, Any]]:
    """A row for pictures that look for captions, and one for captions that look for pictures, of all seeds' ranks."""
    pictures = len(before[0].image_to_text)
    at = [k for k in AT if k <= min(pictures, len(owner))]
    each = [retrieval.judge(one, owner, at=at) for one in before]
    first = {
        "image_to_text": np.stack([one.image_to_text[:, 0] for one in before]),
        "text_to_image": np.stack([one.text_to_image for one in before]),
    }
    rows = []
    for query, name, clusters in (("picture", "image_to_text", None), ("caption", "text_to_image", owner)):
        directions = [getattr(one, name) for one in each]
        row = {"ranked_by": ranked_by, "query": query}
        row |= {"queries": directions[0].queries, "candidates": directions[0].candidates}
        row |= {f"recall_{k}": accuracy(first[name] < k, clusters) for k in at}
        for field in ("median_rank", "mean_average_precision"):
            row[field] = float(np.mean([getattr(one, field) for one in directions]))
        rows.append(row)
    return rows
