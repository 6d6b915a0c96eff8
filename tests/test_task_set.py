"""The tasks that share a backbone: what is asked of each."""

from __future__ import annotations

import pytest

from vla_jax.backbones.loading import abstract_backbone
from vla_jax.data.scenes import SceneConfig, SceneSource
from vla_jax.data_sets import Generated
from vla_jax.errors import UserError
from vla_jax.task_set import TASKS, Kinds, member_data


def test_a_class_is_a_colour_and_a_shape():
    source = SceneSource("train", "classes", SceneConfig(image_size=32), 60)
    kinds = Kinds(source)
    assert len(kinds) == 60
    assert len(set(Kinds.names)) == 64
    for index in range(60):
        example = source[index]
        assert Kinds.names[kinds[index]["label"]] == f"{example['color_name']} {example['class_name']}"
    assert len({kinds[index]["label"] for index in range(60)}) > 30


def test_tasks_come_without_data_where_nothing_is_to_be_read(tmp_path):
    sizes, shapes = Generated(8, 4, 4), abstract_backbone("tiny")
    found = {name: member_data(name, sizes, 20, str(tmp_path), shapes, read=False) for name in TASKS}
    assert all(data.splits == {} for data in found.values())
    assert found["classification"].task.classes == 64
    assert (found["easy_vqa"].task.answers, found["scene_vqa"].task.answers) == (13, 32)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="unknown task 'grunding'; did you mean 'grounding'"):
        member_data("grunding", sizes, 20, str(tmp_path), shapes)
