"""Several tasks as one: each head sees its own rows alone, and results come out as each task would give them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax import names
from vla_jax.backbones.clip import CLIPOutput
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.errors import UserError
from vla_jax.many_tasks import ManyTasks, Sent, apart, as_one, own_fields
from vla_jax.tasks.classification import Classification, ZeroShotClassification
from vla_jax.tasks.grounding import BoxPrediction
from vla_jax.tasks.matching import Matching
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.variants import TaskData

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, PATCHES = 6, 4
SIZES = {"kinds": 5, "pairs": 7, "captions": 6, "boxes": 4}
ALONE = {
    "kinds": Classification("kinds", 9),
    "pairs": Matching("pairs"),
    "captions": Retrieval("captions", gallery=4),
    "boxes": BoxPrediction("boxes", width=8),
}
MANY = ManyTasks(tuple(ALONE.values()))


def _order() -> np.ndarray:
    """A task for each row, in no order."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(4), list(SIZES.values())))


def _batch(task: np.ndarray) -> dict[str, jax.Array]:
    generator = np.random.default_rng(2)
    low, reach = generator.uniform(0, 0.5, (len(task), 2)), generator.uniform(0.2, 0.5, (len(task), 2))
    label = np.where(task == 0, generator.integers(0, 9, len(task)), np.where(task == 1, 1, -1))
    box = np.where(task[:, None] == 3, np.concatenate([low, low + reach], 1), 0)
    rows = {"task": task.astype(np.int32), "label": label.astype(np.int32), "box": box.astype(np.float32)}
    return jax.tree.map(jnp.asarray, rows | {"valid": np.arange(len(task)) % 6 != 5})


def _output(rows: int) -> CLIPOutput:
    generator = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)  # noqa: E731
    fields = dict.fromkeys(field.name for field in dataclasses.fields(CLIPOutput))
    drawn = {"image_features": draw(rows, WIDTH), "text_features": draw(rows, WIDTH)}
    return CLIPOutput(**fields | drawn | {"patch_features": draw(rows, PATCHES, WIDTH), "scale": jnp.float32(3)})


def _heads() -> dict:
    generator = np.random.default_rng(4)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * generator.normal(size=a.shape), a.dtype), MANY.init(4 * WIDTH))


def _rows_of(number: int, tree, task: np.ndarray):
    """One task's rows of a batch, or of an output, whose scale has none."""
    return jax.tree.map(lambda a: a[task == number] if a.ndim else a, tree)


def _loss(heads, image, output, batch):
    return MANY.loss(heads, output.replace(image_features=image), batch)


GRADIENT = jax.jit(jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True))


def test_loss_and_gradient_are_the_mean_of_those_of_each_task_on_its_own_rows():
    task = _order()
    batch, output, heads = _batch(task), _output(len(task)), _heads()

    def one_by_one(heads, image):
        given = output.replace(image_features=image)
        losses = []
        for number, (name, own) in enumerate(ALONE.items()):
            kept = (task == number) & np.asarray(batch["valid"])
            rows = jax.tree.map(lambda a: a[kept] if a.ndim else a, (given, batch))  # noqa: B023
            losses.append(own.loss(heads[name], *rows)[0])
        return sum(losses) / 4, losses

    (loss, metrics), found = GRADIENT(heads, output.image_features, output, batch)
    (expected, losses), slopes = jax.jit(jax.value_and_grad(one_by_one, argnums=(0, 1), has_aux=True))(
        heads, output.image_features
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, own in zip(ALONE, losses, strict=True):
        np.testing.assert_allclose(metrics[f"{name}_loss"], own, rtol=1e-5)
    assert set(metrics) == {f"{name}_loss" for name in ALONE} | {
        "kinds_accuracy", "pairs_accuracy", "boxes_accuracy"
    }  # fmt: skip
    for (name, mine), other in zip(names.flatten(found[0]).items(), jax.tree.leaves(slopes[0]), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found[1], slopes[1], rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_task_leaves_its_head_alone():
    task = np.arange(sum(SIZES.values())) % 3  # no boxes
    output = _output(len(task))
    _, (gradient, _) = GRADIENT(_heads(), output.image_features, output, _batch(task))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient["boxes"]))
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient["kinds"]))


def test_results_are_those_of_each_task_by_itself():
    task = _order()
    batch, output, heads = _batch(task), _output(len(task)), _heads()
    found = jax.tree.map(np.asarray, jax.jit(MANY.predict)(heads, output, batch))
    found["index"] = np.arange(len(task))
    told = MANY.finish(found)
    assert {name for name in told if "/" not in name} == {"task", "index", "correct"}
    for number, (name, own) in enumerate(ALONE.items()):
        rows = _rows_of(number, (output, batch), task)
        expected = own.finish(jax.tree.map(np.asarray, jax.jit(own.predict)(heads[name], *rows)))
        np.testing.assert_array_equal(told["correct"][task == number], expected["correct"])
        fields = own_fields(name, told)
        assert set(fields) == set(expected)
        for field, values in fields.items():
            np.testing.assert_allclose(values[task == number], expected[field], rtol=1e-5, err_msg=f"{name}/{field}")
            assert not np.any(values[task != number])
    assert 0 < told["correct"].mean() < 1


