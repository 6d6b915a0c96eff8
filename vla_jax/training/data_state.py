"""Where processes stood in their data, as a checkpoint keeps it, and what a process takes of it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vla_jax.errors import UserError


def data_state_text(state: Any) -> str:
    """A process's data state, bytes or JSON-able, as text."""
    return json.dumps({"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"json": state})


def own_data_state(folder: str | os.PathLike[str], texts: Sequence[str]) -> Any:
    """This process's data state, of those that were saved.

    Args:
        folder: the checkpoint, for the message.
        texts: of all processes that saved, in their order.

    Returns:
        The process's own; or, where another number of processes saved, ``{"position": ...}``, what all of them had
        there.

    Raises:
        UserError: if their number is another and they had no position, or not the same.
    """
    states = [_decoded(text) for text in texts]
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    positions = [state.get("position") if isinstance(state, Mapping) else None for state in states]
    if positions[0] is None or any(position != positions[0] for position in positions):
        raise UserError(
            f"{folder} was saved by {len(states)} processes and is resumed by {jax.process_count()}, and where its "
            "data stood cannot be said for these: they are a mixture of tasks, have workers, or pictures were passed "
            f"over. Resume with {len(states)} processes, or load only its adapters with load_adapters"
        )
    return {"position": positions[0]}


def _decoded(text: str) -> Any:
    content = json.loads(text)
    return base64.b64decode(content["base64"]) if "base64" in content else content["json"]
