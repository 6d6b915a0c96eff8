"""The few-shot protocol on a small random backbone: draws, accuracies, both halves, what is read again and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.few_shot import PRESETS, Config, check, run
from vla_jax import comparison
from vla_jax.adapters import TipAdapter
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.image import Preprocess
from vla_jax.data.text import Tokenize
from vla_jax.data_sets import Data, Generated
from vla_jax.errors import UserError
from vla_jax.evaluation.few_shot import draw_shots
from vla_jax.evaluation.scene_zero_shot import clip_encoders
from vla_jax.evaluation.zero_shot import class_features, cosines
from vla_jax.few_shot_data import OBJECTS, classes_of, pool
from vla_jax.reporting.page.gallery import make_galleries
from vla_jax.reporting.page.workdir import read_work_directory
from vla_jax.training.metrics import run_record
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def config(small_backbone_folder):
    return Config(
        backbone=str(small_backbone_folder),
        data=Data(name=OBJECTS, generated=Generated(train=96, validation=96, test=64)),
        methods=("tip", "tip_f", "linear", "coop"),
        shots=(1, 2),
        novel_shots=2,
        head_rates=(1e-1,),
        light_rates=(1e-2, 1e-1),
        tip=TipAdapter(epochs=2, alpha_steps=3, beta_steps=3),
        budget=Budget(steps=2, batch_size=8, seeds=SEEDS, log_every=1),
    )


@pytest.fixture(scope="module")
def backbone(small_backbone_folder):
    return load_backbone(small_backbone_folder)


def chosen_runs(folder: Path) -> list[Path]:
    """The folders of finished runs, seed by seed."""
    return sorted((path.parent for path in folder.glob("learning_rate_*/seed_*/test.npz")), key=lambda path: path.name)


@pytest.mark.slow
def test_a_small_run_keeps_to_the_protocol_and_is_read_again(config, backbone, tmp_path, monkeypatch):
    rows = run(config, tmp_path)
    assert [row["name"] for row in rows] == ["zero_shot", *config.methods]
    classes = classes_of(config.data)
    assert (len(classes.names), classes.names[5], classes.templates) == (32, "green square", ("a photo of a {}",))
    drawn = pool(config.data, classes, backbone, {"train": 2, "validation": 2}, SEEDS)

    # The backbone by itself, computed in another way.
    images, texts = clip_encoders(
        CLIP(backbone.config, Compute()), Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, 16)
    )(backbone.params)
    pictures = [drawn.splits["test"][place]["image"] for place in range(64)]
    labels = drawn.labels["test"]
    assert np.bincount(labels).tolist() == [2] * 32
    scores = cosines(images(pictures), class_features(texts, classes.names, classes.templates))
    assert rows[0]["shots_1"] == rows[0]["shots_2"] == pytest.approx((scores.argmax(1) == labels).mean())

    runs = tmp_path / "runs" / f"{OBJECTS}_96_96_64"
    for name, row in zip(config.methods[2:], rows[3:], strict=True):
        for shots in config.shots:
            found = chosen_runs(runs / "all_classes" / f"shots_{shots}" / name)
            assert len(found) == len(SEEDS)
            for seed, folder, accuracy in zip(SEEDS, found, row[f"shots_{shots}_by_seed"], strict=True):
                told = json.loads((folder / "settings.json").read_text())
                for split, field in (("train", "drawn"), ("validation", "validated")):
                    places = drawn.places[split][told[field]]
                    np.testing.assert_array_equal(places, draw_shots(drawn.labels[split], shots, seed))
                assert accuracy == pytest.approx(np.load(folder / "test.npz")["correct"].mean())
    assert rows[3]["trained"] == 8 * 32 + 32

    halves = [json.loads(line) for line in (tmp_path / "base_to_novel.jsonl").read_text().splitlines()]
    assert [row["name"] for row in halves] == ["zero_shot", "coop"]  # the others cannot name a class they never saw
    base, novel = labels < 16, labels >= 16
    by_half = (
        (scores[base][:, :16].argmax(1) == labels[base]).mean(),
        (scores[novel][:, 16:].argmax(1) + 16 == labels[novel]).mean(),
    )
    assert (halves[0]["base"], halves[0]["novel"]) == pytest.approx(by_half)
    for at, folder in enumerate(chosen_runs(runs / "base_to_novel" / "shots_2" / "coop")):
        told = json.loads((folder / "settings.json").read_text())
        trained = drawn.labels["train"][drawn.places["train"][told["drawn"]]]
        assert np.bincount(trained).tolist() == [2] * 16
        by_half = [np.load(folder / f"{name}.npz")["correct"].mean() for name in ("test", "novel")]
        found = [halves[1][f"{name}_by_seed"][at] for name in ("base", "novel", "harmonic")]
        mean = 2 * by_half[0] * by_half[1] / sum(by_half) if all(by_half) else 0.0
        assert found == pytest.approx([*by_half, mean])

    for name in ("results.md", "base_to_novel.md", "curves.png", "base_to_novel.png"):
        assert (tmp_path / name).stat().st_size > 0, name

    run_record(tmp_path, config)
    all_classes, base_classes = make_galleries(read_work_directory(tmp_path), 4, None, lambda text: None)
    assert (all_classes.group, all_classes.problems) == (f"{OBJECTS}_96_96_64/all_classes/shots_2", ())
    assert (base_classes.group, base_classes.problems) == (f"{OBJECTS}_96_96_64/base_to_novel/shots_2", ())
    for gallery, most in ((all_classes, 32), (base_classes, 16)):
        shown = [example for shelf in gallery.examples for example in shelf.shown]
        assert len(shown) == 4
        for example in shown:
            assert example.truth == classes.names[example.place // 2]  # two of each, in the order of labels
            assert example.place < 2 * most
            told = [answer for answer in example.answers if answer.right is not None]
            assert len(told) == len(example.answers) - 1  # all but the backbone, which is shown beside them
            for answer in told:
                assert answer.right == (answer.said == example.truth)

    def nothing_again(*_, **__):
        raise AssertionError("what was finished was done again")

    monkeypatch.setattr(comparison, "fit", nothing_again)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    run(config, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before


@pytest.mark.slow
def test_a_file_of_ones_own_whose_classes_are_too_few_for_halves(config, tmp_path):
    rows = []
    for number in range(24):
        color = ("red", "blue_green")[number % 2]
        pixels = np.full((20, 20, 3), (200, 20, number) if number % 2 == 0 else (20, 90, 120 + number), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "label": color}))
    (tmp_path / "mine.jsonl").write_text("\n".join(rows) + "\n")
    data = Data(path=str(tmp_path / "mine.jsonl"), validation_share=0.25, test_share=0.25)
    mine = dataclasses.replace(config, data=data, methods=("tip", "coop"), templates=("a {} square", "a {}"))
    with pytest.raises(UserError, match=r"at least 4 classes, and .*mine.jsonl.* has 2; .*--config.novel_shots=0"):
        check(mine)
    mine = dataclasses.replace(mine, novel_shots=0)
    check(mine)
    assert classes_of(data).names == ("blue green", "red")
    found = run(mine, tmp_path / "run")
    assert [row["name"] for row in found] == ["zero_shot", "tip", "coop"]
    assert not (tmp_path / "run/base_to_novel.jsonl").exists()


def test_the_presets_pass_the_check():
    for preset in PRESETS.values():
        check(preset)


def test_methods_are_put_together_by_name():
    table = check(dataclasses.replace(PRESETS["smoke"], methods=("tip", "lora+pfeiffer", "stack:pfeiffer:parallel")))
    methods, trained = (list(table.columns[column].cells) for column in (0, 1))
    assert methods == ["Tip-Adapter", "LoRA + Pfeiffer", "stack of Pfeiffer, parallel"]
    alone = check(dataclasses.replace(PRESETS["smoke"], methods=("lora", "pfeiffer", "parallel")))
    counts = [int(cell.replace(",", "")) for cell in alone.columns[1].cells]
    # Each has the classifier's temperature, and together they have one.
    together = [counts[0] + counts[1] - 1, counts[1] + counts[2] - 1]
    assert [int(cell.replace(",", "")) for cell in trained[1:]] == together


def test_a_split_without_a_class_is_named(backbone):
    data = Data(name=OBJECTS, generated=Generated(train=64, validation=31, test=64))
    with pytest.raises(
        UserError, match="the validation split has no picture of 32 of 32 classes, such as 'red circle'"
    ):
        pool(data, classes_of(data), backbone, {"train": 1, "validation": 1}, SEEDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("tip_g",)}, "unknown method 'tip_g'; did you mean 'tip_f'"),
        ({"methods": ("lora+pfeifer",)}, "unknown method 'pfeifer'; did you mean 'pfeiffer'"),
        ({"methods": ("lora+full",)}, "full trains by the rules 'full', which other methods do not"),
        ({"methods": ()}, "methods must name at least one"),
        ({"methods": ("lora", "lora")}, "none twice; given: lora, lora"),
        ({"shots": ()}, "from 1 on and rising"),
        ({"shots": (0, 1)}, "from 1 on and rising"),
        ({"shots": (2, 1)}, "from 1 on and rising"),
        ({"novel_shots": -1}, "novel_shots are examples a class, or 0"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PRESETS["smoke"], **changes)


def test_templates_without_a_place_for_the_name_are_refused():
    with pytest.raises(UserError, match=r"has no \{\} for the class's name"):
        check(dataclasses.replace(PRESETS["smoke"], templates=("a photo",)))
