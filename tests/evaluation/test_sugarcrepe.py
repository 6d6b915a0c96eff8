from __future__ import annotations

import numpy as np
import pytest
from published_layout import pixels_of, write_json, write_picture

from vla_jax.errors import UserError
from vla_jax.evaluation import sugarcrepe
from vla_jax.evaluation.sugarcrepe import SugarCrepe


@pytest.fixture
def folder(tmp_path):
    """Two examples in each category, the first of all on one picture; numbers may have holes."""
    for place, category in enumerate(sugarcrepe.CATEGORIES):
        content = {
            str(number): {
                "filename": f"{0 if number == 0 else place:012}.jpg",
                "caption": f"A {category} cat {number}.",
                "negative_caption": f"A {category} dog {number}.",
            }
            for number in (0, 2)
        }
        write_json(tmp_path / "data" / f"{category}.json", content)
        write_picture(tmp_path / "val2017" / f"{place:012}.jpg", place)
    return tmp_path


def test_the_published_layout_is_read(folder):
    source = SugarCrepe(folder / "data", folder / "val2017")
    assert len(source) == 14
    example = source[2 * sugarcrepe.CATEGORIES.index("swap_obj") + 1]
    assert pixels_of(example.pop("image"))[0, 0, 2] == 6
    assert example == {
        "id": "swap_obj/2",
        "image_id": "000000000006.jpg",
        "captions": ("A swap_obj cat 2.", "A swap_obj dog 2."),
        "kind": "swap_obj",
    }
    assert [source[at]["kind"] for at in range(0, 14, 2)] == list(sugarcrepe.CATEGORIES)
    assert len(SugarCrepe(folder / "data", folder / "val2017", ("swap_att",))) == 2


def test_the_caption_must_score_strictly_above_the_negative_one(folder):
    """Right alone in the first example of each category; a tie in the second one of the swaps."""
    source = SugarCrepe(folder / "data", folder / "val2017")
    scores = np.tile([[2.0, 1.0], [1.0, 2.0]], (7, 1))
    scores[[at for at, example in enumerate(source.examples) if example.identifier.startswith("swap_")][1::2]] = 1.0
    found = sugarcrepe.evaluate(source.examples, scores)
    assert list(found) == [*sugarcrepe.CATEGORIES, "add", "replace", "swap"]
    assert {part.accuracy.value for part in found.values()} == {0.5}
    assert {name: part.ties for name, part in found.items() if part.ties} == {
        "swap_att": 0.5,
        "swap_obj": 0.5,
        "swap": 0.5,
    }
    assert {name: found[name].examples for name in sugarcrepe.CHANGES} == {"add": 4, "replace": 6, "swap": 4}
    constant = sugarcrepe.evaluate(source.examples, np.zeros((14, 2)))
    assert {(part.accuracy.value, part.ties) for part in constant.values()} == {(0.0, 1.0)}


def test_kinds_of_change_count_examples_as_the_published_means_do():
    """CLIP ViT-B/32 by category, and the published 80.76, 63.27 and 75.09; swap_obj had 246 examples then."""
    sizes = {"add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652, "replace_rel": 1406}
    sizes |= {"swap_att": 666, "swap_obj": 246}
    published = {"add_att": 68.79, "add_obj": 77.21, "replace_att": 80.08, "replace_obj": 90.92, "replace_rel": 69.20}
    published |= {"swap_att": 63.96, "swap_obj": 61.38}
    examples, scores = [], []
    for category, size in sizes.items():
        right = round(published[category] * size / 100)
        for number in range(size):
            name = f"{category}/{number}"
            examples.append(sugarcrepe.Example(name, category, f"{name}.jpg", ("a", "b")))
            scores.append([1.0, 0.0] if number < right else [0.0, 1.0])
    found = sugarcrepe.evaluate(examples, np.array(scores))
    for name, value in (published | {"replace": 80.76, "swap": 63.27, "add": 75.09}).items():
        assert round(100 * found[name].accuracy.value, 2) == pytest.approx(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("negative_caption"), "example '2': fields negative_caption are missing"),
        (lambda entry: entry.update(caption=["a cat"]), r"example '2': field caption is \['a cat'\], not str"),
        (lambda entry: entry.update(caption=""), "example '2': field caption is empty"),
    ],
)
def test_damaged_examples_are_named(folder, change, message):
    entries = {str(n): {"filename": "0.jpg", "caption": "a", "negative_caption": "b"} for n in (0, 2)}
    change(entries["2"])
    write_json(folder / "data" / "add_att.json", entries)
    with pytest.raises(UserError, match=message):
        SugarCrepe(folder / "data", folder / "val2017")


def test_what_is_absent_is_named_with_what_to_download(folder):
    (folder / "val2017" / "000000000003.jpg").unlink()
    with pytest.raises(
        UserError, match=r"1 of 7 pictures are missing, first .*003\.jpg' \(example replace_obj/2\).*val2017\.zip"
    ):
        SugarCrepe(folder / "data", folder / "val2017")
    (folder / "data" / "add_obj.json").unlink()
    with pytest.raises(
        UserError, match=r"add_obj\.json' is not there\. Clone https://github\.com/RAIVNLab/sugar-crepe"
    ):
        SugarCrepe(folder / "data", folder / "val2017")
    with pytest.raises(UserError, match=r"unknown category of SugarCrepe 'swap_object'; did you mean 'swap_obj'"):
        SugarCrepe(folder / "data", folder / "val2017", ("swap_object",))
    (folder / "data" / "swap_att.json").write_text('{"0": {},\n "0": {}}')
    with pytest.raises(UserError, match="the key '0' stands twice"):
        SugarCrepe(folder / "data", folder / "val2017", ("swap_att",))
