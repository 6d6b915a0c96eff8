"""Errors a user can mend: what was given, what is allowed, what is near."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from vla_jax.redaction import redacted

# All but tabs and ends of lines; the halves of surrogate pairs cannot be printed at all.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what is allowed and how to mend it.

    ``launch.py`` prints the message alone, without a traceback, and exits with status 2. What files say may stand in
    it, so secrets are taken out, and characters that would steer a terminal are written as their codes.
    """

    def __init__(self, message: object = ""):
        super().__init__(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], redacted(str(message))))


def nearest(given: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names in ``allowed`` that look most like ``given``, best first; empty if none is near."""
    return difflib.get_close_matches(str(given), [str(a) for a in allowed], n=count, cutoff=0.5)


def unknown(kind: str, given: str, allowed: Iterable[str], hint: str = "") -> UserError:
    """The error for a name that does not exist.

    Args:
        kind: what was looked for, such as ``"slot"``.
        given: the name as given.
        allowed: the names that exist.
        hint: one more sentence, for how to mend it.

    Returns:
        The error, for the caller to raise.
    """
    allowed = [str(a) for a in allowed]
    near = nearest(given, allowed)
    message = f"unknown {kind} {given!r}"
    if near:
        message += f"; did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(allowed[:40]) + (f", and {len(allowed) - 40} more" if len(allowed) > 40 else "")
    message += f" Allowed: {shown}." if near else f"; allowed: {shown or 'none'}."
    return UserError(f"{message} {hint}".strip())
