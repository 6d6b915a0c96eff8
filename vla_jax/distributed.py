"""Several processes that run one program: how they find each other, what they tell each other, who speaks for them.

JAX's own runtime connects the processes. The first process alone writes to the work directory and reports; what the
others need of a file they get from it (:func:`read`), since a shared file system may show them an older one. Every
function here serves a process that is alone as well, and then touches no device.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vla_jax.errors import UserError

if TYPE_CHECKING:  # JAX takes a second to import, and the command line may have no need of it.
    import jax
    import numpy as np

# How long a process that fails waits for others that fail with it, before it leaves them behind, in seconds.
_FAREWELL = 10

_ABSENT, _CONTENT, _REFUSED = b"a", b"c", b"r"


def start(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Connects this process with the others; to be called before anything touches a device.

    Args:
        coordinator: address and port at which the first process listens, such as ``10.0.0.1:1234``. Where JAX finds
            its cluster by itself (TPU VMs, GKE, Slurm, Open MPI, Kubernetes), all three are left out.
        processes: how many there are.
        index: which one this is, from 0.

    Raises:
        UserError: if some but not all of the three are given, they do not fit together, or no cluster is found.
    """
    import jax

    given = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": index}
    if missing := [name for name, value in given.items() if value is None]:
        if present := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"{' and '.join(present)} given without {' and '.join(missing)}; give all three, or none where JAX "
                "finds its cluster by itself"
            )
    elif not 0 <= index < processes:
        raise UserError(f"--process_id is {index}; with --num_processes={processes}, allowed: 0 to {processes - 1}")
    elif ":" not in coordinator:
        raise UserError(f"--coordinator is {coordinator!r}; allowed: an address with a port, such as 10.0.0.1:1234")
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes cannot find each other: {error} Where JAX finds no cluster by itself, give on every host "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error


def several() -> bool:
    """Whether this process is one of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes and reports: the only one, or the first of several."""
    return not several() or sys.modules["jax"].process_index() == 0


def gather(text: str) -> list[str]:
    """Every process's text, in the order of the processes; all of them must call it."""
    if not several():
        return [text]
    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(own.size))  # [processes]
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def from_first(make: Callable[[], bytes | None]) -> bytes | None:
    """What ``make`` returns on the first process, on every process; the others do not call it.

    Raises:
        UserError: on every process, if ``make`` raises one on the first.
    """
    if not several():
        return make()
    import numpy as np
    from jax.experimental import multihost_utils

    message = b""
    if is_first():
        try:
            content = make()
            message = _ABSENT if content is None else _CONTENT + content
        except UserError as error:
            message = _REFUSED + str(error).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int64(len(message))))
    room = np.zeros(length, np.uint8)
    room[: len(message)] = np.frombuffer(message, np.uint8)
    message = bytes(multihost_utils.broadcast_one_to_all(room))
    if message[:1] == _REFUSED:
        raise UserError(message[1:].decode())
    return message[1:] if message[:1] == _CONTENT else None


def read(path: str | os.PathLike[str]) -> bytes | None:
    """A file of the work directory as the first process sees it, on every process; None if it is not there."""
    path = Path(path)
    return from_first(lambda: path.read_bytes() if path.is_file() else None)


def on_host(array: jax.Array) -> np.ndarray:
    """An array whole, also where other processes hold parts of it; all of them must then call it."""
    import numpy as np
    from jax.experimental import multihost_utils

    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder of the work directory, if it is there."""
    if is_first():
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process refuses inside, all of them refuse; otherwise the others would wait for it.

    Raises:
        UserError: what was raised inside, on this process or on another.
    """
    refused = None
    try:
        yield
    except UserError as error:
        refused = error
    texts = gather("" if refused is None else str(refused))
    if refused is not None:
        raise refused
    for process, text in enumerate(texts):
        if text:
            raise UserError(f"process {process} cannot go on: {text}")


def agree(facts: Mapping[str, str]) -> None:
    """Checks that all processes hold the same facts.

    Args:
        facts: by name; a name that only some processes have differs too.

    Raises:
        UserError: on every process, if any differs from the first; the message names what differs, and where.
    """
    told = [json.loads(text) for text in gather(json.dumps(dict(facts)))]
    problems = []
    for process, own in enumerate(told[1:], start=1):
        for name in dict.fromkeys([*told[0], *own]):
            if own.get(name) != told[0].get(name):
                problems.append(
                    f"{name} is {own.get(name, 'not there')} on process {process} and {told[0].get(name, 'not there')} "
                    "on process 0"
                )
    if problems:
        more = f"\n  and {len(problems) - 8} more differences" if len(problems) > 8 else ""
        raise UserError(
            "the processes do not run the same program:\n  " + "\n  ".join(problems[:8]) + more + "\n"
            "Give every process the same command, code and packages."
        )


def only_first_speaks() -> None:
    """Silences what this process prints and logs, unless it is the first; errors are still said."""
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        os.dup2(sys.stdout.fileno(), 1)  # libraries below Python print too
        logging.disable(logging.WARNING)


def leave(status: int) -> NoReturn:
    """Ends the process after a failure. Others that still compute with it then fail too, instead of waiting for ever.

    Leaving as usual would wait for all processes to leave. Here those that fail with this one have a few seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not several():
        sys.exit(status)
    farewell = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(_FAREWELL)
    os._exit(status)
