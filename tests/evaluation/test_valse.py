from __future__ import annotations

import numpy as np
import pytest
from published_layout import pixels_of, write_json, write_picture

from vla_jax.errors import UserError
from vla_jax.evaluation import valse
from vla_jax.evaluation.valse import Valse

DATASETS = {"existence": "visual7w", "actant-swap": "SWiG", "foil-it": "FOIL dataset"}


def entry(dataset, image, votes, foil="There is no cat."):
    return {
        "dataset": dataset,
        "original_split": "test",
        "image_file": image,
        "linguistic_phenomena": "existence",
        "caption": "There is a cat.",
        "classes": 0,
        "classes_foil": [2, 1, 8],
        "mturk": {"foil": 3 - votes, "caption": votes, "other": 0},
        "foil": foil,
    }


@pytest.fixture
def folder(tmp_path):
    """In each of three instruments four examples, of which the annotators refused one."""
    for shade, (instrument, dataset) in enumerate(DATASETS.items()):
        names = [f"{instrument}_{number}" for number in range(4)]
        content = {name: entry(dataset, "one.jpg", votes) for name, votes in zip(names, (3, 1, 2, 3), strict=True)}
        write_json(tmp_path / "data" / f"{instrument}.json", content)
        write_picture(tmp_path / "images" / dataset / "one.jpg", shade)
    return tmp_path


def read(folder, **more):
    return Valse(folder / "data", folder / "images", instruments=tuple(DATASETS), **more)


def test_valid_examples_of_the_published_layout_are_read(folder):
    source = read(folder)
    assert [example.identifier for example in source.examples[:3]] == [
        "existence/existence_0", "existence/existence_2", "existence/existence_3"
    ]  # fmt: skip
    assert len(source) == 9
    example = source[4]
    assert pixels_of(example.pop("image"))[0, 0, 2] == 1
    assert example == {
        "id": "actant-swap/actant-swap_2",
        "image_id": str(folder / "images" / "SWiG" / "one.jpg"),
        "captions": ("There is a cat.", "There is no cat."),
        "kind": "actant-swap",
    }


def test_a_data_set_may_lie_elsewhere(folder):
    (folder / "images" / "SWiG").rename(folder / "swig_512")
    with pytest.raises(UserError, match=r"1 of 3 pictures are missing.*SWiG/one\.jpg' \(example actant.*images_512"):
        read(folder)
    assert pixels_of(read(folder, folders={"SWiG": folder / "swig_512"})[3]["image"])[0, 0, 2] == 1
    with pytest.raises(UserError, match="unknown data set of VALSE 'Swig'; did you mean 'SWiG'"):
        read(folder, folders={"Swig": folder})


SCORES = np.array([[2.0, 1.0], [1.0, 1.0], [-1.0, -2.0]] + [[1.0, -1.0], [-3.0, 1.0], [-1.0, -1.0]] + [[0.0, 0.5]] * 3)


def test_pairs_are_right_where_the_caption_scores_strictly_above_its_foil(folder):
    found = valse.evaluate(read(folder).examples, SCORES)
    assert {name: (part.accuracy.value, part.ties) for name, part in found.items()} == {
        "existence": (pytest.approx(2 / 3), pytest.approx(1 / 3)),
        "actant-swap": (pytest.approx(1 / 3), pytest.approx(1 / 3)),
        "foil-it": (0.0, 0.0),
    }


def test_captions_and_foils_are_judged_each_by_itself(folder):
    """Existence: captions 2, 1, -1, foils 1, 1, -2. A score of exactly the threshold is false."""
    found = valse.judge(read(folder).examples, SCORES)
    values = {name: (part.caption.value, part.foil.value, part.mean, part.least) for name, part in found.items()}
    assert values == {
        "existence": pytest.approx((2 / 3, 1 / 3, 1 / 2, 1 / 3)),
        "actant-swap": pytest.approx((1 / 3, 2 / 3, 1 / 2, 1 / 3)),
        "foil-it": (0, 0, 0, 0),
    }
    always = valse.judge(read(folder).examples, np.ones((9, 2)))["existence"]
    assert (always.mean, always.least) == (0.5, 0)
    assert valse.judge(read(folder).examples, np.ones((9, 2)), threshold=1.0)["existence"].foil.value == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("mturk"), "example 'x': fields mturk are missing"),
        (lambda e: e.update(mturk={"foil": 1}), "example 'x', mturk: fields caption are missing"),
        (lambda e: e.update(dataset="COCO"), "example 'x': unknown data set 'COCO'"),
        (lambda e: e.update(foil=None), "example 'x': field foil is None, not str"),
        (lambda e: e.update(mturk={"caption": 1}), "no valid example in existence"),
    ],
)
def test_damaged_examples_are_named(folder, change, message):
    damaged = entry("visual7w", "one.jpg", 3)
    change(damaged)
    write_json(folder / "data" / "existence.json", {"x": damaged})
    with pytest.raises(UserError, match=message):
        Valse(folder / "data", folder / "images", instruments=("existence",))


def test_an_absent_file_and_an_unknown_instrument_are_named(folder):
    with pytest.raises(
        UserError, match=r"plurals\.json' is not there\. Clone https://github\.com/Heidelberg-NLP/VALSE"
    ):
        Valse(folder / "data", folder / "images", instruments=("plurals",))
    with pytest.raises(UserError, match="unknown instrument of VALSE 'plural'; did you mean 'plurals'"):
        Valse(folder / "data", folder / "images", instruments=("plural",))
