"""What is left on plain scenes: against the backbone's own zero-shot numbers, with adapters on and taken out again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from word_clip import export_word_clip

from vla_jax import names
from vla_jax.adapters import LoRA, Placement, place
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.image import Preprocess
from vla_jax.data.text import Tokenize
from vla_jax.evaluation.forgetting import MEASURES, Kept, OldDomain
from vla_jax.evaluation.scene_zero_shot import SceneQuestions, clip_encoders, zero_shot
from vla_jax.training.sharding import MeshConfig, make_mesh

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:.*is cut"),  # full descriptions are longer than the small context
]

SIZES = {"image_size": 32, "split": "test", "classes": 24, "candidates": 16, "quadruples": 6}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(export_word_clip(tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="module")
def old(backbone):
    return OldDomain(backbone, SceneQuestions.draw(**SIZES), Compute(), make_mesh(MeshConfig()), batch_size=32)


@pytest.fixture(scope="module")
def plan(backbone):
    return place(
        [Placement(LoRA(rank=4), "lora", towers=("vision",), slots=("attn_q", "attn_v"))], backbone.config.towers
    )


@pytest.fixture(scope="module")
def adapted(backbone, plan):
    """Adapters that do a lot."""
    generator = np.random.default_rng(0)
    flat = names.flatten(plan.init(jax.random.key(0), backbone.params))
    drawn = {name: jnp.asarray(0.5 * generator.standard_normal(leaf.shape), leaf.dtype) for name, leaf in flat.items()}
    return {"backbone": backbone.params, "adapters": names.unflatten(drawn)}


def test_before_is_what_the_backbone_can_do(backbone, old):
    encoders = clip_encoders(
        CLIP(backbone.config), Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, 24), batch_size=32
    )
    expected = zero_shot(*encoders(backbone.params), **SIZES)
    found = old.before.right
    assert list(found) == list(MEASURES)
    for name in ("shape", "color", "image_to_text", "text_to_image"):
        assert found[name].mean() == getattr(expected, name).value
    assert found["group"].mean() == pytest.approx(np.mean([tag.value for tag in expected.group.values()]))
    assert {name: len(right) for name, right in found.items()} == {
        "shape": 24,
        "color": 24,
        "image_to_text": 16,
        "text_to_image": 16,
        "text": 18,
        "image": 18,
        "group": 18,
    }
    np.testing.assert_array_equal(found["group"], found["text"] & found["image"])
    assert 0 < found["shape"].mean() < 1  # by chance, since the weights are random
    assert old.before.off is None


def test_adapters_that_are_taken_out_leave_the_backbone_to_the_last_bit(old, plan, adapted):
    kept = old.kept(adapted, plan)
    assert kept.exact
    np.testing.assert_array_equal(old.features(adapted), old.features({"backbone": adapted["backbone"]}))
    for name in MEASURES:
        np.testing.assert_array_equal(kept.off[name], old.before.right[name])
    # With them it is another model.
    assert not np.allclose(old.features(adapted, plan), old.features(adapted), atol=0.1)
    assert any((kept.right[name] != kept.off[name]).any() for name in MEASURES)


def test_a_weight_that_moved_ever_so_little_is_noticed(old, plan, adapted):
    moved = names.flatten(adapted)
    name = "backbone/vision/blocks/mlp/fc1/bias"
    moved[name] = moved[name].at[0, 0].add(1e-3)
    assert not old.kept(names.unflatten(moved), plan).exact


def test_a_tower_that_was_trained_itself_has_no_way_back(backbone, old):
    kept = old.kept({"backbone": backbone.params}, place([], backbone.config.towers))
    assert kept.off is None
    for name in MEASURES:
        np.testing.assert_array_equal(kept.right[name], old.before.right[name])


@pytest.mark.parametrize("off", [False, True])
def test_what_was_kept_goes_through_a_file(off):
    right = {name: np.arange(5) % 2 == 0 for name in MEASURES}
    kept = Kept(right)
    if off:
        kept = dataclasses.replace(kept, off={name: ~value for name, value in right.items()}, exact=True)
    again = Kept.from_bytes(kept.to_bytes())
    assert again.exact == off
    assert (again.off is None) == (not off)
    for part in ("right", "off")[: 1 + off]:
        for name in MEASURES:
            np.testing.assert_array_equal(getattr(again, part)[name], getattr(kept, part)[name])
