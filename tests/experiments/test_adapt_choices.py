"""How a task is put, from the launcher's side: answers ranked by their texts, candidate boxes, prototypes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import adapt
from experiments.adapt import Config, check, run
from vla_jax import launching
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.catalogue import METHODS
from vla_jax.data.candidate_texts import CandidateTexts
from vla_jax.data_sets import Data, Generated, find, splits_of
from vla_jax.errors import UserError
from vla_jax.task_kinds import Setup, data_of_kind
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "yellow": (220, 220, 20)}
SPLITS = {"train": 24, "validation": 10, "test": 12}
RANK, REGIONS, PROTOTYPES = Setup(answers="rank"), Setup(grounding="regions"), Setup(classifier="prototypes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of two squares on black and rows about them, a file a split; yellow squares in the last one alone."""
    folder = tmp_path_factory.mktemp("own")
    generator = np.random.default_rng(0)
    for split, count in SPLITS.items():
        rows = {"vqa": [], "grounding": [], "classification": []}
        for number in range(count):
            here = ("red", "blue", "yellow")[: 3 if split == "test" else 2]
            left, right = (here[(number + place) % len(here)] for place in (0, 1))
            pixels = generator.integers(0, 30, (36, 40, 3))
            boxes = [[2, 10, 14, 24], [22, 8, 38, 26], [0, 0, 40, 6]][: 2 + number % 2]
            for color, (x0, y0, x1, y1) in zip((left, right), boxes, strict=False):
                pixels[y0:y1, x0:x1] = COLORS[color]
            name = f"{split}_{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            answers = [left] * 3 + ["a " + right]
            rows["vqa"].append({"image": name, "question": "what color is the square ?", "answers": answers})
            rows["grounding"].append({"image": name, "phrase": f"the {left} square", "box": boxes[0], "boxes": boxes})
            rows["classification"].append({"image": name, "label": left if split != "test" else here[number % 2]})
        for task, told in rows.items():
            (folder / f"{task}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return folder


def config(backbone, folder, task, setup, **changes):
    paths = {f"{split}_path".removeprefix("train_"): str(folder / f"{task}_{split}.jsonl") for split in SPLITS}
    given = {
        "backbone": str(backbone),
        "setup": setup,
        "data": Data(**paths),
        "budget": Budget(steps=2, batch_size=8, log_every=1, checkpoint_every=2),
    }
    return Config(**given | changes)


def told(config):
    """What the dry run says."""
    report = check(config)
    return dict(zip(*(column._cells for column in report.columns), strict=True))


def predictions(workdir, split):
    return [json.loads(line) for line in (workdir / f"predictions_{split}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "fusion"])
def test_answers_are_ranked_by_their_texts(method, small_backbone_folder, folder, tmp_path):
    ranked = config(small_backbone_folder, folder, "vqa", RANK, method=method)
    assert "answers' texts are ranked: 2 of 2 at a time in training, all 3 in evaluation" in told(ranked)["put as"]
    rows = run(ranked, tmp_path)
    names = json.loads((tmp_path / "labels.json").read_text())
    assert sorted(names[:2]) == ["blue", "red"]
    assert names[2:] == ["yellow"]
    for row in rows:
        lines = predictions(tmp_path, row["split"])
        assert len(lines) == row["examples"] == SPLITS[row["split"]]
        for line in lines:
            given = Counter(answer.removeprefix("a ") for answer in line["example"]["answers"])
            assert line["predicted"] == names[line["prediction"]]
            # Of four annotators one at a time is left out: what three gave is worth (2/3 + 2/3 + 2/3 + 1) / 4 ...
            worth = {3: 0.75, 1: 0.25, 0: 0.0}
            assert line["accuracy"] == pytest.approx(worth[given[line["predicted"]]])
            assert line["correct"] == (given[line["predicted"]] == 3)
        for field in ("accuracy", "correct"):
            assert row[field].value == pytest.approx(np.mean([line[field] for line in lines]))


def test_an_answer_that_training_never_showed_is_ranked_in_evaluation(small_backbone_folder, folder):
    ranked = config(small_backbone_folder, folder, "vqa", RANK)
    found, backbone = find(ranked.data, "", RANK), load_backbone(ranked.backbone)
    data = data_of_kind("vqa", found.labels, RANK, backbone, splits_of(ranked.data, found, backbone))
    shown = [data.transform(data.splits["train"][0], np.random.default_rng(seed)) for seed in range(20)]
    assert {tuple(sorted(row["candidates"])) for row in shown} == {(0, 1)}
    yellow = next(
        example for example in map(data.splits["test"].__getitem__, range(12)) if example["answers"][0] == "yellow"
    )
    row = data.transform(yellow, None)
    assert row["candidates"].tolist() == [0, 1, 2]
    assert row["label"] == 2
    assert row["answer_counts"].sum() == 4
    texts = {tuple(tokens) for tokens in row["tokens"]}
    assert len(texts) == 3


def test_what_training_cannot_rank_is_left_out(small_backbone_folder, folder):
    rare = Setup(answers="rank", least_answers=12)
    rows = [json.loads(line) for line in (folder / "vqa_train.jsonl").read_text().splitlines()]
    path = folder / "vqa_rare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"answers": ["green"]}]))
    ranked = config(small_backbone_folder, folder, "vqa", rare)
    data = dataclasses.replace(ranked.data, path=str(path))
    found, backbone = find(data, "", rare), load_backbone(ranked.backbone)
    assert sorted(found.labels.names) == ["blue", "red"]
    splits = splits_of(data, found, backbone)
    assert len(splits["train"]) == 25
    assert len(data_of_kind("vqa", found.labels, rare, backbone, splits).splits["train"]) == 24


def test_known_candidates_come_first():
    spelled = lambda text: (np.array([len(text)]), np.array([True]))  # noqa: E731
    with pytest.raises(UserError, match="known is how many of the 3 candidates training may show: at least 2"):
        CandidateTexts(spelled, ("cat", "dog", "bird"), known=1)
    part = CandidateTexts(spelled, ("cat", "dog", "bird"), "{}", known=2)
    with pytest.raises(UserError, match="unknown candidate answer 'bird'"):
        part({"answers": ["bird"]}, (), np.random.default_rng(0))
    assert part({"answers": ["bird"]}, (), None)["label"] == 2


def overlap(one, other):
    """Intersection over union of two boxes x0, y0, x1, y1."""
    across, down = (max(0, min(one[2 + i], other[2 + i]) - max(one[i], other[i])) for i in (0, 1))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return across * down / (area(one) + area(other) - across * down)


def check_regions(rows, workdir):
    for row in rows:
        lines = predictions(workdir, row["split"])
        assert len(lines) == row["examples"]
        for line in lines:
            chosen = line["example"]["boxes"][line["prediction"]]
            assert line["iou"] == pytest.approx(overlap(chosen, line["example"]["box"]), abs=1e-4)
            assert line["correct"] == (line["iou"] >= 0.5)
        for field in ("correct", "pointed", "iou"):
            assert row[field].value == pytest.approx(np.mean([line[field] for line in lines]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "fusion"])
def test_a_phrase_is_grounded_by_choosing_among_candidate_boxes(method, small_backbone_folder, folder, tmp_path):
    chosen = config(small_backbone_folder, folder, "grounding", REGIONS, method=method)
    assert told(chosen)["put as"] == "the best of the candidate boxes, 3 a picture at most"
    check_regions(run(chosen, tmp_path), tmp_path)


@pytest.mark.slow
def test_phrases_of_scenes_choose_among_all_objects(small_backbone_folder, tmp_path, tmp_path_factory):
    data = Data(generated=Generated(24, 10, 12), data_dir=str(tmp_path_factory.getbasetemp() / "scenes"))
    chosen = config(small_backbone_folder, tmp_path, "grounding", REGIONS, data=data)
    chosen = dataclasses.replace(chosen, task="grounding")
    assert told(chosen)["put as"] == "the best of the candidate boxes, 5 a picture at most"
    check_regions(run(chosen, tmp_path / "run"), tmp_path / "run")
    lines = predictions(tmp_path / "run", "test")
    assert len({len(line["example"]["boxes"]) for line in lines}) > 1
    assert all(line["example"]["box"] in line["example"]["boxes"] for line in lines)


def test_regions_need_candidate_boxes(small_backbone_folder, folder, tmp_path):
    chosen = config(small_backbone_folder, folder, "grounding", REGIONS)
    lacking = dataclasses.replace(chosen.data.columns, boxes="")
    with pytest.raises(UserError, match=r"grounding_train\.jsonl has no column of them; give each row a list of boxes"):
        check(dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, columns=lacking)))
    assert told(dataclasses.replace(chosen, setup=Setup()))["put as"] == "a predicted box"
    rows = [json.loads(line) for line in (folder / "grounding_train.jsonl").read_text().splitlines()]
    path = folder / "wrong.jsonl"
    for boxes, message in (
        ([[1, 2, 3]], "a box is four numbers"),
        ([], "list of at least one box"),
        ([[2, 10, 14, 24], [2, 10, 99, 24]], r"outside its picture of 40 x 36"),
    ):
        path.write_text("".join(json.dumps(row | {"boxes": boxes}) + "\n" for row in rows))
        with pytest.raises(UserError, match=rf"wrong\.jsonl:1: .*{message}"):
            check(dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, path=str(path))))


