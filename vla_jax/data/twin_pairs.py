"""Twins (two scenes that differ by one swap) as pairs to judge, with hard or with ordinary wrong texts."""

from __future__ import annotations

from typing import Any, Literal

from vla_jax.data.stages import Source
from vla_jax.errors import UserError, unknown

Negatives = Literal["plain", "hard"]


class TwinPairs:
    """Four examples for each pair of twins: both pictures with their own caption, and with one that is false of them.

    Pictures and true captions are the same for both kinds of negatives, at the same positions; what differs is where
    the false captions come from, so that nothing else can explain what two models learn.

    Args:
        source: twins with ``image``, ``caption``, ``twin_image``, ``twin_caption``.
        negatives: ``hard``, where the false caption is the twin's (the same words bound otherwise), or ``plain``,
            where it is that of the next pair of twins.
    """

    def __init__(self, source: Source, negatives: Negatives):
        if negatives not in ("plain", "hard"):
            raise unknown("kind of negatives", negatives, ("plain", "hard"))
        if negatives == "plain" and len(source) < 2:
            raise UserError("captions of other scenes need at least 2 pairs of twins, given 1")
        self.source, self.negatives = source, negatives

    def __len__(self) -> int:
        return 4 * len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, pair = divmod(int(index), 4)
        twin, false = divmod(pair, 2)
        example = self.source[place]
        image, caption = ("twin_image", "twin_caption") if twin else ("image", "caption")
        text = example[caption]
        if false and self.negatives == "hard":
            text = example["caption" if twin else "twin_caption"]
        elif false:
            text = self.source[(place + 1) % len(self.source)][caption]
        return {"image": example[image], "text": text, "label": 1 - false}