def _source(count: int, seed: int, **more: np.ndarray) -> ArraySource:
    generator = np.random.default_rng(seed)
    rows = {"image": generator.normal(size=(count, 4, 4, 3)).astype(np.float32)}
    rows |= {"label": np.full(count, seed, np.int32), "tokens": np.zeros((count, 5), np.int32)}
    return ArraySource(rows | more)


def _parts() -> dict[str, TaskData]:
    box = np.ones((3, 4), np.float32)
    plain = TaskData(Matching(), {"train": _source(2, 0), "test": _source(3, 1)}, as_rows)
    boxes = TaskData(BoxPrediction(), {"train": _source(3, 2, box=box), "test": _source(3, 3, box=box)}, as_rows)
    return {"pairs": plain, "regions": boxes}


def test_examples_stand_one_task_after_the_other_with_the_same_fields():
    data = as_one(_parts())
    assert [task.name for task in data.task.tasks] == ["pairs", "regions"]
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 5, "test": 6}
    rows = [data.transform(data.splits["train"][index], None) for index in range(5)]
    assert [int(row["task"]) for row in rows] == [int(row["route"]) for row in rows] == [0, 0, 1, 1, 1]
    assert [int(row["label"]) for row in rows] == [0, 0, 2, 2, 2]
    assert [row["box"].tolist() for row in rows] == [[0.0] * 4] * 2 + [[1.0] * 4] * 3
    assert len({tuple((name, row[name].shape, row[name].dtype) for name in sorted(row)) for row in rows}) == 1


def test_examples_may_be_sent_elsewhere_and_keep_their_task():
    data = as_one(_parts())
    sent = Sent(data.splits["test"], np.array([1, 0, -1, 1, 0, 0]))
    rows = [data.transform(sent[index], None) for index in range(len(sent))]
    assert [int(row["route"]) for row in rows] == [1, 0, -1, 1, 0, 0]
    assert [int(row["task"]) for row in rows] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="2 routes were given for 6 examples"):
        Sent(data.splits["test"], np.zeros(2, int))


def test_results_are_told_apart_with_places_in_the_tasks_own_sources():
    index = np.array([[0, 2, 3, 4, 5]] * 2)  # the second example cannot be read
    correct = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]], bool)
    iou = np.linspace(0, 1, 10).reshape(2, 5)
    found = {"task": np.array([[0, 0, 1, 1, 1]] * 2), "index": index, "correct": correct, "regions/iou": iou}
    told = apart(_parts(), found, "test")
    assert told["pairs"]["index"].tolist() == [[0, 2]] * 2
    assert told["regions"]["index"].tolist() == [[0, 1, 2]] * 2
    np.testing.assert_array_equal(told["pairs"]["correct"], correct[:, :2])
    np.testing.assert_array_equal(told["regions"]["correct"], correct[:, 2:])
    np.testing.assert_array_equal(told["regions"]["iou"], iou[:, 2:])
    assert set(told["pairs"]) == {"index", "correct"}


def test_a_task_alone_and_tasks_without_data_come_out_as_well():
    alone = as_one({"regions": _parts()["regions"]})
    assert int(alone.transform(alone.splits["train"][2], None)["task"]) == 0
    counted = as_one({name: TaskData(part.task, {}, None) for name, part in _parts().items()})
    assert counted.splits == {}
    assert set(counted.task.init(4 * WIDTH)) == {"pairs", "regions"}


def test_what_cannot_be_put_together_is_refused():
    with pytest.raises(UserError, match="names of their own; got a, a"):
        ManyTasks((Matching("a"), Matching("a")))
    with pytest.raises(UserError, match="names has texts of its own"):
        ManyTasks((Matching("a"), ZeroShotClassification("names", ((1, 2), (1, 3)), (2, 2), 2)))
    parts = _parts()
    longer = _source(3, 4)
    longer.arrays["tokens"] = np.zeros((3, 8), np.int32)
    other = dataclasses.replace(parts["regions"], splits={"train": longer, "test": longer})
    with pytest.raises(UserError, match=r"rows of pairs and regions differ in tokens: int32 \[5\] and int32 \[8\]"):
        as_one(parts | {"regions": other})
    with pytest.raises(UserError, match="have the same splits"):
        as_one(parts | {"regions": dataclasses.replace(parts["regions"], splits={"train": longer})})
