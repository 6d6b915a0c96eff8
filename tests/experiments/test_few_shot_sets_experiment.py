"""The eleven few-shot sets from the launcher: as TFDS has prepared them, in published splits, and what is missing."""

from __future__ import annotations

import dataclasses
import io
import json
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tfds_prepared import prepare

from experiments import few_shot as experiment
from experiments.few_shot import Config, check, run
from vla_jax.adapters import TipAdapter
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.few_shot_sets import FEW_SHOT_SETS, TFDS_NAMES
from vla_jax.data.few_shot_splits import divide, opened_splits, three_splits
from vla_jax.data.image import Preprocess
from vla_jax.data.text import Tokenize
from vla_jax.data_sets import Data
from vla_jax.errors import UserError
from vla_jax.evaluation.few_shot import draw_shots
from vla_jax.evaluation.scene_zero_shot import clip_encoders
from vla_jax.evaluation.zero_shot import class_features, cosines
from vla_jax.few_shot_data import classes_of, labels_of, sources_of
from vla_jax.launching import parse_config
from vla_jax.reporting.page.tested import find_tested
from vla_jax.variants import Budget

SPLITS = {split: split for split in ("train", "validation", "test")}
IN_TFDS = sorted(name for name, of in FEW_SHOT_SETS.items() if of.tfds)
NOWHERE = tuple(sorted(set(FEW_SHOT_SETS) - set(IN_TFDS)))


def pictures(source):
    return [bytes(source[place]["image"]) for place in range(len(source))]


def class_names_of_imagenet(manual_dir, data_dir):
    labels = tfds.builder("imagenet2012", data_dir=str(data_dir)).info.features["label"].names
    (manual_dir / "imagenet").mkdir(parents=True)
    lines = "".join(f"{label} thing {number}\n" for number, label in enumerate(labels))
    (manual_dir / "imagenet" / "classnames.txt").write_text(lines)


@pytest.mark.parametrize("name", IN_TFDS)
def test_every_set_of_tfds_has_three_splits_without_a_common_picture(tmp_path, monkeypatch, name):
    of, labels = FEW_SHOT_SETS[name], np.arange(20) % 2
    prepare(name, tmp_path, monkeypatch, labels, distinct=True)
    data = Data(name=name, data_dir=str(tmp_path))
    if name == "imagenet":
        class_names_of_imagenet(tmp_path / "manual", tmp_path)
        data = dataclasses.replace(data, manual_dir=str(tmp_path / "manual"))
    found = sources_of(data, None)
    assert list(found) == ["train", "validation", "test"]
    # Ten of each class: a fifth for validation, three tenths for testing, where TFDS has no such split.
    held_out = {"validation": 2, "test": 3}
    expected = {split: 10 if split in of.splits else count for split, count in held_out.items()}
    expected["train"] = 10 - sum(count for split, count in held_out.items() if split not in of.splits)
    seen = []
    for split, source in found.items():
        assert np.bincount(labels_of(source)).tolist() == [expected[split]] * 2, split
        for place, label in enumerate(labels_of(source)):
            assert source[place]["label"] == label
            assert np.asarray(Image.open(io.BytesIO(source[place]["image"])))[0, 0, 0] == 10 * label
        seen += pictures(source)
    assert len(set(seen)) == len(seen) == 20 * len(set(of.splits.values()))
    again = sources_of(data, None)
    assert all(pictures(again[split]) == pictures(source) for split, source in found.items())

    classes = classes_of(data)
    assert classes.templates == (of.template,)
    assert classes.names == (found["test"].source if "test" not in of.splits else found["test"]).class_names
    told = [split for split in held_out if split not in of.splits]
    assert classes.origin.startswith(f"{of.name} as in TFDS ({of.tfds.split('/')[0]} ")
    assert f"{' and '.join(told)} held out of train" in classes.origin or not told
    own = dataclasses.replace(data, name=TFDS_NAMES[of.tfds.split("/")[0]])
    assert classes_of(own, ("my {}",)) == dataclasses.replace(classes, templates=("my {}",))


def test_names_of_tfds_are_understood(tmp_path, monkeypatch):
    prepare("flowers102", tmp_path, monkeypatch)
    theirs, ours = (classes_of(Data(name=name, data_dir=str(tmp_path))) for name in ("oxford_flowers102", "flowers102"))
    assert theirs == ours
    assert ours.fingerprint.startswith("flowers102_tfds_")


