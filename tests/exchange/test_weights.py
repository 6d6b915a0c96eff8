"""Merging and combining what is kept; the algebra itself is tested beside it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from exchanged_clip import close, drawn, far, features, loaded, write_backbone

from vla_jax.adapters import Bottleneck, LoRA, Placement
from vla_jax.errors import UserError
from vla_jax.exchange.weights import combine_saved, export_merged

LORA = Placement(LoRA(rank=2), slots=("attn_q", "mlp_fc1"), layers="first 1")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return loaded(write_backbone(tmp_path_factory.mktemp("clip")))


@pytest.mark.parametrize(
    ("placements", "trained"),
    [
        ((LORA,), "post_norm"),
        ((Placement(LoRA(rank=2, decomposed=True), slots=("projection",)),), ""),
        ((), "projection"),
    ],
    ids=["lora_and_norms", "decomposed", "projections_alone"],
)
def test_a_merged_backbone_has_the_adapters_features(backbone, tmp_path, placements, trained):
    saved = drawn(backbone, placements, trained)
    merged = loaded(export_merged(tmp_path, saved, backbone))
    close(features(merged), features(backbone, saved))
    far(features(merged), features(backbone))
    assert merged.fingerprint != backbone.fingerprint


def test_a_bottleneck_cannot_be_merged(backbone, tmp_path):
    saved = drawn(backbone, (Placement(Bottleneck(rank=2), slots=("mlp_out",)),))
    with pytest.raises(UserError, match=r"\(bottleneck\) at vision/mlp_out/0 cannot be turned into weights"):
        export_merged(tmp_path / "out", saved, backbone)
    assert not (tmp_path / "out").exists()


def test_combined_updates_are_the_weighted_sum(backbone):
    one, two = (drawn(backbone, (LORA,), seed=seed) for seed in (1, 2))
    combined = combine_saved([one, two], [0.25, -0.5], "cat")
    for site in ("vision/attn_q", "text/mlp_fc1"):
        product = lambda s, site=site: (  # noqa: E731
            s.leaves[f"adapters/adapter/{site}/a"] @ s.leaves[f"adapters/adapter/{site}/b"]
        )
        scale = 16 / 4 / (16 / 2)  # alpha over rank, of the combination and of either
        np.testing.assert_allclose(scale * product(combined), 0.25 * product(one) - 0.5 * product(two), atol=1e-5)
    assert (combined.fingerprint, combined.step) == (one.fingerprint, 0)
    assert combined.adapters["placements"][0]["method"]["rank"] == 4


def test_one_adapter_at_weight_one_is_itself(backbone):
    saved = drawn(backbone, (Placement(LoRA(rank=2, decomposed=True), slots=("projection",)),))
    again = combine_saved([saved], [1.0], "cat", backbone=backbone.params)
    close(features(backbone, again), features(backbone, saved))


def test_what_dare_drops_follows_the_seed(backbone):
    both = [drawn(backbone, (LORA,), seed=seed) for seed in (1, 2)]
    first, again, other = (combine_saved(both, [0.5, 0.5], "dare_linear", density=0.5, seed=s) for s in (0, 0, 1))
    name = "adapters/adapter/vision/attn_q/b"
    np.testing.assert_array_equal(first.leaves[name], again.leaves[name])
    assert not np.allclose(first.leaves[name], other.leaves[name])


def test_heads_are_kept_where_they_do_not_conflict(backbone):
    def with_head(name, value, seed):
        saved = drawn(backbone, (LORA,), seed=seed)
        head = {f"heads/{name}/classifier/bias": np.full(2, value, np.float32)}
        return dataclasses.replace(saved, leaves=saved.leaves | head)

    one, two = with_head("a", 1.0, 1), with_head("b", 2.0, 2)
    combined = combine_saved([one, two], [0.5, 0.5], "cat")
    assert {name for name in combined.leaves if name.startswith("heads")} == {
        "heads/a/classifier/bias",
        "heads/b/classifier/bias",
    }
    other = with_head("a", 3.0, 2)
    with pytest.raises(UserError, match=r"have a head heads/a/classifier/bias of their own; .*--no-heads"):
        combine_saved([one, other], [0.5, 0.5], "cat")
    combined = combine_saved([one, other], [0.5, 0.5], "cat", heads=False)
    assert not any(name.startswith("heads") for name in combined.leaves)


def test_what_cannot_be_combined_is_refused(backbone):
    one = drawn(backbone, (LORA,))
    with pytest.raises(UserError, match="trained on two backbones"):
        combine_saved([one, dataclasses.replace(one, fingerprint="f" * 64)], [0.5, 0.5], "cat")
    with pytest.raises(UserError, match="backbone/vision/post_norm/scale was trained itself"):
        combine_saved([one, drawn(backbone, (LORA,), "post_norm")], [0.5, 0.5], "cat")
    with pytest.raises(UserError, match="unknown way to combine 'average'"):
        combine_saved([one, one], [0.5, 0.5], "average")
