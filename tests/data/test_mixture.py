"""Mixtures of tasks: their shares, their order, both kinds of batch, resuming, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import chain, islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from light_examples import Noisy

from vla_jax.data.batches import Batches
from vla_jax.data.mixed_batches import MixedBatches
from vla_jax.data.mixing import Interleaving, Mixing
from vla_jax.data.mixture import Part, TaskBatches
from vla_jax.data.pipeline import Pipeline
from vla_jax.errors import UserError
from vla_jax.training.checkpoint import Checkpointer
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.step import init_state, make_train_step
from vla_jax.training.trainer import fit

SIZES = {"a": 30, "b": 10, "c": 20}


@dataclasses.dataclass(frozen=True)
class Wide:
    """A transform of other rows than the others'."""

    def __call__(self, example, generator=None):
        return Noisy()(example, generator) | {"extra": np.zeros(3)}


def part(name, count=None, start=0, **settings):
    count = SIZES[name] if count is None else count
    source = [{"value": start + index, "bad": False} for index in range(count)]
    return Part(name, source, settings.pop("transform", Noisy()), **settings)


def parts(**by_name):
    return [part(name, start=1000 * number, **by_name.get(name, {})) for number, name in enumerate(SIZES)]


def mixture(kind, by="size", batch_size=5, tasks=None, **settings):
    mixing = by if isinstance(by, Mixing) else Mixing(by)
    alone = {"process_index": 0, "process_count": 1}
    return kind(parts() if tasks is None else tasks, mixing, batch_size, **(alone | settings))


def take(mixed, count):
    iterator = iter(mixed)
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert getattr(one, "task", None) == getattr(other, "task", None)
        assert dict(one).keys() == dict(other).keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_shares_by_hand():
    sizes = [100, 400, 1600]
    np.testing.assert_allclose(Mixing("size").shares(sizes), [1 / 21, 4 / 21, 16 / 21])
    np.testing.assert_allclose(Mixing("balanced").shares(sizes), [1 / 3] * 3)
    np.testing.assert_allclose(Mixing("temperature", temperature=2.0).shares(sizes), [1 / 7, 2 / 7, 4 / 7])
    np.testing.assert_allclose(Mixing("temperature", temperature=1.0).shares(sizes), [1 / 21, 4 / 21, 16 / 21])
    np.testing.assert_allclose(Mixing("weights", weights=(3, 1, 1)).shares(sizes), [0.6, 0.2, 0.2])


@pytest.mark.parametrize("seed", range(4))
def test_an_interleaving_keeps_every_share_and_every_turn(seed):
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(2 + seed, 0.5)) + 1e-3
    shares /= shares.sum()
    sequence = Interleaving.of(shares)
    seen = Counter()
    for position in range(3000):
        task, before = sequence(position)
        assert before == seen[task]
        seen[task] += 1
        counts = np.array([seen[each] for each in range(len(shares))])
        assert (np.abs(counts - shares * (position + 1)) < len(shares)).all()
    assert sequence.counts(3000) == [seen[each] for each in range(len(shares))]


def test_an_epoch_by_size_is_all_batches_of_all_tasks_shuffled():
    mixed = mixture(TaskBatches)  # 6, 2 and 4 batches
    assert mixed.epoch == 12
    batches = take(mixed, 36)
    orders = []
    for epoch in range(3):
        own = batches[12 * epoch : 12 * (epoch + 1)]
        orders.append([batch.task for batch in own])
        assert Counter(orders[-1]) == {"a": 6, "b": 2, "c": 4}
        for name, start in (("a", 0), ("b", 1000), ("c", 2000)):
            values = np.concatenate([batch["value"] for batch in own if batch.task == name])
            np.testing.assert_array_equal(np.sort(values), start + np.arange(SIZES[name]))
    assert len(set(map(tuple, orders))) == 3
    assert orders[0] != sorted(orders[0])
    assert [mixed.parts[mixed.task_at(step)].name for step in range(36)] == list(chain(*orders))


def test_tasks_keep_their_own_batch_size_and_transform():
    tasks = parts(b={"batch_size": 2, "transform": Wide()})
    mixed = mixture(TaskBatches, "balanced", tasks=tasks)
    batches = take(mixed, 45)
    assert {(batch.task, len(batch["value"]), "extra" in batch) for batch in batches} == {
        ("a", 5, False),
        ("b", 2, True),
        ("c", 5, False),
    }
    # Balanced in examples: 2 of 9 batches are of a, 5 of b, 2 of c.
    rows = {row["task"]: row for row in mixed.report()}
    assert [rows[name]["share_of_batches"] for name in "abc"] == pytest.approx([2 / 9, 5 / 9, 2 / 9])
    assert [rows[name]["share"] for name in "abc"] == pytest.approx([1 / 3] * 3)
    assert [rows[name]["passes"] for name in "abc"] == pytest.approx([20 / 30, 20 / 10, 20 / 20])
    counts = Counter(batch.task for batch in take(mixed, 2 * mixed.epoch))
    for name in "abc":
        assert abs(counts[name] - 2 * mixed.epoch * rows[name]["share_of_batches"]) < 3


