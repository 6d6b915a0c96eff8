"""New domains: as many pictures of each class, draws of examples, and what they are told apart by."""

from __future__ import annotations

import numpy as np
import pytest

from vla_jax import domain_data
from vla_jax.backbones.loading import load_backbone
from vla_jax.data.builders.textile_defects import CLASSES
from vla_jax.data.image import Preprocess
from vla_jax.data.scenes import SceneConfig, SceneSource, Shift
from vla_jax.data.scenes.vocabulary import SHAPES
from vla_jax.domain_data import DomainSizes, domain, domain_task
from vla_jax.errors import UserError

SIZES = DomainSizes(train=64, validation=24, test=32)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny")


@pytest.fixture(scope="module")
def shifted(backbone):
    return domain("shifted_scenes", SIZES, backbone)


def test_shifted_scenes_have_as_many_of_each_shape_in_pictures_as_the_backbone_takes_them(shifted, backbone):
    seen = set()
    for split, count in (("train", 8), ("validation", 3), ("test", 4)):
        rows = shifted.data.splits[split].arrays
        assert np.bincount(rows["label"], minlength=8).tolist() == [count] * 8
        assert rows["image"].shape == (8 * count, 72, 72, 3)
        seen |= {picture.tobytes() for picture in rows["image"]}
    assert len(seen) == 8 * (8 + 3 + 4)
    # They are the generator's, in the shifted world.
    config = SceneConfig(2, image_size=72, shapes=(SHAPES[2],), shift=Shift())
    picture = SceneSource("test", "classes", config, 4)[1]["image"]
    pixels = Preprocess(backbone.image_processor)(picture)
    np.testing.assert_array_equal(shifted.data.splits["test"].arrays["image"][4 * 2 + 1], pixels)
    assert (shifted.most, shifted.data.task.classes, shifted.by_name.classes) == (8, 8, 8)


def test_draws_differ_by_seed_and_those_of_fewer_labels_are_among_those_of_more(shifted):
    one, two = (shifted.draws(labels, (1, 2)) for labels in (1, 2))
    assert set(one) == {1, 2}
    for seed in (1, 2):
        assert np.bincount(shifted.labels[two[seed]], minlength=8).tolist() == [2] * 8
        assert set(one[seed]) < set(two[seed])
    assert set(one[1]) != set(one[2])


def test_textiles_are_cut_to_the_rarest_class_and_have_no_names_that_say_something(backbone, monkeypatch):
    def load_source(name, split, data_dir):
        assert (name, str(data_dir)) == ("textile_defects", "data")
        labels = [0, 0, 0, 0, 1, 1, 2, 2, 2] if split == "train" else [2, 0, 1]
        return [{"image": np.full((250, 250, 3), 20 * label, np.uint8), "label": label} for label in labels]

    monkeypatch.setattr(domain_data, "load_source", load_source)
    found = domain("textile_defects", DomainSizes(), backbone)
    assert np.bincount(found.labels).tolist() == [2, 2, 2]
    assert (found.most, found.by_name, found.data.task.classes) == (2, None, len(CLASSES))
    assert found.data.splits["test"].arrays["label"].tolist() == [2, 0, 1]
    assert found.data.splits["test"].arrays["image"].shape == (3, 72, 72, 3)


def test_what_cannot_be_had_is_refused(backbone):
    with pytest.raises(UserError, match="unknown domain 'textiles_defects'; did you mean 'textile_defects'"):
        domain_task("textiles_defects")
    with pytest.raises(UserError, match=r"the test split .* picture of each of 8 classes; raise sizes\.test"):
        domain("shifted_scenes", DomainSizes(train=64, validation=24, test=4), backbone)
    with pytest.raises(UserError, match="must be at least 2"):
        DomainSizes(test=1)