def features(backbone, data, split):
    """The frozen backbone's features of a split's pictures, each of length one, and the labels."""
    rows = [data.transform(data.splits[split][index], None) for index in range(len(data.splits[split]))]
    images = jnp.stack([row["image"] for row in rows])
    output = CLIP(backbone.config, Compute()).apply({"params": backbone.params}, images, None, None)
    found = np.asarray(output.image_features, np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True), np.array([row["label"] for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "lora"])
@pytest.mark.parametrize("kept_gib", [0.0, 2.0])
def test_prototypes_start_as_the_mean_of_training_pictures(method, kept_gib, small_backbone_folder, folder, tmp_path):
    # At a rate of nothing, what is learnt is what it started from.
    still = {"learning_rate": 1e-12, "kept_gib": kept_gib}
    budget = Budget(steps=4, batch_size=8, log_every=1, checkpoint_every=4)
    put = config(small_backbone_folder, folder, "classification", PROTOTYPES, method=method, budget=budget, **still)
    assert "learned feature a class" in told(put)["put as"]
    rows = run(put, tmp_path)
    found, backbone = find(put.data, "", PROTOTYPES), load_backbone(put.backbone)
    data = data_of_kind(found.kind, found.labels, PROTOTYPES, backbone, splits_of(put.data, found, backbone))
    train, labels = features(backbone, data, "train")
    means = np.stack([train[labels == label].mean(0) for label in (0, 1)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    for row in rows:
        pictures, _ = features(backbone, data, row["split"])
        scores = float(np.exp(np.asarray(backbone.params["logit_scale"]))) * pictures @ means.T
        expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        lines = predictions(tmp_path, row["split"])
        np.testing.assert_allclose([line["confidence"] for line in lines], expected.max(1), rtol=1e-3)
        assert [line["prediction"] for line in lines] == expected.argmax(1).tolist()
        assert row["correct"].value == pytest.approx(np.mean([line["correct"] for line in lines]))
        for line in lines:
            assert line["correct"] == (line["predicted"] == line["example"]["class_name"])


BOTH_TOWERS = {"bitfit", "layer_norm", "projection", "vl_adapter"}
JOINED = {"fusion", "cross_modal", "mma", "uniadapter", "maple"}
TEXT_ALONE = {"coop", "cocoop"}


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_a_vision_tower_of_their_own_are_refused_for_prototypes(method, folder):
    put = config("tiny", folder, "classification", PROTOTYPES, method=method)
    if method in BOTH_TOWERS | JOINED | TEXT_ALONE:
        with pytest.raises(UserError, match=f"classifier=prototypes shows the model pictures alone, and {method} "):
            check(put)
    else:
        assert "text" not in told(put)["method"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_template": "the answer"}, r"needs \{\} where the answer stands"),
        ({"answer_template": "{} {phrase}"}, "nothing else"),
        ({"answer_template": "{} {"}, "is no template"),
        ({"shown_answers": 1}, "shown_answers must be at least 2"),
    ],
)
def test_settings_of_ranking_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Setup(**settings)


def test_kept_streams_do_not_suit_answers_that_are_drawn(small_backbone_folder, folder, tmp_path):
    ranked = config(small_backbone_folder, folder, "vqa", RANK, streams_dir=str(tmp_path / "streams"))
    with pytest.raises(UserError, match="the answers that are ranked are drawn in each; leave it out"):
        run(ranked, tmp_path / "run")


def test_the_launcher_takes_the_choices(small_backbone_folder, folder, capsys):
    paths = [f"--config.data.path={folder}/vqa_train.jsonl", "--config.data.test_share=0.3"]
    given = ["--experiment=adapt", f"--config.backbone={small_backbone_folder}", *paths, "--dry_run"]
    launching.main([*given, "--config.setup.answers=rank", "--config.setup.answer_template={question} {}"])
    assert "answers' texts are ranked" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="answers cannot be 'rang'; allowed: classify, rank"):
        launching.main([*given, "--config.setup.answers=rang"])


def test_a_run_from_before_a_setting_goes_on_with_its_default(small_backbone_folder, folder, tmp_path):
    put = config(small_backbone_folder, folder, "vqa", Setup())
    found, path = find(put.data, "", put.setup), tmp_path / "data.json"
    adapt._same_data(path, found, Setup())
    stored = json.loads(path.read_text())
    del stored["setup"]["answers"], stored["setup"]["grounding"]
    path.write_text(json.dumps(stored))
    adapt._same_data(path, found, Setup())
    with pytest.raises(UserError, match=r"belongs to another run, on .*: setup was"):
        adapt._same_data(path, found, RANK)
