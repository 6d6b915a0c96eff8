"""The input pipeline: from a random-access source of examples to batches of arrays, on Grain.

Training and evaluation differ in what must never happen, so they are two shapes of one :class:`Pipeline`:

- training is endless, shuffled anew each epoch, and every batch is full. A picture that cannot be decoded is passed
  over and the next example takes its row.
- evaluation is one pass in the source's order in which every example has its row, on every process as many batches as
  on the others. Rows without an example (the end of the last batch) and rows whose picture cannot be decoded repeat
  another row and have ``valid`` false.

Both count the pictures passed over, name them in the log, and end the run when their share is too large.
:mod:`vla_jax.data.batches` puts the batches on the mesh.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from vla_jax.data.batch_iterator import ENOUGH_TO_JUDGE, BatchIterator
from vla_jax.data.boxes import View
from vla_jax.data.stages import (
    LEAST_SHARED,
    FillBatch,
    FullBatches,
    Gap,
    Groups,
    Guarded,
    Numbered,
    Row,
    Source,
    Transform,
    shuffled,
)
from vla_jax.errors import UserError, unknown

__all__ = ["BatchIterator", "Part", "Pipeline", "TransformExample"]

Part = Callable[[Mapping[str, Any], Sequence[View], np.random.Generator | None], Row]
"""What a task adds to a row: of the raw example, the views of its pictures and the generator (None in evaluation)."""


QUICK = 0.5e-3
"""Seconds that a row of pictures of 64 pixels does not take, and one of a photograph takes many times over."""

ROWS_AT_ONCE = 8
"""More would hand them over more cheaply by little, and leave threads without work in batches of few rows."""


@dataclass(frozen=True)
class TransformExample:
    """Maps a raw example to a row of the batch: picture, text, label and route, and what a task asks for besides.

    Attributes:
        preprocess: the picture's transformation, :class:`vla_jax.data.image.Preprocess`.
        tokenize: the text's transformation, :class:`vla_jax.data.text.Tokenize`.
        image_key: the field that holds the picture; a tuple of fields for several pictures, which are then stacked.
        text_key: the field that holds the text, or a list of texts of which training draws one and evaluation takes
            the first; None makes rows without a text.
        label_key: the integer field that is the label; None gives every row the label -1.
        route_key: the integer field that is the route; None gives every row ``route``.
        route: the adapter (task) of all examples where no field says it; -1 is the bare backbone.
        parts: further fields of the row, such as :class:`vla_jax.data.boxes.TargetBox`; a part's fields replace those
            of the same name.
    """

    preprocess: Callable[[Any, np.random.Generator | None], np.ndarray]
    tokenize: Callable[[str], tuple[np.ndarray, np.ndarray]]
    image_key: str | tuple[str, ...] = "image"
    text_key: str | None = "text"
    label_key: str | None = None
    route_key: str | None = None
    route: int = 0
    parts: tuple[Part, ...] = ()

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The fields that hold the pictures."""
        return (self.image_key,) if isinstance(self.image_key, str) else self.image_key

    def __call__(self, example: Mapping[str, Any], generator: np.random.Generator | None = None) -> Row:
        """Makes the row: ``image``, ``tokens``, ``text_mask``, ``label`` and ``route`` of the batch contract.

        Args:
            example: the raw example.
            generator: draws caption and augmentation in training; None in evaluation.

        Raises:
            UnreadablePicture: if the picture cannot be decoded.
            UserError: if a field is missing.
        """
        row: Row = {}
        if self.text_key is not None:
            row["tokens"], row["text_mask"] = self.tokenize(self._text(example, generator))
        label = -1 if self.label_key is None else _field(example, self.label_key)
        route = self.route if self.route_key is None else _field(example, self.route_key)
        row |= {"label": np.asarray(label, np.int32), "route": np.asarray(route, np.int32)}
        # Only a real Preprocess knows views, and only parts ask for them.
        if isinstance(self.image_key, str) and not self.parts:
            return row | {"image": self.preprocess(_field(example, self.image_key), generator)}
        pictures = [self.preprocess.with_view(_field(example, key), generator) for key in self.image_fields]
        pixels, views = [each for each, _ in pictures], [view for _, view in pictures]
        row["image"] = pixels[0] if isinstance(self.image_key, str) else np.stack(pixels)
        for part in self.parts:
            row |= part(example, views, generator)
        return row

    def _text(self, example: Mapping[str, Any], generator: np.random.Generator | None) -> str:
        text = _field(example, self.text_key)
        if not isinstance(text, str | bytes):
            if len(text) == 0:
                raise UserError(f"an example's field {self.text_key!r} is an empty list; it needs at least one text")
            text = text[0 if generator is None else int(generator.integers(len(text)))]
        return text.decode() if isinstance(text, bytes) else str(text)


