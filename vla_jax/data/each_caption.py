"""One example a caption, of examples that hold a picture with several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla_jax.data.stages import Source
from vla_jax.errors import UserError


class EachCaption:
    """A source with one example for each caption, in the order of pictures and, of a picture, of captions.

    An example has the picture's other fields, and ``caption`` instead of ``captions``.

    Attributes:
        source: the pictures.
        owner: int ``[captions]``, which picture of the source each belongs to.
    """

    def __init__(self, source: Source):
        """Takes a source whose examples have ``captions``, or one ``caption`` each; annotations alone are read.

        Raises:
            UserError: for a picture without captions.
        """
        self.source = source
        counts = [len(_captions(self._annotation(index))) for index in range(len(source))]
        if 0 in counts:
            raise UserError(f"picture {counts.index(0)} has no captions; leave it out")
        self.owner = np.repeat(np.arange(len(source)), counts)
        self._first = np.cumsum([0, *counts])[:-1]

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._one(self.source[int(self.owner[index])], index)

    def annotation(self, index: int) -> dict[str, Any]:
        """The example without its picture, where the source reads that apart."""
        return self._one(self._annotation(int(self.owner[index])), index)

    def _annotation(self, index: int) -> Mapping[str, Any]:
        return getattr(self.source, "annotation", self.source.__getitem__)(index)

    def _one(self, example: Mapping[str, Any], index: int) -> dict[str, Any]:
        chosen = _captions(example)[index - int(self._first[self.owner[index]])]
        return {name: value for name, value in example.items() if name != "captions"} | {"caption": chosen}


def _captions(example: Mapping[str, Any]) -> list[Any]:
    return list(example["captions"]) if "captions" in example else [example["caption"]]
