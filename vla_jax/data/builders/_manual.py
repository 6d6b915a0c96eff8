"""What the builders of published data sets have in common: they read a folder the user has and write array_record.

One record holds one picture (or pair of pictures), as the bytes of its file, with all annotations of it, in the order
of the annotation file. Everything is read and checked before the first byte is written.

TFDS's own writer sorts its examples through a buffer, which beyond 1 GB lies in files that only TensorFlow opens; and
examples whose order is kept would all fall into one bucket of it, in memory. COCO has 20 GB. So splits are written
here, one record after the other.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, splits
from tqdm.auto import tqdm

from vla_jax.data.builders._files import ManualFolder
from vla_jax.data.image import read_picture
from vla_jax.errors import UserError, unknown

_log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 28
"""Bytes of pictures a file of a split holds at most, if not a single one is larger."""


@dataclass(frozen=True)
class Annotations:
    """How the annotations of a record are stored, for a view that has one example an annotation.

    Attributes:
        field: the record's field that holds them: several lists of one length by name, or one plain list.
        name: what one annotation is called where ``field`` is a plain list.
        lists: fields of which an annotation has a list of any length, such as ``answers``. Lists of lists need
            TensorFlow, so a record holds all annotations' lists one after the other under that name, and ``field``
            has how many each takes, ``<name>_count``.
    """

    field: str
    name: str | None = None
    lists: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One picture or pair of pictures with all that is said about it.

    Attributes:
        pictures: file by field.
        fields: the other fields, as the builder's features say.
        count: how many annotations it has.
    """

    pictures: Mapping[str, Path]
    fields: Mapping[str, Any]
    count: int = 1


class ManualBuilder(tfds.core.GeneratorBasedBuilder):
    """A data set whose files the user has downloaded.

    Attributes:
        MANUAL_DOWNLOAD_INSTRUCTIONS: what to download and where it goes, shown when something is missing.
        PUBLISHED_SPLITS: the splits the data set has, by what must be there for each to be built.
        ANNOTATIONS: how a record's annotations are stored; None where a record is one example.
    """

    VERSION = tfds.core.Version("1.0.0")
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {}
    ANNOTATIONS: ClassVar[Annotations | None] = None

    def __init_subclass__(cls, **arguments: Any):
        # TFDS has builders of its own under some of these names; ours are found by their module.
        super().__init_subclass__(skip_registration=True, **arguments)

    @abc.abstractmethod
    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features of a record."""

    @abc.abstractmethod
    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        """Reads and checks the annotations of every split whose files are there.

        Raises:
            UserError: if a file is missing or wrong, with the file and row.
        """

    def annotation_counts(self, split: str) -> np.ndarray:
        """How many annotations each record of a built split has, int64 ``[records]``."""
        return np.load(self._counts_file(split))

    def absent_split(self, split: str) -> UserError:
        """The error for a split that was not built."""
        if split not in self.PUBLISHED_SPLITS:
            return unknown(f"split of the data set {self.name!r}", split, self.info.splits)
        return UserError(
            f"the split {split!r} of the data set {self.name!r} was not built, for want of "
            f"{self.PUBLISHED_SPLITS[split]}; add it, delete {self.data_dir} and build anew. Built are: "
            f"{', '.join(self.info.splits)}"
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(self._features()),
            disable_shuffling=True,
        )

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[tfds.core.SplitInfo]:
        del download_config
        # The manager's property fails on a missing folder before anyone can say which files belong there.
        root = Path(dl_manager._manual_dir)
        folder = ManualFolder(root, self.name, self.MANUAL_DOWNLOAD_INSTRUCTIONS)
        if not root.is_dir():
            raise folder.error(f"the data set {self.name!r} is read from a folder that is not there")
        found = self._read(folder)
        folder.check_pictures()
        if not found:
            raise folder.error(f"no file of any split of the data set {self.name!r} is there")
        for split, records in found.items():
            if not sum(record.count for record in records):
                raise UserError(
                    f"the split {split!r} of the data set {self.name!r} is empty; {folder.root} has its files"
                )
        if absent := [split for split in self.PUBLISHED_SPLITS if split not in found]:
            _log.info("%s is built without %s, whose files are not in %s", self.name, ", ".join(absent), root)
        return [self._write(split, records) for split, records in found.items()]

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise NotImplementedError("splits are written by _generate_splits")

    def _generate_examples(self, **arguments: Any) -> Any:
        raise NotImplementedError("splits are written by _generate_splits")

    def _write(self, split: str, records: Sequence[Record]) -> tfds.core.SplitInfo:
        template = self._get_filename_template(split_name=split)
        serializer = example_serializer.ExampleSerializer(self.info.features.get_serialized_info())
        parts, size = list(_parts(records)), 0
        bar = tqdm(total=len(records), desc=f"writing {self.name} {split}", unit=" records", leave=False)

        def serialised(part: Sequence[Record]) -> Iterator[tuple[int, bytes]]:
            nonlocal size
            for position, record in enumerate(part):
                pictures = {name: read_picture(path) for name, path in record.pictures.items()}
                example = self.info.features.encode_example({**pictures, **record.fields})
                content = serializer.serialize_example(example)
                size += len(content)
                bar.update()
                yield position, content

        with bar:
            for number, part in enumerate(parts):
                path = template.sharded_filepath(shard_index=number, num_shards=len(parts))
                self._example_writer().write(path, serialised(part))
        np.save(self._counts_file(split), np.array([record.count for record in records], np.int64))
        lengths = [len(part) for part in parts]
        return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)

    def _counts_file(self, split: str) -> Path:
        return Path(self.data_path) / f"{self.name}-{split}-annotations.npy"


def _parts(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Consecutive records whose pictures fit into one file."""
    start, size = 0, 0
    for position, record in enumerate(records):
        added = sum(path.stat().st_size for path in record.pictures.values())
        if size and size + added > SHARD_BYTES:
            yield records[start:position]
            start, size = position, 0
        size += added
    yield records[start:]
