"""Adapters: small trainable modules for the slots of a frozen backbone, and where they go.

One file holds one method. A method's module is written for one example and one layer; layers, tasks and towers are
added by :mod:`vla_jax.adapters.placement` and :mod:`vla_jax.adapters.binding`, alike for every method.
"""

from vla_jax.adapters.binding import BoundAdapters
from vla_jax.adapters.bottleneck import Bottleneck
from vla_jax.adapters.fusion import Fusion
from vla_jax.adapters.lora import LoRA
from vla_jax.adapters.placement import Placement
from vla_jax.adapters.plan import Plan, place

__all__ = ["Bottleneck", "BoundAdapters", "Fusion", "LoRA", "Placement", "Plan", "place"]
