"""VQAv2 (Goyal et al. 2017): open-ended questions on COCO pictures with the answers of ten annotators.

Published: 443,757 questions on 82,783 pictures for training, 214,354 on 40,504 for validation, 447,793 on 81,434 for
testing without answers, of which ``testdev`` is a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vla_jax.data.builders._files import ManualFolder, Row, Unique, coco_folders, read_rows
from vla_jax.data.builders._manual import Annotations, ManualBuilder, Record

# By split: the name in the question file, the subset of COCO's pictures, and whether answers are published.
_SPLITS = {
    "train": ("train2014", "train2014", True),
    "validation": ("val2014", "val2014", True),
    "test": ("test2015", "test2015", False),
    "testdev": ("test-dev2015", "test2015", False),
}


def _question_files(name: str) -> tuple[str, ...]:
    file = f"v2_OpenEnded_mscoco_{name}_questions.json"
    return file, f"Questions/{file}"


def _annotation_files(name: str) -> tuple[str, ...]:
    file = f"v2_mscoco_{name}_annotations.json"
    return file, f"Annotations/{file}"


class Vqav2(ManualBuilder):
    """VQAv2, one record a picture with all questions on it.

    A record: ``image``, ``image_id``; ``questions`` with ``question``, ``question_id``, ``question_kind`` (its first
    words, as published), ``answer_kind`` (``yes/no``, ``number``, ``other``) and ``answer`` (what most annotators
    said); and ``answers``, ten of each question. The test splits have no answers, and empty kinds.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
From https://visualqa.org/download.html, unpacked into manual_dir (or its folders Questions/ and Annotations/):
  v2_OpenEnded_mscoco_train2014_questions.json     v2_mscoco_train2014_annotations.json
  v2_OpenEnded_mscoco_val2014_questions.json       v2_mscoco_val2014_annotations.json
  v2_OpenEnded_mscoco_test2015_questions.json      v2_OpenEnded_mscoco_test-dev2015_questions.json
From https://cocodataset.org/#download, unpacked into manual_dir (or its folder images/):
  train2014/COCO_train2014_000000000009.jpg ...    val2014/...    test2015/...
Splits whose questions are not there are left out.
"""
    PUBLISHED_SPLITS: ClassVar[Mapping[str, str]] = {
        split: _question_files(name)[0] for split, (name, _, _) in _SPLITS.items()
    }
    ANNOTATIONS = Annotations("questions", lists=("answers",))

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        text = tfds.features.Text()
        names = ("question", "question_id", "question_kind", "answer_kind", "answer")
        question = dict.fromkeys(names, text) | {"answers_count": tfds.features.Scalar(np.int32)}
        return {
            "image": tfds.features.Image(),
            "image_id": text,
            "questions": tfds.features.Sequence(question),
            "answers": tfds.features.Sequence(text),
        }

    def _read(self, folder: ManualFolder) -> dict[str, list[Record]]:
        return {
            split: _records(folder, name, subset, answered)
            for split, (name, subset, answered) in _SPLITS.items()
            if folder.find(*_question_files(name)) or (answered and folder.find(*_annotation_files(name)))
        }


def _records(folder: ManualFolder, name: str, subset: str, answered: bool) -> list[Record]:
    file = folder.require(*_question_files(name))
    annotations = _annotations(folder.require(*_annotation_files(name))) if answered else {}
    pictures = folder.pictures(*coco_folders(subset))
    unique = Unique("question_id")
    by_picture: dict[int, tuple[Path, list[dict[str, Any]], list[str]]] = {}
    for row in read_rows(file, "questions"):
        question_id, image_id = row.integer("question_id"), row.integer("image_id")
        unique.add(question_id, row)
        answers, of_annotation = [], {"question_kind": "", "answer_kind": "", "answer": ""}
        if answered:
            if question_id not in annotations:
                raise row.error(f"the question {question_id} has no answers in the file of annotations")
            annotation = annotations.pop(question_id)
            if annotation.integer("image_id") != image_id:
                raise annotation.error(
                    f"the question {question_id} is on picture {image_id}, and its answers are on picture "
                    f"{annotation.integer('image_id')}; the two files do not belong together"
                )
            answers, of_annotation = _answers(annotation), _of_annotation(annotation)
        if image_id not in by_picture:
            by_picture[image_id] = (pictures.find(f"COCO_{subset}_{image_id:012d}.jpg", row), [], [])
        _, questions, all_answers = by_picture[image_id]
        questions.append(
            {"question": row.text("question"), "question_id": str(question_id), "answers_count": len(answers)}
            | of_annotation
        )
        all_answers.extend(answers)
    for question_id, annotation in annotations.items():
        raise annotation.error(f"answers to a question {question_id} that is not in {file}")
    return [
        Record(
            {"image": path},
            {"image_id": str(image_id), "questions": questions, "answers": answers},
            len(questions),
        )
        for image_id, (path, questions, answers) in by_picture.items()
    ]


def _annotations(file: Path) -> dict[int, Row]:
    unique, found = Unique("question_id"), {}
    for row in read_rows(file, "annotations"):
        question_id = row.integer("question_id")
        unique.add(question_id, row)
        found[question_id] = row
    return found


def _answers(annotation: Row) -> list[str]:
    answers = annotation.items("answers")
    if not answers:
        raise annotation.error(f"the question {annotation.get('question_id')} has no answers")
    return [
        annotation.as_text(Row(answer, annotation.file, annotation.number).get("answer"), "answer")
        for answer in answers
    ]


def _of_annotation(annotation: Row) -> dict[str, str]:
    return {
        "question_kind": annotation.text("question_type"),
        "answer_kind": annotation.text("answer_type"),
        "answer": annotation.text("multiple_choice_answer"),
    }
