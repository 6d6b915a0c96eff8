"""The tasks that share a backbone: what is asked of each."""

from __future__ import annotations

import pytest

from vla_jax.backbones.loading import abstract_backbone, load_backbone
from vla_jax.data_sets import Generated
from vla_jax.errors import UserError
from vla_jax.task_set import TASKS, member_data


def test_a_small_data_set_is_repeated_for_training_and_taken_whole_for_testing(tmp_path):
    backbone = load_backbone("tiny")
    data = member_data("defects", Generated(3_000, 300, 500), 20, str(tmp_path), backbone)
    assert {split: len(source) for split, source in data.splits.items()} == {
        "train": 3_000,
        "validation": 200,
        "test": 500,
    }
    train = data.splits["train"]
    assert len({train[index]["image_id"] for index in range(1_200)}) == 1_200
    assert train[1_207]["image_id"] == train[7]["image_id"]
    assert data.transform(train[0])["image"].shape == (72, 72, 3)


def test_tasks_come_without_data_where_nothing_is_to_be_read(tmp_path):
    sizes, shapes = Generated(8, 4, 4), abstract_backbone("tiny")
    found = {name: member_data(name, sizes, 20, str(tmp_path), shapes, read=False) for name in TASKS}
    assert all(data.splits == {} for data in found.values())
    assert found["defects"].task.classes == 3
    assert (found["easy_vqa"].task.answers, found["scene_vqa"].task.answers) == (13, 32)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="unknown task 'grunding'; did you mean 'grounding'"):
        member_data("grunding", sizes, 20, str(tmp_path), shapes)
