"""The TFDS builder writes what SceneSource gives, and reads it back."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from vla_jax.data.builders.scenes import Scenes, ScenesConfig
from vla_jax.data.scenes import KINDS, SceneConfig, SceneSource
from vla_jax.errors import UserError


@pytest.mark.parametrize("kind", KINDS)
def test_written_examples_are_those_of_the_source(tmp_path, kind):
    scene = SceneConfig(seed=5, image_size=48)
    config = ScenesConfig(name=f"tiny_{kind}", kind=kind, scene=scene, train=4, validation=2, test=3)
    builder = Scenes(config=config, data_dir=tmp_path)
    builder.download_and_prepare()
    for split, length in {"train": 4, "validation": 2, "test": 3}.items():
        expected = SceneSource(split, kind, scene, length)
        # Files are in an order of their own.
        left = [_plain(expected[index]) for index in range(length)]
        stored = builder.as_data_source(split=split)
        assert len(stored) == length
        for index in range(length):
            left.remove(_plain(stored[index]))
        assert left == []
    assert "tensorflow" not in sys.modules


def _plain(example):
    """An example with pictures and boxes as lists, annotations as objects, and text as str."""
    plain = {}
    for name, value in example.items():
        if isinstance(value, bytes):
            value = value.decode()
        if name.startswith(("scene", "twin_scene")) and isinstance(value, str):
            value = json.loads(value)
        value = np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value
        texts = isinstance(value, list) and value and isinstance(value[0], bytes)
        plain[name] = [text.decode() for text in value] if texts else value
    return plain


def test_every_kind_is_a_builder_config():
    assert set(Scenes.builder_configs) == set(KINDS)


def test_a_wrong_configuration_is_refused():
    with pytest.raises(UserError, match="did you mean 'captions'"):
        ScenesConfig(name="x", kind="caption")
    with pytest.raises(UserError, match="patch_grid 8"):
        ScenesConfig(name="x", kind="captions", scene=SceneConfig(patch_grid=8))
