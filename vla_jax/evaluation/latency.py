"""How long a forward pass takes, measured turn by turn so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vla_jax.errors import UserError


def forward_seconds(programs: Mapping[str, Callable[[], Any]], rounds: int = 31) -> dict[str, float]:
    """The median time of each program.

    Args:
        programs: by name, what to time: a call without arguments that gives arrays. All are called once before, so that
            no compilation is timed.
        rounds: how often each is timed; in every round each once, every second round backwards.

    Returns:
        Seconds by name.

    Raises:
        UserError: for no round or no program.
    """
    if rounds < 1 or not programs:
        raise UserError(f"timing needs at least one round and one program, got {rounds} and {len(programs)}")
    for program in programs.values():
        jax.block_until_ready(program())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name in list(programs)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}
