"""The tasks of a comparison, done by the backbone as it was loaded: the reference in which nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.answers import texts
from vla_jax.data.cached import evaluate
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.sources import make_builder
from vla_jax.data.text import Tokenize
from vla_jax.errors import unknown
from vla_jax.evaluation.scene_zero_shot import clip_encoders
from vla_jax.model import AdaptedModel
from vla_jax.task_data import TASKS, examples_of
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.training.sharding import batch_sharding
from vla_jax.variants import TaskData


def untrained(
    name: str, data: TaskData, backbone: Backbone, compute: Compute, mesh: jax.sharding.Mesh, batch_size: int
) -> dict[str, np.ndarray]:
    """Zero-shot predictions of a task's test examples, from nothing but cosines of the backbone's features.

    - ``retrieval``: as :class:`vla_jax.tasks.retrieval.Retrieval` finds them.
    - ``statements``: one counts as true where its cosine is above the median of the validation statements', of which
      half are true; their labels are not looked at.
    - ``easy_vqa``: of the data set's answers the one that, written behind the question, makes it most like the picture.

    Args:
        name: one of :data:`vla_jax.task_data.TASKS`.
        data: the task with its data.
        backbone: the backbone.
        compute: how it is run.
        mesh: where.
        batch_size: pairs at a time.

    Returns:
        ``correct`` bool ``[examples]``, and ``index`` int32 ``[examples]``, their places in the test split.

    Raises:
        UserError: if there is no task of that name.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    model = AdaptedModel(backbone, Retrieval(), compute=compute)
    params, program = model.init(jax.random.key(0)), jax.jit(model.predict)

    def features(split: str) -> Mapping[str, np.ndarray]:
        pipeline = Pipeline(data.splits[split], data.transform, batch_size, training=False)
        return evaluate(pipeline, lambda batch: program(params, batch), batch_sharding(mesh), keep=("label",))

    with jax.set_mesh(mesh):
        found = features("test")
        if name == "retrieval":
            correct = model.task.finish(found)["correct"]
        elif name == "statements":
            correct = (_cosines(found) > np.median(_cosines(features("validation")))) == (found["label"] > 0)
        else:
            questions = texts(example["question"] for example in examples_of(data, found["index"]))
            correct = _answers(found["image_feature"], questions, model, batch_size) == found["label"]
    return {"correct": correct, "index": found["index"]}


def _cosines(found: Mapping[str, Any]) -> np.ndarray:
    return (found["image_feature"] * found["text_feature"]).sum(-1)


def _answers(pictures: np.ndarray, questions: Sequence[str], model: AdaptedModel, batch_size: int) -> np.ndarray:
    """The class of the answer that each picture is most like behind its question, int ``[questions]``."""
    backbone = model.backbone
    answers = make_builder("easy_vqa", "data").info.features["answer_id"].names
    read = Tokenize(backbone.tokenizer, backbone.config.context_length)
    encoders = clip_encoders(model.clip, Preprocess(backbone.image_processor), read, batch_size)
    _, encode = encoders(backbone.params)
    different, which = np.unique(questions, return_inverse=True)  # few: they are made of templates
    features = encode([f"{question} {answer}" for question in different for answer in answers])
    features = features.reshape(len(different), len(answers), -1)
    return np.stack([features[place] @ picture for place, picture in zip(which, pictures, strict=True)]).argmax(-1)
