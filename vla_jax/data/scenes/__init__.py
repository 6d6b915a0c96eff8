"""Generated pictures of simple objects with exact annotations, and texts about them."""

from vla_jax.data.scenes.quadruples import hard_twins
from vla_jax.data.scenes.render import annotations, object_arrays, patch_labels, render
from vla_jax.data.scenes.sampling import SWAPS, CaptionWeights, Scene, SceneConfig, SceneObject, draw_scene, seeded
from vla_jax.data.scenes.shift import Shift
from vla_jax.data.scenes.source import KINDS, SceneSource

__all__ = [
    "KINDS",
    "SWAPS",
    "CaptionWeights",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "SceneSource",
    "Shift",
    "annotations",
    "draw_scene",
    "hard_twins",
    "object_arrays",
    "patch_labels",
    "render",
    "seeded",
]
