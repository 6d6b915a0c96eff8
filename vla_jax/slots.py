"""Slots: the named places of a transformer where an adapter may sit, and what a backbone and its adapters agree on.

A backbone calls a slot with the input and the output of the computation the slot stands for and goes on with what
comes back. It knows nothing of adapters beyond the types of this file; adapters know nothing of a backbone beyond
:class:`Site` and :class:`TowerShape`.

    slot           x                                   y
    tokens         embedded tokens                     tokens inserted so far; comes back with more of them appended
    embed          embeddings                          the same
    prompts        the block's input                   the inserted tokens in it, in every block but the first
    attn_in        normalised block input              the same
    attn_q/k/v     attention input                     the query, key or value map's output (linear)
    attn_kv        attention input                     the pair (keys, values); may come back with more tokens in front
    attn_out       concatenated heads                  the output map's output (linear)
    attn_sublayer  normalised block input              the attention sublayer's output, before the residual sum
    mlp_in         normalised MLP input                the same
    mlp_fc1        MLP input                           the first map's output, before the activation (linear)
    mlp_hidden     activated hidden units              the same
    mlp_fc2        activated hidden units              the second map's output (linear)
    mlp_out        normalised MLP input                the MLP's output, before the residual sum
    block_out      the block's input                   the block's output, after the residual sum
    side           all states [1 + blocks, tokens, w]  the last block's output, before it is pooled
    projection     the pooled token                    the tower's feature (linear); one token wide

``tokens``, ``embed``, ``side`` and ``projection`` exist once a tower, all others once a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

SLOTS = (
    "tokens",
    "embed",
    "prompts",
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_kv",
    "attn_out",
    "attn_sublayer",
    "mlp_in",
    "mlp_fc1",
    "mlp_hidden",
    "mlp_fc2",
    "mlp_out",
    "block_out",
    "side",
    "projection",
)
"""Every slot, in the order in which a tower meets them."""

SINGLE_SLOTS = ("tokens", "embed", "side", "projection")
"""The slots that exist once a tower instead of once a block."""

LINEAR_MAPS: Mapping[str, str] = MappingProxyType(
    {
        "attn_q": "blocks/attn/q",
        "attn_k": "blocks/attn/k",
        "attn_v": "blocks/attn/v",
        "attn_out": "blocks/attn/out",
        "mlp_fc1": "blocks/mlp/fc1",
        "mlp_fc2": "blocks/mlp/fc2",
        "projection": "projection",
    }
)
"""The slots around one linear map, ``y = x @ kernel + bias``, and the map's name below its tower's parameters."""

LINEAR_SLOTS = tuple(LINEAR_MAPS)


class LinearWeights(NamedTuple):
    """The frozen map at a linear slot: ``kernel [in, out]`` and ``bias [out]``, or None where it has none."""

    kernel: jax.Array
    bias: jax.Array | None


class KeysValues(NamedTuple):
    """What the slot ``attn_kv`` is about.

    Attributes:
        keys: ``[batch, tokens, width]``.
        values: ``[batch, tokens, width]``.
        seen: ``bool [batch, added]``, false where an example does not see a token that was put in front; None where
            all see all of them.
    """

    keys: jax.Array
    values: jax.Array
    seen: jax.Array | None = None


class Inserted(NamedTuple):
    """Tokens that adapters put into a tower's stream.

    Attributes:
        start: where they begin in the stream.
        count: how many there are.
        seen: ``bool [batch, count]``, false where an example does without one; None where all have all of them.
    """

    start: int
    count: int
    seen: jax.Array | None = None


@runtime_checkable
class Slot(Protocol):
    """What a block calls at each of its slots."""

    readings: Mapping[str, Any]
    """What the occupants hand out for inspection, by name, each ``[batch, ...]``; filled while the slot is called."""

    def __call__(self, name: str, x: jax.Array, y: Any, weights: LinearWeights | None = None) -> Any:
        """What becomes of y, ``[batch, tokens, width]``; ``weights`` are given at linear slots."""
        ...


class _EmptySlot:
    """The slot with nothing in it: the output goes on untouched, and the compiled program is the plain backbone's."""

    readings: Mapping[str, Any] = MappingProxyType({})

    def __call__(self, name: str, x: jax.Array, y: Any, weights: LinearWeights | None = None) -> Any:
        del name, x, weights
        return y


