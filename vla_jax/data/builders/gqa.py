"""GQA (Hudson and Manning 2019): compositional questions on real pictures, one answer each.

The balanced questions, on which results are reported: 943,000 for training, 132,062 for validation, 12,578 of
``testdev``; all questions: 14 million for training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from sys import intern
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder, Pictures, Row, Unique, read_json
from vla_jax.data.builders._manual import Annotations, ManualBuilder, Record
from vla_jax.errors import UserError

# By split: its published name, and whether answers are published.
_SPLITS = {
    "train": ("train", True),
    "validation": ("val", True),
    "testdev": ("testdev", True),
    "test": ("test", False),
    "challenge": ("challenge", False),
}
# The file of all training questions is published in ten parts.
_PARTS = 10


def _alternatives(file: str) -> tuple[str, ...]:
    return file, f"questions/{file}", f"questions1.2/{file}"


class Gqa(ManualBuilder):
    """GQA, one record a picture with all questions on it; configurations ``balanced`` and ``all``.

    A record: ``image``, ``image_id``; ``questions`` with ``question``, ``question_id``, ``question_kind`` (the
    published structural type: verify, query, choose, logical, compare), ``semantic_kind`` (global, obj, attr, cat,
    rel), ``answer_kind`` (``open`` for queries, else ``binary``, as the official evaluation divides them) and
    ``full_answer`` (a sentence); and ``answers``, one of each question. ``test`` and ``challenge`` have no answers, and
    empty kinds. Building ``all`` holds the text of 14 million questions in memory, some 8 GB.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://cs.stanford.edu/people/dorarad/gqa/download.html, unpacked into manual_dir (or manual_dir/gqa):
  questions1.2.zip: train_balanced_questions.json, val_balanced_questions.json, testdev_balanced_questions.json,
    test_balanced_questions.json, challenge_balanced_questions.json, directly or in questions/ or questions1.2/;
    for the configuration `all` the same with `all` for `balanced`, of which training is the folder
    train_all_questions/ with train_all_questions_0.json to train_all_questions_9.json
  images.zip: images/2354786.jpg ...
Splits whose questions are not there are left out.
"""
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="balanced", description="The questions on which results are reported."),
        tfds.core.BuilderConfig(name="all", description="All questions."),
    ]
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {
        split: f"{name}_balanced_questions.json (or {name}_all_questions.json)" for split, (name, _) in _SPLITS.items()
    }
    ANNOTATIONS = Annotations("questions", lists=("answers",))

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        text = tfds.features.Text()
        names = ("question", "question_id", "question_kind", "semantic_kind", "answer_kind", "full_answer")
        question = dict.fromkeys(names, text) | {"answers_count": tfds.features.Scalar(np.int32)}
        return {
            "image": tfds.features.Image(),
            "image_id": text,
            "questions": tfds.features.Sequence(question),
            "answers": tfds.features.Sequence(text),
        }

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        files = {split: self._files(folder, name) for split, (name, _) in _SPLITS.items()}
        files = {split: found for split, found in files.items() if found}
        if not files:
            return {}
        pictures = folder.pictures("images")
        return {split: _records(found, pictures, answered=_SPLITS[split][1]) for split, found in files.items()}

    def _files(self, folder: ManualFolder, name: str) -> list[Path]:
        """The question files of a split; none if it is not there.

        Raises:
            UserError: if one of several parts is missing.
        """
        file = f"{name}_{self.builder_config.name}_questions"
        whole, parts = folder.find(*_alternatives(f"{file}.json")), folder.find(*_alternatives(file))
        if whole or not parts:
            return [whole] if whole else []
        found = [parts / f"{file}_{number}.json" for number in range(_PARTS)]
        if missing := [part.name for part in found if not part.is_file()]:
            raise folder.error(f"of the {_PARTS} parts in {parts}, {', '.join(missing)} are missing")
        return found


def _records(files: list[Path], pictures: Pictures, *, answered: bool) -> list[Record]:
    unique = Unique("question id")
    by_picture: dict[str, tuple[Path, list[dict[str, Any]], list[str]]] = {}
    for file in files:
        content = read_json(file, unique_keys=True)
        if not isinstance(content, Mapping):
            raise UserError(f"{file}: expected an object with questions by id; this is not the published file")
        for question_id, values in content.items():
            row = Row(values, file, repr(question_id))
            if len(files) > 1:
                unique.add(question_id, row)
            image_id = row.text("imageId")
            if image_id not in by_picture:
                by_picture[image_id] = (pictures.find(f"{image_id}.jpg", row), [], [])
            _, questions, answers = by_picture[image_id]
            answer = _answer(row) if answered else []
            questions.append(_question(row, question_id, answered) | {"answers_count": len(answer)})
            answers.extend(answer)
    return [
        Record({"image": path}, {"image_id": image_id, "questions": questions, "answers": answers}, len(questions))
        for image_id, (path, questions, answers) in by_picture.items()
    ]


def _answer(row: Row) -> list[str]:
    if row.values.get("answer") is None:
        raise row.error("the question has no answer; only test and challenge have none")
    return [intern(row.text("answer"))]


def _question(row: Row, question_id: str, answered: bool) -> dict[str, str]:
    question = {"question": row.text("question"), "question_id": question_id}
    if not answered:
        return question | dict.fromkeys(("question_kind", "semantic_kind", "answer_kind", "full_answer"), "")
    types = Row(row.get("types"), row.file, row.number)
    structural = intern(types.text("structural"))
    return question | {
        "question_kind": structural,
        "semantic_kind": intern(types.text("semantic")),
        "answer_kind": "open" if structural == "query" else "binary",
        "full_answer": row.text("fullAnswer", ""),
    }
