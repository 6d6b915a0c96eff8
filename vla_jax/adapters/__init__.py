"""Adapters: small trainable modules for the slots of a frozen backbone, and where they go.

One file holds one method. A method's module is written for one example and one layer; layers, tasks and towers are
added by :mod:`vla_jax.adapters.placement` and :mod:`vla_jax.adapters.binding`, alike for every method.
"""

from vla_jax.adapters.adapter_fusion import Fuse
from vla_jax.adapters.affine import Affine, ia3
from vla_jax.adapters.base import Share
from vla_jax.adapters.binding import BoundAdapters
from vla_jax.adapters.bottleneck import Bottleneck, adapter_plus, houlsby, parallel, pfeiffer, vl_adapter
from vla_jax.adapters.clip_adapter import CLIPAdapter, clip_adapter
from vla_jax.adapters.cocoop import CoCoOp, cocoop
from vla_jax.adapters.composing import compose, fuse
from vla_jax.adapters.composition import Average, Parallel, Split, Stack
from vla_jax.adapters.cross_modal import CrossModal, cross_modal_adapter
from vla_jax.adapters.drop import drop_layers
from vla_jax.adapters.fusion import Fusion
from vla_jax.adapters.hyperformer import Hyperformer, hyperformer, vl_adapter_hyperformer
from vla_jax.adapters.ladder import Ladder
from vla_jax.adapters.learned_tokens import fold
from vla_jax.adapters.lora import LoRA, clip_lora, vl_adapter_lora
from vla_jax.adapters.maple import MaPLe, maple
from vla_jax.adapters.mma import MMA, mma
from vla_jax.adapters.phm import PHM, compacter, vl_adapter_compacter
from vla_jax.adapters.placement import Placement
from vla_jax.adapters.placing import place
from vla_jax.adapters.plan import Plan
from vla_jax.adapters.prefix import Prefix, prefix_tuning
from vla_jax.adapters.prompt import Prompt, coop, prompt_tuning, start_from_phrase, vpt_deep, vpt_shallow
from vla_jax.adapters.router import Router
from vla_jax.adapters.router_training import RouterConfig
from vla_jax.adapters.task_bank import TaskBank, free_places
from vla_jax.adapters.tip_adapter import TipAdapter
from vla_jax.adapters.uniadapter import uniadapter

__all__ = [
    "MMA",
    "PHM",
    "Affine",
    "Average",
    "Bottleneck",
    "BoundAdapters",
    "CLIPAdapter",
    "CoCoOp",
    "CrossModal",
    "Fuse",
    "Fusion",
    "Hyperformer",
    "Ladder",
    "LoRA",
    "MaPLe",
    "Parallel",
    "Placement",
    "Plan",
    "Prefix",
    "Prompt",
    "Router",
    "RouterConfig",
    "Share",
    "Split",
    "Stack",
    "TaskBank",
    "TipAdapter",
    "adapter_plus",
    "clip_adapter",
    "clip_lora",
    "cocoop",
    "compacter",
    "compose",
    "coop",
    "cross_modal_adapter",
    "drop_layers",
    "fold",
    "free_places",
    "fuse",
    "houlsby",
    "hyperformer",
    "ia3",
    "maple",
    "mma",
    "parallel",
    "pfeiffer",
    "place",
    "prefix_tuning",
    "prompt_tuning",
    "start_from_phrase",
    "uniadapter",
    "vl_adapter",
    "vl_adapter_compacter",
    "vl_adapter_hyperformer",
    "vl_adapter_lora",
    "vpt_deep",
    "vpt_shallow",
]
