"""What the texts say: true where they should be, false where they should be, in a closed vocabulary."""

from __future__ import annotations

import dataclasses

import pytest
from scenes_oracle import answer_to, matches, true_of

from vla_jax.data.scenes import SceneConfig, SceneSource, captions
from vla_jax.data.scenes.render import annotations
from vla_jax.data.scenes.sampling import CaptionWeights, seeded
from vla_jax.data.scenes.vocabulary import (
    ANSWERS,
    CLASS_TEMPLATES,
    COLORS,
    MAX_WORDS,
    RELATIONS,
    SHAPES,
    WORDS,
    split_words,
)
from vla_jax.errors import UserError

EASY_VQA = (
    "circle rectangle triangle red green blue black gray teal brown yellow yes no what is the color of shape does "
    "image contain present there a not in ?"
)


@pytest.fixture(scope="module")
def drawn_captions():
    """Captions of the default configuration with their scenes, unrendered."""
    config = SceneConfig()
    drawn = []
    for index in range(6000):
        rng = seeded("captions", index)
        scene, kind = captions.draw_captioned_scene(rng, config, "train")
        drawn.append((scene, kind, captions.caption(scene, rng, kind)))
    return drawn


def test_captions_are_true(drawn_captions):
    for scene, kind, text in drawn_captions[:3000]:
        objects = annotations(scene)["objects"]
        if kind != "question":
            assert true_of(text, objects), (text, objects)
            continue
        question, answer = text.split("? ")
        if answer in ("true", "false"):
            assert true_of(question, objects) == (answer == "true"), (text, objects)
        else:
            assert answer in answer_to(question, objects), (text, objects)


def test_full_captions_name_every_object(drawn_captions):
    for scene, kind, text in drawn_captions:
        if kind == "full":
            assert sum(word in SHAPES for word in split_words(text)) == len(scene.objects)


def test_caption_kinds_come_as_often_as_weighted(drawn_captions):
    kinds = [kind for _, kind, _ in drawn_captions]
    for kind, weight in vars(CaptionWeights()).items():
        deviation = (weight * (1 - weight) / len(kinds)) ** 0.5
        assert abs(kinds.count(kind) / len(kinds) - weight) < 4 * deviation


def test_captions_use_the_whole_vocabulary_and_nothing_else(drawn_captions):
    used = {word for _, _, text in drawn_captions for word in split_words(text)}
    assert used == set(WORDS)
    assert max(len(split_words(text)) for _, _, text in drawn_captions) <= MAX_WORDS


def test_other_texts_stay_in_the_vocabulary():
    texts = [template.format(shape) for template in CLASS_TEMPLATES for shape in SHAPES]
    texts += [EASY_VQA, *ANSWERS, *COLORS, "true", "false"]
    for kind in ("statements", "questions", "phrases", "quadruples", "twins"):
        source = SceneSource("train", kind, SceneConfig(binding_attributes=("color", "size", "texture")))
        for index in range(400):
            example = source[index]
            fields = ("text", "question", "answer", "phrase", "caption", "twin_caption", "caption_0", "caption_1")
            texts += [example[field] for field in fields if field in example]
    for text in texts:
        assert set(split_words(text)) <= set(WORDS), text
        assert len(split_words(text)) <= MAX_WORDS, text


def test_weights_choose_the_kinds_of_captions():
    config = SceneConfig(
        max_objects=1, caption_weights=CaptionWeights(full=0, short=0, relation=1, count=0, question=0)
    )
    # One object has no relation; its captions are short ones.
    assert {SceneSource("train", "captions", config)[index]["caption_kind"] for index in range(20)} == {"short"}
    with pytest.raises(UserError, match="must not be negative"):
        CaptionWeights(full=-1)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("attribute", ["color", "size", "texture"])
def test_labels_of_statements_agree_with_the_oracle(split, attribute):
    source = SceneSource(split, "statements", SceneConfig(seed=1, binding_attributes=(attribute,)))
    for index in range(500):
        example = source[index]
        assert true_of(example["text"], example["scene"]["objects"]) == bool(example["label"]), example


def test_questions_have_one_answer_which_is_right():
    source = SceneSource("validation", "questions")
    seen = set()
    for index in range(1500):
        example = source[index]
        assert answer_to(example["question"], example["scene"]["objects"]) == {example["answer"]}, example
        assert ANSWERS[example["answer_id"]] == example["answer"]
        seen.add(example["answer"])
    assert seen == set(ANSWERS)


def test_phrases_point_at_one_object():
    source = SceneSource("train", "phrases")
    for index in range(800):
        example = source[index]
        boxes = [thing["box"] for thing in example["scene"]["objects"] if matches(example["phrase"], thing, 64)]
        assert boxes == [example["box"]], example


def test_classes_name_the_only_object():
    source = SceneSource("test", "classes")
    labels = []
    for index in range(800):
        example = source[index]
        (thing,) = example["scene"]["objects"]
        assert (thing["shape"], thing["color"]) == (SHAPES[example["label"]], COLORS[example["color_label"]])
        assert (thing["shape"], thing["color"]) == (example["class_name"], example["color_name"])
        labels.append(example["label"])
    assert all(60 < labels.count(label) < 140 for label in range(8))


@pytest.mark.parametrize("attribute", ["color", "size", "texture"])
def test_quadruples_are_true_crosswise_and_of_the_same_words(attribute):
    source = SceneSource("test", "quadruples", SceneConfig(seed=2, binding_attributes=(attribute,)))
    tags = set()
    for index in range(500):
        example = source[index]
        first, second = (example[f"scene_{n}"]["objects"] for n in (0, 1))
        one, other = example["caption_0"], example["caption_1"]
        assert sorted(split_words(one)) == sorted(split_words(other))
        assert (true_of(one, first), true_of(one, second)) == (True, False), example
        assert (true_of(other, first), true_of(other, second)) == (False, True), example
        assert (example["image_0"] != example["image_1"]).any()
        tags.add((example["tag"], example["collapsed_tag"], example["num_main_preds"]))
    assert tags == {("Object", "Object", 1), ("Attribute", "Relation", 1), ("Relation", "Relation", 2)}


def test_twins_have_captions_that_tell_them_apart():
    source = SceneSource("train", "twins", SceneConfig(seed=3, patch_grid=8))
    swapped = set()
    for index in range(800):
        example = source[index]
        first, second = example["scene"]["objects"], example["twin_scene"]["objects"]
        one, other = example["caption"], example["twin_caption"]
        assert (true_of(one, first), true_of(one, second)) == (True, False), example
        assert (true_of(other, first), true_of(other, second)) == (False, True), example
        swapped.add(example["swapped"])
    assert swapped == {"shape", "color", "size", "texture", "cell"}


def test_twins_may_be_told_what_to_exchange_and_to_speak_of_it_alone():
    config = SceneConfig(seed=4, image_size=32, twin_swaps=("cell",), twin_pair_share=1.0)
    source = SceneSource("train", "twins", config)
    drawn = [source[index] for index in range(100)]
    assert {example["swapped"] for example in drawn} == {"cell"}
    alone = [any(relation in example["caption"] for relation in RELATIONS) for example in drawn]
    # The others hold two objects of the same colour and shape, of which a relation would not tell.
    assert sum(alone) >= 80
    config = dataclasses.replace(config, twin_pair_share=0.0)
    source = SceneSource("train", "twins", config)
    assert not any(relation in source[index]["caption"] for index in range(100) for relation in RELATIONS)
