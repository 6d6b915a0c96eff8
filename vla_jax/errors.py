"""Errors a user can mend: what was given, what is allowed, what is near."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what is allowed and how to mend it.

    ``launch.py`` prints the message alone, without a traceback, and exits with status 2.
    """


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