@pytest.mark.parametrize("by", ["size", "balanced", "temperature", "weights"])
@pytest.mark.parametrize("kind", [TaskBatches, MixedBatches])
def test_resuming_is_exact(kind, by):
    mixing = Mixing(by, weights=(1, 2, 5) if by == "weights" else ())
    iterator = iter(mixture(kind, mixing))
    before = list(islice(iterator, 7))
    taken = iterator.state()
    state = json.loads(json.dumps(taken))
    after, drawn = list(islice(iterator, 9)), iterator.drawn
    assert json.loads(json.dumps(taken)) == state  # what was handed out does not change
    resumed = iter(mixture(kind, mixing))
    resumed.restore(state)
    assert_same(list(islice(resumed, 9)), after)
    assert resumed.drawn == drawn
    resumed.restore(state)  # and once more, back from later on
    assert_same(list(islice(resumed, 2)), after[:2])
    iterator.close()
    resumed.close()
    assert_same(take(mixture(kind, mixing), 7), before)
    other = take(mixture(kind, mixing, seed=1), 7)
    assert any(not np.array_equal(one["value"], two["value"]) for one, two in zip(before, other, strict=True))


@pytest.mark.parametrize("kind", [TaskBatches, MixedBatches])
def test_another_mixture_cannot_go_on(kind):
    iterator = iter(mixture(kind, "balanced"))
    next(iterator)
    state = iterator.state()
    iterator.close()
    other = iter(mixture(kind, "size"))
    with pytest.raises(UserError, match=r"shares was \[0\.33.* and is now \[0\.5"):
        other.restore(state)
    other.close()


