"""Where a run's numbers go (JSON lines, TensorBoard events) and what is written down about the run itself."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

import vla_jax
from vla_jax.distributed import is_first
from vla_jax.redaction import redacted

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Writer(Protocol):
    """Takes the numbers of one step at a time; raises :class:`OSError` where they cannot be written."""

    def resume(self, step: int) -> None:
        """Forgets what was written for steps after ``step``, before the run goes on from there (0: a new run)."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the named numbers of one step."""

    def close(self) -> None:
        """Writes out whatever is still held back."""


class JsonLines:
    """One JSON object a line, ``{"step": 20, "train/loss": 0.5, ...}``; numbers that are not finite become null.

    Texts and lists may stand beside numbers. A line that cannot be written whole is taken back.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Args:
        path: the file; it is created, with its folders, at the first write.
        """
        self.path = Path(path)

    def resume(self, step: int) -> None:
        """See :meth:`Writer.resume`; the file is replaced in one piece, so an interruption loses nothing."""
        if not self.path.exists():
            return
        kept = [record for record in read_records(self.path) if record["step"] <= step]
        replacement = self.path.with_name(self.path.name + ".new")
        replacement.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(replacement, self.path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :meth:`Writer.write`; the line is in the file when the call returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"step": step} | {name: _json_value(value) for name, value in values.items()}
        line = (json.dumps(record) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while line:  # a disk that fills up takes a part before it refuses
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(end)
                raise

    def close(self) -> None:
        """See :meth:`Writer.close`; every line is already written."""


class TensorBoard:
    """TensorBoard scalar events; after a resume its readers drop the events of steps that are done again."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Args:
        folder: where the event files go.
        """
        self._folder = Path(folder)
        # Not SummaryWriter, whose thread dies of a full disk, after which it blocks for ever.
        self._events: EventsWriter | None = None

    def resume(self, step: int) -> None:
        """See :meth:`Writer.resume`."""
        self.close()
        self._open(step)
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=restart))
        self._events.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :meth:`Writer.write`."""
        if self._events is None:
            self._open(0)
        for name, value in values.items():
            summary = scalar(name, float(value))
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        """See :meth:`Writer.close`."""
        if self._events is not None:
            events, self._events = self._events, None
            events.close()

    def _open(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Event files are named by the second; the suffix keeps a quick restart from overwriting the one before.
        self._events = EventsWriter(str(self._folder / "events"), filename_suffix=f".{step:09d}")


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a :class:`JsonLines` file; a last line cut short by a killed process is left out."""
    lines = Path(path).read_text().splitlines()
    records = []
    for index, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if index != len(lines) - 1:
                raise
    return records


def peak_memory_bytes() -> int:
    """The most memory this process held: of its fullest device, or of the host where devices do not say (a CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # Linux counts KiB, macOS bytes.


def package_version() -> str:
    """The installed version of this package, or ``"source"`` when it runs from a folder that is not installed."""
    try:
        return importlib.metadata.version("vla_jax")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def versions() -> dict[str, Any]:
    """What the run ran on: Python, packages, devices, processes, cores and, in a git checkout, the commit."""
    found = {"python": platform.python_version(), "vla_jax": package_version(), "commit": _commit()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
    }


def run_record(workdir: str | os.PathLike[str], config: Any) -> None:
    """Writes ``config.json`` (the resolved configuration) and ``versions.json`` into the work directory.

    Access tokens in the configuration's texts are not written. Of several processes the first alone writes.

    Args:
        workdir: the run's folder; created if missing.
        config: a (nested) dataclass or a mapping; values JSON does not know are written as their text.
    """
    if not is_first():
        return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    resolved = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    (workdir / "config.json").write_text(redacted(json.dumps(resolved, indent=2, default=str)) + "\n")
    (workdir / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, int | str | list):
        return value
    return float(value) if math.isfinite(float(value)) else None


def _commit() -> str | None:
    """The checked-out commit, with ``+changes`` if files differ from it; None if this is no checkout of its own."""
    root = Path(vla_jax.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, whose commit says nothing about it.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
