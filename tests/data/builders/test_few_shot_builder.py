"""Few-shot data sets in their published splits: lists in JSON, and the aircraft's in text."""

from __future__ import annotations

import pytest
from published_layouts import edit, picture, plain, write

from vla_jax.data.builders.few_shot import FewShot
from vla_jax.data.few_shot_sets import FEW_SHOT_SETS
from vla_jax.data.sources import load_source, make_builder
from vla_jax.errors import UserError

# Every class has a picture of the same name, in a folder of its own.
LISTS = {
    "train": [["cup/image_0001.jpg", 0, "tea_cup"], ["mug/image_0001.jpg", 1, "mug"]],
    "val": [["cup/image_0002.jpg", 0, "tea_cup"]],
    "test": [["mug/image_0002.jpg", 1, "mug"]],
}


def listed(root, name):
    """A data set with its list; returns the file's bytes by picture."""
    of = FEW_SHOT_SETS[name]
    write(root / of.folder / f"split_zhou_{of.name}.json", LISTS)
    names = [row[0] for rows in LISTS.values() for row in rows]
    folder = root / of.folder / of.pictures
    return {name: write(folder / name, picture(seed, file_format="JPEG")) for seed, name in enumerate(names)}


def test_all_but_imagenet_have_a_configuration():
    assert set(FewShot.builder_configs) == set(FEW_SHOT_SETS) - {"imagenet"}


@pytest.mark.parametrize("name", sorted(set(FEW_SHOT_SETS) - {"imagenet", "fgvc_aircraft"}))
def test_what_is_built_is_what_is_listed(tmp_path, name):
    files = listed(tmp_path / "manual", name)
    for split, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        source = load_source("few_shot", split, tmp_path / "data", name, manual_dir=tmp_path / "manual")
        assert [plain(source[place]) for place in range(len(source))] == [
            {
                "image": files[file],
                "image_id": file.removesuffix(".jpg"),
                "label": label,
                "class_name": words.replace("_", " "),
            }
            for file, label, words in LISTS[theirs]
        ]
    assert make_builder("few_shot", tmp_path / "data", name).class_names() == ["tea cup", "mug"]


def test_aircraft(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    write(folder / "variants.txt", "707-320\nA340-600\nDH-82 Tiger Moth\n")
    lists = {"train": ["1 DH-82 Tiger Moth", "2 707-320", "3 A340-600"], "val": ["4 A340-600"], "test": ["5 707-320"]}
    for split, lines in lists.items():
        write(folder / f"images_variant_{split}.txt", "".join(f"{line}\n" for line in lines))
    files = {str(n): write(folder / "images" / f"{n}.jpg", picture(n, file_format="JPEG")) for n in range(1, 6)}
    source = load_source("few_shot", "train", tmp_path / "data", "fgvc_aircraft", manual_dir=tmp_path)
    assert [plain(source[place]) for place in range(3)] == [
        {"image": files["1"], "image_id": "1", "label": 2, "class_name": "DH-82 Tiger Moth"},
        {"image": files["2"], "image_id": "2", "label": 0, "class_name": "707-320"},
        {"image": files["3"], "image_id": "3", "label": 1, "class_name": "A340-600"},
    ]
    write(folder / "images_variant_val.txt", "4 A340-700\n")
    with pytest.raises(UserError, match=r"images_variant_val\.txt, row 1: the variant 'A340-700' is not in"):
        load_source("few_shot", "train", tmp_path / "other", "fgvc_aircraft", manual_dir=tmp_path)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"row 1 of 'test': the label 2 \(jug\) is outside the 2 classes", lambda f: f.update(test=[["a", 2, "jug"]])),
        (r"row 1 of 'val': the label 1 is 'tea cup' here and 'mug' elsewhere", lambda f: f["val"][0].__setitem__(1, 1)),
        ("labels must count from 0 without gaps", lambda f: f["train"].append(["a", 3, "jug"])),
        ("row 1 of 'val': 'label' must be a whole number", lambda f: f["val"][0].__setitem__(1, "cup")),
        ("row 2 of 'train': expected a picture, a label and a class name", lambda f: f["train"][1].pop()),
        ("the picture 'cup/image_0001.jpg' stands twice", lambda f: f["test"].append(f["train"][0])),
        (r"1 picture\(s\).*cup/image_0009\.jpg", lambda f: f["val"].append(["cup/image_0009.jpg", 0, "tea_cup"])),
        ("expected an object with lists train, val and test", lambda f: f.pop("val")),
        ("the split 'validation' of the data set 'few_shot' is empty", lambda f: f["val"].clear()),
    ],
)
def test_wrong_lists_are_refused(tmp_path, message, change):
    listed(tmp_path, "caltech101")
    edit(tmp_path / "caltech-101" / "split_zhou_Caltech101.json", change)
    with pytest.raises(UserError, match=message):
        load_source("few_shot", "train", tmp_path / "data", "caltech101", manual_dir=tmp_path)
    assert not list((tmp_path / "data").rglob("classes.json"))


def test_missing_lists_say_where_they_are_from(tmp_path):
    (tmp_path / "dtd").mkdir()
    with pytest.raises(UserError, match=r"(?s)needs dtd/split_zhou_DescribableTextures\.json.*DATASETS\.md"):
        load_source("few_shot", "train", tmp_path / "data", "dtd", manual_dir=tmp_path)
