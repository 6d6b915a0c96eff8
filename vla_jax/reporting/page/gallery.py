"""The gallery: which examples are shown, what every variant said of them, and which patches look like the text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.backbones.loading import Backbone, load_backbone
from vla_jax.data.image import Preprocess
from vla_jax.data.quadruple_pairs import as_scores
from vla_jax.errors import UserError
from vla_jax.evaluation import winoground
from vla_jax.foreign import load_arrays
from vla_jax.many_tasks import own_fields
from vla_jax.model import MODALITIES
from vla_jax.reporting.page.compared import compared_runs
from vla_jax.reporting.page.maps import HeatMaps, Pair
from vla_jax.reporting.page.shown import Answer, Example, Gallery, Judgement, Quadruple, Shelf
from vla_jax.reporting.page.tested import Tested, find_tested
from vla_jax.reporting.page.wording import Wording
from vla_jax.reporting.page.workdir import Run, WorkDirectory

FROZEN = "frozen backbone"
Progress = Callable[[str], None]
Found = Mapping[str, np.ndarray]


def make_galleries(work: WorkDirectory, count: int, data_dir: str | None, progress: Progress) -> list[Gallery]:
    """The gallery of every group with tested runs.

    Args:
        work: the work directory.
        count: how many examples, and how many quadruples, of each group.
        data_dir: where data sets lie, in place of what the configuration says.
        progress: is told what is computed.

    Returns:
        A gallery for each group; and one without a name for what cannot be shown, if there is any.
    """
    galleries: list[Gallery] = []
    hidden: dict[str, list[str]] = {}
    backbone: Backbone | None = None
    for group, runs in compared_runs(work).items():
        try:
            if "backbone" not in work.config:
                raise UserError("config.json does not name the backbone")
            if backbone is None:
                progress(f"loading {work.config['backbone']}")
                backbone = load_backbone(work.config["backbone"], dtype=work.config.get("storage"))
            progress(f"reading examples of {group or 'the test split'}")
            data = find_tested(work.config, group, backbone, data_dir)
            _check_unchanged(data, work, runs)
            galleries.append(_GroupGallery(work, group, runs, data, backbone, progress).gallery(count))
        # A configuration that says something else than an experiment wrote is met where it is used.
        except (UserError, OSError, KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            hidden.setdefault(str(error), []).append(group or "the test split")
    if hidden:
        problems = (f"No examples of {', '.join(groups)} are shown: {error}." for error, groups in hidden.items())
        galleries.append(Gallery("", problems=tuple(problems)))
    return galleries


def _check_unchanged(data: Tested, work: WorkDirectory, runs: Mapping[str, Run]) -> None:
    """Refuses other examples than those that predictions were made for: they would stand beside the wrong pictures."""
    for run in runs.values():
        count = tested_count(run, data)
        now = {len(data.test)} if data.member is None else {len(data.test), data.member.every}
        if count not in now:
            raise UserError(f"the test split had {count:,} examples when they were tested, and has {max(now):,} now")
    if data.fingerprint != work.data.get("data", data.fingerprint):
        raise UserError("the data have changed since they were tested")


def tested_count(run: Run, data: Tested) -> int:
    """How many test examples a run was tested on, of all its tasks together."""
    return run.settings.get("examples", {}).get("test", len(data.test))


def shelves(right: np.ndarray, count: int) -> list[tuple[str, int, list[int]]]:
    """How examples fared, and which of them are shown: evenly spread over those that fared alike.

    Args:
        right: bool ``[variants, examples]``.
        count: how many to show in all; of each kind as many as of the others, as far as there are any.

    Returns:
        Title, number of examples, and places of those shown; what tells variants apart comes first.
    """
    every, some = right.all(0), right.any(0)
    kinds = {"right by some variants": some & ~every, "wrong by every variant": ~some, "right by every variant": every}
    if len(right) == 1:
        kinds = {"wrong": ~every, "right": every}
    found = {title: np.flatnonzero(chosen) for title, chosen in kinds.items()}
    taken = dict.fromkeys(found, 0)
    for title in itertools.islice(itertools.cycle(found), count * len(found)):
        if sum(taken.values()) < count and taken[title] < len(found[title]):
            taken[title] += 1
    return [
        (title, len(places), places[np.arange(taken[title]) * len(places) // taken[title]].tolist())
        for title, places in found.items()
        if taken[title]
    ]


class _GroupGallery:
    """Chooses what is shown of one group, and has it computed."""

    def __init__(
        self,
        work: WorkDirectory,
        group: str,
        runs: Mapping[str, Run],
        data: Tested,
        backbone: Backbone,
        progress: Progress,
    ):
        self.group, self.runs, self.data, self.backbone = group, runs, data, backbone
        self.titles = {variant: work.called(variant) for variant in runs}
        self.progress = progress
        self.wording = Wording(data.kind, data.names)
        self.preprocess = Preprocess(backbone.image_processor)
        self.pairs: list[Pair] = []
        self.heat: dict[str, np.ndarray | None] = {}
        self.problems: list[str] = []

    def gallery(self, count: int) -> Gallery:
        """Everything that is shown of the group, so many examples and so many quadruples."""
        found = aligned({variant: self._told(run) for variant, run in self.runs.items()})
        index = next(iter(found.values()))["index"]
        scores = self._scores()
        judged = {variant: winoground.outcomes(each) for variant, each in scores.items()}
        kept = shelves(self._counted({variant: each["correct"] for variant, each in found.items()}), count)
        kept_four = shelves(self._counted({v: each.group for v, each in judged.items()}), count) if judged else []
        examples = {row: self.data.test[int(index[row])] for _, _, rows in kept for row in rows}
        quadruples = {row: self.data.quadruples[row] for _, _, rows in kept_four for row in rows}
        # All that is shown goes through each model in one batch.
        at = {row: self._enter(self.wording.pairs(example)) for row, example in examples.items()}
        at_four = {row: self._enter(_four(example)) for row, example in quadruples.items()}
        self._look()

        def of_example(row: int) -> Example:
            told = {v: {field: values[row] for field, values in each.items()} for v, each in found.items()}
            return self._example(int(index[row]), examples[row], at[row], told)

        def of_quadruple(row: int) -> Quadruple:
            given = {variant: each[row] for variant, each in scores.items()}
            right = {v: {part: bool(getattr(o, part)[row]) for part in winoground.CHANCE} for v, o in judged.items()}
            return self._quadruple(row, quadruples[row], at_four[row], given, right)

        four = len(self.data.quadruples) if kept_four else 0
        return Gallery(
            self.group,
            self.data.kind,
            next(iter(self.runs.values())).seed,
            tuple(Shelf(title, number, four, tuple(map(of_quadruple, rows))) for title, number, rows in kept_four),
            tuple(Shelf(title, number, len(index), tuple(map(of_example, rows))) for title, number, rows in kept),
            tuple(self.problems),
        )

    def _told(self, run: Run) -> Found:
        """What a run said of the examples of this group."""
        found, member = load_arrays(run.folder / "test.npz"), self.data.member
        if member is None:
            return found
        fields = {field: found[field] for field in ("index", "correct")} | own_fields(self.group, found)
        if tested_count(run, self.data) < member.every:  # a model of the task's own
            return fields
        own = {field: values[found["task"] == member.number] for field, values in fields.items()}
        return own | {"index": own["index"] - member.start}

    def _counted(self, right: Mapping[str, np.ndarray]) -> np.ndarray:
        """What is right, ``[variants, examples]``, of variants that see everything: controls are wrong too often."""
        whole = [each for variant, each in right.items() if set(self.runs[variant].modalities) == set(MODALITIES)]
        return np.array(whole or list(right.values()))

    def _scores(self) -> dict[str, np.ndarray]:
        """By variant that has them, the scores of all quadruples, ``[quadruples, 2 captions, 2 pictures]``."""
        scores = {}
        for variant, run in self.runs.items():
            if self.data.quadruples is None or not (run.folder / "quadruples.npz").is_file():
                continue
            found = load_arrays(run.folder / "quadruples.npz")
            if len(found["index"]) == 4 * len(self.data.quadruples):
                scores[variant] = as_scores(found["score"][np.argsort(found["index"])], run.modalities)
            else:
                self.problems.append(f"{self.titles[variant]} scored other quadruples than there are now.")
        return scores

    def _enter(self, pairs: Sequence[Pair]) -> slice:
        """Has maps made of these pairs too; returns where they will be."""
        self.pairs += pairs
        return slice(len(self.pairs) - len(pairs), len(self.pairs))

    def _look(self) -> None:
        """Makes the maps of all pairs by all models."""
        self.progress(f"heat maps of the {FROZEN}")
        route = 0 if self.data.member is None else self.data.member.number
        maps = HeatMaps(self.backbone, self.pairs, self.data.text_length, route)
        self.heat[FROZEN] = maps.frozen()
        for variant, run in self.runs.items():
            self.progress(f"heat maps of {self.titles[variant]}")
            self.heat[variant] = None
            if set(run.modalities) != set(MODALITIES):
                continue
            try:
                self.heat[variant] = maps.adapted(run.folder / "adapters", run.begun and run.begun / "adapters")
            except UserError as error:
                self.problems.append(f"{self.titles[variant]} has no heat maps: {error}.")

    def _shown(self, picture: Any) -> np.ndarray:
        """A picture as the backbone is shown it, uint8 ``[size, size, 3]``."""
        processor = self.backbone.image_processor
        pixels = self.preprocess(picture) * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
        return (255 * pixels).round().clip(0, 255).astype(np.uint8)

    def _example(
        self, place: int, example: Mapping[str, Any], at: slice, found: Mapping[str, Mapping[str, Any]]
    ) -> Example:
        def heat(variant: str) -> tuple[np.ndarray, ...]:
            maps = self.heat[variant]
            return () if maps is None else tuple(maps[at])

        answers = [Answer(FROZEN, heat=heat(FROZEN))]
        for variant, told in found.items():
            said, score = self.wording.said(told)
            box = tuple(map(float, told["box"])) if "box" in told else None
            answers.append(Answer(self.titles[variant], said, score, bool(told["correct"]), heat(variant), box))
        pictures = self.wording.pictures(example)
        box = None
        if "box" in example:
            _, view = self.preprocess.with_view(pictures[0])
            box = tuple(map(float, view.to_square(np.asarray(example["box"], np.float32))))
        return Example(
            place,
            self.wording.note(example),
            tuple(map(self._shown, pictures)),
            self.wording.text(example),
            self.wording.truth(example),
            box,
            tuple(answers),
        )

    def _quadruple(
        self,
        place: int,
        example: Mapping[str, Any],
        at: slice,
        scores: Mapping[str, np.ndarray],
        right: Mapping[str, Mapping[str, bool]],
    ) -> Quadruple:
        def heat(variant: str) -> np.ndarray | None:
            maps = self.heat[variant]
            return None if maps is None else maps[at].reshape(2, 2, *maps.shape[1:])

        judgements = [Judgement(FROZEN, heat=heat(FROZEN))]
        judgements += [Judgement(self.titles[v], scores[v], right[v], heat(v)) for v in scores]
        captions = [text for _, text in _four(example)][::2]
        pictures = tuple(self._shown(example[f"image_{number}"]) for number in (0, 1))
        return Quadruple(place, self.wording.note(example), pictures, tuple(captions), tuple(judgements))


def aligned(found: Mapping[str, Found]) -> dict[str, Found]:
    """The predictions of several models for the examples that all of them have, in one order."""
    common = None
    for each in found.values():
        common = each["index"] if common is None else np.intersect1d(common, each["index"])
    together = {}
    for name, each in found.items():
        order = np.argsort(each["index"])
        rows = order[np.searchsorted(each["index"], np.sort(common), sorter=order)]
        together[name] = {field: values[rows] for field, values in each.items()}
    return together


def _four(example: Mapping[str, Any]) -> list[Pair]:
    """The four pairs of a quadruple, caption by caption."""
    captions = [example[f"caption_{number}"] for number in (0, 1)]
    words = [text.decode() if isinstance(text, bytes) else str(text) for text in captions]
    return [(example[f"image_{number}"], text) for text in words for number in (0, 1)]
