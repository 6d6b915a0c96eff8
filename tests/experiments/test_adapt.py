"""Any method on any task from the launcher: files of one's own and generated data, results, resuming, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os

import numpy as np
import pytest
from PIL import Image

from experiments import adapt
from experiments.adapt import PRESETS, Config, check, run
from vla_jax import comparison, launching
from vla_jax.catalogue import METHODS
from vla_jax.data.own import Columns
from vla_jax.data_sets import Data, Generated
from vla_jax.errors import UserError
from vla_jax.exchange.checkpoints import read_adapter
from vla_jax.task_kinds import MEASURES, Setup
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 pictures of a bright square on black, red or blue, left or right, and rows about them for every task."""
    folder = tmp_path_factory.mktemp("own")
    generator = np.random.default_rng(0)
    rows = {task: [] for task in MEASURES}
    for number in range(120):
        color, side = ("red", "blue")[number % 2], ("left", "right")[number // 2 % 2]
        left = 2 if side == "left" else 22
        pixels = generator.integers(0, 30, (36, 40, 3))
        pixels[10:26, left : left + 16] = COLORS[color]
        name = f"{number}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        box = [left, 10, left + 16, 26]
        rows["classification"].append({"image": name, "label": color})
        rows["matching"].append({"image": name, "text": "a red square", "label": int(color == "red")})
        rows["retrieval"] += [{"image": name, "caption": f"a {color} square at the {side}"}] * 2
        rows["vqa"].append({"image": name, "question": "what color is the square ?", "answers": [color] * 3 + ["gray"]})
        rows["grounding"].append({"image": name, "phrase": f"the {color} square", "box": box})
    for task, told in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return folder


@pytest.fixture(scope="module")
def config(small_backbone_folder, folder):
    return Config(
        backbone=str(small_backbone_folder),
        data=Data(path=str(folder / "classification.jsonl"), validation_share=0.2, test_share=0.2),
        budget=Budget(steps=3, batch_size=8, log_every=1, checkpoint_every=2),
    )


def of(config, folder, task, **changes):
    data = dataclasses.replace(config.data, path=str(folder / f"{task}.jsonl"))
    return dataclasses.replace(config, data=data, **changes)


def predictions(workdir, split="test"):
    return [json.loads(line) for line in (workdir / f"predictions_{split}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_texts_about_two_pictures_train_too(config, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "matching.jsonl").read_text().splitlines()]
    told = [row | {"image_1": other["image"], "text": "one of them is red"} for row, other in itertools.pairwise(rows)]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    data = dataclasses.replace(config.data, path=str(path), images=str(folder))
    run(dataclasses.replace(config, data=data), tmp_path / "run")
    for line in predictions(tmp_path / "run"):
        first, second = (int(line["example"][name].partition(".")[0]) for name in ("image_id", "image_id_1"))
        assert second == first + 1
        assert line["correct"] == ((line["score"] > 0) == bool(line["example"]["label"]))


@pytest.mark.parametrize("task", [pytest.param(task, marks=pytest.mark.slow) for task in MEASURES])
def test_every_task_trains_on_a_file_of_ones_own(task, config, folder, tmp_path):
    rows = run(of(config, folder, task), tmp_path)
    assert [row["split"] for row in rows] == ["validation", "test"]
    labels = json.loads((tmp_path / "labels.json").read_text()) if task in ("classification", "vqa") else None
    assert labels in (None, ["blue", "red"])
    for row in rows:
        told = predictions(tmp_path, row["split"])
        assert len(told) == row["examples"] > 10
        assert len({line["example"]["image_id"] for line in told}) == len(told)
        for measure in MEASURES[task]:
            if measure.field in row:
                interval = row[measure.field]
                assert interval.value == pytest.approx(np.mean([line[measure.field] for line in told]))
                assert interval.low <= interval.value <= interval.high
        if labels:
            for line in told:
                assert line["predicted"] == labels[line["prediction"]]
                right = line["example"]["class_name"] if task == "classification" else line["example"]["answers"][0]
                assert line["correct"] == (line["predicted"] == right)
        lines = (folder / f"{task}.jsonl").read_text().splitlines()
        for line in told:
            file, _, number = line["place"].rpartition(":")
            assert file == str(folder / f"{task}.jsonl")
            assert json.loads(lines[int(number) - 1])["image"] == line["example"]["image_id"]
    pictures = [
        {line["example"]["image_id"] for line in predictions(tmp_path, split)} for split in ("validation", "test")
    ]
    assert not set.intersection(*pictures)
    for name in ("results.md", "results.csv", "results.jsonl"):
        assert (tmp_path / name).stat().st_size > 0
    (saved,) = tmp_path.glob("runs/lora/learning_rate_0.002/seed_0/adapters")
    assert read_adapter(saved, config.backbone).adapters["task"]["name"] == task


@pytest.mark.slow
def test_it_learns_from_the_launcher_and_a_finished_run_is_read(config, folder, tmp_path, monkeypatch, capsys):
    told = [json.loads(line) for line in (folder / "classification.jsonl").read_text().splitlines()]
    own = [{"file": row["image"], "kind": row["label"]} for row in told]
    path = folder / "renamed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in own))
    arguments = [
        "--experiment=adapt",
        f"--workdir={tmp_path}",
        f"--config.backbone={config.backbone}",
        "--config.method=linear",
        f"--config.data.path={path}",
        "--config.data.columns.image=file",
        "--config.data.columns.label=kind",
        "--config.data.validation_share=0.2",
        "--config.data.test_share=0.2",
        "--config.learning_rate=0.05",
        "--config.budget.steps=60",
        "--config.budget.batch_size=16",
        "--config.budget.seeds=0,1",
    ]
    launching.main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["correct"]["value"] for row in rows] == [1.0, 1.0]
    assert rows[1]["seeds"] == 2
    assert len(predictions(tmp_path)) == 2 * rows[1]["examples"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "accuracy" in printed

    def no_training(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(comparison, "fit", no_training)
    launching.main(arguments)
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == rows
    # Other data or another setup in the same folder would be taken for these.
    with pytest.raises(UserError, match=r"belongs to another run, on .*renamed\.jsonl.*: setup was"):
        launching.main([*arguments, "--config.setup.prompt=a square"])
    path.write_text("".join(json.dumps(row) + "\n" for row in own[:-1]))
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"belongs to another run, on .*: data was"):
        launching.main(arguments)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(config, folder, tmp_path, monkeypatch):
    config = of(config, folder, "grounding", method="pfeiffer", kept_gib=0.0)
    whole = run(config, tmp_path / "whole")
    fit, taken = comparison.fit, []

    class Killed(BaseException):
        """Stands for a process that dies: no handler runs."""

    def dies(state, frozen, step, batches, steps, **arguments):
        def counting(*given):
            if len(taken) == 2:
                raise Killed
            taken.append(0)
            return step(*given)

        return fit(state, frozen, counting, batches, steps, **arguments)

    monkeypatch.setattr(comparison, "fit", dies)
    with pytest.raises(Killed):
        run(config, tmp_path / "cut")
    monkeypatch.setattr(comparison, "fit", fit)
    again = run(config, tmp_path / "cut")
    assert [row["iou"] for row in again] == [row["iou"] for row in whole]
    assert (tmp_path / "cut/predictions_test.jsonl").read_text() == (
        tmp_path / "whole/predictions_test.jsonl"
    ).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "vqa", "grounding"])
def test_every_task_has_generated_scenes(task, config, tmp_path, tmp_path_factory):
    data = Data(generated=Generated(24, 10, 12), data_dir=str(tmp_path_factory.getbasetemp() / "scenes"))
    rows = run(dataclasses.replace(config, task=task, data=data, method="bitfit"), tmp_path)
    assert [row["examples"] for row in rows] == [10, 12]
    assert "place" not in predictions(tmp_path)[0]
    assert predictions(tmp_path)[0]["example"]


@pytest.mark.slow
def test_class_names_can_be_the_classifier_and_frozen_streams_change_nothing(config, folder, tmp_path):
    named = dataclasses.replace(config, setup=Setup(classifier="names", templates=("a {} square", "a {} picture")))
    check(named)
    ways = {"memory": {}, "disk": {"streams_dir": str(tmp_path / "streams")}, "anew": {"kept_gib": 0.0}}
    found = {way: run(dataclasses.replace(named, **changes), tmp_path / way) for way, changes in ways.items()}
    for kept, disk, anew in zip(*found.values(), strict=True):
        assert kept["correct"] == disk["correct"] == anew["correct"]
    kept, disk, anew = ([line["confidence"] for line in predictions(tmp_path / way)] for way in ways)
    assert kept == disk
    np.testing.assert_allclose(kept, anew, rtol=1e-4)


def test_streams_that_differ_from_pass_to_pass_are_not_kept(config, tmp_path):
    changed = dataclasses.replace(config, setup=Setup(augment="crop"), streams_dir=str(tmp_path / "streams"))
    with pytest.raises(UserError, match=r"pictures are augmented \(crop\)"):
        run(changed, tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_the_check(method, config, folder):
    check(of(config, folder, "vqa", method=method, backbone="tiny"))


def test_the_dry_run_says_what_will_be_done(config, folder):
    report = check(of(config, folder, "vqa"))
    told = dict(zip(*(column._cells for column in report.columns), strict=True))
    assert told["task"] == "vqa"
    assert told["chooses from"] == "blue, red"
    assert told["learning rate"] == "0.002"
    assert "LoRA" in told["method"]
    assert "train" in told["data"]
    check(PRESETS["smoke"])
    check(PRESETS["default"])


def test_adapters_may_sit_in_other_layers_than_the_papers(config, folder):
    def trained(layers):
        report = check(of(config, folder, "vqa", backbone="tiny", layers=layers))
        told = dict(zip(*(column._cells for column in report.columns), strict=True))
        return told["method"], int(told["trained"].split()[0].replace(",", ""))

    head = 2 * 513  # of two answers
    assert trained("")[1] - head == 8 * 2 * 2 * 128 * (4 + 3)
    method, count = trained("last 1")
    assert "last 1 layers" in method
    assert count - head == 8 * 2 * 2 * 128 * 2
    with pytest.raises(UserError, match="layer 4 does not exist: the vision tower has 4 layers, 0 to 3"):
        trained("0,4")
    with pytest.raises(UserError, match="full has no adapters that layers 'early' could be for; leave layers out"):
        check(of(config, folder, "vqa", method="full", layers="early"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lara"}, "unknown method 'lara'; did you mean 'lora'"),
        ({"task": "clasification"}, "unknown task 'clasification'; did you mean 'classification'"),
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"kept_gib": -1.0}, "kept_gib cannot be negative"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)


def test_what_cannot_be_trained_is_refused_before_anything_is_compiled(config, folder, tmp_path):
    with pytest.raises(UserError, match="fusion makes a picture's features depend on the text beside it"):
        check(of(config, folder, "retrieval", method="fusion"))
    with pytest.raises(UserError, match="vqa needs the column question and answers or answer"):
        check(dataclasses.replace(config, task="vqa"))
    with pytest.raises(UserError, match="unknown data set 'coco'"):
        check(dataclasses.replace(config, data=Data(name="coco")))
    with pytest.raises(UserError, match="grounding needs the column phrase and box; the file has answer, image, quest"):
        check(dataclasses.replace(config, task="grounding", data=Data(name="easy_vqa")))
    for probe in ("winoground", "sugarcrepe", "aro", "valse"):
        with pytest.raises(UserError, match=f"{probe} has no split 'train', only test; .*vla_jax.evaluation.probe"):
            check(dataclasses.replace(config, data=Data(name=probe)))
    with pytest.raises(UserError, match=r"vsr has no split 'minival', only train, .*; give another test_split"):
        check(dataclasses.replace(config, data=Data(name="vsr", test_split="minival[:5]")))
    renamed = dataclasses.replace(config.data, columns=Columns(caption="titel"))
    with pytest.raises(UserError, match="unknown column 'titel'"):
        check(dataclasses.replace(config, data=renamed))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "none.png", "label": "a"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: missing picture"):
        check(dataclasses.replace(config, data=Data(path=str(path))))


def test_the_check_of_a_file_is_made_once(config, folder, monkeypatch):
    made = []
    real = adapt.find.__globals__["load_own"]
    monkeypatch.setitem(adapt.find.__globals__, "load_own", lambda *given: made.append(given) or real(*given))
    config = of(config, folder, "matching", method="linear")
    own = adapt.find(config.data, "", config.setup)
    adapt.find(config.data, "", config.setup)
    adapt.splits_of(config.data, own, None)
    assert len(made) <= 2
    path = folder / "matching.jsonl"
    os.utime(path, ns=(5, 5))
    before = len(made)
    adapt.find(config.data, "", config.setup)
    assert len(made) == before + 1
