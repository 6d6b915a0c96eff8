"""Real processes that run toy experiments, started in a fraction of the time that imports take."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import toy_run

_HERE = Path(__file__).resolve().parent
_OWN = tempfile.TemporaryDirectory()  # apart from work directories, which may have no room


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _server() -> multiprocessing.context.BaseContext:
    """The server that forks processes with everything imported; it has one thread, so that forking is sound."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_run", "toy_comparison"])
    path = os.pathsep.join(map(str, (_HERE, _HERE.parent, _HERE.parents[1])))
    compiled = str(Path(_OWN.name) / "compiled")
    with _environment(
        PYTHONPATH=path, JAX_PLATFORMS="cpu", XLA_FLAGS="", OMP_NUM_THREADS="1", NPROC="4", TOY_COMPILED=compiled
    ):
        forkserver.ensure_running()
    return context


class Run:
    """A process of a toy experiment.

    Attributes:
        workdir: its work directory.
        process: the process.
    """

    def __init__(
        self, workdir: Path, *arguments: str, experiment: str = "toy_run", devices: int = 1, unprivileged: bool = False
    ):
        self.workdir = workdir
        number, name = tempfile.mkstemp(dir=_OWN.name)
        os.close(number)
        self._output = Path(name)
        given = [f"--experiment={experiment}", f"--workdir={workdir}", *arguments]
        self.process = _server().Process(
            target=toy_run.start, args=(given, str(self._output), devices, unprivileged), daemon=True
        )
        self.process.start()

    @property
    def said(self) -> str:
        """What the process has said so far."""
        return self._output.read_text()

    def steps(self) -> list[int]:
        """The steps that the run has logged."""
        return steps(self.workdir)

    def until(self, condition: Callable[[], bool], seconds: float = 60, every: float = 0.005) -> None:
        """Waits for a condition; fails where the process ends before it."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}:\n{self.said}"
            assert time.monotonic() < end, f"waited in vain:\n{self.said}"
            time.sleep(every)

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 120) -> int:
        """Waits for the end; the exit status, or minus the number of the signal that ended it."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"does not end:\n{self.said}")
        return self.process.exitcode


def steps(workdir: Path) -> list[int]:
    """The steps that a run has logged."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def together(
    workdir: Path,
    count: int,
    *arguments: str,
    experiment: str = "toy_run",
    devices: int = 1,
    own: dict[int, str] | None = None,
) -> list[Run]:
    """So many processes of one run; ``own`` has an argument more for some of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [*arguments, "--distributed", f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    runs = []
    for index in range(count):
        more = [own[index]] if own and index in own else []
        more = [f"--process_id={index}", *more]
        runs.append(Run(workdir, *given, *more, experiment=experiment, devices=devices))
    return runs
