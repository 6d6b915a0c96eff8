"""What share each task of a mixture has, and in which order tasks come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from vla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What share of the examples each task has.

    Attributes:
        by: ``size``, as many as it has, so that an epoch sees every example once (VL-Adapter's "roundrobin", which is
            in truth all tasks' batches concatenated and shuffled); ``balanced``, the same for all; ``temperature``, in
            proportion to ``n ** (1 / temperature)`` for n examples (Raffel et al. 2020, section 3.5.2); ``weights``, as
            given.
        temperature: 1 is by size, and the larger it is, the more equal shares are.
        weights: one for each task, of any sum.
    """

    by: Literal["size", "balanced", "temperature", "weights"] = "size"
    temperature: float = 2.0
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if self.by not in ("size", "balanced", "temperature", "weights"):
            raise UserError(f"tasks are mixed by size, balanced, temperature or weights; got {self.by!r}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"the temperature of a mixture must be above 0, got {self.temperature}")
        if bool(self.weights) != (self.by == "weights"):
            raise UserError(f"weights go with by=weights alone; got by={self.by} and weights={self.weights}")
        if not all(weight > 0 and math.isfinite(weight) for weight in self.weights):
            raise UserError(f"weights of a mixture must be above 0, got {self.weights}; leave a task out instead")

    def shares(self, sizes: Sequence[int]) -> np.ndarray:
        """Each task's share of the examples.

        Args:
            sizes: examples of each task.

        Returns:
            float64 ``[tasks]`` of sum one.

        Raises:
            UserError: if there is not one weight a task.
        """
        if self.by == "weights" and len(self.weights) != len(sizes):
            raise UserError(f"{len(sizes)} tasks are mixed, and {len(self.weights)} weights given; one for each")
        power = {"size": 1.0, "balanced": 0.0, "temperature": 1 / self.temperature}.get(self.by)
        raw = np.asarray(self.weights) if power is None else np.asarray(sizes, np.float64) ** power
        return raw / raw.sum()


@dataclasses.dataclass(frozen=True)
class Interleaving:
    """An endless sequence of tasks with given shares, and how often a task has come before, by position.

    The first task takes its share of the positions, evenly spaced; the second takes its share of what is left; and so
    on.

    Attributes:
        units: the share of each task, in whole units.
    """

    units: tuple[int, ...]

    @classmethod
    def of(cls, shares: Sequence[float]) -> Interleaving:
        """For shares of any sum; each task comes at some time, however small its share is."""
        # As fractions, so that what is a whole number of examples in an epoch comes out as one.
        exact = [Fraction(share / sum(shares)).limit_denominator(10**9) for share in shares]
        common = math.lcm(*(share.denominator for share in exact))
        return cls(tuple(max(1, int(share * common)) for share in exact))

    def __call__(self, position: int) -> tuple[int, int]:
        """The task at a position, and how many of its examples or batches came before."""
        left = sum(self.units)
        for task, units in enumerate(self.units):
            others, others_next = (at * (left - units) // left for at in (position, position + 1))
            if others == others_next:
                return task, position - others
            position, left = others, left - units
        raise AssertionError("the last task takes all that is left")

    def counts(self, positions: int) -> list[int]:
        """How often each task comes among the first so many positions."""
        left, found = sum(self.units), []
        for units in self.units:
            others = positions * (left - units) // left
            found.append(positions - others)
            positions, left = others, left - units
        return found