def test_mixed_batches_by_size_are_one_shuffle_of_all():
    mixed = mixture(MixedBatches, batch_size=6)
    batches = take(mixed, 20)
    routes = np.concatenate([batch["route"] for batch in batches]).reshape(2, 60)
    values = np.concatenate([batch["value"] for batch in batches]).reshape(2, 60)
    everything = np.concatenate([1000 * number + np.arange(size) for number, size in enumerate(SIZES.values())])
    for epoch in range(2):
        np.testing.assert_array_equal(np.sort(values[epoch]), everything)
        np.testing.assert_array_equal(values[epoch] // 1000, routes[epoch])
    assert not np.array_equal(*values)
    for batch in batches[:3]:
        for value, index in zip(batch["value"], batch["index"], strict=True):
            assert mixed.source[index]["value"] == value
    # The stream is that of a plain pipeline over the joined source.
    plain = iter(Pipeline(mixed.source, mixed._transform, 6, True, process_index=0, process_count=1))
    assert_same([dict(batch) for batch in batches[:3]], list(islice(plain, 3)))
    plain.close()


def test_mixed_batches_keep_other_shares_batch_by_batch():
    tasks = [dataclasses.replace(each, classes=count) for each, count in zip(parts(), (2, 13, 4), strict=True)]
    mixed = mixture(MixedBatches, Mixing("weights", weights=(1, 1, 4)), batch_size=12, tasks=tasks)
    iterator = iter(mixed)
    batches = list(islice(iterator, 30))
    assert iterator.drawn == pytest.approx({"a": 60, "b": 60, "c": 240}, abs=2)
    iterator.close()
    for batch in batches:
        counts = np.bincount(batch["route"], minlength=3)
        assert (np.abs(counts - [2, 2, 8]) <= 2).all()
        np.testing.assert_array_equal(batch["value"] // 1000, batch["route"])
        np.testing.assert_array_equal(batch["classes"], np.array([2, 13, 4])[batch["route"]])
    # Each task is gone through as a whole, in another order each time.
    seen = np.concatenate([batch["value"][batch["route"] == 2] for batch in batches])
    passes = seen[: len(seen) // 20 * 20].reshape(-1, 20)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(2000 + np.arange(20), (len(passes), 1)))
    assert len({tuple(each) for each in passes}) == len(passes) > 5
    noise = np.concatenate([batch["noise"] for batch in batches])
    assert len(set(noise)) == len(noise)


@pytest.mark.parametrize("by", ["size", "balanced"])
@pytest.mark.parametrize("kind", [TaskBatches, MixedBatches])
def test_processes_share_each_global_batch(kind, by):
    whole = take(mixture(kind, by, batch_size=4), 8)
    shares = [take(mixture(kind, by, batch_size=4, process_index=index, process_count=2), 8) for index in range(2)]
    for step, batch in enumerate(whole):
        assert len({getattr(share[step], "task", None) for share in (whole, *shares)}) == 1
        for name in ("value", "noise"):
            joined = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(joined, batch[name])


def test_a_batch_of_one_task_compiles_one_program_a_task():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    traced = []

    @jax.jit
    def step(batch):
        traced.append(batch.task)
        return batch["value"].sum() * {"a": 1, "b": 10, "c": 100}[batch.task]

    mixed = mixture(TaskBatches, batch_size=4)
    batches = Batches(iter(mixed), sharding)
    expected = take(mixed, 12)
    for own in expected[:8]:
        batch = next(batches)
        assert batch.task == own.task
        assert batch["value"].sharding.is_equivalent_to(sharding, 1)
        assert int(step(batch)) == own["value"].sum() * {"a": 1, "b": 10, "c": 100}[own.task]
    assert sorted(traced) == sorted({own.task for own in expected[:8]})
    # The state belongs to the batch in use, not to those put on devices ahead of it.
    state = json.loads(json.dumps(batches.state()))
    assert state["step"] == 8
    next(batches)
    batches.restore(state)
    for own in expected[8:]:
        np.testing.assert_array_equal(np.asarray(next(batches)["value"]), own["value"])
    batches.close()


def test_a_training_loop_takes_batches_of_several_tasks_and_goes_on_with_them(tmp_path):
    """One step function, a head a task: each head moves by its own task's examples alone, as when cut in two."""
    tasks = parts(b={"transform": Wide()})

    def loss(params, batch, key):
        del key
        return jnp.mean((params["heads"][batch.task] - batch["value"]) ** 2), {}

    def train(steps, saver=None):
        mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
        start = init_state({"heads": {name: jnp.zeros(()) for name in SIZES}}, optax.sgd(0.01))
        batches = Batches(
            iter(mixture(TaskBatches, tasks=tasks, batch_size=8)), NamedSharding(mesh, PartitionSpec("data"))
        )
        step = make_train_step(loss, optax.sgd(0.01), seed=0)
        try:
            return fit(start, {}, step, batches, steps, checkpointer=saver, log_every=1)
        finally:
            batches.close()

    whole = train(9)
    identity = Identity("none", "none", {})
    with Checkpointer(tmp_path / "a", identity, every=4) as saver:
        train(4, saver)
    with Checkpointer(tmp_path / "a", identity, every=4) as saver:
        rest = train(9, saver)
    assert [record["train/loss"] for record in rest.history] == [record["train/loss"] for record in whole.history[4:]]
    by_hand = dict.fromkeys(SIZES, 0.0)
    for batch in take(mixture(TaskBatches, tasks=tasks, batch_size=8), 9):
        by_hand[batch.task] -= 0.01 * 2 * (by_hand[batch.task] - batch["value"].mean())
    for name, value in by_hand.items():
        assert float(whole.state.trainable["heads"][name]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixing("sizes"), "by size, balanced, temperature or weights; got 'sizes'"),
        (lambda: Mixing("temperature", temperature=0), "temperature of a mixture must be above 0"),
        (lambda: Mixing("size", weights=(1,)), "weights go with by=weights alone"),
        (lambda: Mixing("weights"), "weights go with by=weights alone"),
        (lambda: Mixing("weights", weights=(1, 0)), r"weights of a mixture must be above 0, got \(1, 0\)"),
        (lambda: mixture(TaskBatches, Mixing("weights", weights=(1, 2))), "3 tasks are mixed, and 2 weights"),
        (lambda: mixture(TaskBatches, tasks=[]), "at least one task"),
        (lambda: mixture(TaskBatches, tasks=[part("a"), part("a")]), "names a task twice: a, a"),
        (lambda: mixture(TaskBatches, tasks=[part("a", 0)]), "task 'a' of the mixture has no example"),
        (
            lambda: mixture(MixedBatches, tasks=parts(b={"batch_size": 2})),
            "batches hold all tasks, so b cannot have a batch size of its own",
        ),
        (lambda: mixture(MixedBatches, tasks=parts(b={"classes": 2})), "how many classes they have, or none"),
        (lambda: mixture(MixedBatches, tasks=parts(b={"transform": Wide()})), "those of a and b differ in extra"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
