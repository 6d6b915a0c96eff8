"""Timing of forward passes: what is called, how often and in which order."""

from __future__ import annotations

import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation import latency


def test_every_round_calls_each_program_once_and_the_first_call_is_not_timed(monkeypatch):
    calls, clock = [], [0.0]
    costs = {"plain": [100.0, 1.0, 5.0, 2.0], "adapted": [200.0, 3.0, 4.0, 9.0]}  # the first one compiles

    def program(name):
        def call():
            clock[0] += costs[name][calls.count(name)]
            calls.append(name)
            return 0.0

        return call

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    found = latency.forward_seconds({name: program(name) for name in costs}, rounds=3)
    assert found == {"plain": 2.0, "adapted": 4.0}
    assert calls == ["plain", "adapted", "plain", "adapted", "adapted", "plain", "plain", "adapted"]


@pytest.mark.parametrize(("programs", "rounds"), [({}, 3), ({"a": lambda: 0.0}, 0)])
def test_nothing_to_time_is_refused(programs, rounds):
    with pytest.raises(UserError, match="at least one round and one program"):
        latency.forward_seconds(programs, rounds)
