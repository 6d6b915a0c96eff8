"""What a kind of input is: a valid one, how it is made invalid, and what reads it."""

from __future__ import annotations

import abc
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from vla_jax.errors import UserError

Files = dict[str, bytes]
"""An input: the content of files by their names below the folder that is read."""


def list_of(value: Any) -> list[Any]:
    """A list as it is, anything else as the only one of a list."""
    return value if isinstance(value, list) else [value]


class Kind(abc.ABC):
    """A kind of input.

    Attributes:
        name: in the table.
        share: how many of a thousand inputs are of it.
        errors: what reading one may raise.
    """

    name: ClassVar[str]
    share: ClassVar[int]
    errors: ClassVar[tuple[type[BaseException], ...]] = (UserError,)

    def __init__(self, scratch: Path):
        """Makes the valid input in a folder of its own; what is named ``outside`` beside it is not to be touched."""
        self.folder = scratch / self.name.replace(" ", "_")
        self.folder.mkdir()
        self.valid = self.seed()
        self._written: Files = {}

    @abc.abstractmethod
    def seed(self) -> Files:
        """The valid input."""

    @abc.abstractmethod
    def mutated(self, random: Random) -> Files:
        """An input of which something is wrong."""

    @abc.abstractmethod
    def read(self) -> Any:
        """Reads what lies in the folder."""

    def write(self, files: Files) -> None:
        """Puts an input into the folder, in the place of the one before."""
        for name in self._written.keys() - files.keys():
            (self.folder / name).unlink()
        for name, content in files.items():
            if self._written.get(name) != content:
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        self._written = files

    def _one(self, random: Random, change: Any, name: str) -> Files:
        return self.valid | {name: change(random, self.valid[name])}
