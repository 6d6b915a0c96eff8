"""The work directory of a run: held by one run at a time, recorded, with compiled programs that outlive a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import filelock
import jax
from absl import logging

from vla_jax import distributed
from vla_jax.errors import UserError
from vla_jax.program import facts
from vla_jax.training.metrics import run_record


@contextlib.contextmanager
def prepared(workdir: Path, experiment: ModuleType, config: Any) -> Iterator[None]:
    """Makes and holds the work directory and writes the run down, on the first process; all agree on what they run.

    SIGTERM inside ends a process that is alone with status 0, also where it does not train and nothing needs saving.

    Args:
        workdir: the folder.
        experiment: the experiment's module.
        config: its configuration.

    Raises:
        UserError: if the folder cannot be made, another run holds it, or the processes do not run the same program.
    """
    # TFDS and Orbax tell at length, through absl, what nobody needs to know of a run; their errors stay, but for those
    # of a save, which the run says itself.
    logging.set_verbosity(logging.ERROR)
    logging.get_absl_logger().addFilter(_not_of_orbax)
    if distributed.several():
        distributed.agree(facts(experiment, config) | {"--workdir": str(workdir)})
    with _sigterm_ends_well(), contextlib.ExitStack() as holding:
        with distributed.together():
            if distributed.is_first():
                try:
                    workdir.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(
                        f"the work directory {workdir} cannot be made: {error}; choose another with --workdir"
                    ) from None
                holding.enter_context(held(workdir))
                run_record(workdir, config)
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        yield


@contextlib.contextmanager
def held(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a work directory for this process; a second run in it would overwrite what the first one writes.

    The lock is the operating system's and goes with the process, however that ends. ``running.json`` beside it says who
    holds it, for people; it decides nothing.

    Args:
        workdir: the folder; it must exist.

    Raises:
        UserError: if another process holds it.
    """
    workdir = Path(workdir)
    holder = workdir / "running.json"
    try:
        held = filelock.FileLock(workdir / ".lock", timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(
            f"another run is using the work directory {workdir}{_told(holder)}; wait for it or stop it, or choose "
            "another --workdir"
        ) from None
    except OSError as error:
        raise UserError(f"the work directory {workdir} cannot be locked: {error}; choose another --workdir") from error
    with held:
        content = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk is said where something is lost by it
            holder.write_text(json.dumps(content) + "\n")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def _told(holder: Path) -> str:
    try:
        content = json.loads(holder.read_text())
        return f" (process {content['process']} on {content['host']}, since {content['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def _sigterm_ends_well() -> Iterator[None]:
    # Training has a handler of its own meanwhile. Of several processes JAX's runtime takes the signal, and tells all.
    if distributed.several() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> NoReturn:
        raise SystemExit(0)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _not_of_orbax(record: Any) -> bool:
    return "orbax" not in record.pathname
