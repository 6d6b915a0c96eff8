"""Kinds of tasks on any data set whose examples have the shared field names: head, transform and what is measured."""

from __future__ import annotations

import dataclasses
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vla_jax.backbones.loading import Backbone
from vla_jax.data.answers import AnswerCounts, AnswerVocabulary, given_answers, normalise, texts
from vla_jax.data.boxes import CandidateBoxes, TargetBox
from vla_jax.data.cached import Chosen
from vla_jax.data.candidate_texts import CandidateTexts
from vla_jax.data.image import AUGMENTATIONS, Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.data.stages import Row, Source, Transform
from vla_jax.data.text import Tokenize
from vla_jax.errors import UserError, unknown
from vla_jax.model import Task
from vla_jax.tasks.classification import Classification, PrototypeClassification, ZeroShotClassification
from vla_jax.tasks.grounding import BoxPrediction, RegionScoring
from vla_jax.tasks.matching import Matching, PairMatching
from vla_jax.tasks.ranking import TextRanking
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.tasks.vqa import AnswerClassification
from vla_jax.variants import TaskData


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a task is put to a backbone.

    Attributes:
        text_length: tokens of a text; the backbone's context if that is shorter.
        augment: what training does to pictures: ``none``, ``crop``, or ``flip_crop`` where no text speaks of sides.
        classifier: of classification: ``linear`` on the features of the picture and of the text beside it;
            ``names``, which compares pictures with texts that name the classes; or ``prototypes``, which compares them
            with one learned feature a class, at first the mean of its training pictures'. The last two read no text of
            the data, and the last one trains no text tower.
        templates: the sentences in which ``names`` puts them.
        prompt: the text beside a picture to be classified, where the data have none; for ``linear``.
        least_answers: questions that an answer must be right for, to be one of those a model chooses from; 9 is usual
            for VQAv2.
        answers: of visual question answering: ``classify`` among the answers of the training questions, each a row of
            the head; or ``rank`` the answers' texts beside the picture, so that one that no training question has can
            be chosen. Evaluation then ranks the answers of all splits for every question, the same for each split:
            whoever knows no list of answers beforehand must not compare that with a model that has none. Every text
            goes through the text tower with every question: a few hundred answers, not VQAv2's thousands.
        answer_template: the text that is ranked, with ``{}`` for the answer and ``{question}``; what goes beyond
            ``text_length`` is cut off its end.
        shown_answers: how many texts training ranks for a question, the right one and others drawn anew each time.
        grounding: ``box`` predicts the box of a phrase; ``regions`` chooses among candidate boxes, for data that have
            them in a field or column ``boxes``: RefCOCO's annotated objects, all objects of a generated scene, or
            what one's own file says, such as a detector's boxes.
    """

    text_length: int = 40
    augment: Literal["none", "crop", "flip_crop"] = "none"
    classifier: Literal["linear", "names", "prototypes"] = "linear"
    templates: tuple[str, ...] = ("a photo of a {}",)
    prompt: str = "a photo"
    least_answers: int = 1
    answers: Literal["classify", "rank"] = "classify"
    answer_template: str = "question: {question} answer: {}"
    shown_answers: int = 16
    grounding: Literal["box", "regions"] = "box"

    def __post_init__(self):
        if self.augment not in AUGMENTATIONS:
            raise unknown("augmentation", self.augment, AUGMENTATIONS)
        if self.least_answers < 1:
            raise UserError(f"least_answers must be at least 1, got {self.least_answers}")
        if not self.prompt.strip():
            raise UserError("the prompt is empty; it is the text beside a picture that has none")
        if self.shown_answers < 2:
            raise UserError(f"shown_answers must be at least 2, the right one and another; got {self.shown_answers}")
        try:
            named = [name for _, name, _, _ in string.Formatter().parse(self.answer_template) if name is not None]
        except ValueError as error:
            raise UserError(f"the answer_template {self.answer_template!r} is no template: {error}") from error
        if "" not in named or set(named) - {"", "question"}:
            raise UserError(
                f"the answer_template {self.answer_template!r} needs {{}} where the answer stands, and may have "
                "{question}; nothing else"
            )

    def length(self, backbone: Backbone) -> int:
        """Tokens of a text for this backbone."""
        return min(self.text_length, backbone.config.context_length)


@dataclasses.dataclass(frozen=True)
class Measure:
    """Something that is told of a task.

    Attributes:
        field: of the predictions, bool or a number for each example.
        title: in tables.
    """

    field: str
    title: str


MEASURES: Mapping[str, tuple[Measure, ...]] = {
    "classification": (Measure("correct", "accuracy"), Measure("top_5", "top-5")),
    "matching": (Measure("correct", "accuracy"),),
    "retrieval": (Measure("image_to_text", "R@1 image to text"), Measure("text_to_image", "R@1 text to image")),
    "vqa": (Measure("accuracy", "VQA accuracy"), Measure("correct", "most frequent answer")),
    "grounding": (Measure("correct", "accuracy at IoU 0.5"), Measure("pointed", "pointing"), Measure("iou", "IoU")),
}
"""By kind of task, what is measured, the first thing foremost."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a head chooses from; empty for kinds of tasks that have no such list.

    Attributes:
        names: of the classes, or the answers.
        annotators: the most answers a question has.
        key: the field with the answers.
        two_pictures: whether a text is about two pictures.
        trained: how many of the names, from the first on, training shows where answers are ranked; all if 0.
        boxes: the most candidate boxes that an example has; 0 where they are not asked for.
    """

    names: tuple[str, ...] = ()
    annotators: int = 1
    key: str = "answers"
    two_pictures: bool = False
    trained: int = 0
    boxes: int = 0


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A transform for examples that may have no text of their own."""

    transform: Transform
    prompt: str

    def __call__(self, example: Mapping[str, Any], generator: np.random.Generator | None = None) -> Row:
        return self.transform({"text": self.prompt, **example}, generator)