def test_slices_are_other_data_and_must_not_overlap(tmp_path, monkeypatch):
    prepare("oxford_pets", tmp_path, monkeypatch, np.arange(20) % 2, distinct=True)
    data = Data(name="oxford_pets", data_dir=str(tmp_path), train_split="train[:60%]", validation_split="train[60%:]")
    found = sources_of(data, None)
    assert {split: len(source) for split, source in found.items()} == {"train": 12, "validation": 8, "test": 20}
    assert not set(pictures(found["train"])) & set(pictures(found["validation"]))
    moved = dataclasses.replace(data, train_split="train[:70%]", validation_split="train[70%:]")
    whole = Data(name="oxford_pets", data_dir=str(tmp_path))
    assert len({classes_of(each).fingerprint for each in (data, moved, whole)}) == 3
    with pytest.raises(
        UserError,
        match=r"train_split 'train' and validation_split 'train\[60%:\]' of oxford_pets have 8 pictures in common; "
        r"give slices that do not overlap, such as train\[:80%\]",
    ):
        classes_of(dataclasses.replace(data, train_split="train"))
    with pytest.raises(UserError, match=r"unknown split of OxfordPets in TFDS 'validation'; allowed: train, test"):
        classes_of(dataclasses.replace(data, validation_split="validation[:50%]"))
    one = dataclasses.replace(data, train_split="train[:60%]", validation_split="validation")
    divided = sources_of(one, None)
    assert len(divided["train"]) + len(divided["validation"]) == 12
    assert set(pictures(divided["train"]) + pictures(divided["validation"])) == set(pictures(found["train"]))


def test_classes_are_divided_each_by_itself():
    labels = np.repeat([0, 1, 4], [10, 5, 3])
    found = divide(labels, {"validation": 0.2, "test": 0.3})
    counts = {split: np.bincount(labels[places], minlength=5).tolist() for split, places in found.items()}
    assert counts == {"train": [5, 2, 0, 0, 1], "validation": [2, 1, 0, 0, 1], "test": [3, 2, 0, 0, 1]}
    assert sorted(np.concatenate(list(found.values()))) == list(range(18))
    # A class's choice does not depend on the other classes.
    alone = divide(labels[:10], {"validation": 0.2, "test": 0.3})
    for split, places in alone.items():
        assert places.tolist() == [place for place in found[split] if place < 10]
    other = divide(labels, {"validation": 0.2, "test": 0.3}, seed=1)
    assert any(not np.array_equal(found[split], other[split]) for split in found)
    with pytest.raises(
        UserError, match=r"the class 7 has 2 picture\(s\), too few .* train, validation, test; give more"
    ):
        divide([7, 7], {"validation": 0.2, "test": 0.3})


def test_a_class_with_too_few_pictures_is_named_with_its_set(tmp_path, monkeypatch):
    prepare("eurosat", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"eurosat, train: the class 0 has 1 picture\(s\), too few to be divided"):
        three_splits("eurosat", SPLITS, tmp_path)


def test_published_files_are_read_with_a_manual_dir(tmp_path):
    lists, seed = {"train": [], "val": [], "test": []}, 0
    folder = tmp_path / "manual" / "oxford_pets"
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for label, name in enumerate(("shiba_inu", "pug", "beagle", "sphynx")):
            for _ in range(count):
                seed += 1
                pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / f"{name}_{seed}.jpg")
                lists[split].append([f"{name}_{seed}.jpg", label, name])
    (folder / "split_zhou_OxfordPets.json").write_text(json.dumps(lists))
    given = {"data_dir": str(tmp_path / "data"), "manual_dir": str(tmp_path / "manual")}
    named = Data(name="oxford_pets", **given)
    published = Data(name="few_shot", config="oxford_pets", **given)
    assert classes_of(named) == classes_of(published)
    assert classes_of(named).names == ("shiba inu", "pug", "beagle", "sphynx")
    assert classes_of(named).templates == ("a photo of a {}, a type of pet.",)
    found, expected = sources_of(named, None), sources_of(published, None)
    for split, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert pictures(found[split]) == pictures(expected[split])
        assert pictures(found[split]) == [(folder / "images" / name).read_bytes() for name, _, _ in lists[theirs]]
        assert labels_of(found[split]).tolist() == [label for _, label, _ in lists[theirs]]


@pytest.fixture
def offline(monkeypatch):
    """Whoever asks for the network fails at once."""

    def refused(*_, **__):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.parametrize("name", sorted(set(IN_TFDS) - {"imagenet"}))
def test_what_was_not_prepared_is_named_and_nothing_is_downloaded(tmp_path, offline, name):
    config = parse_config(experiment, [f"--config.data.name={name}", f"--config.data.data_dir={tmp_path}"])
    of = FEW_SHOT_SETS[name]
    with pytest.raises(
        UserError,
        match=rf"{of.name} \({of.tfds}\) is not in {tmp_path}/.*nothing is downloaded\. .*run: tfds build {of.tfds} "
        rf"--file_format=array_record --data_dir={tmp_path}\. Or give a manual_dir with CoOp's files of it, which lie "
        rf"in {of.folder}",
    ):
        check(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NOWHERE)
def test_sets_that_tfds_has_no_pictures_of_ask_for_their_published_files(tmp_path, offline, name):
    config = parse_config(experiment, [f"--config.data.name={name}", f"--config.data.data_dir={tmp_path}"])
    with pytest.raises(UserError, match=rf"(?s)DATASETS\.md.*{FEW_SHOT_SETS[name].folder}"):
        check(config)


