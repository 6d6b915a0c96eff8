"""What the tests beside it ask of every hostile input."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from vla_jax.errors import UserError


def refused(message, call, *arguments, megabytes=64, **named):
    """Whether a call ends in an error of the user's with this message, and takes little memory on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            call(*arguments, **named)
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()


def change_json(path: Path, **values) -> None:
    """Changes the top of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
