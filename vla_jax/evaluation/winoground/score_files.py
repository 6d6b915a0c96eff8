"""Score files in the authors' format: one JSON a line, ``{"label": "<id>_c<caption>_i<image>", "score": x}``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.annotations import read_json_lines
from vla_jax.foreign import shown
from vla_jax.reporting.table import write_atomically

_LABEL = re.compile(r"(?P<identifier>.+)_c(?P<caption>[01])_i(?P<image>[01])")


def write_scores(path: str | Path, identifiers: Sequence[str | int], scores: np.ndarray) -> None:
    """Writes scores, one a line, at full precision.

    Args:
        path: of the file, replaced as a whole.
        identifiers: of the examples.
        scores: float [examples, 2 captions, 2 images], finite.
    """
    scores = np.asarray(scores, np.float64)
    if scores.shape != (len(identifiers), 2, 2) or not np.isfinite(scores).all():
        raise UserError(f"scores are finite and [{len(identifiers)} examples, 2, 2], given {scores.shape}")
    lines = [
        json.dumps({"label": f"{identifier}_c{caption}_i{image}", "score": float(scores[position, caption, image])})
        for position, identifier in enumerate(identifiers)
        for caption in (0, 1)
        for image in (0, 1)
    ]
    write_atomically(path, "\n".join(lines) + "\n")


def read_scores(path: str | Path, identifiers: Sequence[str | int]) -> np.ndarray:
    """Reads a scores file, lines in any order, and insists on exactly the expected labels.

    Args:
        path: of the file, as :func:`write_scores` writes it.
        identifiers: of the examples, in the order wanted.

    Returns:
        float64 [examples, 2 captions, 2 images].

    Raises:
        UserError: a label is malformed, unknown, given twice or missing, or a score is no finite number.
    """
    position = {str(identifier): index for index, identifier in enumerate(identifiers)}
    scores = np.full((len(position), 2, 2), np.nan)
    lines: dict[tuple[int, int, int], int] = {}
    for number, entry in read_json_lines(path):
        where = f"{path}, line {number}"
        label, score = entry.get("label"), entry.get("score")
        match = _LABEL.fullmatch(label) if isinstance(label, str) else None
        if match is None:
            raise UserError(f"{where}: label {shown(label)} is not of the form <id>_c<0 or 1>_i<0 or 1>")
        if match["identifier"] not in position:
            raise UserError(f"{where}: label {shown(label)} names no example; there are {len(position)} examples")
        if not _finite(score):
            raise UserError(f"{where}: the score of {label!r} is {shown(score)}, not a finite number")
        place = (position[match["identifier"]], int(match["caption"]), int(match["image"]))
        if place in lines:
            raise UserError(f"{where}: label {label!r} stands already in line {lines[place]}")
        lines[place] = number
        scores[place] = score
    absent = [
        f"{identifier}_c{caption}_i{image}"
        for identifier, index in position.items()
        for caption in (0, 1)
        for image in (0, 1)
        if (index, caption, image) not in lines
    ]
    if absent:
        raise UserError(f"{path}: {len(absent)} of {scores.size} labels are missing, first {absent[0]!r}")
    return scores


def _finite(score: Any) -> bool:
    """Whether a score is a number that float64 can hold."""
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return False
    try:
        return math.isfinite(score)
    except OverflowError:  # JSON's whole numbers have no end
        return False