def test_imagenet_says_what_it_needs(tmp_path, monkeypatch, offline):
    data = Data(name="imagenet", data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"with data\.manual_dir the folder in which imagenet/classnames\.txt lies"):
        classes_of(data)
    data = dataclasses.replace(data, manual_dir=str(tmp_path / "manual"))
    with pytest.raises(
        UserError, match=r"run: tfds build imagenet2012 .*What that needs first: .*ILSVRC2012_img_train"
    ):
        classes_of(data)
    prepare("imagenet", tmp_path / "data", monkeypatch)
    with pytest.raises(UserError, match=r"manual/imagenet/classnames\.txt does not exist"):
        classes_of(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "oxford_pet"},
            r"unknown data set 'oxford_pet'; did you mean 'oxford_pets'.*imagenet, .*ucf101, .*scenes",
        ),
        ({"name": "dtd", "config": "rgb"}, "dtd has no configurations; leave data.config out, which was 'rgb'"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        classes_of(Data(data_dir=str(tmp_path), **changes))


def test_splits_that_tfds_has_are_opened_as_they_are(tmp_path, monkeypatch):
    prepare("dtd", tmp_path, monkeypatch)
    opened = opened_splits("dtd", SPLITS, tmp_path)
    assert {split: (source.split, source.start, source.stop) for split, source in opened.items()} == {
        split: (split, 0, 3) for split in SPLITS
    }
    assert three_splits("dtd", SPLITS, tmp_path).keys() == opened.keys()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_experiment_keeps_to_the_protocol_on_a_set_of_tfds(small_backbone_folder, tmp_path, monkeypatch):
    prepare("eurosat", tmp_path / "data", monkeypatch, np.arange(100) % 10, distinct=True)
    data, seeds = Data(name="eurosat", data_dir=str(tmp_path / "data")), (1, 2)
    config = Config(
        backbone=str(small_backbone_folder),
        data=data,
        methods=("tip", "coop"),
        shots=(1, 2),
        novel_shots=2,
        light_rates=(1e-2,),
        tip=TipAdapter(epochs=2, alpha_steps=3, beta_steps=3),
        budget=Budget(steps=2, batch_size=8, seeds=seeds, log_every=1),
    )
    assert "10 classes" in check(config).title
    rows = run(config, tmp_path / "run")
    assert [row["name"] for row in rows] == ["zero_shot", "tip", "coop"]
    classes, sources = classes_of(data), sources_of(data, None)
    assert (classes.names[0], len(sources["train"]), len(sources["test"])) == ("Annual Crop Land", 50, 30)

    # The backbone by itself, computed in another way, on the pictures held out for testing.
    backbone = load_backbone(small_backbone_folder)
    images, texts = clip_encoders(
        CLIP(backbone.config, Compute()), Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, 24)
    )(backbone.params)
    labels = labels_of(sources["test"])
    named = class_features(texts, classes.names, ("a centered satellite photo of {}.",))
    scores = cosines(images(pictures(sources["test"])), named)
    assert rows[0]["shots_1"] == rows[0]["shots_2"] == pytest.approx((scores.argmax(1) == labels).mean())

    runs = tmp_path / "run" / "runs" / classes.fingerprint
    train = labels_of(sources["train"])
    most = np.unique(np.concatenate([draw_shots(train, 2, seed) for seed in seeds]))
    for shots in (1, 2):
        for seed in seeds:
            (folder,) = (runs / "all_classes" / f"shots_{shots}" / "coop").glob(f"*/seed_{seed}")
            drawn = json.loads((folder / "settings.json").read_text())["drawn"]
            np.testing.assert_array_equal(most[drawn], draw_shots(train, shots, seed))
            found = dict(np.load(folder / "test.npz"))
            np.testing.assert_array_equal(found["correct"], found["prediction"] == labels[found["index"]])
            at = seeds.index(seed)
            assert rows[2][f"shots_{shots}_by_seed"][at] == pytest.approx(found["correct"].mean())
    halves = [json.loads(line) for line in (tmp_path / "run/base_to_novel.jsonl").read_text().splitlines()]
    base = labels < 5
    assert halves[0]["base"] == pytest.approx((scores[base][:, :5].argmax(1) == labels[base]).mean())
    assert halves[0]["novel"] == pytest.approx((scores[~base][:, 5:].argmax(1) + 5 == labels[~base]).mean())
    assert (
        f"EuroSAT as in TFDS (eurosat {classes.fingerprint.split('_')[2]}" in (tmp_path / "run/results.md").read_text()
    )

    told = find_tested(dataclasses.asdict(config), f"{classes.fingerprint}/all_classes/shots_1", backbone, None)
    assert told.names == classes.names
    assert pictures(told.test) == pictures(sources["test"])
