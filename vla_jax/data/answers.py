"""Answers to questions on pictures: their normal form, a vocabulary of them, and what a row of a batch carries.

The normal form is that of the published evaluation of VQA (Antol et al. 2015; the script of the authors' repository
``GT-Vision-Lab/VQA``): lower case, no articles, numbers up to ten as digits, apostrophes put back into contractions,
punctuation gone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.boxes import View
from vla_jax.errors import UserError, unknown

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# Words whose lost apostrophe is put back, wherever one alone was lost. Words that would be other words (she'd, I'll)
# and those that the published list leaves out are not among them.
_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Of two words with one lost apostrophe, "hed've" and "he'dve", both come back; "somebody'd" loses its own.
_CONTRACTIONS = {
    word[: lost.start()] + word[lost.end() :]: word for word in _APOSTROPHES.split() for lost in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The published script hands a flag to where the number of replacements stands.
_MOST_PERIODS = 32


def without_punctuation(answer: str) -> str:
    """An answer without punctuation, by the rules of the published script.

    A mark beside a space goes; so do all marks of a text with a comma between digits. Any other mark becomes a space
    ("t-shirt", "t shirt"). Periods go, unless a digit follows. Apostrophes and colons stay.
    """
    loose = _COMMA_IN_NUMBER.search(answer) is not None
    found = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        found = found.replace(mark, "" if loose or beside_space else " ")
    return _PERIOD.sub("", found, count=_MOST_PERIODS)


def normalise(answer: str) -> str:
    """The normal form of an answer: what the published evaluation makes of a model's one.

    Args:
        answer: any text.
    """
    words = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def texts(values: Iterable[str | bytes]) -> list[str]:
    """Texts as they come out of a stored data set."""
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


@dataclass(frozen=True)
class AnswerVocabulary:
    """The answers that a classifier chooses from, in their normal form.

    Attributes:
        answers: the answers; the class of each is its place.
    """

    answers: tuple[str, ...]

    def __post_init__(self):
        if len(self.answers) < 2:
            raise UserError(f"a vocabulary needs at least 2 answers, got {len(self.answers)}")
        twice = [answer for answer, count in Counter(self.answers).items() if count > 1]
        if twice:
            raise UserError(f"a vocabulary names {len(twice)} answers twice, such as {twice[0]!r}")
        changed = next((answer for answer in self.answers if normalise(answer) != answer), None)
        if changed is not None:
            raise UserError(
                f"the vocabulary's answer {changed!r} is not in its normal form {normalise(changed)!r}; no annotator's "
                "answer would ever be equal to it"
            )
        object.__setattr__(self, "_places", {answer: place for place, answer in enumerate(self.answers)})

    def __len__(self) -> int:
        return len(self.answers)

    @classmethod
    def build(cls, answers: Iterable[Sequence[str | bytes]], *, least: int = 9) -> AnswerVocabulary:
        """The vocabulary of training questions.

        Args:
            answers: the annotators' answers to each question.
            least: questions whose most frequent answer (the first given of equally frequent ones) one must be, to be
                taken up; 9 is usual for VQAv2, where it leaves some 3,100 answers (Teney et al. 2018).

        Returns:
            The answers, the most frequent first, equally frequent ones in alphabetical order.

        Raises:
            UserError: for a question without answers, or if fewer than two answers are left.
        """
        counts: Counter[str] = Counter()
        for question, given in enumerate(answers):
            if len(given) == 0:
                raise UserError(f"question {question} has no answers; leave it out")
            counts[Counter(map(normalise, texts(given))).most_common(1)[0][0]] += 1
        kept = sorted((answer for answer, count in counts.items() if count >= least), key=lambda a: (-counts[a], a))
        if len(kept) < 2:
            raise UserError(
                f"{len(kept)} of {len(counts)} answers are those of at least {least} questions; a vocabulary needs 2. "
                "Give a smaller least"
            )
        return cls(tuple(kept))

    @classmethod
    def load(cls, path: str | Path) -> AnswerVocabulary:
        """Reads what :meth:`save` wrote."""
        return cls(tuple(json.loads(Path(path).read_text(encoding="utf-8"))))

    def save(self, path: str | Path) -> None:
        """Writes the answers as a JSON list."""
        Path(path).write_text(json.dumps(self.answers, ensure_ascii=False, indent=0), encoding="utf-8")

    def place(self, answer: str) -> int:
        """The class of an answer in any form; -1 for one that is not in the vocabulary."""
        return self._places.get(normalise(answer), -1)


@dataclass(frozen=True)
class AnswerCounts:
    """The part of a row with how many annotators gave which answer.

    See :class:`vla_jax.data.pipeline.TransformExample`.

    Attributes:
        vocabulary: the answers there are.
        places: different answers there is room for: as many as there are annotators at most.
        key: the field with the annotators' answers.
    """

    vocabulary: AnswerVocabulary
    places: int = 10
    key: str = "answers"

    def __call__(
        self, example: Mapping[str, Any], views: Sequence[View], generator: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """``answer_ids`` int32 ``[places]``, -1 for answers outside the vocabulary and on unused places; and
        ``answer_counts`` int32 ``[places]``, how many annotators gave each, 0 on unused places.

        Raises:
            UserError: for a question without answers, or more different answers than places.
        """
        del views, generator
        counts = Counter(map(normalise, given_answers(example, self.key)))
        if len(counts) > self.places:
            raise UserError(
                f"a question has {len(counts)} different answers and there are {self.places} places; give more"
            )
        row = {
            "answer_ids": np.full(self.places, -1, np.int32),
            "answer_counts": np.zeros(self.places, np.int32),
        }
        for place, (answer, count) in enumerate(counts.items()):
            row["answer_ids"][place] = self.vocabulary.place(answer)
            row["answer_counts"][place] = count
        return row


def given_answers(example: Mapping[str, Any], key: str) -> list[str]:
    """The answers of an example's field, one or several.

    Raises:
        UserError: if the field is missing or empty.
    """
    if key not in example:
        raise unknown("field of an example", key, example)
    given = example[key]
    found = texts([given] if isinstance(given, str | bytes) else given)
    if not found:
        raise UserError(f"an example's field {key!r} is empty; a question needs at least one answer")
    return found
