"""The shapes of CLIP: what a configuration says, and the published ones by name."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vla_jax.backbones.transformer import TowerConfig
from vla_jax.errors import UserError, unknown
from vla_jax.slots import TowerShape

Pooling = Literal["first_eos", "largest_id"]


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The shape of a CLIP.

    Attributes:
        vision: the image tower.
        text: the text tower.
        image_size: pixels a side.
        patch_size: pixels a side; must divide ``image_size``.
        vocabulary_size: number of token ids.
        context_length: the longest text, in tokens.
        projection: width of the joint feature space.
        eos_token_id: the end-of-text token.
        pooling: which token a text's feature is read at: the first end-of-text token, or the largest id, the rule of
            checkpoints whose configuration says ``eos_token_id = 2``.
    """

    vision: TowerConfig
    text: TowerConfig
    image_size: int = 224
    patch_size: int = 32
    vocabulary_size: int = 49408
    context_length: int = 77
    projection: int = 512
    eos_token_id: int = 49407
    pooling: Pooling = "first_eos"

    def __post_init__(self):
        if self.image_size < 1 or self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(f"image_size {self.image_size} is not a positive multiple of patch_size {self.patch_size}")
        if self.pooling not in ("first_eos", "largest_id"):
            raise unknown("text pooling", self.pooling, ("first_eos", "largest_id"))
        if not 0 <= self.eos_token_id < self.vocabulary_size:
            raise UserError(f"eos_token_id {self.eos_token_id} is outside the vocabulary of {self.vocabulary_size}")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def towers(self) -> dict[str, TowerShape]:
        """What adapters need to know: depth and widths of each tower."""
        towers = {"vision": self.vision.shape, "text": self.text.shape}
        return {name: shape._replace(features=self.projection) for name, shape in towers.items()}

    def check_text_length(self, name: str, length: int) -> None:
        """Refuses texts for which there is no room.

        Args:
            name: of the setting that says how long texts are.
            length: tokens a text.

        Raises:
            UserError: if that is longer than the context.
        """
        if length > self.context_length:
            raise UserError(f"{name} {length} is longer than the backbone's context of {self.context_length} tokens")

    @classmethod
    def preset(cls, name: str) -> CLIPConfig:
        """A published shape by name, such as ``vit_b_32``; see :data:`PRESETS`."""
        if name not in PRESETS:
            raise unknown("CLIP shape", name, PRESETS)
        return PRESETS[name]


def _openai(width: int, depth: int, patch: int, size: int, text_width: int, projection: int) -> CLIPConfig:
    """OpenAI's checkpoints: heads 64 wide, MLPs four times the width, quick gelu, twelve text blocks."""
    return CLIPConfig(
        vision=TowerConfig(width, depth, width // 64, 4 * width),
        text=TowerConfig(text_width, 12, text_width // 64, 4 * text_width),
        image_size=size,
        patch_size=patch,
        projection=projection,
        # Their configurations on the hub say eos_token_id = 2, which asks for this rule.
        pooling="largest_id",
    )


def _openclip(vision: tuple[int, int, int, int], text: tuple[int, int], patch: int, projection: int) -> CLIPConfig:
    """OpenCLIP's LAION checkpoints in the hub's format: exact gelu; vision is (width, depth, heads, MLP width)."""
    text_width, text_depth = text
    return CLIPConfig(
        vision=TowerConfig(*vision, activation="gelu"),
        text=TowerConfig(text_width, text_depth, text_width // 64, 4 * text_width, activation="gelu"),
        patch_size=patch,
        projection=projection,
        pooling="largest_id",
    )


PRESETS: dict[str, CLIPConfig] = {
    "vit_b_32": _openai(768, 12, 32, 224, 512, 512),
    "vit_b_16": _openai(768, 12, 16, 224, 512, 512),
    "vit_l_14": _openai(1024, 24, 14, 224, 768, 768),
    "vit_l_14_336": _openai(1024, 24, 14, 336, 768, 768),
    "openclip_b_32": _openclip((768, 12, 12, 3072), (512, 12), 32, 512),
    "openclip_b_16": _openclip((768, 12, 12, 3072), (512, 12), 16, 512),
    "openclip_l_14": _openclip((1024, 24, 16, 4096), (768, 12), 14, 768),
    "openclip_h_14": _openclip((1280, 32, 16, 5120), (1024, 24), 14, 1024),
    "openclip_g_14": _openclip((1408, 40, 16, 6144), (1024, 24), 14, 1024),
    "openclip_bigg_14": _openclip((1664, 48, 16, 8192), (1280, 32), 14, 1280),
}
