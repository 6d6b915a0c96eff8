"""The adaptation to new domains on a small random backbone: its rows, its files, what it reads again and refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from experiments.domain_adaptation import PRESETS, Config, _kept, check, run, variants
from vla_jax import comparison, names
from vla_jax.backbones.loading import abstract_backbone
from vla_jax.data.scenes.vocabulary import SHAPES
from vla_jax.domain_data import DomainSizes
from vla_jax.errors import UserError
from vla_jax.evaluation.forgetting import MEASURES, Kept, OldDomain
from vla_jax.reporting.page.gallery import make_galleries
from vla_jax.reporting.page.workdir import read_work_directory
from vla_jax.training.metrics import run_record
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(small_backbone_folder):
    return Config(
        backbone=str(small_backbone_folder),
        domains=("shifted_scenes",),
        methods=("lora", "full"),
        labels=(1, 100),
        adapter_rates=(1e-2,),
        full_rates=(1e-3,),
        budget=Budget(steps=2, batch_size=8, seeds=(1, 2), log_every=1),
        sizes=DomainSizes(train=48, validation=24, test=32),
        classes=4,
        candidates=4,
        quadruples=2,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is cut")  # descriptions do not fit into the small context
def test_a_small_run_ends_in_tables_and_the_same_rows_again(config, tmp_path, monkeypatch):
    rows = run(config, tmp_path)
    most = rows[-1]["labels"]
    assert [row["labels"] for row in rows] == [1, most] == [1, 6]
    runs = tmp_path / "runs" / "shifted_scenes"
    for row in rows:
        for name in config.methods:
            seeds = [
                np.load(path)["correct"]
                for path in sorted(runs.glob(f"labels_{row['labels']}/{name}/learning_rate_*/seed_*/test.npz"))
            ]
            assert len(seeds) == 2
            assert row[name].value == pytest.approx(np.mean(seeds))
            assert row[f"{name}_by_seed"] == pytest.approx([np.mean(seed) for seed in seeds])
        lora, full = row["lora"].value, row["full"].value
        assert row["lora_difference"].value == pytest.approx(lora - full)
        assert 0 <= row["zero_shot"].value <= 1
    # The text tower sees nothing here and is not trained.
    vision = names.flatten(abstract_backbone(config.backbone).params["vision"])
    assert rows[0]["full_trained"] == sum(leaf.size for leaf in vision.values()) + 8 * 8 + 8

    forgotten = [json.loads(line) for line in (tmp_path / "forgetting.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["state"]) for row in forgotten] == [
        ("backbone", None),
        ("LoRA, after shifted scenes", "on"),
        ("LoRA, after shifted scenes", "off"),
        ("full fine-tuning, after shifted scenes", None),
    ]
    assert forgotten[2]["features"] == "as before, bitwise"
    ratios = [json.loads(line) for line in (tmp_path / "ratios.jsonl").read_text().splitlines()]
    assert [(row["name"], row["reference_labels"]) for row in ratios] == [("lora", labels) for labels in (most, 1)]
    for name in ("results.md", "curves.png", "forgetting.png"):
        assert (tmp_path / name).stat().st_size > 0, name

    def nothing_again(*_, **__):
        raise AssertionError("what was finished was done again")

    run_record(tmp_path, config)
    (gallery,) = make_galleries(read_work_directory(tmp_path), 3, None, lambda text: None)
    assert (gallery.group, gallery.problems) == (f"shifted_scenes/labels_{most}", ())
    for example in (example for shelf in gallery.examples for example in shelf.shown):
        (shape,) = {answer.said for answer in example.answers if answer.right} or {example.truth}
        assert shape == example.truth == SHAPES[example.place // 4]  # four of each, in the order of shapes

    monkeypatch.setattr(comparison, "fit", nothing_again)
    monkeypatch.setattr(OldDomain, "features", nothing_again)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert [row["lora"] for row in run(config, tmp_path)] == [row["lora"] for row in rows]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before


def test_the_presets_pass_the_check():
    for preset in PRESETS.values():
        check(preset)


def test_adapters_sit_where_pictures_are_seen():
    found = {variant.name: variant for variant in variants(PRESETS["default"], abstract_backbone("tiny"))}
    assert {variant.modalities for variant in found.values()} == {("image",)}
    assert {placement.towers for variant in found.values() for placement in variant.placements} == {("vision",)}
    assert found["full"].rules == "image_tower"


@pytest.mark.parametrize("method", ["coop", "fusion"])
def test_methods_that_act_on_texts_are_refused(method):
    with pytest.raises(UserError, match=f"{method} acts on texts, which are not seen here"):
        check(dataclasses.replace(PRESETS["smoke"], methods=(method,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ("shifted_scene",)}, "unknown domain 'shifted_scene'; did you mean 'shifted_scenes'"),
        ({"domains": ()}, "domains must name at least one"),
        ({"methods": ("lroa",)}, "unknown method 'lroa'"),
        ({"methods": ("lora", "lora")}, "none twice; given: lora, lora"),
        ({"labels": (4, 1)}, "from 1 on and rising"),
        ({"labels": (0, 1)}, "from 1 on and rising"),
        ({"candidates": 1}, "candidates at least 2"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PRESETS["smoke"], **changes)


def test_a_model_is_asked_once_and_again_for_what_it_was_not_asked(tmp_path):
    asked = []

    def ask(measures):
        asked.append(measures)
        return Kept({name: np.array([True, False]) for name in measures})

    path = tmp_path / "seed_1.npz"
    fewer = [name for name in MEASURES if name != "text"]
    path.write_bytes(Kept({name: np.array([True, False]) for name in fewer}).to_bytes())
    for _ in range(2):
        assert _kept(path, lambda: ask(MEASURES)).right.keys() == MEASURES.keys()
    assert asked == [MEASURES]
