"""Slots: the named places of a transformer where an adapter may sit, and what a backbone and its adapters agree on.

A backbone calls a slot with the input and the output of the computation the slot stands for and goes on with what
comes back. It knows nothing of adapters beyond the types of this file; adapters know nothing of a backbone beyond
:class:`TowerShape`.

    slot           x                                   y
    embed          embeddings                          the same
    attn_in        normalised block input              the same
    attn_q/k/v     attention input                     the query, key or value map's output (linear)
    attn_kv        attention input                     the pair (keys, values); may come back with more tokens in front
    attn_out       concatenated heads                  the output map's output (linear)
    attn_sublayer  normalised block input              the attention sublayer's output, before the residual sum
    mlp_in         normalised MLP input                the same
    mlp_fc1        MLP input                           the first map's output, before the activation (linear)
    mlp_fc2        activated hidden units              the second map's output (linear)
    mlp_out        normalised MLP input                the MLP's output, before the residual sum
    block_out      the block's input                   the block's output, after the residual sum
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

SLOTS = (
    "embed",
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_kv",
    "attn_out",
    "attn_sublayer",
    "mlp_in",
    "mlp_fc1",
    "mlp_fc2",
    "mlp_out",
    "block_out",
)
"""Every slot, in the order in which a tower meets them."""

LINEAR_SLOTS = ("attn_q", "attn_k", "attn_v", "attn_out", "mlp_fc1", "mlp_fc2")
"""The slots around one linear map: ``y = x @ kernel + bias``."""

Slot = Callable[[str, jax.Array, Any], Any]
"""``slot(name, x, y) -> y'`` with x and y ``[batch, tokens, width]``: what a block calls at each of its slots."""


def empty_slot(name: str, x: jax.Array, y: Any) -> Any:
    """The slot with nothing in it: the output goes on untouched, and the compiled program is the plain backbone's."""
    del name, x
    return y


class TowerShape(NamedTuple):
    """What adapters must know of a tower: how many blocks, and how wide the arrays at its slots are."""

    depth: int
    width: int
    mlp_width: int

    def widths(self, slot: str) -> tuple[int, int]:
        """The widths of x and y at a slot."""
        return {
            "mlp_fc1": (self.width, self.mlp_width),
            "mlp_fc2": (self.mlp_width, self.width),
        }.get(slot, (self.width, self.width))


class Segment(NamedTuple):
    """Consecutive blocks whose slots hold the same adapters, so that one scan runs them.

    Attributes:
        start: the first block.
        stop: one past the last block.
        tree: what the occupants need, each leaf ``[stop - start, ...]``; a block sees its own layer's slice.
        fill: makes a block's slots from its slice of ``tree``.
    """

    start: int
    stop: int
    tree: Any
    fill: Callable[[Any], Slot]


def between(segments: Sequence[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """The part of ``segments`` that runs the blocks ``start`` to ``stop - 1``, cut where it must be."""
    parts = []
    for segment in segments:
        first, last = max(start, segment.start), min(stop, segment.stop)
        if (first, last) == (segment.start, segment.stop):
            parts.append(segment)
        elif first < last:
            cut = slice(first - segment.start, last - segment.start)
            tree = jax.tree.map(lambda a, cut=cut: a[cut], segment.tree)
            parts.append(Segment(first, last, tree, segment.fill))
    return tuple(parts)


class Joint(NamedTuple):
    """A point at which the two towers meet: after these blocks, ``call`` takes both streams and returns both.

    ``call(image, text, text_mask)`` gets ``[batch, image tokens, width]``, ``[batch, text tokens, width]`` and
    ``bool [batch, text tokens]``, false where the text is padding.
    """

    vision_layer: int
    text_layer: int
    call: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Occupancy(NamedTuple):
    """Adapters as one forward pass meets them: bound to this batch's routes and to this step's dropout key.

    Attributes:
        embed: by tower, the slot after the embeddings.
        segments: by tower, segments that cover every block in order.
        joints: in the order in which both towers reach them.
    """

    embed: Mapping[str, Slot]
    segments: Mapping[str, tuple[Segment, ...]]
    joints: tuple[Joint, ...]


@runtime_checkable
class Adapters(Protocol):
    """What a backbone takes as its ``adapters`` argument: a pytree of parameters that knows where they belong."""

    def occupy(self, route: jax.Array | None, key: jax.Array | None) -> Occupancy:
        """Binds the adapters to a batch.

        Args:
            route: ``int32 [batch]``, each example's task, -1 for the bare backbone; None where tasks are not stacked.
            key: the step's dropout key; None for evaluation.
        """
        ...


def vacant(depths: Mapping[str, int]) -> Occupancy:
    """The occupancy of a backbone without adapters: one segment a tower, every slot empty."""
    segments = {tower: (Segment(0, depth, (), lambda _: empty_slot),) for tower, depth in depths.items()}
    return Occupancy(dict.fromkeys(depths, empty_slot), segments, ())
