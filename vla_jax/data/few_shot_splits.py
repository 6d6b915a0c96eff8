"""Training, validation and test pictures of a few-shot data set as TFDS has prepared it, which may have fewer splits.

Where a set has no validation split, CoOp's authors held out a fifth of each class's training pictures; of a set that is
not divided at all they took half of each class for training, a fifth for validation and the rest for testing (Zhou et
al. 2022; ``split_trainval`` and ``read_and_split_data`` of their code). Here are the same shares, but other pictures:
their lists are what the data set ``few_shot`` of :mod:`vla_jax.data.builders` reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from vla_jax.data.cached import Chosen
from vla_jax.data.few_shot_sets import Classified, few_shot_set, load_tfds_few_shot
from vla_jax.data.stages import Source
from vla_jax.errors import UserError

HELD_OUT: Mapping[str, float] = {"validation": 0.2, "test": 0.3}
"""The share of each class's training pictures that becomes a split which TFDS does not have."""


class Part(Chosen):
    """Some pictures of a split whose labels are known, so that nobody reads all pictures for them again."""

    def __init__(self, source: Source, places: np.ndarray, labels: np.ndarray):
        """Takes pictures of a split.

        Args:
            source: the whole split.
            places: int ``[chosen]``, where they stand in it.
            labels: int ``[examples]``, of the whole split.
        """
        super().__init__(source, places)
        self._labels = labels

    def annotation(self, index: int) -> dict[str, Any]:
        """What is said of a picture."""
        return {"label": int(self._labels[self.places[index]])}


def opened_splits(
    name: str, named: Mapping[str, str], data_dir: str | Path, class_names: str | Path | None = None
) -> dict[str, Classified]:
    """The splits that TFDS has; no picture is read.

    A split that is asked for by its own name, and which TFDS does not have, is left out: :func:`three_splits` makes it.

    Args:
        name: a name from :data:`vla_jax.data.few_shot_sets.FEW_SHOT_SETS`.
        named: by ``train``, ``validation`` and ``test``, a split or a slice of one.
        data_dir: TFDS's folder.
        class_names: as for :func:`vla_jax.data.few_shot_sets.load_tfds_few_shot`.

    Raises:
        UserError: if they cannot be read, or two of them have pictures in common.
    """
    there = few_shot_set(name).splits
    opened = {
        split: load_tfds_few_shot(name, text, data_dir, class_names)
        for split, text in named.items()
        # Of a set that TFDS has no pictures of, all splits are absent, and loading says so.
        if text != split or split in there or split not in HELD_OUT or not there
    }
    for (one, first), (other, second) in itertools.combinations(opened.items(), 2):
        common = min(first.stop, second.stop) - max(first.start, second.start)
        if first.split == second.split and common > 0:
            raise UserError(
                f"{one}_split {named[one]!r} and {other}_split {named[other]!r} of {name} have {common:,} pictures in "
                f"common; give slices that do not overlap, such as train[:80%] and train[80%:]"
            )
    return opened


def three_splits(
    name: str, named: Mapping[str, str], data_dir: str | Path, class_names: str | Path | None = None
) -> dict[str, Source]:
    """All three splits; those that TFDS does not have are divided off training, class by class, always alike.

    Args:
        name: as for :func:`opened_splits`, as are the next three.
        named: which splits.
        data_dir: TFDS's folder.
        class_names: a file of them.

    Returns:
        By split, examples with ``image``, the bytes of its file; ``label``, an int; and ``class_name``.

    Raises:
        UserError: if they cannot be read, or a class has too few pictures to be divided.
    """
    opened = opened_splits(name, named, data_dir, class_names)
    absent = [split for split in named if split not in opened]
    if not absent:
        return dict(opened)
    train = opened["train"]
    bar = tqdm(range(len(train)), desc=f"reading labels of {name}", disable=None, leave=False)
    labels = np.array([train[place]["label"] for place in bar], np.int64)
    try:
        divided = divide(labels, {split: HELD_OUT[split] for split in absent})
    except UserError as error:
        raise UserError(f"{name}, {named['train']}: {error}") from None
    return {split: opened[split] if split in opened else Part(train, divided[split], labels) for split in named} | {
        "train": Part(train, divided["train"], labels)
    }


def divide(labels: Sequence[int] | np.ndarray, shares: Mapping[str, float], seed: int = 0) -> dict[str, np.ndarray]:
    """Divides examples class by class.

    Args:
        labels: int ``[examples]``.
        shares: by split, the share of each class's examples that it gets, one example at least; ``train`` has the rest.
        seed: of the choice, which otherwise depends on a class's label and its number of examples alone.

    Returns:
        By split, ``train`` among them, places in rising order, int64 ``[chosen]``.

    Raises:
        UserError: if nothing of a class is left for training.
    """
    labels = np.asarray(labels)
    found: dict[str, list[np.ndarray]] = {split: [] for split in ("train", *shares)}
    for label in np.unique(labels):
        order = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        start = 0
        for split, share in shares.items():
            count = max(1, round(share * len(order)))
            found[split].append(order[start : start + count])
            start += count
        if start >= len(order):
            raise UserError(
                f"the class {label} has {len(order)} picture(s), too few to be divided into {', '.join(found)}; give "
                "more of them, or splits of their own"
            )
        found["train"].append(order[start:])
    return {split: np.sort(np.concatenate(chosen)).astype(np.int64) for split, chosen in found.items()}
