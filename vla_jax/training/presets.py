"""Ready rules for the parameter table: what the usual methods train, what decays, and how CLIP's names are sharded.

All but one are optional rules: they serve trees with and without adapters or heads, and leave a dimension whole that a
mesh axis does not divide. Rules of one's own go in front: ``ParameterTable(own + preset("adapters"))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vla_jax.errors import unknown
from vla_jax.training.optimizer import GroupConfig
from vla_jax.training.table import Rule

# What an adapter started from and takes off again is stored beside it and stays (LoRA from singular vectors).
_KEPT = (Rule(r"adapters/.*/frozen/.*", train=False, optional=True),)
_ADDED = (*_KEPT, Rule(r"(adapters|heads)/.*", train=True, optional=True))
_REST_FROZEN = (Rule(r"backbone/.*", train=False, optional=True),)

# What was added is trained, the backbone is frozen.
ADAPTERS = _ADDED + _REST_FROZEN

# Everything is trained: full fine-tuning.
FULL = (*_KEPT, Rule(r".*", train=True, optional=True))

# Everything that a model that is shown pictures alone makes use of: its full fine-tuning.
IMAGE_TOWER = (*_ADDED, Rule(r"backbone/vision/.*", train=True, optional=True), *_REST_FROZEN)

# The heads alone are trained.
LINEAR_PROBE = (
    Rule(r"heads/.*", train=True, optional=True),
    Rule(r"(backbone|adapters)/.*", train=False, optional=True),
)

# Every bias of the backbone and what was added (BitFit; Ben Zaken, Goldberg and Ravfogel 2022).
BITFIT = (*_ADDED, Rule(r"backbone/(.*/)?bias", train=True, optional=True), *_REST_FROZEN)

# Scale and bias of every LayerNorm of the backbone and what was added.
LAYER_NORM = (*_ADDED, Rule(r"backbone/(.*/)?\w*norm\w*/(scale|bias)", train=True, optional=True), *_REST_FROZEN)

# The towers' projections into the space in which they meet, and what was added.
PROJECTION = (*_ADDED, Rule(r"backbone/(.*/)?projection/kernel", train=True, optional=True), *_REST_FROZEN)

# What was added is trained, LoRA's b faster than the rest (LoRA+; Hayou, Ghosh and Yu 2024): see GROUPS.
LORA_PLUS = (Rule(r"adapters/.*/b", group="lora_b", optional=True), *ADAPTERS)

# The attention of AdapterFusion, over adapters that have been trained before (Pfeiffer et al. 2021, second stage). Not
# optional: a tree without it would leave the head alone to be trained.
ADAPTER_FUSION = (
    Rule(r"adapters/.*/fuse/(query|key|value)/(kernel|bias)", train=True),
    *LINEAR_PROBE,
)

# What OpenCLIP's training leaves out of weight decay: biases, norms and other vectors, and the temperature. Adapters'
# vectors among them: the zero that decay pulls to would switch off a map that one of them multiplies.
DEFAULT_DECAY = (Rule(r"(.*/)?(bias|scale|shift|magnitude|class_embedding|logit_scale)", decay=False, optional=True),)

# Products inside a block are cut in pairs over "tensor", the first by columns and the second by rows, so that a pair
# needs one sum of activations (Megatron-LM; Shoeybi 2019, section 3); "fsdp" cuts the other dimension for storage.
# Norms, patch and position embeddings, adapters and heads are small and replicated. Blocks are stacked: [depth, in,
# out].
DEFAULT_SHARDING = (
    Rule(r"backbone/.*blocks/(.*/)?(q|k|v|fc1)/kernel", sharding=(None, "fsdp", "tensor"), optional=True),
    Rule(r"backbone/.*blocks/(.*/)?(q|k|v|fc1)/bias", sharding=(None, "tensor"), optional=True),
    Rule(r"backbone/.*blocks/(.*/)?(out|fc2)/kernel", sharding=(None, "tensor", "fsdp"), optional=True),
    Rule(r"backbone/(.*/)?token_embedding", sharding=("tensor", "fsdp"), optional=True),
    Rule(r"backbone/(.*/)?projection/kernel", sharding=("fsdp",), optional=True),
    Rule(r".*", sharding=(), optional=True),
)

PRESETS: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {
        "adapters": ADAPTERS,
        "full": FULL,
        "image_tower": IMAGE_TOWER,
        "linear_probe": LINEAR_PROBE,
        "bitfit": BITFIT,
        "layer_norm": LAYER_NORM,
        "projection": PROJECTION,
        "lora_plus": LORA_PLUS,
        "adapter_fusion": ADAPTER_FUSION,
    }
)

# The optimiser groups that a preset's rules name, by preset. 16 is the ratio that the authors of LoRA+ recommend.
GROUPS: Mapping[str, tuple[GroupConfig, ...]] = MappingProxyType(
    {"lora_plus": (GroupConfig("lora_b", learning_rate_ratio=16.0),)}
)


def preset(name: str) -> tuple[Rule, ...]:
    """The rules of a method, with what decays and how CLIP's names are sharded.

    Args:
        name: one of :data:`PRESETS`; where it has an entry in :data:`GROUPS`, the optimiser needs these groups.

    Raises:
        UserError: if there is no such preset.
    """
    if name not in PRESETS:
        raise unknown("parameter preset", name, PRESETS)
    return PRESETS[name] + DEFAULT_DECAY + DEFAULT_SHARDING
