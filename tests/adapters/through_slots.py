"""Adapters run through their slots without a backbone around them, which would take longer to compile than to test."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from vla_jax.adapters import Plan


def through_slots(
    plan: Plan, params, streams: Mapping[str, jax.Array], route: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What each tower's adapters make of its stream, one slot and one layer after another.

    Args:
        plan: where adapters sit.
        params: their parameters.
        streams: by tower, ``[batch, tokens, width]``; the input of every slot, and the output of the first.
        route: each example's task.
    """
    occupancy, results = plan.bind(params).occupy(route, None), {}
    slots = list(dict.fromkeys(group.site.slot for group in plan.groups))
    for tower, stream in streams.items():
        y = stream
        for segment in occupancy.segments[tower]:
            for k in range(segment.stop - segment.start):
                filled = segment.fill(jax.tree.map(lambda a, k=k: a[k], segment.tree))
                for slot in slots:
                    y = filled(slot, stream, y)
        results[tower] = y
    return results
