"""The backbone as it was loaded, asked for the tasks of a comparison: against features of one example at a time."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.data.sources import make_builder
from vla_jax.data.text import Tokenize
from vla_jax.errors import UserError
from vla_jax.evaluation.untrained import untrained
from vla_jax.task_data import task
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.variants import TaskData

WORDS = ("a red circle", "a blue square", "two green rings", "the small triangle", "is there a circle", "what color")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny")


def examples(count: int, seed: int) -> list[dict]:
    generator = np.random.default_rng(seed)
    return [
        {
            "image": generator.integers(0, 256, (64, 64, 3), np.uint8),
            "text": WORDS[generator.integers(len(WORDS))],
            "label": int(generator.integers(2)),
        }
        for _ in range(count)
    ]


def untouched(backbone, splits, name, **fields):
    """The predictions in batches of 8, the last of them incomplete, on all devices."""
    transform = TransformExample(Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, 24), **fields)
    data = TaskData(task(name), splits, transform)
    found = untrained(name, data, backbone, Compute(), make_mesh(MeshConfig()), 8)
    np.testing.assert_array_equal(found["index"], np.arange(len(splits["test"])))
    return found["correct"]


@functools.cache
def towers(backbone_name):
    backbone = load_backbone(backbone_name)
    return jax.jit(lambda x, t, m: CLIP(backbone.config).apply({"params": backbone.params}, x, t, m))


def cosine(backbone, image, text):
    """By the module itself, one pair at a time and without padding."""
    pixels = Preprocess(backbone.image_processor)(image, None)
    tokens, mask = Tokenize(backbone.tokenizer, 48)(text)
    found = towers("tiny")(pixels[None], tokens[None, : mask.sum()], mask[None, : mask.sum()])
    image, text = (np.asarray(each)[0] for each in (found.image_features, found.text_features))
    return image @ text / np.linalg.norm(image) / np.linalg.norm(text)


def test_a_statement_is_true_above_the_median_of_the_validation_statements(backbone):
    splits = {"validation": examples(9, 0), "test": examples(11, 1)}
    validation, test = (
        np.array([cosine(backbone, each["image"], each["text"]) for each in splits[split]]) for split in splits
    )
    expected = (test > np.median(validation)) == np.array([each["label"] == 1 for each in splits["test"]])
    assert 0 < expected.sum() < len(expected)
    np.testing.assert_array_equal(untouched(backbone, splits, "statements", label_key="label"), expected)


def test_retrieval_is_that_of_the_features(backbone):
    rows = [each | {"text": text} for each, text in zip(examples(len(WORDS), 2), WORDS, strict=True)]
    scores = np.array([[cosine(backbone, image["image"], text["text"]) for text in rows] for image in rows])
    # Pictures of noise are all most like one caption: the one that has it is right.
    expected = scores.argmax(1) == np.arange(len(rows))
    assert expected.any()
    np.testing.assert_array_equal(untouched(backbone, {"test": rows}, "retrieval"), expected)


def test_a_question_has_the_answer_that_makes_it_most_like_the_picture(backbone):
    answers = make_builder("easy_vqa", "data").info.features["answer_id"].names
    rows = [
        {"image": each["image"], "question": question}
        for each, question in zip(examples(5, 3), ("what color is the shape?", "is it a circle?") * 3, strict=False)
    ]
    best = [
        int(np.argmax([cosine(backbone, row["image"], f"{row['question']} {answer}") for answer in answers]))
        for row in rows
    ]
    rows = [row | {"answer_id": (best[place] + (place == 2)) % 13} for place, row in enumerate(rows)]
    found = untouched(backbone, {"test": rows}, "easy_vqa", text_key="question", label_key="answer_id")
    np.testing.assert_array_equal(found, [True, True, False, True, True])


def test_a_task_that_does_not_exist_is_refused(backbone):
    data = TaskData(task("statements"), {}, None)
    with pytest.raises(UserError, match="unknown task 'statement'; did you mean 'statements'"):
        untrained("statement", data, backbone, Compute(), make_mesh(MeshConfig()), 8)
