"""Which examples the gallery takes, and how they and the predictions are put into words."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import adapt, compositionality, fusion_ablation, method_comparison
from vla_jax.backbones.loading import load_backbone
from vla_jax.data_sets import Data, find
from vla_jax.errors import UserError
from vla_jax.reporting.page.gallery import aligned, make_galleries, shelves
from vla_jax.reporting.page.tested import find_tested, restored
from vla_jax.reporting.page.wording import Wording
from vla_jax.reporting.page.workdir import read_work_directory
from vla_jax.task_data import Sizes, task_data
from vla_jax.task_kinds import Setup


@pytest.fixture(scope="module")
def backbone(small_backbone_folder):
    return load_backbone(small_backbone_folder)


def _stored(config):
    """A configuration as a work directory has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def test_examples_are_shelved_by_how_they_fared_and_taken_from_all_over_the_shelf():
    right = np.random.default_rng(0).random((3, 200)) < 0.7
    by_number = {
        "right by some variants": (1, 2),
        "wrong by every variant": (0,),
        "right by every variant": (3,),
    }
    found = shelves(right, 9)
    assert [title for title, _, _ in found] == list(by_number)
    for title, count, places in found:
        alike = [place for place in range(200) if int(right[:, place].sum()) in by_number[title]]
        assert count == len(alike)
        assert places == [alike[0], alike[len(alike) // 3], alike[2 * len(alike) // 3]]


def test_what_one_shelf_lacks_the_others_give():
    right = np.array([[True, True, True, False], [True, True, True, True]])
    assert shelves(right, 3) == [("right by some variants", 1, [3]), ("right by every variant", 3, [0, 1])]
    assert shelves(right, 9) == [("right by some variants", 1, [3]), ("right by every variant", 3, [0, 1, 2])]
    assert shelves(right[:1], 2) == [("wrong", 1, [3]), ("right", 3, [0])]


def test_a_configuration_that_no_experiment_wrote_breaks_nothing(tmp_path):
    (tmp_path / "config.json").write_text('{"ways": 3, "tasks": {"a": 1}}')
    assert make_galleries(read_work_directory(tmp_path), 2, None, lambda text: None) == []


def test_predictions_are_brought_into_one_order():
    one = {"index": np.array([4, 0, 2, 9]), "correct": np.array([1, 2, 3, 4])}
    other = {"index": np.array([0, 9, 4, 5]), "correct": np.array([5, 6, 7, 8])}
    found = aligned({"one": one, "other": other})
    for each in found.values():
        assert each["index"].tolist() == [0, 4, 9]
    assert found["one"]["correct"].tolist() == [2, 1, 4]
    assert found["other"]["correct"].tolist() == [5, 7, 6]


@pytest.mark.parametrize(
    ("wording", "example", "told", "expected"),
    [
        (
            Wording("matching"),
            {"text": b"a red square", "label": 0, "statement_kind": b"binding"},
            {"score": np.float32(-1.234)},
            ("a red square", "false", "binding", ("false", "\N{MINUS SIGN}1.23")),
        ),
        (
            Wording("matching"),
            {"text": "t", "label": 1, "swap": "color", "objects": 3},
            {"score": np.float32(0)},  # exactly zero counts as false
            ("t", "true", "color swapped, 3 objects", ("false", "+0.00")),
        ),
        (
            Wording("vqa", ("yes", "no")),
            {"question": "is it?", "answers": ["yes", "yes", "maybe"]},
            {"prediction": np.int32(1), "accuracy": np.float32(0.3)},
            ("is it?", "yes / maybe", "", ("no", "VQA accuracy 0.30")),
        ),
        (
            Wording("vqa", ("yes", "no")),
            {"question": b"is it?", "answer": b"yes", "question_kind": 2},
            {"prediction": np.int32(0), "confidence": np.float32(0.875)},
            ("is it?", "yes", "is shape", ("yes", "88%")),
        ),
        (
            Wording("classification", ("cat", "dog")),
            {"label": 1},
            {"prediction": np.int32(0)},
            ("", "dog", "", ("cat", "")),
        ),
        (
            Wording("retrieval"),
            {"captions": [b"one", b"two"]},
            {"image_to_text": True, "text_to_image": False, "correct": True},
            ("one", "", "", ("found caption", "")),
        ),
        (
            Wording("grounding"),
            {"phrase": "the cup", "tag": "a", "secondary_tag": "b"},
            {"iou": np.float32(0.5), "pointed": True},
            ("the cup", "", "a, b", ("", "IoU 0.50")),
        ),
    ],
)
def test_examples_and_predictions_are_put_into_words(wording, example, told, expected):
    assert (wording.text(example), wording.truth(example), wording.note(example), wording.said(told)) == expected


def test_maps_of_a_class_are_made_with_its_name_and_those_of_two_pictures_with_one_text():
    assert Wording("classification", ("cat", "dog")).pairs({"image": 7, "label": 1}) == [(7, "a photo of a dog")]
    pair = {"image_0": 7, "image_1": 8, "text": "t", "label": 1}
    assert Wording("matching").pairs(pair) == [(7, "t"), (8, "t")]


def test_configurations_come_back_from_json():
    data = Data(path="a.jsonl", columns=dataclasses.replace(Data().columns, caption="title"), classes=("b", "c"))
    setup = Setup(templates=("x {}", "y {}"), text_length=7)
    for given in (data, setup):
        stored = _stored(given)
        assert restored(type(given), stored) == given
        assert restored(type(given), stored | {"unknown": 1}) == given
    assert restored(Setup, {"text_length": 7}) == Setup(text_length=7)


def _same(found, expected):
    assert len(found) == len(expected)
    for place in (0, len(found) - 1):
        jax.tree.map(np.testing.assert_array_equal, dict(found[place]), dict(expected[place]))


def test_every_experiments_test_examples_are_found_again(backbone, tmp_path):
    sizes = {"train": 4, "validation": 4, "test": 6, "quadruples": 2}
    given = Sizes(**sizes, data_dir=str(tmp_path))
    expected = task_data("statements", given, backbone)
    ablation = dataclasses.replace(fusion_ablation.PRESETS["smoke"], **sizes, data_dir=str(tmp_path / "elsewhere"))
    methods = dataclasses.replace(method_comparison.PRESETS["smoke"], sizes=dataclasses.replace(given, kept=9))
    for config, data_dir in ((ablation, str(tmp_path)), (methods, None)):
        found = find_tested(_stored(config), "statements", backbone, data_dir)
        assert (found.kind, found.text_length) == ("matching", 20)
        _same(found.test, expected.splits["test"])
        _same(found.quadruples, expected.probes["quadruples"].source.source)
    assert not (tmp_path / "elsewhere").exists()
    assert [folder.name for folder in (tmp_path / "scenes").glob("captions*")] == []  # nothing is built for nothing


def test_twins_and_their_probe_are_found_again(backbone, tmp_path):
    config = dataclasses.replace(
        compositionality.PRESETS["smoke"], twins=3, validation=2, test=2, quadruples=1, data_dir=str(tmp_path)
    )
    hard = find_tested(_stored(config), "cosine_hard", backbone, None)
    plain = find_tested(_stored(config), "head_plain", backbone, None)
    assert (len(hard.test), hard.kind, hard.text_length) == (8, "matching", 48)
    assert hard.test[1]["text"] != plain.test[1]["text"]  # the false caption comes from elsewhere
    assert {example["swap"] for example in map(hard.quadruples.__getitem__, range(19))} == set(compositionality.SWAPS)


def test_data_of_ones_own_are_found_again(backbone, tmp_path):
    rows = [{"image": "a.png", "question": f"q{n}", "answer": "yes" if n % 2 else "no"} for n in range(8)]
    rows = [
        row | {"split": split} for row, split in zip(rows, ["train"] * 4 + ["validation"] + ["test"] * 3, strict=True)
    ]
    (tmp_path / "a.png").write_bytes(b"looked at later")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = adapt.Config(data=Data(path=str(tmp_path / "rows.jsonl")), setup=Setup(text_length=9))
    found = find_tested(_stored(config), "", backbone, None)
    assert (found.kind, found.names, found.text_length) == ("vqa", ("no", "yes"), 9)
    assert found.fingerprint == find(config.data, "", config.setup).fingerprint
    assert [found.test.annotation(place)["question"] for place in range(3)] == ["q5", "q6", "q7"]
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="there is no data file"):
        find_tested(_stored(config), "", backbone, None)


@pytest.mark.parametrize(("config", "group"), [({}, ""), ({"train": 4}, "segmentation"), ({"twins": 4}, "cosine")])
def test_what_the_configuration_does_not_say_is_not_made_up(backbone, config, group):
    with pytest.raises(UserError, match="does not say which examples the runs were tested on"):
        find_tested(config, group, backbone, None)