def task_of_kind(kind: str, labels: Labels, setup: Setup, backbone: Backbone) -> Task:
    """The task, without its data.

    Raises:
        UserError: if there is no such kind, or fewer than two classes or answers.
    """
    if kind not in MEASURES:
        raise unknown("task", kind, MEASURES)
    if kind == "classification" and setup.classifier == "names":
        tokenize = Tokenize(backbone.tokenizer, setup.length(backbone))
        return ZeroShotClassification.of_names(kind, labels.names, setup.templates, tokenize)
    linear = PrototypeClassification if setup.classifier == "prototypes" else Classification
    makers: Mapping[str, Callable[[], Task]] = {
        "classification": lambda: linear(kind, len(labels.names)),
        "matching": lambda: PairMatching(kind) if labels.two_pictures else Matching(kind),
        "retrieval": lambda: Retrieval(kind),
        "vqa": lambda: TextRanking(kind) if setup.answers == "rank" else AnswerClassification(kind, len(labels.names)),
        "grounding": lambda: RegionScoring(kind) if setup.grounding == "regions" else BoxPrediction(kind),
    }
    return makers[kind]()


def pictures_alone(kind: str, setup: Setup) -> bool:
    """Whether the task's model is shown pictures and no text."""
    return kind == "classification" and setup.classifier == "prototypes"


def manner(kind: str, labels: Labels, setup: Setup) -> str:
    """In words, how the task is put where there is a choice; empty for kinds of tasks without one."""
    if kind == "classification":
        return {
            "linear": "a linear map of the features of picture and text",
            "names": f"pictures compared with the classes' names in {len(setup.templates)} templates",
            "prototypes": "pictures compared with a learned feature a class, at first its training pictures' mean",
        }[setup.classifier]
    if kind == "vqa" and setup.answers == "rank":
        known = labels.trained or len(labels.names)
        return (
            f"answers' texts are ranked: {min(setup.shown_answers, known):,} of {known:,} at a time in training, all "
            f"{len(labels.names):,} in evaluation"
        )
    if kind == "vqa":
        return f"one of {len(labels.names):,} answers of training questions by a linear map"
    if kind == "grounding":
        chosen = f"the best of the candidate boxes, {labels.boxes} a picture at most"
        return chosen if setup.grounding == "regions" else "a predicted box"
    return ""


