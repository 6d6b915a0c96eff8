"""What results say beside a task's main measure, against scikit-learn and brute force on the predictions."""

from __future__ import annotations

import collections
import itertools
import json

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from experiments.adapt import Config, run
from vla_jax.data.each_caption import EachCaption
from vla_jax.data.own import OwnData, load_own
from vla_jax.data.scenes.vocabulary import COLORS as VOCABULARY
from vla_jax.data.scenes.vocabulary import SHAPES, SIZES, TEXTURES
from vla_jax.data_sets import Data
from vla_jax.errors import UserError
from vla_jax.evaluation import vqa
from vla_jax.reporting.details import retrieved
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "gray": (120, 120, 120)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """90 noisy pictures of three colours, with rows for three tasks; captions differ in number and in words."""
    folder = tmp_path_factory.mktemp("own")
    generator = np.random.default_rng(3)
    rows = collections.defaultdict(list)
    words = map(" ".join, itertools.product(SIZES, TEXTURES, VOCABULARY, SHAPES))  # no caption twice
    for number in range(90):
        color = list(COLORS)[min(number % 5, 2)]  # one of five is red, one blue, the others gray
        pixels = generator.integers(-40, 40, (32, 32, 3)) + COLORS[color]
        name = f"{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
        rows["classification"].append({"image": name, "label": color})
        captions = itertools.islice(words, 1 + number % 3)
        rows["retrieval"] += [{"image": name, "caption": f"a {caption}"} for caption in captions]
        said = ["t-shirt"] * 4 if number % 2 else ["yes", "yes", "yes", color]
        kind = "what" if number % 2 else "is there"
        rows["vqa"].append({"image": name, "question": "what is it ?", "answers": said, "question_kind": kind})
    for task, told in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return folder


def adapted(task, folder, small_backbone_folder, workdir, **changes):
    config = Config(
        backbone=str(small_backbone_folder),
        data=Data(path=str(folder / f"{task}.jsonl"), validation_share=0.2, test_share=0.4),
        budget=Budget(steps=3, batch_size=8, log_every=1),
        method="lora",
        **changes,
    )
    _, row = run(config, workdir)
    return row, [json.loads(line) for line in (workdir / "predictions_test.jsonl").read_text().splitlines()]


def table(workdir, name):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_classes_one_by_one_and_their_calibration(folder, small_backbone_folder, tmp_path):
    row, told = adapted("classification", folder, small_backbone_folder, tmp_path)
    truth, said = [line["example"]["class_name"] for line in told], [line["predicted"] for line in told]
    assert row["class_mean"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(truth, said))
    labels = json.loads((tmp_path / "labels.json").read_text())
    recalls = sklearn.metrics.recall_score(truth, said, labels=labels, average=None)
    groups = [line for line in table(tmp_path, "groups") if line["split"] == "test"]
    assert [(line["by"], line["group"]) for line in groups] == [("class", label) for label in labels]
    assert [line["accuracy"]["value"] for line in groups] == pytest.approx(recalls)
    assert [line["examples"] for line in groups] == [truth.count(label) for label in labels]
    error = 0.0
    for n in range(15):  # Guo et al. 2017, equation 3
        member = [line for line in told if n / 15 < line["confidence"] <= (n + 1) / 15]
        if member:
            sure, right = (np.mean([line[field] for line in member]) for field in ("confidence", "correct"))
            error += len(member) / len(told) * abs(sure - right)
    assert row["calibration_error"] == pytest.approx(error)
    assert "calibration error (%)" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_answers_by_kind_of_question_and_by_the_published_script(folder, small_backbone_folder, tmp_path):
    row, told = adapted("vqa", folder, small_backbone_folder, tmp_path)
    groups = {line["group"]: line for line in table(tmp_path, "groups") if line["split"] == "test"}
    assert set(groups) == {"what", "is there"}
    published = []
    for line in told:
        given, said = line["example"]["answers"], line["predicted"]
        # Of unanimous answers the script compares the texts as they are, "t-shirt" with the normal form "t shirt".
        same = given.count(said)
        support = [min((same - (answer == said)) / 3, 1) for answer in given]
        published.append(np.mean(support))
    assert row["published"].value == pytest.approx(np.mean(published))
    for kind, group in groups.items():
        own = [line["accuracy"] for line in told if line["example"]["question_kind"] == kind]
        assert (group["by"], group["examples"]) == ("question kind", len(own))
        assert group["accuracy"]["value"] == pytest.approx(np.mean(own))


