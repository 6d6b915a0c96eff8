"""What only all rows together show: the splits that pictures fall into, labels without a class, ids that repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from vla_jax.data.own.settings import SPLITS, OwnData

Index = dict[str, np.ndarray]
"""By name ``[rows]``: ``split`` (its place in SPLITS, -1 for a bad row), ``label``, and hashes: ``id``, ``picture`` and
``second``, a row's second picture, or its only one again."""


def name_hash(text: str) -> int:
    """64 bits that are the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def split_by_picture(index: Index, data: OwnData, held_out: Sequence[str]) -> None:
    """Moves shares of the training rows to the splits that are held out, every picture where its hash puts it."""
    place = index["picture"] / 2.0**64  # in [0, 1)
    start = 0.0
    for split, share in (("test", data.test_share), ("validation", data.validation_share)):
        if split in held_out:
            chosen = (index["split"] == 0) & (place >= start) & (place < start + share)
            start += share
            index["split"][chosen] = SPLITS.index(split)


def trained_classes(index: Index, codes: Mapping[str, int]) -> tuple[str, ...]:
    """The labels of the training rows, numbers by their size and names by their letters."""
    trained = set(np.unique(index["label"][index["split"] == 0]).tolist())
    names = [name for name, code in codes.items() if code in trained]
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int if numbers else str))


def repeated(hashes: np.ndarray) -> list[tuple[int, int]]:
    """Rows whose id an earlier row has, each with the first such row; a hash of zero is no id."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    new = np.append(True, ordered[1:] != ordered[:-1])
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))] if len(order) else order
    again = ~new[: len(order)] & (ordered != 0)
    return sorted(zip(order[again].tolist(), first[again].tolist(), strict=True))


def shared_pictures(index: Index) -> tuple[int, int]:
    """How many pictures good rows have, and how many of these stand in more than one split."""
    good = index["split"] >= 0
    pictures = np.concatenate([index[name][good] for name in ("picture", "second")])
    pairs = np.unique(np.stack([pictures, np.tile(index["split"][good].astype(np.uint64), 2)]), axis=1)
    _, splits = np.unique(pairs[0], return_counts=True)
    return len(splits), int((splits > 1).sum())
