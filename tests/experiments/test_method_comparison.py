"""The comparison of methods on a small random backbone: its rows, its files, what it leaves out and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from experiments import method_comparison
from experiments.method_comparison import PRESETS, Config, check, run, variants
from vla_jax import comparison
from vla_jax.backbones.loading import load_backbone
from vla_jax.errors import UserError
from vla_jax.task_data import Sizes
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(small_backbone_folder, tmp_path_factory):
    return Config(
        backbone=str(small_backbone_folder),
        tasks=("statements", "retrieval"),
        methods=("linear", "full", "lora", "fusion"),
        head_rates=(1e-2,),
        adapter_rates=(1e-2,),
        full_rates=(1e-2,),
        budget=Budget(steps=2, batch_size=8, log_every=1),
        sizes=Sizes(
            train=24,
            validation=10,
            test=30,
            kept=20,
            text_length=20,
            caption_length=20,
            data_dir=str(tmp_path_factory.mktemp("data")),
        ),
        latency_batch=2,
    )


@pytest.mark.slow
def test_a_small_comparison_ends_in_table_figures_and_the_same_rows_again(config, tmp_path, monkeypatch):
    rows = {row["name"]: row for row in run(config, tmp_path)}
    assert list(rows) == ["untrained", "linear", "full", "lora", "fusion"]
    untouched = rows.pop("untrained")

    def found(task, name, kind):
        (path,) = (tmp_path / f"runs/{task}/{name}").glob(f"learning_rate_*/seed_0/{kind}.npz")
        return np.load(path)["correct"].astype(float)

    for name, row in rows.items():
        assert row["statements"].value == pytest.approx(found("statements", name, "test").mean())
    for name in ("linear", "full", "lora"):
        assert rows[name]["retrieval"].value == pytest.approx(found("retrieval", name, "test").mean())
        kept = found("statements", name, "kept")
        assert rows[name]["statements_kept"].value == pytest.approx(kept.mean())
        lost = (kept - found("statements", "linear", "kept")).mean()
        assert rows[name]["statements_forgotten"].value == pytest.approx(lost)
    for name in ("linear", "lora", "fusion"):  # linear is trained before full, the others after it
        difference = (found("statements", name, "test") - found("statements", "full", "test")).mean()
        assert rows[name]["statements_difference"].value == pytest.approx(difference), name
    assert "statements_difference" not in rows["full"]
    # A head that scales all cosines alike changes no order, so that both find the same captions.
    assert untouched["retrieval"].value == rows["linear"]["retrieval"].value
    full = found("retrieval", "full", "test").mean()
    assert untouched["retrieval_difference"].value == pytest.approx(untouched["retrieval"].value - full)
    assert untouched["trained"] == 0
    depth = sum(tower.depth for tower in load_backbone(config.backbone).config.towers.values())
    assert {name: row["statements_stored_blocks"] for name, row in rows.items()} == {
        "linear": depth,
        "full": 0,
        "lora": 0,
        "fusion": 2,
    }
    # A frozen backbone keeps what it could do; a fusion adapter's features cannot be compared across pairs.
    assert rows["linear"]["statements_forgotten"].value == 0
    assert not {"retrieval", "statements_kept"} & set(rows["fusion"])
    # LoRA can be merged, a fusion adapter cannot, and a linear head has nothing to merge.
    assert [name for name, row in rows.items() if "merged_overhead" in row] == ["lora"]

    for name in ("results.csv", "results.md", "results.png", "parameters.png", "memory.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    stored = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in stored] == ["untrained", *rows]

    def no_training(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(comparison, "fit", no_training)
    monkeypatch.setattr(method_comparison, "forward_seconds", no_training)
    assert [row["statements"] for row in run(config, tmp_path)][1:] == [row["statements"] for row in rows.values()]


def test_methods_that_do_not_fit_are_left_out_unless_asked_for(config, capsys):
    shallow = load_backbone(config.backbone)
    text = dataclasses.replace(shallow.config.text, width=24, heads=2)
    narrow = dataclasses.replace(shallow, config=dataclasses.replace(shallow.config, text=text))
    found = [variant.name for variant in variants(dataclasses.replace(config, methods=()), narrow)]
    assert "lora" in found
    assert "uniadapter" not in found
    assert "uniadapter is left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="uniadapter does not fit"):
        variants(dataclasses.replace(config, methods=("uniadapter",)), narrow)


def test_every_method_of_the_default_passes_the_check():
    check(PRESETS["default"])
    check(PRESETS["smoke"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "at least one task"),
        ({"tasks": ("statement",)}, "unknown task 'statement'; did you mean 'statements'"),
        ({"methods": ("lora", "lara")}, "unknown method 'lara'; did you mean 'lora'"),
        ({"methods": ("lora", "lora")}, "methods name something twice: lora, lora"),
        ({"latency_batch": 0}, "latency_batch must be at least 1"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PRESETS["smoke"], **changes)


def test_texts_that_leave_no_room_for_prompts_are_refused_before_anything_is_compiled():
    sizes = dataclasses.replace(PRESETS["smoke"].sizes, caption_length=46)
    with pytest.raises(UserError, match="46 tokens and 4 inserted ones exceed the context of 48"):
        check(dataclasses.replace(PRESETS["smoke"], methods=("coop",), sizes=sizes))
    sizes = dataclasses.replace(PRESETS["smoke"].sizes, caption_length=49)
    with pytest.raises(UserError, match=r"sizes\.caption_length 49 is longer than the backbone's context of 48"):
        check(dataclasses.replace(PRESETS["smoke"], sizes=sizes))
