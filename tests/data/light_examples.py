"""What worker processes load in the tests of the pipeline: apart, so that they do not import the tests."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from vla_jax.data.image import UnreadablePicture


class Noisy:
    """A row with the example's value and, in training, one random number; unreadable where the example says so."""

    def __call__(self, example, generator=None):
        if example.get("bad"):
            raise UnreadablePicture("cannot be decoded: it is torn")
        noise = 0.0 if generator is None else generator.random()
        return {"value": np.asarray(example["value"], np.int32), "noise": np.asarray(noise)}


class Wearing:
    """4,000 examples of which the first 1,200 can be read."""

    def __len__(self):
        return 4000

    def __getitem__(self, index):
        return {"value": index, "bad": index >= 1200}


class Halting:
    """Forty examples; the thirteenth may never come, for the first process that asks for it."""

    def __init__(self, folder, halt):
        self.flag, self.halt = Path(folder) / "halted", halt

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.halt == "once" and index == 12 and not self.flag.exists():
            self.flag.touch()
            time.sleep(600)
        return {"value": index}
