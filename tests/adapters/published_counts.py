"""What the published counts are counted on: CLIP's B/16, T5 base, and VL-Adapter's BART base.

A placement sits in a vision and in a text tower; an encoder and a decoder of one width take their places. A decoder's
layer has three sublayers, so that six of them are nine layers of two.
"""

from __future__ import annotations

from vla_jax.slots import TowerShape

B_16 = {"vision": TowerShape(12, 768, 3072, 512), "text": TowerShape(12, 512, 2048, 512)}
T5_BASE = {"vision": TowerShape(12, 768, 3072), "text": TowerShape(12, 768, 3072)}
BART_BASE = {"vision": TowerShape(6, 768, 3072), "text": TowerShape(9, 768, 3072)}

TASKS = ("vqa", "gqa", "nlvr", "caption")

# Always trained beside the adapters (VL-Adapter's code): the embedding of visual features, and all LayerNorms.
TRAINED_BESIDE = 1_582_848 + 49_152
# BART base, 200 visual tokens of its width, and the embedding of visual features.
FROZEN_AND_VISUAL = 139_420_416 + 200 * 768 + 1_582_848


def trained_share(adapters: int) -> float:
    """Percentage of trained parameters of VL-Adapter's BART base with adapters of so many."""
    return 100 * (adapters + TRAINED_BESIDE) / (FROZEN_AND_VISUAL + adapters)
