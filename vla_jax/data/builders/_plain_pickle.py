"""Pickles of plain values, in which one data set is published, read without anything that a pickle could run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

from vla_jax.errors import UserError
from vla_jax.foreign import read_bytes

MOST_PICKLE_BYTES = 1 << 28
"""Of a file of RefCOCO's phrases, of which the largest has 142,210 with their words."""

_PLAIN = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING),
    *(pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
)


def _refused(reader: Any) -> None:
    raise pickle.UnpicklingError("it asks for more than lists, dicts, texts and numbers")


class _PlainUnpickler(pickle._Unpickler):
    """Reads pickles of lists, dicts, texts and numbers; what imports, makes or calls anything is not there at all.

    The one in Python: that in C cannot be left without some of its operations, and takes memory for as many memoised
    values as a pickle claims to have.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: do if bytes([code]) in _PLAIN else _refused for code, do in pickle._Unpickler.dispatch.items()
    }


def read_plain_pickle(path: Path) -> Any:
    """A pickle of plain containers, texts and numbers, such as Python 2 wrote; no code of it is ever run.

    Raises:
        UserError: if it is no pickle, is cut short, or holds anything else.
    """
    content = read_bytes(path, MOST_PICKLE_BYTES)
    try:
        # Texts of Python 2 are bytes; the published ones are ASCII, which is UTF-8.
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: this is not the published pickle of plain values: {error}") from error
