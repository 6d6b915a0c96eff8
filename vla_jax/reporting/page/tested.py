"""Which examples the runs of a work directory were tested on, by the configuration that they were run with."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from vla_jax import task_set
from vla_jax.backbones.loading import Backbone
from vla_jax.data.cached import Chosen
from vla_jax.data.scenes import SceneConfig
from vla_jax.data.sources import make_builder
from vla_jax.data.stages import Source
from vla_jax.data.text import Tokenize
from vla_jax.data_sets import Data, Generated, find, splits_of
from vla_jax.domain_data import DomainSizes, describe, domain_pictures
from vla_jax.errors import UserError
from vla_jax.evaluation.few_shot import split_classes
from vla_jax.evaluation.scene_probe import SceneProbe
from vla_jax.few_shot_data import BASE, TEMPLATE, classes_of, labels_of, sources_of
from vla_jax.task_data import TASKS, Sizes, task_data, twin_pairs
from vla_jax.task_kinds import Setup
from vla_jax.tasks.classification import class_texts

T = TypeVar("T")
Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Member:
    """A task's place among those that were trained together.

    Attributes:
        number: what ``task`` and ``route`` call it.
        start: the place of its first test example among those of all tasks.
        every: test examples of all tasks.
    """

    number: int
    start: int
    every: int


@dataclasses.dataclass(frozen=True)
class Tested:
    """What the runs of one group were tested on.

    Attributes:
        kind: of the task, one of :data:`vla_jax.task_kinds.MEASURES`; it says which fields examples have.
        test: the test examples; ``index`` of stored predictions is a place in it.
        names: what a prediction is a place in, where the task chooses from a list.
        quadruples: in Winoground's format, those whose four pairs were scored; None if there are none.
        text_length: tokens a text.
        fingerprint: of data that a user may change; empty where they cannot change.
        member: of a task that was trained together with others; None for one that was not.
    """

    kind: str
    test: Source
    names: tuple[str, ...] = ()
    quadruples: Source | None = None
    text_length: int = 40
    fingerprint: str = ""
    member: Member | None = None


def find_tested(config: Config, group: str, backbone: Backbone, data_dir: str | None) -> Tested:
    """The test examples of a group of runs; data sets that are not built yet are built.

    Args:
        config: the stored configuration.
        group: what the runs were trained for; see :func:`vla_jax.reporting.page.compared.compared_runs`.
        backbone: the backbone they were trained on.
        data_dir: where data sets lie, in place of what the configuration says; None leaves it at that.

    Raises:
        UserError: if the configuration does not say, or the data are not there.
    """
    for recipe in _RECIPES:
        found = recipe(config, group, backbone, {} if data_dir is None else {"data_dir": data_dir})
        if found is not None:
            return found
    raise UserError("the configuration does not say which examples the runs were tested on")


def _compared(config: Config, group: str, backbone: Backbone, changes: Mapping[str, str]) -> Tested | None:
    """A comparison on the tasks of :mod:`vla_jax.task_data`; sizes stand by themselves or under ``sizes``."""
    given = config.get("sizes", config)
    if group not in TASKS or not {"train", "quadruples", "text_length", "data_dir"} <= given.keys():
        return None
    # What a model has kept of the backbone is no matter of single examples.
    sizes = dataclasses.replace(restored(Sizes, given), kept=0, **changes)
    data = task_data(group, sizes, backbone)
    kind = {"statements": "matching", "easy_vqa": "vqa", "retrieval": "retrieval"}[group]
    names = make_builder("easy_vqa", sizes.data_dir).info.features["answer_id"].names if kind == "vqa" else ()
    quadruples = data.probes["quadruples"].source.source if "quadruples" in data.probes else None
    length = sizes.caption_length if kind == "retrieval" else sizes.text_length
    return Tested(kind, data.splits["test"], tuple(names), quadruples, length)


def _together(config: Config, group: str, backbone: Backbone, changes: Mapping[str, str]) -> Tested | None:
    """One of several tasks over one backbone, by whatever way they share it."""
    if not {"ways", "tasks", "sizes"} <= config.keys() or group not in config["tasks"]:
        return None
    given = (restored(Generated, config["sizes"]), config["text_length"], changes.get("data_dir", config["data_dir"]))
    tests = {task: task_set.member_data(task, *given, backbone).splits["test"] for task in config["tasks"]}
    counts = list(map(len, tests.values()))
    number = list(tests).index(group)
    member = Member(number, sum(counts[:number]), sum(counts))
    labels = task_set.member_labels(group, *given)
    return Tested(
        task_set.TASKS[group].kind, tests[group], labels.names, text_length=config["text_length"], member=member
    )


def _domain(config: Config, group: str, backbone: Backbone, changes: Mapping[str, str]) -> Tested | None:
    """A new domain, with some number of labels."""
    name = group.partition("/labels_")[0]
    if "domains" not in config or name not in config["domains"]:
        return None
    sizes = dataclasses.replace(restored(DomainSizes, config["sizes"]), **changes)
    test = domain_pictures(name, "test", sizes, backbone.config.image_size)
    return Tested("classification", test, describe(name).classes, text_length=backbone.config.context_length)


def _few_shot(config: Config, group: str, backbone: Backbone, changes: Mapping[str, str]) -> Tested | None:
    """Classes by their names: all of them, or the base ones."""
    if not {"shots", "novel_shots", "data", "templates"} <= config.keys():
        return None
    data = dataclasses.replace(restored(Data, config["data"]), **changes)
    classes = classes_of(data, config["templates"])
    fingerprint, kind, _ = group.split("/")
    if fingerprint != classes.fingerprint:
        raise UserError("the data have changed since they were tested")
    test, names = sources_of(data, backbone)["test"], classes.names
    if kind == BASE:
        base, _ = split_classes(len(names))
        test, names = Chosen(test, np.flatnonzero(np.isin(labels_of(test), base))), names[: len(base)]
    # No longer than the longest name: adapters may insert tokens, which need the room.
    _, masks = Tokenize(backbone.tokenizer, backbone.config.context_length).batch(class_texts(names, [TEMPLATE]))
    return Tested("classification", test, names, text_length=int(masks.sum(1).max()))


def _twins(config: Config, group: str, backbone: Backbone, changes: Mapping[str, str]) -> Tested | None:
    """Pairs of twins, with a probe of quadruples; a group is named by how it scores and by its negatives."""
    negatives = group.rpartition("_")[2]
    if "twins" not in config or negatives not in ("plain", "hard"):
        return None
    sizes = {"train": config["twins"], "validation": config["validation"], "test": config["test"]}
    data_dir = changes.get("data_dir", config["data_dir"])
    probe = SceneProbe(config["quadruples"], SceneConfig(image_size=backbone.config.image_size))
    test = twin_pairs(negatives, sizes, backbone, data_dir)["test"]
    return Tested("matching", test, quadruples=probe, text_length=config["text_length"])


def _adapted(config: Config, group: str, backbone: Backbone, changes: Mapping[str, str]) -> Tested | None:
    """One method on data of one's own, or on a data set by name."""
    if group or not {"data", "setup"} <= config.keys():
        return None
    data = dataclasses.replace(restored(Data, config["data"]), **changes)
    setup = restored(Setup, config["setup"])
    found = find(data, config.get("task", ""), setup)
    test = splits_of(data, found, backbone)["test"]
    length = setup.length(backbone)
    return Tested(found.kind, test, found.labels.names, text_length=length, fingerprint=found.fingerprint)


_Recipe = Callable[[Config, str, Backbone, Mapping[str, str]], Tested | None]
_RECIPES: tuple[_Recipe, ...] = (_together, _domain, _few_shot, _compared, _twins, _adapted)


def restored(kind: type[T], values: Mapping[str, Any]) -> T:
    """A configuration from its JSON form: nested dataclasses and tuples again, defaults where a field is absent."""
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind) if field.name in values]
    return kind(**{name: _value(hints[name], values[name]) for name in fields})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return restored(hint, value)
    return tuple(value) if isinstance(value, list) else value
