"""The check of signatures that the import hook in ``conftest.py`` puts on modules whose signatures say shapes."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks arguments and results; configurations check themselves, with messages for users that tests ask for."""
    return function if function.__name__ == "__init__" else beartype(function)
