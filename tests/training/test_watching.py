"""What a run says of its own speed: rates, waits, warnings, profiles."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_training import FROZEN, OPTIMIZER, STEP, Numbers, loss_function, new_state

from vla_jax.errors import UserError
from vla_jax.training import advice
from vla_jax.training.advice import Advice
from vla_jax.training.compilations import compiled
from vla_jax.training.profile import Profiler, Span
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.training.step import make_train_step
from vla_jax.training.trainer import fit


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of, as it comes."""
    told: list[str] = []
    monkeypatch.setattr(advice._log, "warning", lambda form, *values: told.append(form % values))
    return told


def _slow(position: int) -> None:
    time.sleep(0.05)


def test_rates_are_logged_where_they_are_known() -> None:
    plain = fit(new_state(), FROZEN, STEP, Numbers(), 4, log_every=2).history[-1]
    assert not {"flop_per_second", "mfu"} & plain.keys()
    counted = fit(new_state(), FROZEN, STEP, Numbers(), 4, log_every=2, flop=1e6, peak=1e12).history[-1]
    assert counted["flop_per_second"] == pytest.approx(1e6 / counted["seconds_per_step"])
    assert counted["mfu"] == pytest.approx(counted["flop_per_second"] / 1e12)


def test_waiting_for_data_is_measured_and_told_once(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fit(new_state(), FROZEN, STEP, Numbers(hook=_slow), 9, log_every=3)
    assert warnings == []  # a fraction of a second is nothing to advise on
    monkeypatch.setattr(advice, "_WAITED_SECONDS", 0.2)
    history = fit(new_state(), FROZEN, STEP, Numbers(hook=_slow), 9, log_every=3).history
    assert [record["data_wait_share"] > 0.5 for record in history] == [True] * 3
    assert len(warnings) == 1
    assert "s for data, of late" in warnings[0]


def test_data_that_come_while_the_device_computes_are_no_wait() -> None:
    @jax.jit
    def busy(state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        total = jax.lax.fori_loop(
            0, 60, lambda _, x: jnp.tanh(x @ x), jnp.full((400, 400), 0.01) * batch["image"].sum()
        )
        return state.replace(step=state.step + 1), {"loss": total.mean()}

    history = fit(new_state(), FROZEN, busy, Numbers(), 8, log_every=4).history
    # Behind the logged step the device has nothing to do until the next batch is drawn.
    assert all(record["data_wait_share"] < 0.2 for record in history)


class Shrinking(Numbers):
    """Batches whose last ones have one row less."""

    def __next__(self) -> dict[str, jax.Array]:
        batch = super().__next__()
        return {name: rows[:-1] for name, rows in batch.items()} if self.position > 4 else batch


def test_a_step_that_is_compiled_again_is_told_with_the_shapes(warnings: list[str]) -> None:
    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.square(batch["image"] @ params["adapters"]["kernel"]).mean(), {}

    step = make_train_step(loss, OPTIMIZER, seed=0)
    fit(new_state(), FROZEN, step, Shrinking(), 8, log_every=8)
    assert len(warnings) == 1
    assert "step 5 was compiled again" in "".join(warnings)
    assert "image [6, 4] and [5, 4]" in "".join(warnings)


def test_a_run_compiles_its_step_once(warnings: list[str]) -> None:
    step = make_train_step(loss_function, OPTIMIZER, seed=11)
    before = compiled()
    fit(new_state(), FROZEN, step, Numbers(), 12, log_every=3)
    assert (compiled() - before)["jit(train_step)"] == 1
    assert warnings == []


def _mask(length: int, room: int) -> dict[str, np.ndarray]:
    return {"text_mask": np.arange(room) < np.full((6, 1), length)}


@pytest.mark.parametrize(("length", "told"), [(20, 1), (60, 0)])
def test_texts_that_leave_most_of_their_room_empty_are_told(warnings: list[str], length: int, told: int) -> None:
    looking = Advice()
    for step in range(4):
        looking.logged(step, {}, _mask(length, 77))
        assert len(warnings) == (told if step >= 2 else 0)
    assert not told or "20 of 77 tokens; a text length of 25" in "".join(warnings)


@pytest.mark.parametrize(("fsdp", "limit", "told"), [(1, 1000, 1), (1, 10**9, 0), (8, 1000, 0)])
def test_replicated_frozen_weights_are_told_where_they_fill_the_device(
    warnings: list[str], fsdp: int, limit: int, told: int
) -> None:
    mesh = make_mesh(MeshConfig(fsdp=fsdp))
    cut = PartitionSpec() if fsdp == 1 else PartitionSpec("fsdp")
    kernel = jax.device_put(np.ones((16, 16), np.float32), NamedSharding(mesh, cut))
    Advice().frozen({"kernel": kernel}, limit)
    assert len(warnings) == told
    assert not told or "mesh.fsdp=8" in "".join(warnings)


def test_a_profile_of_the_steps_asked_for(tmp_path: Path) -> None:
    written = []
    numbers = Numbers(hook=lambda position: written.append(any(tmp_path.rglob("*.xplane.pb"))))
    fit(new_state(), FROZEN, STEP, numbers, 6, profiler=Profiler(Span.parse("3:4"), tmp_path))
    assert written == [False] * 4 + [True] * 2  # before each batch
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        events = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum("train_step" in name for name in events) >= 2


def test_a_profile_that_the_run_ends_within_is_written(tmp_path: Path) -> None:
    fit(new_state(), FROZEN, STEP, Numbers(), 4, profiler=Profiler(Span(3, 100), tmp_path))
    assert len([*tmp_path.rglob("*.xplane.pb")]) == 1


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b", "1:2:3", "-1:3"])
def test_a_span_that_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="FIRST:LAST"):
        Span.parse(text)
