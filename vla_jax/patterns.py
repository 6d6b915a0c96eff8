"""Regular expressions that others wrote, matched within a set time.

Backtracking can take for ever on a name of thirty letters, and :mod:`re` cannot be told when to stop.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar

import regex

from vla_jax.errors import UserError
from vla_jax.foreign import shown

SECONDS = 2.0
"""Of computing, for all patterns of one file together. A match of a sane pattern takes a microsecond."""

_LONGEST = 1 << 15  # characters: an alternative for every map of a large model
_MOST_REPEATED = 10_000  # counts in braces, multiplied: the compiled form holds so many copies
_NEAR = re.compile(r"\{[^0-9,]")  # how much a match may differ, to the other module
_COUNTS = re.compile(r"\{[^{}]*?(\d+)\s*\}")

_left: ContextVar[list[float] | None] = ContextVar("_left", default=None)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """All matching inside shares :data:`SECONDS`; outside, each match has as many."""
    token = _left.set([SECONDS])
    try:
        yield
    finally:
        _left.reset(token)


def check(what: str, pattern: str) -> None:
    """Refuses a text that is no regular expression, or one too large.

    Args:
        what: what the pattern is, for the message, such as ``rank pattern``.
        pattern: the text.

    Raises:
        UserError: if it is one.
    """
    if not isinstance(pattern, str):
        raise UserError(f"{what} {shown(pattern)} is not a regular expression but {type(pattern).__name__}")
    counts = [int(count[:9]) for count in _COUNTS.findall(pattern)]
    if len(pattern) > _LONGEST or math.prod(max(count, 1) for count in counts) > _MOST_REPEATED:
        raise UserError(f"{what} {shown(pattern)} is too large; name what is meant with a shorter one")
    try:
        re.compile(pattern)  # which has no patterns within themselves, that take all memory there is
        if _NEAR.search(pattern):
            raise ValueError("braces hold numbers of repetitions")
        _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise UserError(f"{what} {shown(pattern)} is not a regular expression: {error}") from None


def fullmatch(pattern: str, text: str) -> regex.Match[str] | None:
    """The match of a checked pattern with the whole of a text.

    Raises:
        UserError: if it takes too long.
    """
    return _matched("fullmatch", pattern, text)


def match(pattern: str, text: str) -> regex.Match[str] | None:
    """The match of a checked pattern with the beginning of a text; see :func:`fullmatch`."""
    return _matched("match", pattern, text)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def _matched(how: str, pattern: str, text: str) -> regex.Match[str] | None:
    left = _left.get() or [SECONDS]
    before = time.thread_time()
    try:
        return getattr(_compiled(pattern), how)(text, timeout=max(left[0], 1e-3))
    except TimeoutError:
        left[0] = 0.0
        raise UserError(
            f"the pattern {shown(pattern)} takes too long to be matched with {shown(text)}; name what is meant with a "
            "simpler one"
        ) from None
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise UserError(f"the pattern {shown(pattern)} is not a regular expression: {error}") from None
    finally:
        left[0] -= time.thread_time() - before
