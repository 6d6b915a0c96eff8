"""Several texts of which one belongs to the picture: what a row of a batch carries for ranking them."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_jax.data.answers import given_answers, normalise, texts
from vla_jax.data.boxes import View
from vla_jax.errors import UserError, unknown


@dataclass(frozen=True)
class CandidateTexts:
    """Several texts of which one belongs to the picture, such as a question's answers.

    Training shows the right one among others, drawn anew each time; evaluation shows all candidates.

    Attributes:
        tokenize: :class:`vla_jax.data.text.Tokenize`.
        candidates: the answers there are.
        template: the text of a candidate, with ``{}`` where it stands; ``{question}`` and other fields of the example
            may be named too.
        answer_key: the field with the right candidate, or with a list of which the most frequent one is right.
        shown: candidates that training shows, the right one included; all where there are no more.
        known: how many of the candidates, from the first on, training may show; the others are met in evaluation
            alone. All if 0.
    """

    tokenize: Callable[[str], tuple[np.ndarray, np.ndarray]]
    candidates: tuple[str, ...]
    template: str = "question: {question} answer: {}"
    answer_key: str = "answers"
    shown: int = 16
    known: int = 0

    def __post_init__(self):
        if self.known < 0 or self.known == 1 or self.known > len(self.candidates):
            raise UserError(
                f"known is how many of the {len(self.candidates)} candidates training may show: at least 2, or 0 for "
                f"all; got {self.known}"
            )
        if len(self.candidates) < 2 or self.shown < 2:
            raise UserError(
                f"ranking needs at least 2 candidates, and 2 shown; got {len(self.candidates)} and {self.shown}"
            )
        if "{}" not in self.template:
            raise UserError(f"the template {self.template!r} has no {{}} for the candidate")
        places = {normalise(candidate): place for place, candidate in enumerate(self.candidates)}
        if len(places) < len(self.candidates):
            raise UserError("two candidates have one normal form; leave one of them out")
        object.__setattr__(self, "_places", places)
        named = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        object.__setattr__(self, "_named", tuple(dict.fromkeys(named)))

    def __call__(
        self, example: Mapping[str, Any], views: Sequence[View], generator: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """The texts as tokens, and which of them is right.

        Returns:
            ``tokens`` int32 and ``text_mask`` bool ``[candidates, length]``, ``candidates`` int32 ``[candidates]``
            (which they are), and ``label`` int32 ``[]``, the right one's place in the row; -1 where it is no candidate,
            which training refuses.

        Raises:
            UserError: for a field that the template names and the example lacks; in training, for an example whose
                answer is no candidate.
        """
        del views
        answer = Counter(map(normalise, given_answers(example, self.answer_key))).most_common(1)[0][0]
        right = self._places.get(answer, -1)
        chosen = np.arange(len(self.candidates))
        if generator is not None:
            known = self.candidates[: self.known or None]
            if not 0 <= right < len(known):
                raise unknown("candidate answer", answer, known, "Leave the example out of training.")
            others = generator.permutation(np.delete(chosen[: len(known)], right))[: self.shown - 1]
            chosen = generator.permutation(np.append(others, right))
        for name in self._named:
            if name not in example:
                raise unknown("field of an example", name, example, f"The template {self.template!r} names it.")
        # Those alone: other fields may be the bytes of a picture, which are no text.
        fields = {name: texts([example[name]])[0] for name in self._named}
        rows = [self.tokenize(self.template.format(self.candidates[place], **fields)) for place in chosen]
        place = np.flatnonzero(chosen == right)
        return {
            "tokens": np.stack([tokens for tokens, _ in rows]),
            "text_mask": np.stack([mask for _, mask in rows]),
            "candidates": chosen.astype(np.int32),
            "label": np.asarray(place[0] if len(place) else -1, np.int32),
        }
