"""Several texts of which one belongs to the picture: what a row of a batch carries for ranking them."""

from __future__ import annotations

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
    """

    tokenize: Callable[[str], tuple[np.ndarray, np.ndarray]]
    candidates: tuple[str, ...]
    template: str = "question: {question} answer: {}"
    answer_key: str = "answers"
    shown: int = 16

    def __post_init__(self):
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

    def __call__(
        self, example: Mapping[str, Any], views: Sequence[View], generator: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """The texts as tokens, and which of them is right.

        Returns:
            ``tokens`` int32 and ``text_mask`` bool ``[candidates, length]``, ``candidates`` int32 ``[candidates]``
            (which they are), and ``label`` int32 ``[]``, the right one's place in the row; -1 where it is no candidate,
            which training refuses.

        Raises:
            UserError: in training, for an example whose answer is no candidate.
        """
        del views
        answer = Counter(map(normalise, given_answers(example, self.answer_key))).most_common(1)[0][0]
        right = self._places.get(answer, -1)
        chosen = np.arange(len(self.candidates))
        if generator is not None:
            if right < 0:
                raise unknown("candidate answer", answer, self.candidates, "Leave the example out of training.")
            others = generator.permutation(np.delete(chosen, right))[: self.shown - 1]
            chosen = generator.permutation(np.append(others, right))
        fields = {name: texts([value])[0] for name, value in example.items() if isinstance(value, str | bytes)}
        rows = [self.tokenize(self.template.format(self.candidates[place], **fields)) for place in chosen]
        place = np.flatnonzero(chosen == right)
        return {
            "tokens": np.stack([tokens for tokens, _ in rows]),
            "text_mask": np.stack([mask for _, mask in rows]),
            "candidates": chosen.astype(np.int32),
            "label": np.asarray(place[0] if len(place) else -1, np.int32),
        }
