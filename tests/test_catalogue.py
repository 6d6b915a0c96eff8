"""The catalogue: every method fits the shapes it is meant for, and trains what its paper counts."""

from __future__ import annotations

import pytest

from vla_jax.adapters import place
from vla_jax.adapters.base import methods
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.loading import load_config
from vla_jax.catalogue import METHODS, entry, fits
from vla_jax.errors import UserError
from vla_jax.training.presets import preset
from vla_jax.training.table import ParameterTable

B_16 = CLIPConfig.preset("vit_b_16")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_fits_the_embedded_backbone(name):
    assert fits(name, load_config("tiny")) is None


def test_what_does_not_fit_is_said_with_its_reason():
    assert [name for name in METHODS if fits(name, B_16)] == ["uniadapter"]
    assert "which need it as (768, 341) and (512, 341)" in str(fits("uniadapter", B_16))


def test_every_family_of_adapters_is_compared():
    compared = {placement.method.kind for name in METHODS for placement in entry(name).placements(load_config("tiny"))}
    # A composition is made of what is compared; a prompt of several places is one kind.
    assert set(methods()) - compared == {"stack", "parallel", "average", "split", "fuse"}


def _trained(name: str) -> int:
    plan = place(entry(name).placements(B_16), B_16.towers)
    tree = {"backbone": abstract_params(B_16)} | ({"adapters": plan.shapes()} if plan.groups else {})
    return ParameterTable(preset(entry(name).rules)).resolve(tree).trained


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mma", 674_560),  # published
        ("full", 149_620_737),  # published for B/16
        ("ia3", 12 * (768 + 768 + 3072) + 12 * (512 + 512 + 2048)),
        ("lora", 12 * 2 * 2 * 8 * (768 + 512)),
        ("clip_lora", 184_320),  # published
        ("rslora", 12 * 2 * 2 * 8 * (768 + 512)),
        ("vpt_shallow", 8 * 768),
        # After two sublayers of each block, both maps: full blocks of a fourth's size a side, a rule of n^3, biases.
        ("phm", 2 * 12 * sum(2 * (4**3 + width * (width // 32) // 4) + width + width // 32 for width in (768, 512))),
        ("pissa", 12 * 2 * 2 * 8 * (768 + 512)),  # what it starts from is kept, not trained
        ("projection", 768 * 512 + 512 * 512),
        ("linear", 0),  # without a task there is no head
    ],
)
def test_trained_parameters(name, count):
    assert _trained(name) == count


def test_an_unknown_method_is_refused_with_its_neighbours():
    with pytest.raises(UserError, match="unknown method 'lara'; did you mean 'lora'"):
        entry("lara")
