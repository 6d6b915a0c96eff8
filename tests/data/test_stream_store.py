import subprocess
import sys

import numpy as np
import pytest

from vla_jax.backbones.loading import load_backbone
from vla_jax.data.cached import ArraySource
from vla_jax.data.image import Preprocess
from vla_jax.data.stream_store import StreamStore, digests, digests_of_rows, fingerprint
from vla_jax.errors import UserError

KEYS = [bytes([n]) * 32 for n in (3, 0, 3, 1, 0)]  # one of them ends in zeros, which texts of fixed length would lose


class Squares:
    """Computes a row of each place, and remembers which it was asked for."""

    def __init__(self, unreadable=()):
        self.asked, self.unreadable = [], unreadable

    def __call__(self, places):
        self.asked.append(places.tolist())
        found = np.array([place for place in places if place not in self.unreadable], np.int64)
        return found, np.stack([[KEYS[place][0], 7] for place in found]).astype(np.float32)


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return tmp_path / "store" if request.param == "disk" else None


def read(rows):
    return [rows[index].tolist() for index in range(len(rows))]


def test_a_row_is_computed_once_and_found_by_every_example_of_its_digest(folder):
    store, compute = StreamStore(folder), Squares()
    store.fill(KEYS, compute)
    assert compute.asked == [[0, 1, 3]]
    assert read(store.rows(KEYS)) == [[3, 7], [0, 7], [3, 7], [1, 7], [0, 7]]
    assert store.rows(KEYS)[4].dtype == np.float32
    store.fill(KEYS[::-1], compute)
    assert compute.asked == [[0, 1, 3]]


def test_an_interruption_costs_a_part(folder):
    store, compute = StreamStore(folder), Squares()
    store.fill(KEYS[:2], compute)
    store.fill(KEYS, compute, part=1)
    assert compute.asked == [[0, 1], [3]]
    assert read(store.rows(KEYS)) == [[3, 7], [0, 7], [3, 7], [1, 7], [0, 7]]


def test_what_cannot_be_read_has_no_row(folder):
    store = StreamStore(folder)
    store.fill(KEYS, Squares(unreadable=(1,)))
    assert [key in store for key in KEYS] == [True, False, True, True, False]
    assert len(store) == 2


def test_another_process_finds_what_is_on_disk_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    keys = digests_of_rows(values)
    StreamStore(tmp_path).fill(keys, lambda places: (places, values[places]), part=3)
    opened = StreamStore(tmp_path)
    opened.fill(keys, None)  # nothing is missing
    np.testing.assert_array_equal(np.stack([opened.rows(keys)[n] for n in range(4)]), values)


def test_a_part_without_keys_was_cut_off_and_does_not_count(tmp_path):
    StreamStore(tmp_path).fill(KEYS, Squares())
    next(tmp_path.glob("*.keys.npy")).unlink()
    assert len(StreamStore(tmp_path)) == 0


def test_a_damaged_part_is_named(tmp_path):
    StreamStore(tmp_path).fill(KEYS, Squares())
    rows = next(tmp_path.glob("*.rows.npy"))
    rows.write_bytes(rows.read_bytes()[:-4])
    with pytest.raises(UserError, match=rows.name):
        StreamStore(tmp_path)


def test_examples_are_told_apart_by_the_fields_asked_for_alone():
    source = [
        {"image": b"a", "other": np.arange(2), "text": "x"},
        {"image": b"a", "other": np.arange(3), "text": "y"},
        {"image": b"b", "other": np.arange(2), "text": "x"},
        {"image": b"b", "other": np.arange(2).astype(np.float64), "text": "x"},
    ]

    def same(*fields):
        found = digests(source, fields)
        return [found.index(digest) for digest in found]

    assert same("image") == [0, 0, 2, 2]
    assert same("text") == [0, 1, 0, 0]
    assert same("image", "other") == [0, 1, 2, 3]
    # Where one field ends and the next begins counts.
    joined = digests([{"a": b"xy", "b": b"z"}, {"a": b"x", "b": b"yz"}], ("a", "b"))
    assert joined[0] != joined[1]
    with pytest.raises(UserError, match="no field 'picture'; it has image, other, text"):
        same("picture")


def test_rows_differ_by_any_of_their_arrays():
    tokens, mask = np.array([[1, 2], [1, 2], [1, 3]]), np.array([[1, 1], [1, 0], [1, 1]], bool)
    found = digests_of_rows(tokens, mask)
    assert len(set(found)) == 3
    assert digests_of_rows(tokens[:1], mask[:1]) == found[:1]


def test_the_name_of_a_store_is_the_same_in_every_process_and_says_the_transform():
    program = (
        "from vla_jax.backbones.loading import load_backbone\n"
        "from vla_jax.data.image import Preprocess\n"
        "from vla_jax.data.stream_store import fingerprint\n"
        "print(fingerprint({'layers': 3}, Preprocess(load_backbone('tiny').image_processor)))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    processor = load_backbone("tiny").image_processor
    assert fingerprint({"layers": 3}, Preprocess(processor)) == elsewhere.strip()
    assert fingerprint({"layers": 2}, Preprocess(processor)) != elsewhere.strip()
    assert fingerprint({"layers": 3}, Preprocess(processor, augment="crop")) != elsewhere.strip()


def test_rows_serve_as_an_array_of_a_source():
    store = StreamStore(None)
    store.fill(KEYS, Squares())
    source = ArraySource({"stream": store.rows(KEYS), "label": np.arange(5)})
    assert len(source) == 5
    assert source[3]["stream"].tolist() == [1, 7]
