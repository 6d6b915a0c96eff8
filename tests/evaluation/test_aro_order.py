from __future__ import annotations

import numpy as np
import pytest
from published_layout import pixels_of, write_json, write_picture

from vla_jax.errors import UserError
from vla_jax.evaluation import aro_order
from vla_jax.evaluation.aro_order import OrderSet

NOUNS, ADJECTIVES = {"dog", "cat", "ball", "garden"}, {"brown", "small", "red"}
TEXT = "A brown dog and a small cat chase the red ball in a garden."


def tag(text):
    words = text.replace(".", " .").split()
    kinds = {**dict.fromkeys(NOUNS, "NN"), **dict.fromkeys(ADJECTIVES, "JJ")}
    return [(word, kinds.get(word, "XX")) for word in words]


def test_each_shuffle_moves_what_it_may_and_nothing_else():
    words = [word for word, _ in tag(TEXT)]
    seen = [set() for _ in range(4)]
    for seed in range(60):
        found = aro_order.shuffles(tag(TEXT), np.random.default_rng(seed))
        for texts, text in zip(seen, found, strict=True):
            texts.add(text)
            assert sorted(text.split()) == sorted(words)
        nouns, others, within, threes = (text.split() for text in found)
        for at, word in enumerate(words):
            kind = next((group for group in (NOUNS, ADJECTIVES) if word in group), None)
            assert (nouns[at] in kind) if kind else (nouns[at] == word)
            assert (others[at] == word) if kind else (others[at] not in NOUNS | ADJECTIVES)
        for start in range(0, len(words), 3):
            assert sorted(within[start : start + 3]) == sorted(words[start : start + 3])
        pieces = [" ".join(words[start : start + 3]) for start in range(0, len(words), 3)]
        text = " ".join(threes)
        for piece in pieces:
            assert f" {piece} " in f" {text} "
    assert min(map(len, seen)) > 40  # each really shuffles


def test_captions_are_cleaned_as_published():
    assert aro_order.cleaned('A  "Small" (red) ball; in: a #garden!\n') == "a small red ball in a garden"
    assert aro_order.cleaned("it's a mother-in-law, really") == "it's a mother-in-law, really"
    assert len(aro_order.cleaned("word " * 50).split()) == 30


@pytest.fixture
def folder(tmp_path):
    annotations = [
        {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": [TEXT, "A cat ."]},
        {"image": "val2014/COCO_val2014_000000060623.jpg", "caption": ["A red dog and a brown cat."]},
    ]
    write_json(tmp_path / "coco_karpathy_test.json", annotations)
    for shade, entry in enumerate(annotations):
        write_picture(tmp_path / entry["image"], shade)
    return tmp_path


def read(folder, seed=0):
    return OrderSet(folder / "coco_karpathy_test.json", folder, tag, seed)


def test_every_caption_is_an_example_of_five(folder):
    source = read(folder)
    assert len(source) == 3
    example = source[2]
    assert pixels_of(example["image"])[0, 0, 2] == 1
    assert (example["id"], example["image_id"]) == ("2", "COCO_val2014_000000060623.jpg")
    assert example["captions"][0] == "a red dog and a brown cat"
    assert len(example["captions"]) == 5
    assert all(sorted(text.split()) == sorted(example["captions"][0].split()) for text in example["captions"])
    assert read(folder)[0] == source[0]  # drawn by seed and place
    assert read(folder, seed=1)[0]["captions"] != source[0]["captions"]


def test_a_shuffle_that_gives_the_caption_itself_is_a_tie_and_fails(folder):
    """ "a cat" has one noun and one other word: two of its four shuffles cannot differ."""
    source = read(folder)
    captions = source[1]["captions"]
    assert captions[:3] == ("a cat",) * 3
    # A perfect scorer of texts: the right words get 1, whatever the place.
    scores = np.array([[float(text == source[n]["captions"][0]) for text in source[n]["captions"]] for n in range(3)])
    found = aro_order.evaluate(source, scores)
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.ties == pytest.approx(1 / 3)
    constant = aro_order.evaluate(source, np.zeros((3, 5)))
    assert (constant.accuracy.value, constant.ties) == (0, 1)


def test_damaged_annotations_are_named(folder):
    path = folder / "coco_karpathy_test.json"
    (folder / "val2014" / "COCO_val2014_000000060623.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 pictures are missing, first .*060623\.jpg' \(caption 2 of"):
        read(folder)
    write_json(path, [{"image": "a.jpg", "caption": []}])
    with pytest.raises(UserError, match=r"entry 0: caption is \[\], not a list of texts"):
        read(folder)
    write_json(path, {"images": []})
    with pytest.raises(UserError, match="not a list of pictures with their captions"):
        read(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"is not there.*sfr-vision-language-research"):
        read(folder)
