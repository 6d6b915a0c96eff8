"""The accuracy of answers to questions on pictures, as the authors of VQA compute it (Antol et al. 2015).

Of a question's ten annotators each is left out in turn, and an answer counts as much as it finds support among the
others: min(others who gave it / 3, 1). The accuracy is the mean over those left out. Both sides are brought into their
normal form first (:mod:`vla_jax.data.answers`), except where all annotators said the same: then the published script,
as it stands since 2021, compares the texts as they are.

Data sets with one annotator a question (GQA, easy-VQA) leave nobody to agree with once that one is left out; there an
answer is right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.data.answers import normalise, texts
from vla_jax.errors import UserError

_ENOUGH = 3
"""How many annotators make an answer right."""


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracies, as fractions of one.

    Attributes:
        overall: of all questions.
        by_question: by the question's kind ("how many", "is the").
        by_answer: by the answer's kind (in VQA "yes/no", "number" and "other").
        count: questions of each kind, by the names of both, and of all under "overall".
        each: float64 ``[questions]``, each question's accuracy.
    """

    overall: float
    by_question: dict[str, float]
    by_answer: dict[str, float]
    count: dict[str, int]
    each: np.ndarray


def accuracy(prediction: str, answers: Sequence[str | bytes]) -> float:
    """The accuracy of one answer, from 0 to 1.

    Args:
        prediction: the model's answer.
        answers: the annotators' answers, one each.

    Raises:
        UserError: if there is no annotator.
    """
    given = [_plain(answer) for answer in texts(answers)]
    if not given:
        raise UserError("a question has no answers; leave it out")
    prediction = _plain(prediction)
    if len(given) == 1:
        return float(normalise(prediction) == normalise(given[0]))
    if len(set(given)) > 1:
        given, prediction = [normalise(answer) for answer in given], normalise(prediction)
    return agreement(sum(answer == prediction for answer in given), len(given))


def agreement(count: int, annotators: int) -> float:
    """The accuracy of an answer that ``count`` of two or more annotators gave: the mean over the one left out."""
    without_one, without_another = min((count - 1) / _ENOUGH, 1.0), min(count / _ENOUGH, 1.0)
    # Left out is one of those who gave it, or one of the others.
    return (count * without_one + (annotators - count) * without_another) / annotators if count else 0.0


def evaluate(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str | bytes]],
    question_kinds: Sequence[str | bytes] | None = None,
    answer_kinds: Sequence[str | bytes] | None = None,
) -> Accuracy:
    """The accuracy of all answers, and by kind.

    Args:
        predictions: the model's answers, one a question.
        answers: the annotators' answers to each question, in the same order.
        question_kinds: the kind of each question; none are told apart if left out.
        answer_kinds: the kind of each question's answer; none are told apart if left out.

    Raises:
        UserError: if the lists are not equally long, or empty, or a question has no answers.
    """
    lengths = {"predictions": len(predictions), "answers": len(answers)}
    for name, kinds in (("question_kinds", question_kinds), ("answer_kinds", answer_kinds)):
        if kinds is not None:
            lengths[name] = len(kinds)
    if len(set(lengths.values())) > 1 or not len(predictions):
        raise UserError(f"every question needs one of each, and there must be some; given {lengths}")
    if missing := [place for place, given in enumerate(answers) if len(given) == 0]:
        raise UserError(
            f"{len(missing)} of {len(answers)} questions have no answers, the first at place {missing[0]}; leave them "
            "out"
        )
    each = np.array([accuracy(said, given) for said, given in zip(predictions, answers, strict=True)])
    by_question, of_questions = _by_kind(each, question_kinds)
    by_answer, of_answers = _by_kind(each, answer_kinds)
    count = of_questions | of_answers | {"overall": len(each)}
    return Accuracy(float(each.mean()), by_question, by_answer, count, each)


def _by_kind(each: np.ndarray, kinds: Sequence[str | bytes] | None) -> tuple[dict[str, float], dict[str, int]]:
    if kinds is None:
        return {}, {}
    names = np.array(texts(kinds))
    found = {str(kind): each[names == kind] for kind in sorted(set(names))}
    return {kind: float(part.mean()) for kind, part in found.items()}, {kind: len(part) for kind, part in found.items()}


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
