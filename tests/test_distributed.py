"""What processes tell each other; tests/faults has processes that really are several."""

from __future__ import annotations

import json
import sys

import pytest

from vla_jax import distributed
from vla_jax.errors import UserError


def test_a_process_alone_asks_nobody(tmp_path):
    assert not distributed.several()
    assert distributed.is_first()
    assert distributed.gather("mine") == ["mine"]
    assert distributed.from_first(lambda: b"mine") == b"mine"
    assert distributed.read(tmp_path / "not there") is None
    (tmp_path / "file").write_bytes(b"\x00\xff")
    assert distributed.read(tmp_path / "file") == b"\x00\xff"
    distributed.remove_folder(tmp_path)
    assert not tmp_path.exists()
    distributed.only_first_speaks()
    assert sys.stdout.name != "/dev/null"
    with pytest.raises(SystemExit) as ended:
        distributed.leave(3)
    assert ended.value.code == 3


def test_what_differs_between_processes_is_named(monkeypatch):
    facts = {"--config.steps": "12", "jax": "0.10.2", "vla_jax/names.py": "ab"}
    others = [facts, facts | {"--config.steps": "13"}, facts | {"vla_jax/names.py": "cd", "vla_jax/new.py": "ef"}]
    monkeypatch.setattr(distributed, "gather", lambda text: [json.dumps(other) for other in others])
    with pytest.raises(UserError) as refused:
        distributed.agree(facts)
    assert str(refused.value).splitlines()[1:-1] == [
        "  --config.steps is 13 on process 1 and 12 on process 0",
        "  vla_jax/names.py is cd on process 2 and ab on process 0",
        "  vla_jax/new.py is ef on process 2 and not there on process 0",
    ]
    others[1:] = [facts]
    distributed.agree(facts)
    others[1] = {str(number): "" for number in range(20)}
    with pytest.raises(UserError, match="and 15 more differences"):  # twenty too many and three missing
        distributed.agree(facts)


def test_what_another_process_refuses_is_refused(monkeypatch):
    with pytest.raises(UserError, match="mine"), distributed.together():
        raise UserError("mine")
    monkeypatch.setattr(distributed, "gather", lambda text: [text, "", "no such file"])
    with pytest.raises(UserError, match="process 2 cannot go on: no such file"), distributed.together():
        pass
