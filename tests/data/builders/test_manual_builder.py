"""How records are written: in order, over several files, whatever their size, with the counts of annotations."""

from __future__ import annotations

import numpy as np
import pytest
from published_layouts import coco_captions, karpathy, picture, plain, vqav2, write
from tensorflow_datasets.core import shuffle

from vla_jax.data.builders import _manual
from vla_jax.data.flattened import load_examples
from vla_jax.data.sources import load_source, make_builder


@pytest.fixture
def many(tmp_path):
    """Flickr30k with 23 training pictures of different sizes, one to four captions each."""
    rows = [(f"{number}.jpg", "train", [f"{number}.{n}" for n in range(1 + number % 4)]) for number in range(23)]
    rows += [("100.jpg", "val", ["v"]), ("101.jpg", "test", ["t"])]
    write(tmp_path / "dataset_flickr30k.json", karpathy(rows, "flickr30k"))
    files = {}
    for number, (name, _, _) in enumerate(rows):
        content = picture(number, size=(8, 8 + number), file_format="JPEG")
        files[name] = write(tmp_path / "flickr30k-images" / name, content)
    return tmp_path, rows, files


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (3000, 6), (1 << 28, 23)])
def test_several_files_keep_the_order(many, monkeypatch, limit, most):
    folder, rows, files = many
    monkeypatch.setattr(_manual, "SHARD_BYTES", limit)
    # TFDS's own writer would open files with TensorFlow here.
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 100)
    source = load_source("flickr30k", "train", folder / "data", manual_dir=folder)
    info = make_builder("flickr30k", folder / "data").info.splits["train"]
    assert sum(info.shard_lengths) == 23
    assert max(info.shard_lengths) <= most
    assert len(list((folder / "data").rglob("*-train.array_record-*"))) == info.num_shards
    assert [source[place]["image_id"].decode() + ".jpg" for place in range(23)] == [name for name, _, _ in rows[:23]]
    assert all(source[place]["image"] == files[rows[place][0]] for place in range(23))
    examples = load_examples("flickr30k", "train", folder / "data")
    said = [text for _, split, texts in rows for text in texts if split == "train"]
    assert [plain(examples[place])["caption"] for place in range(len(examples))] == said
    # Files hold as much as they may, and no more.
    sizes = [len(files[name]) for name, _, _ in rows[:23]]
    start = 0
    for length in info.shard_lengths:
        assert sum(sizes[start : start + length]) <= limit or length == 1
        assert start + length == 23 or sum(sizes[start : start + length + 1]) > limit
        start += length


def test_counts_are_those_of_the_records(many):
    folder, rows, _ = many
    load_source("flickr30k", "train", folder / "data", manual_dir=folder)
    builder = make_builder("flickr30k", folder / "data")
    np.testing.assert_array_equal(builder.annotation_counts("train"), [len(texts) for _, _, texts in rows[:23]])
    np.testing.assert_array_equal(builder.annotation_counts("test"), [1])


@pytest.mark.parametrize("place", ["images", "Images/mscoco", "images/mscoco/images", "coco"])
def test_coco_pictures_may_lie_where_published_tools_want_them(tmp_path, place):
    expected = vqav2(tmp_path)
    for subset in ("train2014", "val2014", "test2015"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / subset).rename(tmp_path / place / subset)
    for kind, folder in (("*questions.json", "Questions"), ("*annotations.json", "Annotations")):
        (tmp_path / folder).mkdir()
        for file in tmp_path.glob(kind):
            file.rename(tmp_path / folder / file.name)
    source = load_source("vqav2", "validation", tmp_path / "data", manual_dir=tmp_path)
    assert plain(source[0]) == expected["validation"][0]


def test_one_folder_serves_several_data_sets(tmp_path):
    questions, captions = vqav2(tmp_path / "manual"), coco_captions(tmp_path / "manual")
    for name, split, expected in (("vqav2", "train", questions), ("coco_captions", "train", captions)):
        source = load_source(name, split, tmp_path / "data", manual_dir=tmp_path / "manual")
        # Both have COCO's picture 9; the one that was written last is read by both.
        assert [plain(source[place])["image_id"] for place in range(len(source))] == [
            record["image_id"] for record in expected[split]
        ]


def test_tfds_keeps_its_own_data_sets_of_the_same_name():
    import tensorflow_datasets as tfds

    make_builder("coco_captions", "data")
    assert tfds.builder_cls("coco_captions").__module__.startswith("tensorflow_datasets.")
