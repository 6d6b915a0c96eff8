"""What a data file of one's own is to be taken for: its columns, its task, its splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from vla_jax.errors import UserError, unknown

SPLITS = ("train", "validation", "test")

SPLIT_NAMES: Mapping[str, str] = {
    name: split
    for split, names in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing"),
    }.items()
    for name in names
}
"""What a split may be called in a file, in any case, and which one it is."""

TASKS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "classification": (("label",),),
    "matching": (("text",), ("label",)),
    "retrieval": (("captions", "caption", "text"),),
    "vqa": (("question",), ("answers", "answer")),
    "grounding": (("phrase",), ("box",)),
}
"""By task, the columns it needs beside the picture; of each group one, the first that is there."""


_LEFT_OUT = ("question_kind", "boxes", "split", "id")


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the columns are called in the file; nothing but ``image`` and the task's own have to be there.

    Attributes:
        image: path of the picture, relative to the folder of pictures.
        image_1: of matching, path of the second picture where a text is about two; ``image`` is the first then.
        text: a statement about the picture, or a text that stands beside it.
        caption: one caption.
        captions: a list of captions.
        label: the class, by name or number; for matching whether the text is true.
        question: a question.
        answer: its answer.
        answers: a list of answers, of several annotators.
        question_kind: what kind of question it is, by which results are told apart; empty for a file whose column of
            that name means something else.
        phrase: an expression that means one thing in the picture.
        box: where that is, four numbers.
        boxes: a list of candidate boxes, the phrase's own best among them, for grounding that chooses among them;
            empty for a file whose column of that name means something else.
        split: ``train``, ``validation`` or ``test``; empty for a file whose column of that name means something else.
        id: a name of the row that no other has; empty as above.
    """

    image: str = "image"
    image_1: str = "image_1"
    text: str = "text"
    caption: str = "caption"
    captions: str = "captions"
    label: str = "label"
    question: str = "question"
    answer: str = "answer"
    answers: str = "answers"
    question_kind: str = "question_kind"
    phrase: str = "phrase"
    box: str = "box"
    boxes: str = "boxes"
    split: str = "split"
    id: str = "id"

    def __post_init__(self):
        for name, column in dataclasses.asdict(self).items():
            if not column and name not in _LEFT_OUT:
                raise UserError(
                    f"the column for {name} has no name; only those for {', '.join(_LEFT_OUT)} can be left out"
                )

    def present(self, found: Iterable[str]) -> dict[str, str]:
        """Which of the columns a file has, ours by name and the file's.

        Raises:
            UserError: if a column was renamed to one that the file does not have.
        """
        found = list(found)
        present = {}
        for field in dataclasses.fields(self):
            column = getattr(self, field.name)
            if column in found:
                present[field.name] = column
            elif column and column != field.default:
                raise unknown("column", column, found, f"columns.{field.name} says that the file has it.")
        return present


@dataclasses.dataclass(frozen=True)
class OwnData:
    """A data file of one's own.

    Where there is neither a ``split`` column nor a file for a split, it is a share of the training pictures: each
    picture's name decides by itself where the picture goes, with all of its rows, so that rows that come or go move no
    other. Of two pictures the first decides; where no second one may stand in two splits either, give the column.

    Attributes:
        path: the file: ``.jsonl`` or ``.ndjson`` (one JSON object a line), ``.csv`` or ``.tsv`` with a header line,
            ``.parquet``.
        validation_path: a file of its own for validation rows.
        test_path: a file of its own for test rows.
        images: the folder that paths of pictures are relative to; that of the file if empty. No path may leave it.
        columns: what the columns are called.
        classes: the class names in the order of their numbers; those of the training rows, sorted, if empty.
        box_format: ``xyxy`` (left, top, right, bottom) or ``xywh`` (left, top, width, height), in pixels.
        validation_share: share of the pictures held out for validation.
        test_share: share of the pictures held out for testing.
        split_seed: another number holds out other pictures.
    """

    path: str = ""
    validation_path: str = ""
    test_path: str = ""
    images: str = ""
    columns: Columns = dataclasses.field(default_factory=Columns)
    classes: tuple[str, ...] = ()
    box_format: Literal["xyxy", "xywh"] = "xyxy"
    validation_share: float = 0.1
    test_share: float = 0.1
    split_seed: int = 0

    def __post_init__(self):
        if not self.path and (self.validation_path or self.test_path):
            raise UserError("validation_path and test_path stand beside path, the file of the training rows; give it")
        if len(set(self.files.values())) < len(self.files):
            raise UserError(f"one file serves two splits: {', '.join(self.files.values())}")
        if not (self.validation_share >= 0 and self.test_share >= 0 and self.validation_share + self.test_share < 1):
            raise UserError(
                "validation_share and test_share are shares of the pictures, at least 0 and together below 1; got "
                f"{self.validation_share} and {self.test_share}"
            )
        if len(set(self.classes)) < len(self.classes):
            raise UserError(f"classes name one twice: {', '.join(self.classes)}")

    @property
    def files(self) -> dict[str, str]:
        """The files there are, by split."""
        paths = {"train": self.path, "validation": self.validation_path, "test": self.test_path}
        return {split: path for split, path in paths.items() if path}


def missing(task: str, present: Iterable[str]) -> list[str]:
    """What columns a task lacks; alternatives are joined with "or"."""
    present = set(present)
    needed = (("image",), *TASKS[task])
    return [" or ".join(group) for group in needed if not present.intersection(group)]


def task_of(present: Iterable[str], named: str = "") -> str:
    """The task that columns are meant for.

    A task is clear if it uses more of the columns than every other that fits: a text and a label are for matching, a
    label alone for classification.

    Args:
        present: the columns there are, by our names.
        named: the task, where it is said.

    Raises:
        UserError: if the task does not exist or lacks columns, or none was named and none or several fit.
    """
    present = set(present)
    if named:
        if named not in TASKS:
            raise unknown("task", named, TASKS)
        if lacking := missing(named, present):
            raise UserError(
                f"{named} needs the column {' and '.join(lacking)}; the file has {_listed(present)}. Name the file's "
                "own columns with columns.NAME=COLUMN"
            )
        return named
    fitting = [task for task in TASKS if not missing(task, present)]
    used = {task: {column for group in TASKS[task] for column in group if column in present} for task in fitting}
    clear = [task for task in fitting if all(used[task] > used[other] for other in fitting if other != task)]
    if len(clear) == 1:
        return clear[0]
    if fitting:
        raise UserError(
            f"the columns {_listed(present)} fit {' and '.join(fitting)}; say which with task={'|'.join(fitting)}"
        )
    lacks = "; ".join(f"{task} lacks {' and '.join(missing(task, present))}" for task in TASKS)
    raise UserError(
        f"no task fits the columns {_listed(present)}: {lacks}. Name the file's own columns with columns.NAME=COLUMN"
    )


def _listed(present: Iterable[str]) -> str:
    return ", ".join(sorted(present)) or "(none known)"
