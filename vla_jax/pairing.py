"""Examples with several pictures or several texts, as the pairs that a task compares.

Two pictures under one sentence, or one picture with every answer it could have: row ``(b P + p) T + t`` of what comes
out of the backbone is picture p of example b with its text t. Each picture and each text goes through its tower once,
and their features are repeated; where adapters let a picture's features depend on the text beside it, or pick weights
by example, what goes in is repeated instead.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vla_jax.backbones.clip import CLIPOutput

_OF_IMAGES = ("image_features", "image_pooled", "image_tokens", "patch_features")
_OF_TEXTS = ("text_features", "text_pooled", "text_tokens")


@dataclasses.dataclass(frozen=True)
class Pairing:
    """How many of each an example has.

    Attributes:
        pictures: pictures of an example.
        texts: texts of an example.
    """

    pictures: int
    texts: int

    @classmethod
    def of(cls, image: jax.Array | None, plain_image: int, tokens: jax.Array | None) -> Pairing:
        """What a batch holds.

        Args:
            image: pictures or their stream, with an axis more after the batch where examples have several; or None.
            plain_image: axes of ``image`` where they have one.
            tokens: ``[batch, length]``, or ``[batch, texts, length]``; or None.
        """
        pictures = image.shape[1] if image is not None and image.ndim > plain_image else 1
        return cls(pictures, tokens.shape[1] if tokens is not None and tokens.ndim > 2 else 1)

    @property
    def each(self) -> int:
        """Pairs of an example."""
        return self.pictures * self.texts

    def images(self, rows: jax.Array | None, *, repeat: bool) -> jax.Array | None:
        """Pictures, or what was made of them, as one row a picture; one a pair with ``repeat``."""
        if rows is None or self.each == 1:
            return rows
        rows = rows.reshape(-1, *rows.shape[2:]) if self.pictures > 1 else rows
        return jnp.repeat(rows, self.texts, axis=0) if repeat else rows

    def text(self, rows: jax.Array | None, *, repeat: bool) -> jax.Array | None:
        """Texts, or what was made of them, as one row a text; one a pair with ``repeat``."""
        if rows is None or self.each == 1:
            return rows
        if self.texts == 1:
            return jnp.repeat(rows, self.pictures, axis=0) if repeat else rows
        if repeat:
            rows = jnp.repeat(rows[:, None], self.pictures, axis=1).reshape(-1, *rows.shape[1:])
        return rows.reshape(-1, *rows.shape[2:])

    def repeated(self, output: CLIPOutput) -> CLIPOutput:
        """The output for one row a picture and one row a text, as one row a pair of each."""
        if self.each == 1:
            return output

        def apart(rows: jax.Array | None, count: int) -> jax.Array | None:
            return rows if rows is None or count == 1 else rows.reshape(-1, count, *rows.shape[1:])

        images = {name: self.images(apart(getattr(output, name), self.pictures), repeat=True) for name in _OF_IMAGES}
        texts = {name: self.text(apart(getattr(output, name), self.texts), repeat=True) for name in _OF_TEXTS}
        return output.replace(**images, **texts)
