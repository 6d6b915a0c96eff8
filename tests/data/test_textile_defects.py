"""Textile defects: the published counts, splits that share no picture, and what is said without the package."""

from __future__ import annotations

import io
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vla_jax.data.builders.textile_defects import CLASSES
from vla_jax.data.sources import load_source, make_builder
from vla_jax.errors import UserError

package = pytest.importorskip("conformal_clip_data")


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The examples of each split as the builder generates them, before they are written."""
    builder = make_builder("textile_defects", tmp_path_factory.mktemp("unbuilt"))
    return {name: [value for _, value in rows] for name, rows in builder._split_generators(None).items()}


def test_counts_are_the_published_ones_in_every_split(generated):
    whole = Counter(row["label"] for rows in generated.values() for row in rows)
    assert whole == {"nominal": 1000, "local": 500, "global": 500}
    for split, share in (("train", 0.6), ("validation", 0.1), ("test", 0.3)):
        counts = Counter(row["label"] for row in generated[split])
        assert counts == {name: round(share * count) for name, count in whole.items()}


def test_no_picture_is_in_two_splits(generated):
    pictures = [row["image"] for rows in generated.values() for row in rows]
    assert len(set(pictures)) == len(pictures) == 2000


def test_what_is_read_back_is_what_the_package_has(tmp_path, monkeypatch):
    # A folder of two classes' first ten pictures stands in for the whole, so that building is quick.
    for name in CLASSES:
        (tmp_path / "textiles" / name).mkdir(parents=True)
        for path in sorted((package.textile_simulated_root() / name).glob("*.jpg"))[:10]:
            (tmp_path / "textiles" / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(package, "textile_simulated_root", lambda: tmp_path / "textiles")
    source = load_source("textile_defects", "test", tmp_path / "built")
    assert len(source) == 9
    for place in range(len(source)):
        row = source[place]
        name, stem = row["image_id"].decode().split("/")
        assert (CLASSES[row["label"]], row["class_name"].decode()) == (name, name)
        assert bytes(row["image"]) == (tmp_path / "textiles" / name / f"{stem}.jpg").read_bytes()
        assert np.asarray(Image.open(io.BytesIO(row["image"]))).shape == (250, 250, 3)


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "conformal_clip_data", None)
    with pytest.raises(UserError, match="pip install conformal-clip-data"):
        load_source("textile_defects", "train", tmp_path)


def test_a_folder_without_pictures_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "textile_simulated_root", lambda: tmp_path)
    with pytest.raises(UserError, match="no pictures in 'nominal'"):
        load_source("textile_defects", "train", tmp_path / "built")
