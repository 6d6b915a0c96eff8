"""What a run bears before it stops."""

from __future__ import annotations

import dataclasses

from vla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What a run bears before it stops.

    Attributes:
        skipped_steps: it stops after so many steps in a row that were not applied, since their loss or gradient was not
            finite.
        unsaved: whether it trains on where a checkpoint or its numbers cannot be written, and tries again when the next
            ones are due; otherwise it stops.
    """

    skipped_steps: int = 10
    unsaved: bool = False

    def __post_init__(self):
        if self.skipped_steps < 1:
            raise UserError(f"skipped_steps is {self.skipped_steps}; allowed: 1 (the first one stops the run) or more")