empty_slot: Slot = _EmptySlot()


class Site(NamedTuple):
    """A place for an adapter, as a method may want to know it.

    Attributes:
        tower: ``vision`` or ``text``; ``joint`` for a method that joins both.
        slot: the slot.
        depth: how many blocks the tower has; of a joint method's towers the shallower one.
        widths: of x and y; for a joint method of the two towers' streams, vision first.
        streams: by tower, the width of its stream.
        features: the width of the space in which the towers meet, None where there is none.
    """

    tower: str
    slot: str
    depth: int
    widths: tuple[int, int]
    streams: tuple[tuple[str, int], ...]
    features: int | None


class TowerShape(NamedTuple):
    """What adapters must know of a tower: how many blocks, and how wide the arrays at its slots are.

    ``features`` is the width its projection maps to, None for a tower without a projection.
    """

    depth: int
    width: int
    mlp_width: int
    features: int | None = None

    def widths(self, slot: str) -> tuple[int, int]:
        """The widths of x and y at a slot."""
        return {
            "mlp_fc1": (self.width, self.mlp_width),
            "mlp_hidden": (self.mlp_width, self.mlp_width),
            "mlp_fc2": (self.mlp_width, self.width),
            "projection": (self.width, self.features or 0),
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


Insert = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]]
"""``insert(embedded, image) -> (tokens, seen)``: from ``[batch, length, width]`` embeddings, and for a conditioned
adapter the ``[batch, features]`` image features, the ``[batch, count, width]`` tokens to insert and who sees them."""


class Side(Protocol):
    """What a tower calls beside itself, once its last block is done."""

    readings: Mapping[str, Any]
    """As :attr:`Slot.readings`."""

    def __call__(self, states: jax.Array, stream: jax.Array, seen: jax.Array) -> jax.Array:
        """What becomes of the stream.

        Args:
            states: the embeddings and every block's output, ``[states, batch, tokens, width]``.
            stream: the last one, ``[batch, tokens, width]``.
            seen: ``bool [#batch, tokens, tokens]``, which token sees which.
        """
        ...


class Occupancy(NamedTuple):
    """Adapters as one forward pass meets them: bound to this batch's routes and to this step's dropout key.

    Attributes:
        insert: by tower, what makes the tokens to insert; a tower without such adapters is left out.
        embed: by tower, the slot after the embeddings.
        segments: by tower, segments that cover every block in order.
        joints: in the order in which both towers reach them.
        side: by tower, what runs beside it; a tower without such adapters is left out.
        projection: by tower, the slot around the projection.
        conditioned: whether texts can only be begun when their images' features are there.
    """

    insert: Mapping[str, Insert]
    embed: Mapping[str, Slot]
    segments: Mapping[str, tuple[Segment, ...]]
    joints: tuple[Joint, ...]
    side: Mapping[str, Side]
    projection: Mapping[str, Slot]
    conditioned: bool = False


@runtime_checkable
class Adapters(Protocol):
    """What a backbone takes as its ``adapters`` argument: a pytree of parameters that knows where they belong."""

    def occupy(self, route: jax.Array | None, key: jax.Array | None) -> Occupancy:
        """Binds the adapters to a batch.

        Args:
            route: ``int32 [batch]``, each example's task, -1 for the bare backbone; or ``float [batch, tasks]``, the
                weights with which tasks are mixed, 0 throughout for the bare backbone; None where tasks are not
                stacked.
            key: the step's dropout key; None for evaluation.
        """
        ...


def vacant(depths: Mapping[str, int]) -> Occupancy:
    """The occupancy of a backbone without adapters: one segment a tower, every slot empty."""
    segments = {tower: (Segment(0, depth, (), lambda _: empty_slot),) for tower, depth in depths.items()}
    empty = dict.fromkeys(depths, empty_slot)
    return Occupancy({}, empty, segments, (), {}, empty)
