"""The methods by name, each as a comparison takes it: what is trained, what sits where, how fast it may learn.

Settings are those of the method's paper, as shares of the towers' widths and depths where the paper's own numbers would
not fit another tower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from vla_jax.adapters import (
    Fusion,
    Ladder,
    LoRA,
    Placement,
    adapter_plus,
    clip_adapter,
    clip_lora,
    cocoop,
    compacter,
    coop,
    cross_modal_adapter,
    houlsby,
    hyperformer,
    ia3,
    maple,
    mma,
    parallel,
    pfeiffer,
    place,
    prefix_tuning,
    uniadapter,
    vl_adapter,
    vpt_deep,
    vpt_shallow,
)
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.composed_methods import composed, is_composed
from vla_jax.errors import UserError, unknown
from vla_jax.variants import Variant

Pace = Literal["head", "adapters", "light", "full"]
"""Which grid of learning rates: a linear head; adapters; few or multiplying numbers; the backbone itself, or a network
that makes an adapter's weights."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method as it is compared.

    Attributes:
        title: in tables and figures.
        family: what it is grouped with.
        placements: what sits in the slots of a CLIP of this shape.
        rules: the preset of the parameter table that says what is trained.
        pace: which grid of learning rates it is given.
        robust_drop: whether training drops the lower layers' adapters at random, as many as it may.
    """

    title: str
    family: str
    placements: Callable[[CLIPConfig], tuple[Placement, ...]] = lambda config: ()
    rules: str = "adapters"
    pace: Pace = "adapters"
    robust_drop: bool = False


def _fixed(placement: Placement) -> Callable[[CLIPConfig], tuple[Placement, ...]]:
    return lambda config: (placement,)


def _lora(name: str, **settings: object) -> Callable[[CLIPConfig], tuple[Placement, ...]]:
    """LoRA of rank 8 on queries and values, the places of Hu et al. 2022."""
    return _fixed(Placement(LoRA(rank=8, **settings), name, slots=("attn_q", "attn_v")))


def _phm() -> Placement:
    """Compacter's places and width, with full blocks and a rule for each map instead of factors and one rule."""
    placement = compacter()
    method = dataclasses.replace(placement.method, factorised=False, shared_rule=False)
    return dataclasses.replace(placement, method=method, name="phm")


def _paired(placement: Placement, config: CLIPConfig) -> Placement:
    """In as many of the last blocks of both towers as the shallower one has, for weights that both share."""
    return dataclasses.replace(placement, layers=f"last {min(config.vision.depth, config.text.depth)}")


def _mma(config: CLIPConfig) -> tuple[Placement, ...]:
    """The upper two thirds of the blocks: layers 5 to 12 of 12 in the paper."""
    depth = min(config.vision.depth, config.text.depth)
    return (dataclasses.replace(mma(), layers=f"last {max(1, round(2 * depth / 3))}"),)


def _maple(config: CLIPConfig) -> tuple[Placement, ...]:
    """The lower three quarters of the blocks: 9 of 12 in the paper."""
    depth = min(config.vision.depth, config.text.depth)
    return (maple(depth=max(1, round(0.75 * depth))),)


def _uniadapter(config: CLIPConfig) -> tuple[Placement, ...]:
    """Two thirds of the towers' width: 512 of 768 in the paper."""
    placement, width = _paired(uniadapter(), config), min(config.vision.width, config.text.width)
    return (dataclasses.replace(placement, method=placement.method.with_rank(round(2 * width / 3))),)


