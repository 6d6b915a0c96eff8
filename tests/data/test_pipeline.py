"""The input pipeline: the batch contract, shares of processes, exact resuming, gaps, batches on the mesh."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest
from grain.multiprocessing import SharedMemoryArray
from jax.sharding import NamedSharding, PartitionSpec
from light_examples import Noisy, Wearing
from PIL import Image
from transformers import CLIPImageProcessorPil

from vla_jax.data import pipeline as module
from vla_jax.data.batches import Batches
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import BatchIterator, Pipeline, TransformExample
from vla_jax.data.stages import LEAST_SHARED, Stacked
from vla_jax.data.text import Tokenize, train_word_tokenizer
from vla_jax.errors import UserError


def examples(count, bad=()):
    return [{"value": 100 + index, "bad": index in bad} for index in range(count)]


def pipeline(source, batch_size, training=True, **settings):
    alone = {"process_index": 0, "process_count": 1}
    return Pipeline(source, Noisy(), batch_size, training, **(alone | settings))


@contextlib.contextmanager
def started(pipeline):
    iterator = BatchIterator(pipeline)
    try:
        yield iterator
    finally:
        iterator.close()


def take(pipeline, count=None):
    with started(pipeline) as iterator:
        return list(islice(iterator, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def transform(tmp_path_factory):
    tokenizer = train_word_tokenizer(["a red blue circle"], tmp_path_factory.mktemp("tokenizer"), context_length=16)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return TransformExample(
        Preprocess(processor, augment="crop"), Tokenize(tokenizer, 8), text_key="captions", label_key="answer"
    )


def picture_examples(count):
    generator = np.random.default_rng(0)
    for index in range(count):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
        yield {"image": buffer.getvalue(), "captions": [b"a red circle", b"a blue circle"], "answer": index % 3}


CONTRACT = {
    "image": (np.float32, (16, 16, 3)),
    "tokens": (np.int32, (8,)),
    "text_mask": (np.bool_, (8,)),
    "label": (np.int32, ()),
    "route": (np.int32, ()),
    "valid": (np.bool_, ()),
    "index": (np.int32, ()),
}


@pytest.mark.parametrize("training", [True, False])
def test_batches_keep_the_contract(transform, training):
    source = list(picture_examples(10))
    batch = take(Pipeline(source, transform, 4, training, process_index=0, process_count=1), 1)[0]
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        name: (np.dtype(dtype), (4, *shape)) for name, (dtype, shape) in CONTRACT.items()
    }
    assert batch["valid"].all()
    np.testing.assert_array_equal(batch["label"], [source[index]["answer"] for index in batch["index"]])
    np.testing.assert_array_equal(batch["route"], 0)


def test_evaluation_takes_the_first_text_and_no_augmentation(transform):
    source = list(picture_examples(6))
    (batch,) = take(Pipeline(source, transform, 6, False, process_index=0, process_count=1))
    for row, index in enumerate(batch["index"]):
        np.testing.assert_array_equal(batch["image"][row], transform.preprocess(source[index]["image"]))
        np.testing.assert_array_equal(batch["tokens"][row], transform.tokenize("a red circle")[0])


def test_training_draws_texts_and_crops(transform):
    source = list(picture_examples(4))
    batches = take(Pipeline(source, transform, 4, True, process_index=0, process_count=1), 10)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    drawn = Counter(map(bytes, tokens))
    assert set(drawn) == {bytes(transform.tokenize(text)[0]) for text in ("a red circle", "a blue circle")}
    assert min(drawn.values()) > 8  # of 40 draws
    first = [batch["image"][batch["index"] == 0][0] for batch in batches[:2]]
    assert not np.array_equal(*first)


def test_route_and_label_fields(transform):
    example = {**next(picture_examples(1)), "task": 2}
    plain = TransformExample(transform.preprocess, transform.tokenize, text_key="captions", route=1)
    assert (plain(example)["label"], plain(example)["route"]) == (-1, 1)
    routed = TransformExample(transform.preprocess, transform.tokenize, text_key="captions", route_key="task")
    assert routed(example)["route"] == 2
    with pytest.raises(UserError, match="did you mean 'captions'"):
        TransformExample(transform.preprocess, transform.tokenize, text_key="caption")(example)
    with pytest.raises(UserError, match="empty list"):
        plain({**example, "captions": []})


@pytest.mark.parametrize("count", [12, 4200])  # few are shuffled otherwise than many
def test_each_epoch_is_another_permutation(count):
    batches = take(pipeline(examples(count), count // 3), 9)
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(3, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for batch in batches:
        np.testing.assert_array_equal(batch["value"], 100 + batch["index"])


def test_the_seed_decides():
    first, again, other = (take(pipeline(examples(30), 6, seed=seed), 8) for seed in (5, 5, 6))
    assert_same(first, again)
    assert not np.array_equal(first[0]["index"], other[0]["index"])
    assert not np.array_equal(first[0]["noise"], other[0]["noise"])
    noise = np.concatenate([batch["noise"] for batch in first])
    assert len(set(noise)) == len(noise)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_each_global_batch(training, processes):
    source = examples(20)
    whole = take(pipeline(source, 6, training), 10)
    parts = [
        take(pipeline(source, 6, training, process_index=index, process_count=processes), 10)
        for index in range(processes)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        for name in ("value", "noise", "index", "valid"):
            shares = [part[step][name] for part in parts]
            assert {len(share) for share in shares} == {6 // processes}
            if name == "value" and not batch["valid"].all():
                continue  # what fills up an evaluation batch says nothing
            np.testing.assert_array_equal(np.concatenate(shares), batch[name])  # row by row


def test_evaluation_gives_every_example_once_and_fills_up():
    source = examples(10)
    batches = take(pipeline(source, 4, training=False))
    assert len(batches) == len(pipeline(source, 4, training=False)) == 3
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), [*range(10), -1, -1])
    np.testing.assert_array_equal(np.concatenate([b["valid"] for b in batches]), [True] * 10 + [False] * 2)
    assert set(batches[-1]["value"]) <= {example["value"] for example in source}


def test_a_process_without_examples_still_has_its_batches():
    batches = take(pipeline(examples(9), 8, training=False, process_index=3, process_count=4))
    assert [batch["valid"].tolist() for batch in batches] == [[True, True], [False, False]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [4, 24])  # 8 rows are read at once: more than a batch, or less
def test_resuming_is_exact(training, workers, size):
    # Bad pictures on the way shift what a batch has read, and their count is part of the state.
    settings = {"workers": workers, "max_bad_share": 0.3}
    source = examples(15 * size - 10, bad=(3, 7, 8, 20))
    with started(pipeline(source, size, training, **settings)) as iterator:
        before = list(islice(iterator, 5))
        taken = iterator.state()
        state = json.loads(json.dumps(taken))
        after = list(islice(iterator, 7))
        assert taken == state  # what was handed out does not change
        end = (iterator.seen, iterator.skipped)
        with started(pipeline(source, size, training, **settings)) as resumed:
            resumed.restore(state)
            assert_same(list(islice(resumed, 7)), after)
            assert (resumed.seen, resumed.skipped) == end
            resumed.restore(state)  # and once more, back from later on
            assert_same(list(islice(resumed, 2)), after[:2])
            if workers:
                # As many rows come, and where the order is fixed the same ones, with workers as without.
                plain = take(pipeline(source, size, training, max_bad_share=0.3), 12)
                assert len(plain) == len(before + after)
                if not training:
                    assert_same(before + after, plain)


@pytest.mark.parametrize("quick", [0.0, math.inf])
def test_how_rows_are_read_changes_nothing(monkeypatch, quick):
    batches = pipeline(examples(50, bad=(3, 7, 8, 20)), 10, max_bad_share=0.3)
    whole = take(batches, 9)
    with started(batches) as iterator:
        list(islice(iterator, 4))
        state = iterator.state()
    monkeypatch.setattr(module, "QUICK", quick)  # by threads side by side, or by one
    for rows in (1, 3, 10):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", rows)
        assert batches.rows_at_once == rows
        assert_same(take(batches, 9), whole)
        with started(batches) as iterator:
            iterator.restore(state)
            assert_same(list(islice(iterator, 5)), whole[4:])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": np.zeros(3, np.float32)}, r"differ in 'a': float32 \[2\], then float32 \[3\]"),
        ({"a": np.zeros(2)}, r"differ in 'a': float32 \[2\], then float64 \[2\]"),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(2)}, "differ in b"),
    ],
)
def test_rows_that_make_no_batch_are_named(other, message):
    batch = Stacked(2, shared=False)
    batch.add({"a": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=message):
        batch.add(other)


def test_large_arrays_are_shared_and_those_of_a_batch_that_is_given_up_are_freed():
    row = {"large": np.arange(LEAST_SHARED // 8, dtype=np.float32), "small": np.zeros(3)}
    batch = Stacked(2, shared=True)
    batch.add(row)
    given_up = Stacked(2, shared=True)
    given_up.add(row)
    assert given_up.arrays() == {}
    batch.add(row)
    arrays = batch.arrays()
    np.testing.assert_array_equal(arrays["large"], np.stack([row["large"]] * 2))
    assert (type(arrays["large"]), type(arrays["small"])) == (SharedMemoryArray, np.ndarray)
    # Grain frees what is marked when the array goes, in a thread of its own where there were workers.
    marks = [held["large"]._unlink_on_del for held in (given_up._arrays, arrays)]
    assert marks == [True, False]
    arrays["large"].unlink_on_del()


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_workers_hand_over_large_arrays_alone_in_shared_memory(transform, training):
    source = list(picture_examples(24))
    with started(Pipeline(source, transform, 24, training, workers=1, process_index=0, process_count=1)) as iterator:
        batch = next(iterator)
    assert batch["image"].nbytes >= LEAST_SHARED > batch["tokens"].nbytes
    assert {name for name, array in batch.items() if isinstance(array, SharedMemoryArray)} == {"image"}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_another_number_of_processes_goes_on_with_the_same_batches(before, after):
    source = examples(20)
    whole = take(pipeline(source, 6), 9)
    states = []
    for index in range(before):
        own = pipeline(source, 6, process_index=index, process_count=before)
        with started(own) as iterator, started(own) as middle:
            next(iterator)
            middle.restore({"position": iterator.state()["position"]})  # what went on once may go on again
            list(islice(middle, 3))
            states.append(json.loads(json.dumps(middle.state())))
    assert all(state["position"] == states[0]["position"] for state in states)
    for index in range(after):
        with started(pipeline(source, 6, process_index=index, process_count=after)) as iterator:
            iterator.restore({"position": states[0]["position"]})
            for batch, expected in zip(islice(iterator, 5), whole[4:], strict=True):
                own = slice(index * 6 // after, (index + 1) * 6 // after)
                np.testing.assert_array_equal(batch["noise"], expected["noise"][own])
    with started(pipeline(source, 6, process_index=0, process_count=before)) as iterator:
        iterator.restore(states[0])
        np.testing.assert_array_equal(next(iterator)["noise"], whole[4]["noise"][: 6 // before])


def test_a_position_is_for_the_same_batches_alone():
    with started(pipeline(examples(20), 6)) as iterator:
        next(iterator)
        position = iterator.state()["position"]
    with (
        started(pipeline(examples(20), 4, process_index=0, process_count=2)) as other,
        pytest.raises(UserError, match="batch_size was 6 and is now 4"),
    ):
        other.restore({"position": position})
    # Processes that pass over pictures do not stand at one place.
    with started(pipeline(examples(20, bad=range(4)), 4, max_bad_share=0.5)) as iterator:
        list(islice(iterator, 5))
        assert iterator.state()["position"] is None


def test_resuming_with_another_setup_is_an_error():
    with started(pipeline(examples(20), 4)) as iterator:
        next(iterator)
        state = iterator.state()
    with (
        started(pipeline(examples(20), 5, seed=1)) as other,
        pytest.raises(UserError, match="batch_size was 4 and is now 5, seed was 0 and is now 1"),
    ):
        other.restore(state)


def test_bad_pictures_are_named_counted_and_passed_over(caplog):
    source = examples(40, bad=(3, 30))
    with caplog.at_level(logging.WARNING), started(pipeline(source, 4, max_bad_share=0.1)) as iterator:
        batches = list(islice(iterator, 19))
        assert iterator.skipped == 4  # 76 good rows are two epochs of 38
        assert iterator.seen == 80
    indices = Counter(np.concatenate([batch["index"] for batch in batches]).tolist())
    assert indices == {index: 2 for index in range(40) if index not in (3, 30)}
    assert all(batch["valid"].all() for batch in batches)
    for index in (3, 30):
        assert caplog.text.count(f"example {index} of the source: its picture cannot be decoded: it is torn") == 2


def test_bad_pictures_of_an_evaluation_keep_their_place():
    source = examples(10, bad=(0, 5))
    with started(pipeline(source, 4, training=False, max_bad_share=0.2)) as iterator:
        batches = list(iterator)
        assert (iterator.seen, iterator.skipped) == (10, 2)
    indices = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(indices, [-1, 1, 2, 3, 4, -1, 6, 7, 8, 9, -1, -1])
    np.testing.assert_array_equal(np.concatenate([batch["valid"] for batch in batches]), indices >= 0)


@pytest.mark.parametrize("training", [True, False])
def test_too_many_bad_pictures_end_the_run(training):
    source = examples(200, bad=range(10, 200, 40))  # five, 2.5 %
    take(pipeline(source, 8, training, max_bad_share=0.025), 25)
    with pytest.raises(UserError, match=r"cannot be decoded, the last of them example \d+ .*at most 2\.00% may be"):
        take(pipeline(source, 8, training, max_bad_share=0.02), 25)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_many_bad_pictures_later_in_a_long_run(workers):
    # The first thousand are read without a fault; what counts is the share of all that was read.
    batches = pipeline(Wearing(), 100, training=False, max_bad_share=0.25, workers=workers)
    with started(batches) as iterator:
        good = list(islice(iterator, 16))
        assert sum(batch["valid"].sum() for batch in good) == 1200
        assert (iterator.seen, iterator.skipped) == (1600, 400)
        with pytest.raises(UserError, match="of 1700 pictures"):
            next(iterator)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_readable_ends_the_run(training):
    with pytest.raises(UserError, match="decoded"):
        take(pipeline(examples(8, bad=range(8)), 4, training, max_bad_share=0.9), 1)


def test_other_errors_are_not_swallowed():
    with pytest.raises(KeyError, match="value"):
        take(pipeline([{"bad": False}], 1), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, "shared equally by 2 processes"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"process_count": None}, "give both or neither"),
        ({"seed": -1}, "seed -1"),
        ({"workers": -1}, "workers -1"),
        ({"max_bad_share": 1.0}, "max_bad_share 1.0"),
        ({"patience": 0.0}, "patience 0.0"),
        ({"source": []}, "no example"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        pipeline(**({"source": examples(8), "batch_size": 4} | settings))


def test_processes_default_to_those_of_jax():
    assert (found := Pipeline(examples(4), Noisy(), 2, True)).process_count == jax.process_count()
    assert found.process_index == jax.process_index()


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec("data"))


def test_batches_lie_on_the_mesh(sharding):
    source = examples(30)
    batches = Batches(BatchIterator(pipeline(source, 8)), sharding)
    for expected in take(pipeline(source, 8), 5):
        batch = next(batches)
        assert_same([{name: np.asarray(array) for name, array in batch.items() if name != "noise"}],
                    [{name: array for name, array in expected.items() if name != "noise"}])  # fmt: skip
        assert all(array.sharding.is_equivalent_to(sharding, array.ndim) for array in batch.values())
        assert batch["value"].addressable_shards[0].data.shape == (2,)
    batches.close()


def test_rows_of_several_processes_are_not_taken_for_the_same(sharding, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    whole = NamedSharding(sharding.mesh, PartitionSpec())  # a batch that every process must hold whole
    batches = Batches(BatchIterator(pipeline(examples(30), 8)), whole)
    with pytest.raises(UserError, match="8 rows of a batch to 2 processes that read 8 each"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_state_belongs_to_the_batch_in_use(sharding, workers):
    def values(batches, count):
        return [np.asarray(batch["index"]).tolist() for batch in islice(batches, count)]

    source = examples(30)
    batches = Batches(BatchIterator(pipeline(source, 8, workers=workers)), sharding, prefetch=2)
    first = batches.state()
    before = values(batches, 3)
    state = json.loads(json.dumps(batches.state()))
    after = values(batches, 4)
    batches.restore(state)
    assert values(batches, 4) == after
    batches.restore(first)
    assert values(batches, 7) == before + after
    batches.close()

    resumed = Batches(BatchIterator(pipeline(source, 8, workers=workers)), sharding, prefetch=3)
    resumed.restore(state)
    assert resumed.state() == state
    assert values(resumed, 4) == after
    resumed.close()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_end_with_an_evaluation_pass(sharding, workers):
    batches = Batches(BatchIterator(pipeline(examples(20), 8, training=False, workers=workers)), sharding)
    indices = [np.asarray(batch["index"]) for batch in batches]
    np.testing.assert_array_equal(np.concatenate(indices), [*range(20), -1, -1, -1, -1])
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()