@dataclass(frozen=True)
class Pipeline:
    """Batches of one process from a source; iterate over it, with :class:`BatchIterator` for position and count.

    The stream of examples (order, augmentation) depends on the seed alone, and each process takes a block of every
    batch of it: without unreadable pictures, the global batch of a step holds the same rows in the same order however
    many processes share it.

    A batch is what ``transform`` gives, stacked, with two more arrays: ``valid`` bool ``[batch]``, and ``index`` int32
    ``[batch]``, the example's position in the source (-1 where ``valid`` is false), by which results find the fields
    that stay on the host: ``source[index]``.

    Attributes:
        source: the examples.
        transform: makes a row of an example, such as :class:`TransformExample`; must be picklable with workers.
        batch_size: rows of a batch on all processes together.
        training: endless, shuffled and augmented; or one pass in order.
        seed: of shuffling and augmentation, in [0, 2**32).
        workers: processes that read and decode; 0 does it in threads of this process. Training batches come in
            another order with another number of workers.
        max_bad_share: the share of unreadable pictures above which the run ends, judged from the first 1,000 examples
            (or from one pass of a smaller source) on.
        process_index: which share of the stream this is; None asks JAX.
        process_count: how many share the stream; None asks JAX.
        patience: seconds without a batch after which data workers count as stuck. They are then started again, as are
            those that died; what reads in threads of this process, and workers that give nothing again and again, end
            the run with a message.

    Raises:
        UserError: for values out of range, an empty source, a batch that processes cannot share equally.
    """

    source: Source
    transform: Transform
    batch_size: int
    training: bool
    seed: int = 0
    workers: int = 0
    max_bad_share: float = 0.01
    process_index: int | None = None
    process_count: int | None = None
    patience: float = 300.0

    def __post_init__(self) -> None:
        if (self.process_index is None) != (self.process_count is None):
            raise UserError("process_index and process_count go together; give both or neither")
        if self.process_count is None:
            object.__setattr__(self, "process_index", jax.process_index())
            object.__setattr__(self, "process_count", jax.process_count())
        if not 0 <= self.process_index < self.process_count:
            raise UserError(f"process_index {self.process_index} is not one of {self.process_count} processes")
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"batch_size {self.batch_size} cannot be shared equally by {self.process_count} processes; give a "
                "positive multiple of that"
            )
        if len(self.source) == 0:
            raise UserError("the data source holds no example")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed} is out of range; allowed: 0 to 2**32 - 1")
        if self.workers < 0:
            raise UserError(f"workers {self.workers} is negative; allowed: 0 (threads of this process) or more")
        if not 0 <= self.max_bad_share < 1:
            raise UserError(f"max_bad_share {self.max_bad_share} is not a share; allowed: 0 up to, not including, 1")
        if not self.patience > 0:
            raise UserError(f"patience {self.patience} is no time to wait; allowed: above 0 seconds")

    @property
    def local_batch_size(self) -> int:
        """Rows of a batch on this process."""
        return self.batch_size // self.process_count

    def __len__(self) -> int:
        """Batches of one pass over the source, a last incomplete one included; training goes on after them."""
        return math.ceil(len(self.source) / self.batch_size)

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    @property
    def rows_at_once(self) -> int:
        """Rows that one thread reads and hands over together in training."""
        return min(ROWS_AT_ONCE, self.local_batch_size)

    @property
    def enough_to_judge(self) -> int:
        """Examples after which the share of unreadable pictures says something."""
        return min(ENOUGH_TO_JUDGE, math.ceil(len(self.source) / self.process_count))

    def _ordered(self, examples: grain.MapDataset) -> grain.MapDataset:
        """The endless order in which training takes examples."""
        return shuffled(examples, self.seed).repeat()

    def dataset(self, start: int = 0) -> grain.IterDataset:
        """The batches of this process, from the batch ``start`` on."""
        size, group, quick = self.local_batch_size, self.rows_at_once, self._is_quick()
        # Threads read rows side by side while these leave the interpreter alone, as large pictures do. Small ones
        # spend their time in it, and threads would take its lock from one another many times a row. Data workers share
        # the processors with each other and with this process: more threads than processors cost each row a tenth.
        threads = 1 if quick else max(1, min(8, (os.cpu_count() or 1) // (self.workers + 1)))
        # Randomness is drawn before the processes take their shares, so that it does not depend on their number.
        if self.training:
            examples = Numbered(self.source, len(self.source)).seed(self.seed)
            rows = self._ordered(examples).random_map(Guarded(self.transform))
            # A thread that is alone hands nothing over.
            ahead = 0 if threads == 1 else max(threads, math.ceil(2 * size / group))
            reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
            groups = Groups(rows, group, *self._part, start).to_iter_dataset(reading)
            dataset = FullBatches(groups, group, size, self.enough_to_judge, bool(self.workers))
            if threads == 1 and not self.workers:
                dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=2)
        else:
            # Batches are made before the workers take their shares, so that only the last batch is incomplete.
            examples = Numbered(self.source, len(self) * self.batch_size)
            batches = Groups(examples.map(Guarded(self.transform)), size, *self._part, start)
            reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
            dataset = batches.map(FillBatch(self._first_readable(), bool(self.workers))).to_iter_dataset(reading)
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # Grain hands its absl flags to the workers, and absl refuses before it has seen a command line.
                flags.FLAGS.mark_as_parsed()
            sharing = grain.experimental.DatasetOptions(min_shm_size=LEAST_SHARED)
            dataset = grain.experimental.WithOptionsIterDataset(dataset, sharing).mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
            )
        return dataset

    def _is_quick(self) -> bool:
        """Whether a row takes so little time that threads would only hinder each other."""
        guarded = Guarded(self.transform)
        generator = np.random.default_rng(self.seed) if self.training else None
        # The first row also starts whatever is to be started once, and a second reading of it would find it in a cache.
        for index in sorted({0, len(self.source) // 2}):
            start = time.perf_counter()
            guarded((index, self.source[index]), generator)
        return time.perf_counter() - start < QUICK

    @property
    def _part(self) -> tuple[int, int, int]:
        """How batches are shared, and which share this is."""
        return self.batch_size, self.process_index, self.process_count

    def _first_readable(self) -> Row:
        """The row that fills the gaps of evaluation batches."""
        guarded = Guarded(self.transform)
        count = min(len(self.source), ENOUGH_TO_JUDGE)
        rows = (guarded((index, self.source[index])) for index in range(count))
        for row in rows:
            if not isinstance(row, Gap):
                return row
        raise UserError(f"none of the first {count} pictures can be decoded")


def _field(example: Mapping[str, Any], key: str) -> Any:
    if key not in example:
        raise unknown("field of an example", key, example)
    return example[key]
