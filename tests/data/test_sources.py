"""Data sets by name: found by module, built once, read as bytes, mistakes named."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vla_jax.data import builders
from vla_jax.data.image import UnreadablePicture
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.sources import builder_names, load_source, make_builder
from vla_jax.errors import UserError

TOY = '''
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class ToyPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures of one grey level each."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("bright", "dark")]

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "text": tfds.features.Text(), "level": np.int8}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for index in range(count):
            level = index + (100 if self.builder_config.name == "bright" else 0)
            buffer = io.BytesIO()
            Image.fromarray(np.full((5, 4, 3), level, np.uint8)).save(buffer, "PNG")
            buffer.seek(0)
            yield index, {"image": buffer, "text": f"level {level}", "level": level}
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A data set that one new file adds, without an entry anywhere."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "toy_pictures.py").write_text(TOY)
    (folder / "_helpers.py").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "__path__", [*builders.__path__, str(folder)])
        yield "toy_pictures"


@pytest.fixture(scope="module")
def data_dir(toy, tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_data_sets_are_found_by_their_module(toy):
    assert {toy, "easy_vqa"} <= set(builder_names())
    assert "_helpers" not in builder_names()


def test_examples_come_encoded(toy, data_dir):
    source = load_source(toy, "train", data_dir)
    assert len(source) == 10
    assert sorted(int(source[index]["level"]) for index in range(10)) == list(range(100, 110))
    row = source[3]
    assert row["text"] == f"level {row['level']}".encode()
    assert row["image"].startswith(b"\x89PNG")
    assert len(load_source(toy, "test", data_dir)) == 4
    assert len(load_source(toy, "train[:30%]", data_dir)) == 3
    assert pickle.loads(pickle.dumps(source))[3] == row


def test_configurations_are_data_sets_of_their_own(toy, data_dir):
    assert load_source(toy, "train", data_dir, config="dark")[0]["level"] < 10
    with pytest.raises(UserError, match="did you mean 'dark'"):
        load_source(toy, "train", data_dir, config="dork")


def test_it_is_built_once(toy, data_dir, monkeypatch):
    load_source(toy, "train", data_dir)
    monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("again"))
    load_source(toy, "train", data_dir)


def test_it_feeds_the_pipeline(toy, data_dir):
    source = load_source(toy, "train", data_dir)
    (batch,) = Pipeline(source, _level, 10, training=False, process_index=0, process_count=1)
    np.testing.assert_array_equal(batch["level"], [source[index]["level"] for index in range(10)])


def _level(example, generator):
    if not example["image"]:
        raise UnreadablePicture("is empty")
    return {"level": np.asarray(example["level"], np.int32)}


def test_mistakes_are_named(toy, data_dir):
    with pytest.raises(UserError, match="did you mean 'easy_vqa'"):
        load_source("easy_vqua", "train", data_dir)
    with pytest.raises(UserError, match="did you mean 'train'"):
        load_source(toy, "trian[:10%]", data_dir)
    assert make_builder(toy, data_dir).info.splits["test"].num_examples == 4
