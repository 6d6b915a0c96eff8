from __future__ import annotations

import numpy as np
import pytest
from published_layout import pixels_of, write_json, write_picture

from vla_jax.errors import UserError
from vla_jax.evaluation import aro
from vla_jax.evaluation.aro import Aro


def entry(number=0, **more):
    return {
        "image_id": "2327920",
        "image_path": f"{2327920 + number}.jpg",
        "bbox_x": 2,
        "bbox_y": 1,
        "bbox_w": 3,
        "bbox_h": 4,
        "true_caption": "the horse is eating the grass",
        "false_caption": "the grass is eating the horse",
    } | more


@pytest.fixture
def folder(tmp_path):
    relations = [entry(number, relation_name=["eating", "above"][number]) for number in range(2)]
    write_json(tmp_path / "visual_genome_relation.json", relations)
    write_json(tmp_path / "visual_genome_attribution.json", [entry(attributes=["brown", "green"])])
    for number in range(2):
        write_picture(tmp_path / "images" / f"{2327920 + number}.jpg", number)
    return tmp_path


def test_the_published_layout_is_read_and_cropped(folder):
    source = Aro(folder, "relation")
    assert len(source) == 2
    example = source[1]
    picture = example.pop("image")
    assert picture.shape == (4, 3, 3)
    assert picture[..., 0].tolist() == [[20, 30, 40]] * 4  # columns 2, 3, 4
    assert picture[:, 0, 1].tolist() == [10, 20, 30, 40]  # rows 1 to 4
    assert example == {
        "id": "1",
        "image_id": "2327921.jpg",
        "captions": ("the grass is eating the horse", "the horse is eating the grass"),
        "kind": "above",
    }
    assert Aro(folder, "attribution")[0]["kind"] == "brown_green"


def test_a_box_that_reaches_beyond_the_picture_is_padded_with_black(folder):
    write_json(folder / "visual_genome_relation.json", [entry(relation_name="on", bbox_w=20)])
    picture = Aro(folder, "relation")[0]["image"]
    assert picture.shape == (4, 20, 3)
    assert picture[:, 6:].max() == 0
    whole = pixels_of((folder / "images" / "2327920.jpg").read_bytes())
    np.testing.assert_array_equal(picture[:, :6], whole[1:5, 2:])


def of_kinds(*kinds):
    return [aro.Example(str(n), None, (0, 0, 1, 1), ("false", "true"), kind) for n, kind in enumerate(kinds)]


def test_relations_count_the_same_whatever_their_sizes():
    """Of "on" 3 of 4 are right, of "eating" none of 2 (a tie and an error), of "near" 1 of 1."""
    examples = of_kinds("on", "on", "eating", "on", "on", "eating", "near")
    scores = np.array([[0, 1], [0, 1], [1, 1], [0, 1], [1, 0], [1, 0], [0, 1]], float)
    found = aro.evaluate_relations(examples, scores)
    assert found.mean.value == pytest.approx((0.75 + 0 + 1) / 3)
    assert found.ties == pytest.approx(1 / 7)
    assert {name: (part.accuracy.value, part.examples) for name, part in found.kinds.items()} == {
        "eating": (0, 2), "near": (1, 1), "on": (0.75, 4)
    }  # fmt: skip
    found = aro.evaluate_relations(examples, scores, without={"near", "beside"})
    assert found.mean.value == pytest.approx(0.375)
    assert list(found.kinds) == ["eating", "on"]
    with pytest.raises(UserError, match="no relation is left"):
        aro.evaluate_relations(examples, scores, without={"near", "on", "eating"})


def test_attributes_with_fewer_than_25_examples_are_dropped():
    examples = of_kinds(*["red_blue"] * 25, *["old_new"] * 24, *["wet_dry"] * 50)
    right = np.concatenate([np.arange(25) < 5, np.ones(24, bool), np.arange(50) < 40])
    scores = np.stack([np.zeros(99), np.where(right, 1.0, -1.0)], 1)
    found = aro.evaluate_attributes(examples, scores)
    assert found.mean.value == pytest.approx((0.2 + 0.8) / 2)
    assert list(found.kinds) == ["red_blue", "wet_dry"]
    with pytest.raises(UserError, match="no class has 25 examples; the largest of 1 has 24"):
        aro.evaluate_attributes(examples[25:49], scores[25:49])


def test_a_constant_scorer_gets_nothing():
    found = aro.evaluate_relations(of_kinds("on", "eating"), np.ones((2, 2)))
    assert (found.mean.value, found.ties) == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox_w": 0}, r"example 1: the box at 2, 1 of 0 x 4 pixels"),
        ({"bbox_x": "2"}, "example 1: field bbox_x is '2', not int or float"),
        ({"relation_name": ""}, "example 1: field relation_name is empty"),
        ({"image_path": "none.jpg"}, r"1 of 2 pictures are missing, first .*none\.jpg' \(example 1 of .*VG_Relation"),
    ],
)
def test_damaged_examples_are_named(folder, change, message):
    write_json(folder / "visual_genome_relation.json", [entry(relation_name="on"), entry(relation_name="on") | change])
    with pytest.raises(UserError, match=message):
        Aro(folder, "relation")


def test_other_mistakes_are_named(folder):
    with pytest.raises(UserError, match="unknown part of ARO 'relations'; did you mean 'relation'"):
        Aro(folder, "relations")
    with pytest.raises(UserError, match=r"visual_genome_relation\.json' is not there.*vision-language-models-are-bows"):
        Aro(folder / "nowhere", "relation")
    write_json(folder / "visual_genome_attribution.json", [entry(attributes=["brown"])])
    with pytest.raises(UserError, match=r"example 0: attributes are two texts, given \['brown'\]"):
        Aro(folder, "attribution")
    write_json(folder / "visual_genome_relation.json", [entry(relation_name="on", bbox_x=100)])
    with pytest.raises(UserError, match=r"example 0: the box \(100, 1, 103, 5\) lies outside of .* 8 x 6 pixels"):
        Aro(folder, "relation")[0]
