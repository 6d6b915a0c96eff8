"""Whether pictures are there and can be decoded, each looked at once though many rows may name it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vla_jax.data.image import MOST_PICTURE_BYTES, UnreadablePicture, opened
from vla_jax.data.own.rows import Flaw
from vla_jax.foreign import is_file

_REMEMBERED = 65_536


@dataclasses.dataclass(frozen=True)
class Looked:
    """What became of a look at a picture.

    Attributes:
        flaw: what is wrong with it; None if nothing is.
        size: width and height in pixels; None where they were not needed.
    """

    flaw: Flaw | None = None
    size: tuple[int, int] | None = None


class Pictures:
    """Looks at pictures, several at a time, and remembers the last ones."""

    def __init__(self, folder: Path, *, decode: bool, sizes: bool, threads: int = 4):
        """Sets up; nothing is read yet.

        Args:
            folder: what names are relative to.
            decode: decodes every picture; else the file only has to be there.
            sizes: reads width and height, from the file's first bytes where it is not decoded.
            threads: pictures looked at at the same time.
        """
        self._folder, self._decode, self._sizes = folder, decode, sizes
        self._pool = ThreadPoolExecutor(threads)
        self._known: collections.OrderedDict[str, Looked] = collections.OrderedDict()

    def look(self, names: Iterable[str]) -> dict[str, Looked]:
        """Looks at pictures by name."""
        wanted = dict.fromkeys(names)
        found = {name: self._known[name] for name in wanted if name in self._known}
        new = [name for name in wanted if name not in found]
        found |= zip(new, self._pool.map(self._look, new) if self._decode else map(self._look, new), strict=True)
        for name, looked in found.items():
            self._known[name] = looked
            self._known.move_to_end(name)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def _look(self, name: str) -> Looked:
        path = self._folder / name
        if not is_file(path):
            return Looked(Flaw("missing picture", f"there is no picture {path}"))
        if path.stat().st_size > MOST_PICTURE_BYTES:
            return Looked(Flaw("unreadable picture", f"the picture {path} has over {MOST_PICTURE_BYTES:,} bytes"))
        if not (self._decode or self._sizes):
            return Looked()
        try:
            with opened(path) as image:
                if self._decode:
                    image.load()
                return Looked(size=image.size)
        except UnreadablePicture as error:
            return Looked(Flaw("unreadable picture", f"the picture {path} {error}"))
        except Exception as error:  # whatever the decoder of any format may raise on a damaged file
            return Looked(Flaw("unreadable picture", f"the picture {path} cannot be decoded: {error}"))