METHODS: Mapping[str, Entry] = MappingProxyType(
    {
        "linear": Entry("linear head alone", "reference", rules="linear_probe", pace="head"),
        "full": Entry("full fine-tuning", "reference", rules="full", pace="full"),
        "bitfit": Entry("BitFit", "selection", rules="bitfit", pace="light"),
        "layer_norm": Entry("LayerNorm tuning", "selection", rules="layer_norm", pace="light"),
        "projection": Entry("projection tuning", "selection", rules="projection"),
        "ia3": Entry("(IA)³", "selection", _fixed(ia3()), pace="light"),
        "pfeiffer": Entry("Pfeiffer", "bottleneck", _fixed(pfeiffer())),
        "houlsby": Entry("Houlsby", "bottleneck", _fixed(houlsby())),
        "parallel": Entry("parallel", "bottleneck", _fixed(parallel())),
        "adapter_plus": Entry("AdapterPlus", "bottleneck", _fixed(adapter_plus())),
        "vl_adapter": Entry("VL-Adapter", "bottleneck", _fixed(vl_adapter()), rules="layer_norm"),
        "adapter_drop": Entry("Pfeiffer, AdapterDrop", "bottleneck", _fixed(pfeiffer()), robust_drop=True),
        "lora": Entry("LoRA", "low rank", _lora("lora", alpha=16.0)),
        "lora_plus": Entry("LoRA+", "low rank", _lora("lora", alpha=16.0), rules="lora_plus"),
        "rslora": Entry("rsLoRA", "low rank", _lora("rslora", alpha=16.0, rank_stabilised=True)),
        "clip_lora": Entry("CLIP-LoRA", "low rank", _fixed(clip_lora())),
        "dora": Entry("DoRA", "low rank", _lora("dora", alpha=16.0, decomposed=True)),
        "pissa": Entry("PiSSA", "low rank", _lora("pissa", alpha=8.0, init="pissa")),
        "phm": Entry("PHM", "shared weights", _fixed(_phm())),
        "compacter": Entry("Compacter", "shared weights", _fixed(compacter())),
        "hyperformer": Entry("Hyperformer", "shared weights", _fixed(hyperformer()), pace="full"),
        "coop": Entry("CoOp", "tokens", _fixed(coop(4)), pace="light"),
        "cocoop": Entry("CoCoOp", "tokens", _fixed(cocoop()), pace="light"),
        "vpt_shallow": Entry("VPT shallow", "tokens", _fixed(vpt_shallow()), pace="light"),
        "vpt_deep": Entry("VPT deep", "tokens", _fixed(vpt_deep()), pace="light"),
        "maple": Entry("MaPLe", "tokens", _maple, pace="light"),
        "prefix": Entry("prefix tuning", "tokens", _fixed(prefix_tuning()), pace="full"),
        "fusion": Entry("fusion (gate, attention)", "cross-modal", _fixed(Placement(Fusion(reduction=4), "fusion"))),
        "cross_modal": Entry(
            "Cross-Modal Adapter", "cross-modal", lambda config: (_paired(cross_modal_adapter(), config),)
        ),
        "mma": Entry("MMA", "cross-modal", _mma),
        "uniadapter": Entry("UniAdapter", "cross-modal", _uniadapter),
        "clip_adapter": Entry("CLIP-Adapter", "beside the towers", _fixed(clip_adapter())),
        "ladder": Entry("ladder side tuning", "beside the towers", _fixed(Placement(Ladder(), "ladder"))),
    }
)
"""Every method by name, in the order of the tables."""


def entry(name: str) -> Entry:
    """A method by name, or several that are put together as :mod:`vla_jax.composed_methods` says.

    Raises:
        UserError: if there is none.
    """
    if is_composed(name):
        return composed(name, entry)
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def variant(
    name: str, shape: CLIPConfig, learning_rates: tuple[float, ...], selection_share: float | None = None
) -> Variant:
    """A method as a comparison takes it on a CLIP of this shape.

    Args:
        name: one of :data:`METHODS`, or several together.
        shape: the CLIP's.
        learning_rates: the grid from which its own is chosen.
        selection_share: share of the steps after which it is chosen; the budget's if None.

    Raises:
        UserError: if there is no such method.
    """
    known = entry(name)
    return Variant(
        name,
        known.title,
        known.rules,
        known.placements(shape),
        robust_drop=min(shape.vision.depth, shape.text.depth) - 1 if known.robust_drop else 0,
        group=known.family,
        learning_rates=learning_rates,
        selection_share=selection_share,
    )


def fits(name: str, config: CLIPConfig) -> UserError | None:
    """What keeps a method from a CLIP of this shape, such as weights shared by towers of two widths; else None."""
    try:
        place(entry(name).placements(config), config.towers)
    except UserError as error:
        return error
    return None
