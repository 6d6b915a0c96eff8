"""The compositionality experiment on a small random backbone: its rows, its files, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from experiments.compositionality import PRESETS, Config, check, run
from vla_jax import comparison
from vla_jax.data.quadruple_pairs import as_scores
from vla_jax.errors import UserError
from vla_jax.evaluation import winoground
from vla_jax.evaluation.scene_probe import SceneProbe
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(small_backbone_folder, tmp_path_factory):
    return Config(
        backbone=str(small_backbone_folder),
        models=("zero_shot", "head_adapters", "fusion", "head_full", "text_only"),
        rank=4,
        heads=2,
        head_rates=(1e-2,),
        adapter_rates=(1e-2,),
        full_rates=(1e-3,),
        budget=Budget(steps=2, batch_size=8, log_every=1),
        twins=6,
        validation=2,
        test=4,
        quadruples=2,
        text_length=20,
        data_dir=str(tmp_path_factory.mktemp("data")),
    )


@pytest.mark.slow
def test_a_small_run_ends_in_tables_and_the_same_rows_again(config, tmp_path, monkeypatch):
    rows = {(row["name"], row["negatives"]): row for row in run(config, tmp_path)}
    assert list(rows) == [
        ("zero_shot", "none"),
        *((name, negatives) for name in ("head_adapters", "fusion", "head_full") for negatives in ("plain", "hard")),
        ("text_only", "hard"),
        ("constant", "none"),
    ]
    constant = rows.pop(("constant", "none"))
    assert [constant[f"{part}_score"].value for part in ("text", "image", "group")] == [0, 0, 0]
    assert [constant[f"{part}_ties"] for part in ("text", "image", "group")] == [1, 1, 1]
    assert rows["text_only", "hard"]["image_ties"] == 1

    def scores(name, negatives):
        scorer = "cosine" if name == "zero_shot" else "head"
        (path,) = (tmp_path / f"runs/{scorer}_{negatives}/{name}").glob("learning_rate_*/seed_0/quadruples.npz")
        return as_scores(np.load(path)["score"])

    def groups(name, negatives):
        return winoground.outcomes(scores(name, negatives)).group.astype(float)

    probe = SceneProbe(config.quadruples)
    for (name, negatives), row in rows.items():
        found = groups(name, negatives if negatives != "none" else "plain")
        assert row["group_score"].value == pytest.approx(found.mean())
    assert len(rows["zero_shot", "none"]["difficulty"]) == len(probe.cells)
    apart = rows["fusion", "hard"]["against_plain"]
    assert apart.value == pytest.approx((groups("fusion", "hard") - groups("head_full", "plain")).mean())
    apart = rows["fusion", "hard"]["against_independent"]
    assert apart.value == pytest.approx((groups("fusion", "hard") - groups("head_adapters", "hard")).mean())
    assert "against_plain" not in rows["head_full", "plain"]
    # What sees texts alone gives a caption's two pictures one score.
    assert not groups("text_only", "hard").any()

    for name in ("results.csv", "results.md", "results.png", "difficulty.md"):
        assert (tmp_path / name).stat().st_size > 0, name
    stored = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["negatives"]) for row in stored] == [*rows, ("constant", "none")]

    def no_training(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(comparison, "fit", no_training)
    again = {(row["name"], row["negatives"]): row for row in run(config, tmp_path)[:-1]}
    assert {key: row["pairs"] for key, row in again.items()} == {key: row["pairs"] for key, row in rows.items()}


def test_the_presets_pass_the_check():
    for preset in PRESETS.values():
        check(preset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("fusoin",)}, "unknown model 'fusoin'; did you mean 'fusion'"),
        ({"models": ("fusion", "fusion")}, "models name something twice"),
        ({"twins": 1}, "twins, validation and test must be at least 2"),
        ({"quadruples": 0}, "quadruples at least 1"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PRESETS["smoke"], **changes)


def test_texts_longer_than_the_context_are_refused():
    with pytest.raises(UserError, match="text_length 49 is longer than the backbone's context of 48"):
        check(dataclasses.replace(PRESETS["smoke"], text_length=49))
