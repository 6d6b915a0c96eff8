"""Data sets by name as tasks: which task, what its head chooses from, and rows of batches."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import published_layouts
import pytest
from transformers import CLIPImageProcessorPil

import vla_jax.data_sets
from vla_jax.data.few_shot_sets import FEW_SHOT_SETS
from vla_jax.data.text import train_word_tokenizer
from vla_jax.data_sets import Data, find, splits_of
from vla_jax.errors import UserError
from vla_jax.task_kinds import Setup, data_of_kind
from vla_jax.tasks.matching import PairMatching

WORDS = ["what is this how many a net it two of the in is not with"]
# The kind of task, and the splits that stand for those that a layout lacks.
KINDS = {
    "vqav2": ("vqa", {"test_split": "validation"}),
    "gqa": ("vqa", {"validation_split": "testdev", "test_split": "testdev"}),
    "coco_captions": ("retrieval", {}),
    "flickr30k": ("retrieval", {}),
    "nlvr": ("matching", {"validation_split": "train", "test_split": "train"}),
    "nlvr2": ("matching", {"test_split": "validation"}),
    "vsr": ("matching", {"test_split": "validation"}),
    "refcoco": ("grounding", {"test_split": "testB"}),
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """As much of a backbone as data need."""
    tokenizer = train_word_tokenizer(WORDS, tmp_path_factory.mktemp("words"), context_length=16)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return SimpleNamespace(image_processor=processor, tokenizer=tokenizer, config=SimpleNamespace(context_length=16))


def data(tmp_path, name, **settings):
    getattr(published_layouts, name)(tmp_path / "manual")
    return Data(name=name, data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path / "manual"), **settings)


@pytest.mark.filterwarnings("ignore:a text of")
@pytest.mark.parametrize("name", KINDS)
def test_the_task_follows_from_the_fields_and_its_rows_are_those_of_its_batches(name, backbone, tmp_path):
    kind, splits = KINDS[name]
    settings = data(tmp_path, name, **splits)
    setup = Setup()
    found = find(settings, "", setup)
    assert found.kind == kind
    assert find(settings, kind, setup) == found
    task = data_of_kind(kind, found.labels, setup, backbone, splits_of(settings, found, backbone))
    pair = name == "nlvr2"
    assert isinstance(task.task, PairMatching) == pair
    for split in ("train", "validation", "test"):
        source = task.splits[split]
        for index in range(len(source)):
            example = source[index]
            row = task.transform(example, None)
            assert row["image"].shape == ((2, 8, 8, 3) if pair else (8, 8, 3))
            assert row["tokens"].shape == (16,)
            if kind == "matching":
                assert row["label"] == example["label"]
            if kind == "grounding":
                assert row["box"].shape == (4,)
            if kind == "vqa":
                assert row["answer_counts"].sum() == len(example["answers"])
    if kind == "retrieval":
        # A picture is one example with all of its captions, of which training draws.
        example = task.splits["train"][0]
        assert len(example["captions"]) > 1
        drawn = {bytes(task.transform(example, np.random.default_rng(seed))["tokens"]) for seed in range(30)}
        assert drawn == {bytes(backbone_tokens(task, text)) for text in example["captions"]}


@pytest.mark.filterwarnings("ignore:a text of")
def test_phrases_choose_among_all_annotated_objects(backbone, tmp_path, monkeypatch):
    settings, setup = data(tmp_path, "refcoco", test_split="testB"), Setup(grounding="regions")
    found = find(settings, "", setup)
    task = data_of_kind("grounding", found.labels, setup, backbone, splits_of(settings, found, backbone))
    counts = []
    for source in task.splits.values():
        for index in range(len(source)):
            example = source[index]
            row = task.transform(example, None)
            assert row["boxes"].shape == (max(found.labels.boxes, 2), 4)
            assert row["boxes_mask"].sum() == len(example["boxes"])
            counts.append(len(example["boxes"]))
    assert max(counts) == found.labels.boxes
    monkeypatch.setattr("vla_jax.data_sets.load_source", None)  # what was counted is kept
    assert find(settings, "", setup) == found
    with pytest.raises(UserError, match="easy_vqa has no field 'boxes'; take grounding=box"):
        vla_jax.data_sets._named_labels(
            Data(name="easy_vqa"), "grounding", setup, vla_jax.data_sets.make_builder("easy_vqa", tmp_path)
        )


@pytest.mark.filterwarnings("ignore:a text of")
def test_ranked_answers_are_those_of_all_splits_the_training_questions_first(backbone, tmp_path):
    settings, setup = data(tmp_path, "vqav2", test_split="validation"), Setup(answers="rank", shown_answers=2)
    found = find(settings, "", setup)
    assert found.labels.names[: found.labels.trained] == find(settings, "", Setup()).labels.names
    task = data_of_kind("vqa", found.labels, setup, backbone, splits_of(settings, found, backbone))
    for split, source in task.splits.items():
        for index in range(len(source)):
            row = task.transform(source[index], None)
            assert row["tokens"].shape == (len(found.labels.names), 16)
            assert row["label"] >= 0
            if split == "train":
                drawn = task.transform(source[index], np.random.default_rng(0))
                assert drawn["tokens"].shape == (2, 16)
                assert drawn["candidates"].max() < found.labels.trained


def backbone_tokens(task, text):
    return task.transform.tokenize(text.decode())[0]


def test_the_answers_of_the_training_questions_are_kept(tmp_path, monkeypatch):
    settings = data(tmp_path, "vqav2", test_split="validation")
    first = find(settings, "", Setup())
    # "net", "yes" and "2" are each the most frequent answer of one question.
    assert first.labels.names == ("2", "net", "yes")
    assert first.labels.annotators == 10
    (kept,) = (tmp_path / "data/vocabularies").glob("vqav2_*.json")
    assert json.loads(kept.read_text())["names"] == ["2", "net", "yes"]

    def refuse(*_, **__):
        raise AssertionError("all pictures were read again")

    monkeypatch.setattr("vla_jax.data_sets.load_examples", refuse)
    assert find(settings, "", Setup()) == first
    with pytest.raises(AssertionError):
        find(settings, "", Setup(least_answers=2))


def test_classes_that_only_the_built_data_know(backbone, tmp_path):
    lists = {"train": [["cup/1.jpg", 0, "tea_cup"], ["mug/1.jpg", 1, "mug"]], "val": [["cup/2.jpg", 0, "tea_cup"]]}
    lists["test"] = [["mug/2.jpg", 1, "mug"]]
    of = FEW_SHOT_SETS["dtd"]
    root = tmp_path / of.folder
    published_layouts.write(root / f"split_zhou_{of.name}.json", lists)
    for name in ("cup/1.jpg", "mug/1.jpg", "cup/2.jpg", "mug/2.jpg"):
        published_layouts.write(root / of.pictures / name, published_layouts.picture(0, file_format="JPEG"))
    settings = Data(name="few_shot", config="dtd", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
    found = find(settings, "", Setup())
    assert (found.kind, found.labels.names) == ("classification", ("tea cup", "mug"))
    assert find(Data(name="textile_defects"), "", Setup()).labels.names == ("nominal", "local", "global")
    task = data_of_kind(found.kind, found.labels, Setup(), backbone, splits_of(settings, found, backbone))
    row = task.transform(task.splits["train"][1], None)
    assert row["label"] == 1
    np.testing.assert_array_equal(row["tokens"], task.transform.transform.tokenize("a photo")[0])


def test_what_does_not_fit_is_refused(tmp_path):
    settings = data(tmp_path, "vsr")
    with pytest.raises(UserError, match="grounding needs the column phrase and box; the file has image, label, text"):
        find(settings, "grounding", Setup())
    with pytest.raises(UserError, match="unknown task 'captioning'"):
        find(Data(), "captioning", Setup())
