"""Every kind of input that others write."""

from __future__ import annotations

from pathlib import Path

from hostile_data import (
    Annotations,
    CsvRows,
    JsonRows,
    ParquetRows,
    Pickles,
    Pictures,
    ScoreFiles,
    WorkDirectory,
    encoded_picture,
)
from hostile_kind import Kind
from hostile_models import AdapterFile, Arguments, BackboneFolder, CheckpointFolder, CheckpointMetadata, PeftFolder
from hostile_mutations import OUTSIDE

KINDS: tuple[type[Kind], ...] = (
    AdapterFile,
    CheckpointMetadata,
    CheckpointFolder,
    BackboneFolder,
    PeftFolder,
    Arguments,
    JsonRows,
    CsvRows,
    ParquetRows,
    Pictures,
    ScoreFiles,
    Annotations,
    Pickles,
    WorkDirectory,
)


def write_outside(scratch: Path) -> Path:
    """The files that names lead to which leave their folder."""
    folder = scratch / OUTSIDE
    folder.mkdir()
    for name in ("secret", "secret.png", "model.safetensors"):
        (folder / name).write_bytes(encoded_picture("PNG"))
    return folder
