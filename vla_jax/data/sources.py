"""Data sets by name: built on first use from the builders in :mod:`vla_jax.data.builders`, then read at random."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from pathlib import Path
from typing import Any

import filelock
import tensorflow_datasets as tfds

from vla_jax.data import builders
from vla_jax.data.builders._manual import ManualBuilder
from vla_jax.data.stages import Source
from vla_jax.errors import UserError, unknown

_log = logging.getLogger(__name__)


def builder_names() -> list[str]:
    """The data sets there are: the modules of :mod:`vla_jax.data.builders` without a leading underscore."""
    return sorted(module.name for module in pkgutil.iter_modules(builders.__path__) if not module.name.startswith("_"))


def make_builder(name: str, data_dir: str | Path, config: Any = None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a data set, without building it.

    Args:
        name: a name from :func:`builder_names`.
        data_dir: the folder under which prepared data sets lie.
        config: the builder's configuration, by name or as an instance of its ``BuilderConfig``; None is its default.

    Raises:
        UserError: if there is no such data set or configuration.
    """
    names = builder_names()
    if name not in names:
        raise unknown("data set", name, names)
    module = importlib.import_module(f"{builders.__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, tfds.core.GeneratorBasedBuilder)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"the module {module.__name__} must define one GeneratorBasedBuilder; it defines {len(found)}")
    configs = [known.name for known in found[0].BUILDER_CONFIGS]
    if isinstance(config, str) and config not in configs:
        raise unknown(f"configuration of the data set {name!r}", config, configs)
    # array_record is the format that is read at random and without TensorFlow.
    return found[0](data_dir=str(Path(data_dir).expanduser()), config=config, file_format="array_record")


def prepared_builder(
    name: str, data_dir: str | Path, config: Any = None, manual_dir: str | Path | None = None
) -> tfds.core.DatasetBuilder:
    """The builder of a data set that is there; the first use builds it.

    Args:
        name: a name from :func:`builder_names`.
        data_dir: the folder under which prepared data sets lie.
        config: the builder's configuration, by name or instance; None is its default.
        manual_dir: the folder in which the files of data sets lie that are not downloaded by themselves; None is
            TFDS's place for it, ``<data_dir>/downloads/manual``. Once the data set is built, it is not read.

    Raises:
        UserError: if the data set or configuration does not exist, or cannot be built.
    """
    builder = make_builder(name, data_dir, config)
    folder = Path(builder.data_dir)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Processes of one machine start together; one of them builds and the others wait for it.
        with filelock.FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _log.info("building the data set %s in %s; this happens once", name, folder)
                manual = None if manual_dir is None else str(Path(manual_dir).expanduser())
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
        builder = make_builder(name, data_dir, config)
    return builder


def split_name(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """The split that ``split`` names or is a slice of.

    Raises:
        UserError: if the built data set has no such split.
    """
    base = split.split("[")[0]
    if base in builder.info.splits:
        return base
    if isinstance(builder, ManualBuilder):
        raise builder.absent_split(base)
    raise unknown(f"split of the data set {builder.name!r}", base, builder.info.splits)


def split_range(split: str, count: int) -> tuple[int, int]:
    """Which of a split's examples a slice such as ``train[:10%]`` or ``test[500:]`` takes: first, and first behind.

    Args:
        split: the name of the split, or a slice of it.
        count: how many examples the split has.

    Raises:
        UserError: if it cannot be read, or goes beyond the split's examples.
    """
    base = split.split("[")[0]
    counted = tfds.core.SplitInfo(name=base, shard_lengths=[count], num_bytes=0)
    try:
        (taken,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({base: counted})
    except ValueError as error:
        raise UserError(
            f"the slice {split!r} of a split of {count} examples cannot be taken: {error}. Write for example "
            f"{base}[:{min(count, 500)}], {base}[:10%] or {base}[90%:]"
        ) from error
    return taken.from_ or 0, count if taken.to is None else taken.to


def load_source(
    name: str, split: str, data_dir: str | Path, config: Any = None, manual_dir: str | Path | None = None
) -> Source:
    """A split of a data set as a random-access source of records; the first use builds the data set.

    Pictures come as the bytes of their files: decoding is the pipeline's work, so that a damaged one can be passed
    over. Text comes as bytes, labels as integers. Where several annotations share a picture, a record holds them all;
    :func:`vla_jax.data.flattened.load_examples` has one example an annotation.

    Args:
        name: a name from :func:`builder_names`.
        split: a split's name, or a slice of it such as ``train[:10%]``, counted in records.
        data_dir: the folder under which prepared data sets lie.
        config: the builder's configuration, by name or instance; None is its default.
        manual_dir: the folder in which files lie that are not downloaded by themselves; see :func:`prepared_builder`.

    Returns:
        The source; it can be pickled, and read from several threads.

    Raises:
        UserError: if the data set, configuration or split does not exist, or cannot be built.
    """
    builder = prepared_builder(name, data_dir, config, manual_dir)
    split_range(split, builder.info.splits[split_name(builder, split)].num_examples)
    encoded = {
        field: tfds.decode.SkipDecoding()
        for field, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split=split, decoders=encoded)
