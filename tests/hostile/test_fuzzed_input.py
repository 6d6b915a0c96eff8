"""A few inputs of every kind under guard; ``python tests/hostile`` does the same with as many as one likes."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path
from random import Random

import hostile_guard
import pytest
from hostile_data import encoded_picture
from hostile_guard import Forbidden, guarded
from hostile_kinds import KINDS
from hostile_models import AdapterFile
from hostile_mutations import mutated_json, mutated_png, mutated_safetensors
from hostile_run import run, shares

COUNT = 1200


def test_mutated_input_ends_in_nothing_but_documented_errors():
    results = run(COUNT, seed=0)
    assert [failure for result in results for failure in result.failures] == []
    assert sum(result.inputs for result in results) == COUNT
    assert len(results) == len(KINDS)
    for result in results:  # inputs of every kind get to where something is looked at
        assert result.inputs == result.accepted + sum(result.refused.values())
        assert result.refused or result.inputs < 20
    assert sum(result.accepted for result in results) > COUNT / 20


def test_shares_add_up():
    assert sum(shares(200_000).values()) == 200_000
    assert min(shares(200_000).values()) > 1000


def test_an_input_follows_from_its_seed_and_number(tmp_path):
    kind = AdapterFile(tmp_path)
    made = [[kind.mutated(Random(f"{seed} {number}")) for number in range(30)] for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert sum(files != kind.valid for files in made[0]) > 25


def test_mutations_stay_near_the_format(tmp_path):
    kind = AdapterFile(tmp_path)
    content = kind.valid["a.safetensors"]
    made = [mutated_safetensors(Random(number), content) for number in range(60)]
    whole = [one for one in made if int.from_bytes(one[:8], "little") < len(one) and one != content]
    assert len(whole) > 30
    assert len({mutated_json(Random(number), b'{"a": [1, {"b": "text"}]}') for number in range(60)}) > 50
    pictures = [mutated_png(Random(number), encoded_picture("PNG")) for number in range(20)]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    """The folder that may be written to, and that of which nothing may be opened."""
    for name in ("scratch", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret").write_text("x")
    return tmp_path / "scratch", tmp_path / "outside"


def test_the_guard_sees_what_is_forbidden(places, monkeypatch):
    scratch, outside = places

    def hidden(call):
        def caught():
            with contextlib.suppress(BaseException):
                call()

        return caught

    (scratch / "link").symlink_to(outside)
    forbidden = [
        lambda: (scratch.parent / "new").write_text("x"),
        lambda: (scratch / "link" / "new").write_text("x"),
        lambda: (scratch.parent / "new").mkdir(),
        lambda: (outside / "secret").read_text(),
        lambda: (outside / "secret").unlink(),
        lambda: (scratch / "link").rename(scratch.parent / "moved"),
        lambda: subprocess.run(["true"], check=True),
        lambda: socket.create_connection(("127.0.0.1", 9)),
    ]
    for number, call in enumerate([*forbidden, *map(hidden, forbidden)]):
        raised, _ = guarded(call, scratch, outside, 30)
        assert isinstance(raised, Forbidden), number
    assert sorted(path.name for path in scratch.parent.iterdir()) == ["outside", "scratch"]
    monkeypatch.setattr(hostile_guard, "SECONDS", 0.05)
    assert "seconds" in str(guarded(lambda: sum(range(10_000_000)), scratch, outside, 30)[0])
    monkeypatch.setattr(hostile_guard, "SECONDS", 5.0)
    monkeypatch.setattr(hostile_guard, "MEMORY", -1)
    assert "bytes of memory" in str(guarded(lambda: None, scratch, outside, 30)[0])


def test_the_guard_lets_pass_what_is_allowed(places):
    scratch, outside = places
    raised, seconds = guarded(lambda: (scratch / "new").write_text("x"), scratch, outside, 30)
    assert raised is None
    assert 0 <= seconds < 1
    raised, _ = guarded(lambda: {}["absent"], scratch, outside, 30)
    assert isinstance(raised, KeyError)
    assert (scratch.parent / "new").write_text("afterwards") == 10
