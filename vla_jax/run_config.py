"""What the configurations of all experiments have in common."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vla_jax.backbones.transformer import Compute
from vla_jax.training.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every experiment with a pretrained backbone lets be set.

    Attributes:
        preset: the name of the preset it came from.
        backbone: hub name, folder, or ``tiny``.
        storage: dtype in which the frozen backbone is kept; what is trained is float32 always.
        compute: how the backbone is run.
        mesh: the devices.
    """

    preset: str = "default"
    backbone: str = "tiny"
    storage: Literal["float32", "bfloat16", "float16"] = "float32"
    compute: Compute = dataclasses.field(default_factory=Compute)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