def test_an_answer_in_its_normal_form_is_not_that_of_unanimous_annotators():
    # As VQA's own evaluation has it since 2021: texts are brought into their normal form where annotators differ.
    assert vqa.accuracy("t shirt", ["t-shirt"] * 10) == 0
    assert vqa.accuracy("t-shirt", ["t-shirt"] * 10) == 1
    assert vqa.accuracy("t shirt", ["t-shirt"] * 9 + ["shirt"]) == 1


def brute(similarity, owner):
    """Recall at 1 and 5, median rank and mAP in both directions, by sorting every row."""
    by_picture, by_caption = [], []
    for picture, scores in enumerate(similarity):
        order = np.argsort(-scores, kind="stable")
        places = np.flatnonzero(owner[order] == picture) + 1
        by_picture.append((places[0], np.mean(np.arange(1, len(places) + 1) / places)))
    for caption, scores in enumerate(similarity.T):
        place = int(np.flatnonzero(np.argsort(-scores, kind="stable") == owner[caption])[0]) + 1
        by_caption.append((place, 1 / place))
    return [
        {
            "recall_1": np.mean([place <= 1 for place, _ in found]),
            "recall_5": np.mean([place <= 5 for place, _ in found]),
            "median_rank": np.median([place for place, _ in found]),
            "mean_average_precision": np.mean([precision for _, precision in found]),
        }
        for found in (by_picture, by_caption)
    ]


def features(generator, *shape):
    drawn = generator.standard_normal(shape).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def test_whole_splits_are_ranked_as_by_sorting():
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(9), generator.integers(1, 4, 9))
    images, texts = features(generator, 2, 9, 6), features(generator, 2, len(owner), 6)
    texts += 2 * images[:, owner]
    found = retrieved(images, texts, owner)
    expected = [brute(image @ text.T, owner) for image, text in zip(images, texts, strict=True)]
    for direction, (query, queries, candidates) in enumerate((("picture", 9, len(owner)), ("caption", len(owner), 9))):
        row = found[direction]
        assert (row["query"], row["queries"], row["candidates"]) == (query, queries, candidates)
        assert "recall_10" not in row  # there are nine pictures
        for field in expected[0][direction]:
            value = row[field].value if field.startswith("recall") else row[field]
            assert value == pytest.approx(np.mean([seed[direction][field] for seed in expected]))


@pytest.mark.slow
def test_every_caption_counts_in_a_gallery_of_the_whole_split(folder, small_backbone_folder, tmp_path):
    adapted("retrieval", folder, small_backbone_folder, tmp_path)
    (kept,) = (tmp_path / "runs").glob("lora/learning_rate_*/seed_0/test_captions.npz")
    stored = dict(np.load(kept))
    own = load_own(OwnData(str(folder / "retrieval.jsonl"), validation_share=0.2, test_share=0.4)).splits["test"]
    names = [own.annotation(place)["image_id"] for place in range(len(own))]
    owner = np.concatenate([[place] * (1 + int(name[:-4]) % 3) for place, name in enumerate(names)])
    assert stored["index"].tolist() == list(range(len(owner)))
    first = [int(np.argmax(owner == place)) for place in range(len(own))]
    np.testing.assert_allclose(stored["image_feature"], stored["image_feature"][first][owner], atol=1e-5)
    rows = [line for line in table(tmp_path, "retrieval") if line["split"] == "test"]
    assert [(row["queries"], row["candidates"]) for row in rows] == [(len(own), len(owner)), (len(owner), len(own))]
    similarity = stored["image_feature"][first].astype(np.float64) @ stored["text_feature"].astype(np.float64).T
    for row, expected in zip(rows, brute(similarity, owner), strict=True):
        for field, value in expected.items():
            assert (row[field]["value"] if field.startswith("recall") else row[field]) == pytest.approx(value)
    assert "| picture |" in (tmp_path / "retrieval.md").read_text()


def test_each_caption_stands_beside_its_picture():
    class Pictures:
        rows = ({"image_id": 0, "captions": ["a", "b"]}, {"image_id": 1, "caption": "c"})

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return self.rows[index] | {"image": index}

        def annotation(self, index):
            return self.rows[index]

    each = EachCaption(Pictures())
    assert [each[place] for place in range(len(each))] == [
        {"image_id": 0, "image": 0, "caption": "a"},
        {"image_id": 0, "image": 0, "caption": "b"},
        {"image_id": 1, "image": 1, "caption": "c"},
    ]
    assert each.annotation(1) == {"image_id": 0, "caption": "b"}
    assert each.owner.tolist() == [0, 0, 1]
    Pictures.rows = ({"captions": ["a"]}, {"captions": []})
    with pytest.raises(UserError, match="picture 1 has no captions; leave it out"):
        EachCaption(Pictures())
