"""easy-VQA (Zhou 2019): questions on the one shape of a 64-pixel picture, from the pip package ``easy-vqa``.

4,000 pictures with 38,575 questions for training and 1,000 pictures with 9,673 questions for testing, 13 answers. The
package has no validation split: every tenth training picture, with all of its questions, is held out as one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vla_jax.errors import UserError

QUESTION_KINDS = ("shape", "color", "is_shape", "is_color", "is_not_shape", "is_not_color")

_COLORS = frozenset(("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"))
_VALIDATION_EVERY = 10


def question_kind(question: str) -> str:
    """What a question asks, by its wording: one of :data:`QUESTION_KINDS`.

    Open questions ask for the ``shape`` or the ``color``; the others ask whether a shape or colour is there
    (``is_*``), or whether it is absent (``is_not_*``, with "not" or "no" in the question).
    """
    words = question.lower().rstrip("?").split()
    if words[0] == "what":
        # "what color is the circle?", "what is the color of the shape?"; "what shape is present?", "what is the red
        # shape?".
        return "color" if "color" in words else "shape"
    subject = "color" if _COLORS.intersection(words) else "shape"
    return f"is_not_{subject}" if {"not", "no"}.intersection(words) else f"is_{subject}"


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """Builds easy-VQA with the splits ``train``, ``validation`` (by picture) and ``test``."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            homepage="https://github.com/vzhou842/easy-VQA",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                    "image_id": tfds.features.Scalar(np.int32),
                    "question": tfds.features.Text(),
                    "question_kind": tfds.features.ClassLabel(names=QUESTION_KINDS),
                    "answer": tfds.features.Text(),
                    "answer_id": tfds.features.ClassLabel(names=_package().get_answers()),
                }
            ),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        package = _package()
        train = (package.get_train_questions(), package.get_train_image_paths())
        test = (package.get_test_questions(), package.get_test_image_paths())
        return {
            "train": self._generate_examples(*train, held_out=False),
            "validation": self._generate_examples(*train, held_out=True),
            "test": self._generate_examples(*test),
        }

    def _generate_examples(
        self,
        questions: tuple[list[str], list[str], list[int]],
        paths: dict[int, str],
        held_out: bool | None = None,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the examples; ``held_out`` takes the validation pictures, or leaves them out, or ignores them."""
        for position, (question, answer, image_id) in enumerate(zip(*questions, strict=True)):
            if held_out is None or held_out == (image_id % _VALIDATION_EVERY == 0):
                yield (
                    f"{image_id}_{position}",
                    {
                        "image": paths[image_id],
                        "image_id": image_id,
                        "question": question,
                        "question_kind": question_kind(question),
                        "answer": answer,
                        "answer_id": answer,
                    },
                )


def _package() -> Any:
    try:
        return importlib.import_module("easy_vqa")
    except ModuleNotFoundError as error:
        raise UserError("the data set 'easy_vqa' comes with a package that is missing; pip install easy-vqa") from error
