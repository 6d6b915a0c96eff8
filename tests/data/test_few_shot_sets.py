"""The few-shot data sets of TFDS: read as they lie there, without TensorFlow, with class names for prompts."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tfds_prepared import prepare

from vla_jax.data.few_shot_sets import FEW_SHOT_SETS, few_shot_set, load_tfds_few_shot
from vla_jax.errors import UserError

IN_TFDS = sorted(name for name, of in FEW_SHOT_SETS.items() if of.tfds)


# First and last classes as CoOp's lists name them, and the published numbers of classes.
CLASSES = {
    "imagenet": (1000, {0: "name of n01440764"}),
    "caltech101": (102, {0: "accordion"}),
    "oxford_pets": (37, {0: "Abyssinian", 1: "american bulldog"}),
    "stanford_cars": (196, {0: "2000 AM General Hummer SUV", 195: "2012 smart fortwo Convertible"}),
    "flowers102": (102, {0: "pink primrose", 1: "hard-leaved pocket orchid"}),
    "food101": (101, {0: "apple pie", 100: "waffles"}),
    "sun397": (397, {0: "abbey", 1: "airplane cabin", 25: "indoor badminton court"}),
    "dtd": (47, {0: "banded", 46: "zigzagged"}),
    "eurosat": (10, {0: "Annual Crop Land", 9: "Sea or Lake"}),
}


@pytest.mark.parametrize("name", IN_TFDS)
def test_what_tfds_prepared_is_read(tmp_path, monkeypatch, name):
    prepare(name, tmp_path, monkeypatch)
    names = None
    if name == "imagenet":
        names = tmp_path / "classnames.txt"
        labels = tfds.builder("imagenet2012", data_dir=str(tmp_path)).info.features["label"].names
        # CoOp's file is sorted, and may hold more.
        names.write_text("".join(f"{label} name of {label}\n" for label in [*labels, "n99999999"]))
    for split in FEW_SHOT_SETS[name].splits:
        source = load_tfds_few_shot(name, split, tmp_path, names)
        examples = [source[place] for place in range(len(source))]
        assert sorted(example["label"] for example in examples) == [0, 1, 2]
        for example in examples:
            assert set(example) == {"image", "label", "class_name"}
            assert example["class_name"] == source.class_names[example["label"]]
            assert np.asarray(Image.open(io.BytesIO(example["image"])))[0, 0, 0] == 10 * example["label"]
    part = load_tfds_few_shot(name, "train[1:]", tmp_path, names)
    assert len(part) == 2
    count, some = CLASSES[name]
    assert len(part.class_names) == len(set(part.class_names)) == count
    assert {label: part.class_names[label] for label in some} == some
    assert not any("_" in words or words.startswith("/") for words in part.class_names)
    assert "tensorflow" not in sys.modules


def test_prompts():
    assert few_shot_set("oxford_pets").prompts(["pug", "shiba_inu"]) == [
        "a photo of a pug, a type of pet.",
        "a photo of a shiba inu, a type of pet.",
    ]
    assert all(of.template.count("{}") == 1 for of in FEW_SHOT_SETS.values())
    assert len(FEW_SHOT_SETS) == 11
    with pytest.raises(UserError, match="did you mean 'eurosat'"):
        few_shot_set("eurosar")


def test_what_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=rf"run: tfds build dtd --file_format=array_record --data_dir={tmp_path}"):
        load_tfds_few_shot("dtd", "train", tmp_path)
    with pytest.raises(UserError, match=r"no pictures of UCF101; .*'few_shot' with the configuration 'ucf101'"):
        load_tfds_few_shot("ucf101", "train", tmp_path)
    with pytest.raises(UserError, match="unknown split of EuroSAT in TFDS 'test'; allowed: train"):
        load_tfds_few_shot("eurosat", "test", tmp_path)
    prepare("dtd", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"'train\[:4\]' of a split of 3 examples"):
        load_tfds_few_shot("dtd", "train[:4]", tmp_path)
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="is in the format tfrecord, which only TensorFlow reads"):
        load_tfds_few_shot("dtd", "train", tmp_path)


def test_class_names_of_imagenet_are_looked_up(tmp_path, monkeypatch):
    prepare("imagenet", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"labels of ImageNet in TFDS are numbers \(n01440764\); give class_names"):
        load_tfds_few_shot("imagenet", "test", tmp_path)
    file = tmp_path / "names.txt"
    with pytest.raises(UserError, match="does not exist"):
        load_tfds_few_shot("imagenet", "test", tmp_path, file)
    for content, message in {
        "n01440764 tench\n": r"no name for 999 of 1000 classes of ImageNet: \['n01443537'",
        "n01440764 tench\nn01440764 fish\n": "row 2: the label 'n01440764' stands twice",
        "n01440764 tench\nn01443537\n": "row 2: expected a label and a class name",
    }.items():
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            load_tfds_few_shot("imagenet", "test", tmp_path, file)