def transform_of_kind(kind: str, labels: Labels, setup: Setup, backbone: Backbone, text_key: str) -> Transform:
    """What makes a row of an example of the task.

    Args:
        kind: of the task.
        labels: what its head chooses from.
        setup: how it is put.
        backbone: says how pictures and texts go in.
        text_key: the field with the text.
    """
    preprocess = Preprocess(backbone.image_processor, augment=setup.augment)
    tokenize = Tokenize(backbone.tokenizer, setup.length(backbone))
    fields: dict[str, Any] = {"text_key": text_key}
    if kind in ("classification", "matching"):
        fields["label_key"] = "label"
    if labels.two_pictures:
        fields["image_key"] = ("image_0", "image_1")
    if kind == "vqa":
        vocabulary = AnswerVocabulary(labels.names)
        fields["parts"] = (AnswerCounts(vocabulary, places=max(labels.annotators, 1), key=labels.key),)
    if kind == "vqa" and setup.answers == "rank":
        template, shown = setup.answer_template, setup.shown_answers
        ranked = CandidateTexts(tokenize, labels.names, template, labels.key, shown, labels.trained)
        fields |= {"text_key": None, "parts": (*fields["parts"], ranked)}
    if kind == "grounding":
        fields["parts"] = (TargetBox(),)
    if kind == "grounding" and setup.grounding == "regions":
        fields["parts"] = (TargetBox(), CandidateBoxes(max(labels.boxes, 2)))
    if kind == "classification" and setup.classifier != "linear":
        fields["text_key"] = None
    transform = TransformExample(preprocess, tokenize, **fields)
    return Prompted(transform, setup.prompt) if kind == "classification" else transform


def answer_labels(answers: Mapping[str, Sequence[Sequence[str]]], setup: Setup, key: str = "answers") -> Labels:
    """The answers that a model chooses from: those of the training questions, then, to be ranked, all others' too.

    Args:
        answers: by split, the annotators' answers to each question.
        setup: says how often one must have been given, and whether answers are ranked.
        key: the field that has them.
    """
    vocabulary = AnswerVocabulary.build(answers["train"], least=setup.least_answers)
    most = max(len(given) for questions in answers.values() for given in questions)
    if setup.answers == "classify":
        return Labels(vocabulary.answers, most, key)
    held_out = (given for split, questions in answers.items() if split != "train" for given in questions)
    counts = Counter(_most_frequent(given) for given in held_out)
    further = sorted(a for a, count in counts.items() if count >= setup.least_answers and vocabulary.place(a) < 0)
    return Labels((*vocabulary.answers, *further), most, key, trained=len(vocabulary))


def _most_frequent(given: Sequence[str | bytes]) -> str:
    """The answer that is to be ranked first, as :class:`vla_jax.data.candidate_texts.CandidateTexts` takes it."""
    return Counter(map(normalise, texts(given))).most_common(1)[0][0]


TEXT_KEYS: Mapping[str, str] = {
    "classification": "text",
    "matching": "text",
    "retrieval": "caption",
    "vqa": "question",
    "grounding": "phrase",
}
"""By kind of task, the field with its text."""


def data_of_kind(kind: str, labels: Labels, setup: Setup, backbone: Backbone, splits: Mapping[str, Source]) -> TaskData:
    """The task with its data, as a backbone takes them.

    Args:
        kind: of the task.
        labels: what its head chooses from.
        setup: how it is put.
        backbone: the backbone.
        splits: examples of ``train``, ``validation`` and ``test``.
    """
    several = kind == "retrieval" and "captions" in _fields(splits["train"])
    text_key = "captions" if several else TEXT_KEYS[kind]
    transform = transform_of_kind(kind, labels, setup, backbone, text_key)
    if kind == "vqa" and setup.answers == "rank" and labels.trained and setup.least_answers > 1:
        splits = {**splits, "train": _answered(splits["train"], labels)}
    return TaskData(task_of_kind(kind, labels, setup, backbone), splits, transform)


def _answered(source: Source, labels: Labels) -> Source:
    """The training questions whose answer is one of those that training shows; of others nothing can be ranked."""
    known = set(labels.names[: labels.trained])
    given = (given_answers(annotation(source, index), labels.key) for index in range(len(source)))
    return Chosen(source, np.array([index for index, told in enumerate(given) if _most_frequent(told) in known]))


def _fields(source: Source) -> Mapping[str, Any]:
    """An example, without its picture where that is cheaper."""
    return annotation(source, 0)


def annotation(source: Source, index: int) -> Mapping[str, Any]:
    """What is said in an example, without its pictures."""
    read = getattr(source, "annotation", source.__getitem__)
    fields = read(index)
    return {name: fields[name] for name in fields if not name.startswith("image") or name.startswith("image_id")}
