"""Streams are computed once a picture and a text, and are what the model would have made of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_model import LENGTH, backbone, batch

from vla_jax import frozen_streams as module
from vla_jax.adapters import LoRA, Placement
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.data.image import UnreadablePicture
from vla_jax.frozen_streams import frozen_streams
from vla_jax.model import AdaptedModel
from vla_jax.tasks.matching import Matching
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.variants import TaskData

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASK = Matching("bright")
LATE = (Placement(LoRA(rank=2), slots=("attn_q",), layers="last 1"),)
QUESTIONS = 3  # on each picture; every other picture is asked the same ones


@dataclasses.dataclass(frozen=True)
class Transform:
    """As an example's own transform is: it says which fields hold pictures."""

    image_fields: tuple[str, ...] = ("image",)
    broken: tuple[int, ...] = ()

    def __call__(self, example, generator=None):
        if int(example["number"]) in self.broken:
            raise UnreadablePicture("is broken")
        return {name: value for name, value in example.items() if name != "number"}


@pytest.fixture(scope="module")
def source():
    rows = batch(4 * QUESTIONS, 0)
    del rows["valid"]
    picture, question = np.repeat(np.arange(4), QUESTIONS), np.tile(np.arange(2 * QUESTIONS), 2)
    texts = {name: rows[name][question] for name in ("tokens", "text_mask")}
    return ArraySource(rows | texts | {"image": rows["image"][picture], "number": np.arange(4 * QUESTIONS)})


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture
def counted(monkeypatch):
    """How many rows each tower was asked for."""
    found = {"vision": 0, "text": 0}
    computed = module._Computing._computed

    def counting(self, tower, source, transform, places):
        found[tower] += len(places)
        return computed(self, tower, source, transform, places)

    monkeypatch.setattr(module._Computing, "_computed", counting)
    return found


def model(**changes):
    return AdaptedModel(backbone(), TASK, LATE, **changes)


def test_each_picture_and_each_text_is_computed_once_and_right(source, mesh, counted):
    found = frozen_streams(model(), TaskData(TASK, {"test": source}, Transform()), 8, mesh)["test"]
    assert counted == {"vision": 4, "text": 2 * QUESTIONS}
    expected = jax.jit(model().prefix)({"backbone": backbone().params}, source.arrays)
    for field, stream in expected.items():
        np.testing.assert_allclose(np.asarray(found.arrays[field]), stream, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.arrays["label"], source.arrays["label"])
    np.testing.assert_array_equal(found.arrays["position"], np.arange(len(source)))
    assert "image" not in found.arrays


def test_another_run_takes_what_is_on_disk(source, mesh, counted, tmp_path):
    data = TaskData(TASK, {"test": source}, Transform(), streams=tmp_path)
    first = frozen_streams(model(), data, 8, mesh)["test"]
    once = dict(counted)
    again = frozen_streams(model(), data, 8, mesh)["test"]
    assert counted == once
    for field in ("image_stream", "text_stream"):
        np.testing.assert_array_equal(np.asarray(first.arrays[field]), np.asarray(again.arrays[field]))
    # A changed picture is another picture; the texts are the same.
    pixels = source.arrays["image"].copy()
    pixels[0] += 1
    changed = dataclasses.replace(data, splits={"test": ArraySource(source.arrays | {"image": pixels})})
    frozen_streams(model(), changed, 8, mesh)
    assert counted == {"vision": once["vision"] + 1, "text": once["text"]}
    # Streams of another depth, or of another transform, are other streams.
    early = dataclasses.replace(model(), placements=(Placement(LoRA(rank=2), slots=("attn_q",)),))
    frozen_streams(early, data, 8, mesh)
    assert counted == {"vision": 2 * once["vision"] + 1, "text": 2 * once["text"]}
    frozen_streams(model(), dataclasses.replace(data, transform=Transform(broken=(99,))), 8, mesh)
    assert counted == {"vision": 3 * once["vision"] + 1, "text": 2 * once["text"]}


def test_what_cannot_be_read_is_left_out(source, mesh, monkeypatch):
    monkeypatch.setattr(module, "Pipeline", functools.partial(module.Pipeline, max_bad_share=0.5))
    data = TaskData(TASK, {"test": source}, Transform(broken=(2, 7)))
    found = frozen_streams(model(), data, 8, mesh)["test"]
    left = np.array([place for place in range(len(source)) if place not in (2, 7)])
    np.testing.assert_array_equal(found.arrays["position"], left)
    np.testing.assert_array_equal(found.arrays["label"], source.arrays["label"][left])
    expected = jax.jit(model().prefix)({"backbone": backbone().params}, source.arrays)["text_stream"][left]
    assert expected.shape[1] == LENGTH
    np.testing.assert_allclose(np.asarray(found.arrays["text_stream"]), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_shown_pictures_alone_needs_no_texts(source, mesh, counted):
    data = TaskData(TASK, {"test": source}, as_rows)  # a transform that does not say which fields hold pictures
    found = frozen_streams(model(modalities=("image",)), data, 8, mesh)["test"]
    assert "text_stream" not in found.arrays
    assert counted == {"vision": len(source), "text": 0}  # by all fields, no two examples are alike
