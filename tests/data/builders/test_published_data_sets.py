"""Every data set that is read from a user's folder: what is built is what the published files say."""

from __future__ import annotations

import io
import pickle
import sys

import numpy as np
import published_layouts
import pytest
from PIL import Image
from published_layouts import plain, python2_pickle, refcoco, write

from vla_jax.data.flattened import Flattened, load_examples
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.sources import builder_names, load_source, make_builder
from vla_jax.errors import UserError

# Name, configuration, and what one annotation of a record is called by its fields; None where a record is one.
DATA_SETS = {
    "vqav2": (None, "questions"),
    "gqa": ("balanced", "questions"),
    "coco_captions": ("karpathy", "captions"),
    "flickr30k": ("karpathy", "captions"),
    "nlvr": (None, None),
    "nlvr2": (None, "statements"),
    "vsr": ("random", "statements"),
    "refcoco": ("refcoco_unc", "phrases"),
    "winoground": (None, None),
    "sugarcrepe": (None, "pairs"),
    "aro": ("relation", "pairs"),
    "valse": (None, "pairs"),
}
each = pytest.mark.parametrize("name", DATA_SETS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds a data set once; gives its prepared folder, configuration and expected records by split."""
    found = {}

    def build(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            expected = getattr(published_layouts, name)(folder / "manual")
            config = DATA_SETS[name][0]
            load_source(name, next(iter(expected)), folder / "data", config, manual_dir=folder / "manual")
            found[name] = (folder / "data", config, expected)
        return found[name]

    return build


def expected_examples(records, field):
    """One example an annotation, put together by hand from records as they are expected."""
    examples = []
    for record in records:
        if field is None:
            examples.append(record)
            continue
        rest = {name: value for name, value in record.items() if name not in (field, "answers")}
        if field == "captions":
            examples.extend(rest | {"caption": caption} for caption in record["captions"])
            continue
        columns = dict(record[field])
        counts = columns.pop("answers_count", None)
        answers = list(record.get("answers", []))
        for place in range(len(next(iter(columns.values())))):
            example = rest | {name: values[place] for name, values in columns.items()}
            if counts is not None:
                example["answers"], answers = answers[: counts[place]], answers[counts[place] :]
            examples.append(example)
    return examples


@pytest.mark.parametrize(
    ("config", "folder", "division", "splits"),
    [
        ("refcocoplus_unc", "refcoco+", "unc", {"train": "train", "val": "validation", "testB": "testB"}),
        ("refcoco_google", "refcoco", "google", {"train": "train", "val": "validation", "test": "test"}),
        ("refcocog_google", "refcocog", "google", {"train": "train", "val": "validation"}),  # its test is not public
        ("refcocog_umd", "refcocog", "umd", {"train": "train", "val": "validation", "test": "test"}),
    ],
)
def test_every_division_of_refcoco_lies_in_a_file_of_its_own(tmp_path, config, folder, division, splits):
    manual = tmp_path / "manual"
    expected = refcoco(manual)
    (manual / "refcoco").rename(manual / folder)
    unc = manual / folder / "refs(unc).p"
    references = pickle.loads(unc.read_bytes(), encoding="latin1")
    unc.unlink()
    last = next((name for name in splits if name.startswith("test")), None)
    kept = [row | {"split": last if row["split"] == "testB" else row["split"]} for row in references]
    kept = [row for row in kept if row["split"] is not None]
    write(manual / folder / f"refs({division}).p", python2_pickle(kept))
    for split, ours in splits.items():
        source = load_source("refcoco", ours, tmp_path / "data", config, manual_dir=manual)
        records = expected["testB" if split == last else ours]
        assert [plain(source[place]) for place in range(len(source))] == records
    assert set(make_builder("refcoco", tmp_path / "data", config).info.splits) == set(splits.values())


def test_flickr30k_has_the_splits_of_entities_too(built):
    folder, _, expected = built("flickr30k")
    for split, records in expected.items():  # here both sets of splits are the same
        manual = folder.parent / "manual"
        source = load_source("flickr30k", split, folder.parent / "entities", "entities", manual_dir=manual)
        assert [plain(source[place]) for place in range(len(source))] == records


@each
def test_records_are_what_the_files_say(built, name):
    data_dir, config, expected = built(name)
    for split, records in expected.items():
        source = load_source(name, split, data_dir, config)
        assert [plain(source[place]) for place in range(len(source))] == records
    assert set(make_builder(name, data_dir, config).info.splits) == set(expected)
    assert "tensorflow" not in sys.modules


@each
def test_examples_are_single_annotations_in_order(built, name):
    data_dir, config, expected = built(name)
    for split, records in expected.items():
        examples = load_examples(name, split, data_dir, config)
        wanted = expected_examples(records, DATA_SETS[name][1])
        assert [plain(examples[place]) for place in range(len(examples))] == wanted
        copy = pickle.loads(pickle.dumps(examples))
        assert plain(copy[len(copy) - 1]) == wanted[-1]


def test_kinds_of_values_are_those_that_tasks_expect(built):
    data_dir, config, _ = built("refcoco")
    example = load_examples("refcoco", "train", data_dir, config)[1]
    assert example["boxes"].dtype == example["box"].dtype == np.float32
    assert (example["boxes"].shape, example["box"].shape) == ((2, 4), (4,))
    assert example["phrase"] == b"woman back"
    assert (int(example["width"]), int(example["height"])) == (40, 30)
    data_dir, config, _ = built("vqav2")
    example = load_examples("vqav2", "train", data_dir, config)[0]
    assert len(example["answers"]) == 10
    assert {type(answer) for answer in example["answers"]} == {bytes}
    data_dir, config, _ = built("coco_captions")
    captions = load_source("coco_captions", "train", data_dir, config)[0]["captions"]
    assert [type(captions[place]) for place in range(len(captions))] == [bytes] * 6


@each
def test_names_of_fields_do_not_hide_each_other(built, name):
    data_dir, config, _ = built(name)
    features = make_builder(name, data_dir, config).info.features
    field = DATA_SETS[name][1]
    if field is None or field == "captions":
        assert "caption" not in features
    else:
        assert not set(features) & set(features[field].feature)


@each
def test_its_module_is_all_it_takes_to_be_found(name):
    assert name in builder_names()


def test_slices_count_what_the_user_counts(built):
    data_dir, config, expected = built("vqav2")
    everything = expected_examples(expected["train"], "questions")
    assert len(everything) == 3
    for slice_, wanted in (
        ("[:1]", slice(1)),
        ("[1:]", slice(1, None)),
        ("[-1:]", slice(-1, None)),
        ("[:67%]", slice(2)),
    ):
        examples = load_examples("vqav2", f"train{slice_}", data_dir, config)
        assert [plain(examples[place]) for place in range(len(examples))] == everything[wanted]
    # Records: two pictures.
    records = load_source("vqav2", "train[:50%]", data_dir, config)
    assert [plain(records[place]) for place in range(len(records))] == expected["train"][:1]


def test_a_slice_beyond_the_split_is_refused(built):
    data_dir, config, _ = built("vqav2")
    with pytest.raises(UserError, match=r"'train\[:4\]' of a split of 3 examples"):
        load_examples("vqav2", "train[:4]", data_dir, config)
    with pytest.raises(UserError, match=r"'train\[:3\]' of a split of 2 examples"):
        load_source("vqav2", "train[:3]", data_dir, config)
    with pytest.raises(UserError, match=r"'train\[:x\]'"):
        load_examples("vqav2", "train[:x]", data_dir, config)


def test_opening_reads_no_record(built, monkeypatch):
    data_dir, config, _ = built("vqav2")
    source = load_source("vqav2", "train", data_dir, config)
    monkeypatch.setattr(type(source), "__getitem__", lambda *_: pytest.fail("read"))
    assert len(load_examples("vqav2", "train", data_dir, config)) == 3


def test_places_outside_are_refused(built):
    data_dir, config, _ = built("vsr")
    examples = load_examples("vsr", "train", data_dir, config)
    for place in (-1, 3):
        with pytest.raises(IndexError):
            examples[place]
    with pytest.raises(UserError, match="3 records are counted and 2 are there"):
        Flattened(load_source("vsr", "train", data_dir, config), None, np.array([1, 1, 1]))


def test_the_users_folder_is_not_needed_again(built, tmp_path):
    data_dir, config, expected = built("vsr")
    assert len(load_source("vsr", "train", data_dir, config, manual_dir=tmp_path / "gone")) == len(expected["train"])


@pytest.mark.parametrize(
    ("name", "split", "image_key"),
    [
        ("nlvr", "train", "image"),
        ("nlvr2", "train", "image_0"),
        ("nlvr2", "train", "image_1"),
        ("vqav2", "train", "image"),
    ],
)
def test_grey_and_transparent_pictures_go_through_the_pipeline(built, name, split, image_key):
    from transformers import CLIPImageProcessorPil

    data_dir, config, _ = built(name)
    examples = load_examples(name, split, data_dir, config)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    preprocess = Preprocess(processor)
    pipeline = Pipeline(
        examples, Looked(preprocess, image_key), len(examples), training=False, process_index=0, process_count=1
    )
    (batch,) = pipeline
    assert batch["image"].shape == (len(examples), 8, 8, 3)
    assert batch["valid"].all()
    # What is transparent shows white paper, and grey is all three colours alike.
    for place in range(len(examples)):
        original = Image.open(io.BytesIO(examples[place][image_key])).convert("RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", original.size, "white"), original).convert("RGB")
        np.testing.assert_allclose(batch["image"][place], preprocess(seen), atol=1e-6)


class Looked:
    """The transform of one picture field alone."""

    def __init__(self, preprocess, key):
        self.preprocess, self.key = preprocess, key

    def __call__(self, example, generator=None):
        return {"image": self.preprocess(example[self.key], generator)}
