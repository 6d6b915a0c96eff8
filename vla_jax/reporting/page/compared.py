"""Which runs of a work directory stand side by side in the gallery, by what they were trained for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vla_jax.reporting.page.workdir import Run, WorkDirectory

Compared = dict[str, dict[str, Run]]
"""By group and variant, the run whose predictions are shown."""


def compared_runs(work: WorkDirectory) -> Compared:
    """The tested runs that were made for the same examples, the first seed of each variant.

    They are those of a group of folders, but for ways of sharing a backbone, where folders are named by the way and
    runs stand side by side by task, and for numbers of labels or shots, of which the greatest is shown.
    """
    # A configuration may say anything where no experiment wrote it.
    ways, tasks = work.config.get("ways"), work.config.get("tasks")
    if isinstance(ways, list) and isinstance(tasks, list):
        found = {task: _shared(work, task, list(map(str, ways))) for task in map(str, tasks)}
    elif {"domains", "labels"} <= work.config.keys():
        found = {group: _tested(work, group) for group in _greatest(work, "/labels_")}
    elif {"shots", "novel_shots"} <= work.config.keys():
        found = {group: _tested(work, group) for group in _greatest(work, "/shots_")}
    else:
        found = {group: _tested(work, group) for group in work.groups}
    return {group: runs for group, runs in found.items() if runs}


def _tested(work: WorkDirectory, group: str) -> dict[str, Run]:
    first: dict[str, Run] = {}
    for variant, runs in work.of_group(group).items():
        for run in runs:
            if run.tested:
                first.setdefault(variant, run)
    return first


def _shared(work: WorkDirectory, task: str, ways: list[str]) -> dict[str, Run]:
    """Every way's run for a task: one for all tasks, or one of its own."""
    found: dict[str, Run] = {}
    for way in ways:
        for group in (way, f"{way}/{task}"):
            found |= _only(way, _tested(work, group))
        # What weighs the adapters of a first stage is trained in a second one, which does not keep them again.
        begun = _tested(work, f"{way}/first").get(way)
        for run in _only(way, _tested(work, f"{way}/second")).values():
            found[way] = dataclasses.replace(run, begun=None if begun is None else begun.folder)
    return found


def _only(variant: str, runs: Mapping[str, Run]) -> dict[str, Run]:
    return {variant: runs[variant]} if variant in runs else {}


def _greatest(work: WorkDirectory, number: str) -> list[str]:
    """Of groups that differ in the number behind these words, the one with the greatest that has been tested."""
    most: dict[str, tuple[int, str]] = {}
    for group in work.groups:
        same, _, found = group.rpartition(number)
        if found.isdecimal() and _tested(work, group):
            most[same] = max(most.get(same, (0, "")), (int(found), group))
    return [group for _, group in most.values()]
