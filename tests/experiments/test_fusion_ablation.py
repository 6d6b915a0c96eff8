from __future__ import annotations

import csv
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import rich.console

from experiments.fusion_ablation import FUSED, PLACED, PRESETS, VARIANTS, Config, check, run, variants
from vla_jax import comparison
from vla_jax.adapters import Fusion
from vla_jax.backbones.loading import load_backbone
from vla_jax.errors import UserError
from vla_jax.evaluation.winoground import CHANCE
from vla_jax.training.sharding import MeshConfig
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(small_backbone_folder, tmp_path_factory):
    return Config(
        backbone=str(small_backbone_folder),
        tasks=("statements",),
        variants=("independent", "gate"),
        rank=4,
        heads=2,
        adapter_rates=(1e-2,),
        budget=Budget(steps=2, batch_size=8, log_every=1),
        train=24,
        validation=10,
        test=30,
        quadruples=3,
        data_dir=str(tmp_path_factory.mktemp("data")),
    )


def _printed(report) -> str:
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(report)
    return console.file.getvalue()


@pytest.mark.slow
def test_a_small_ablation_ends_in_table_figures_and_the_same_rows_again(config, tmp_path, monkeypatch):
    rows = run(config, tmp_path)
    assert [row["name"] for row in rows] == ["independent", "gate"]
    independent, gate = rows
    predictions = {
        row["name"]: {
            kind: dict(np.load(tmp_path / f"runs/statements/{row['name']}/learning_rate_0.01/seed_0/{kind}.npz"))
            for kind in ("test", "quadruples")
        }
        for row in rows
    }
    for row in rows:
        found = predictions[row["name"]]
        assert row["statements"].value == pytest.approx(found["test"]["correct"].mean())
        assert found["test"]["correct"].shape == (30,)
        scores = found["quadruples"]["score"].reshape(3, 2, 2)
        text = [(s[0, 0] > s[1, 0]) and (s[1, 1] > s[0, 1]) for s in scores]
        image = [(s[0, 0] > s[0, 1]) and (s[1, 1] > s[1, 0]) for s in scores]
        group = [a and b for a, b in zip(text, image, strict=True)]
        for name, expected in (("text", text), ("image", image), ("group", group)):
            assert row[f"quadruples_{name}"].value == pytest.approx(np.mean(expected))
        # Kinds share the examples out between them.
        assert {name for name in row if name in ("statements_binding", "statements_relation", "statements_count")}
    assert "statements_difference" not in independent
    right = [predictions[name]["test"]["correct"].astype(float) for name in ("gate", "independent")]
    assert gate["statements_difference"].value == pytest.approx(np.mean(right[0] - right[1]))
    # A gate reads [h ; c] and gives one number for each of the bottleneck's, for both towers at both pairs of blocks.
    assert gate["trained"] - independent["trained"] == 2 * 2 * (2 * 4 * 4 + 4)

    for name in ("results.csv", "results.jsonl", "results.png", "parameters.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [line["variant"] for line in csv.DictReader(file)] == [row["variant"] for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["independent", "gate"]
    assert not (tmp_path / "runs" / "easy_vqa").exists()

    def refuse(*_, **__):
        raise AssertionError("trained although it was done")

    monkeypatch.setattr(comparison, "fit", refuse)
    assert run(config, tmp_path) == rows


def test_every_variant_is_what_it_is_called(config, small_backbone_folder):
    found = {
        v.name: v for v in variants(dataclasses.replace(config, variants=()), load_backbone(str(small_backbone_folder)))
    }
    assert list(found) == [name for name in VARIANTS if name not in PLACED]
    for name in FUSED:
        (placement,) = found[name].placements
        assert placement.method == Fusion(rank=4, heads=2, mix=name)
        assert placement.layers == "all"
    assert found["independent"].placements[0].method == Fusion(rank=4, mix="none")
    assert found["tied"].placements[0].method.shared
    assert {name: v.modalities for name, v in found.items() if len(v.modalities) == 1} == {
        "text_only": ("text",),
        "image_only": ("image",),
    }
    assert {name for name, v in found.items() if v.rules == "full"} == {"text_only", "image_only", "full"}


def test_the_full_preset_has_every_fusion_and_the_independent_adapters_in_every_place(config, small_backbone_folder):
    full = PRESETS["full"]
    backbone = load_backbone(str(small_backbone_folder))
    found = {v.name: v for v in variants(dataclasses.replace(config, variants=full.variants), backbone)}
    assert tuple(found) == full.variants
    assert set(VARIANTS) - set(found) == set(PLACED)
    places = {}
    for name, variant in found.items():
        if variant.placements and isinstance(method := variant.placements[0].method, Fusion) and not method.shared:
            places.setdefault(method.mix, []).append((variant.placements[0].layers, name, variant.group))
    assert places == {
        mix: [(layers, name if layers == "all" else f"{name}_{layers}", group) for layers in ("all", "early", "late")]
        for mix, name, group in [("none", "independent", "independent"), *((mix, mix, "fusion") for mix in FUSED)]
    }
    assert len({variant.title for variant in found.values()}) == len(found)
    assert len(full.budget.seeds) == 3


def test_the_dry_run_counts_what_each_variant_trains(config):
    printed = _printed(check(dataclasses.replace(config, variants=("linear", "gate"))))
    assert f"{4 * 8 + 1}" in next(line for line in printed.splitlines() if "linear head alone" in line)
    assert "fusion in block_out, all layers" in printed
    assert "frozen" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_length": 25}, "text_length 25 is longer than the backbone's context of 24"),
        ({"budget": Budget(batch_size=12)}, "batch size 12 cannot be cut into 8 equal parts"),
        ({"mesh": MeshConfig(tensor=3)}, "does not fit 8 devices"),
        ({"heads": 3, "variants": ("attention",)}, "3 heads|heads 3"),
        ({"backbone": "no such folder"}, "no backbone 'no such folder'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_computed(config, changes, message):
    if jax.device_count() != 8:
        pytest.skip("needs 8 devices")
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("statement",)}, "unknown task 'statement'; did you mean 'statements'"),
        ({"variants": ("gates",)}, "unknown variant 'gates'; did you mean 'gate'"),
        ({"variants": ("best_early",)}, "put one of those before it"),
        ({"variants": ("best_late", "gate")}, "put one of those before it"),
        ({"test": 0}, "at least 1"),
        ({"tasks": ()}, "at least one task"),
    ],
)
def test_what_does_not_exist_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)


def test_presets_know_their_names():
    assert {name: preset.preset for name, preset in PRESETS.items()} == {name: name for name in PRESETS}
    assert set(CHANCE) == {"text", "image", "group"}
