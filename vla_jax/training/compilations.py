"""Which programs this process has had compiled."""

from __future__ import annotations

from collections import Counter

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled: Counter[str] = Counter()
_listening: list[bool] = []


def compiled() -> Counter[str]:
    """By program, such as ``jit(train_step)``, how often it was compiled since this was first asked.

    A program that is found in the cache of compiled programs counts as well.
    """
    if not _listening:
        _listening.append(True)
        jax.monitoring.register_event_duration_secs_listener(_heard)
    return _compiled.copy()


def _heard(event: str, duration: float, fun_name: str = "", **details: object) -> None:
    if event == _EVENT:
        _compiled[fun_name] += 1
