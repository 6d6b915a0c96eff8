"""How often each task is seen: shares against their formulas, whole epochs counted, and after an interruption."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import backbone, batch
from word_clip import export_word_clip

from experiments import multitask
from vla_jax import launching
from vla_jax.adapters import Bottleneck
from vla_jax.backbones.clip import CLIPOutput
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.data.mixed_batches import Joined
from vla_jax.data.mixing import Mixing
from vla_jax.data.pipeline import Pipeline
from vla_jax.data_sets import Generated
from vla_jax.errors import UserError
from vla_jax.many_tasks import ManyTasks, MixedTasks, as_one
from vla_jax.sharing import Sharing
from vla_jax.task_mixing import mixed, report, shares
from vla_jax.tasks.classification import Classification
from vla_jax.tasks.matching import Matching
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.variants import Budget, TaskData

THERE = {"few": 6, "many": 24, "most": 30}


def _parts():
    """Three tasks of twenty examples each in training, of which the first repeats six."""
    found = {}
    for name, size in THERE.items():
        rows = {field: np.asarray(value) for field, value in batch(size).items()} | {"own": np.arange(size)}
        found[name] = TaskData(Matching(name), {"train": ArraySource(rows)}, as_rows)
    return found


MIXTURES = [
    (Mixing(by="size"), (6 / 60, 24 / 60, 30 / 60)),
    (Mixing(by="balanced"), (1 / 3, 1 / 3, 1 / 3)),
    (Mixing(by="temperature", temperature=2.0), tuple(n**0.5 / (6**0.5 + 24**0.5 + 30**0.5) for n in (6, 24, 30))),
    (Mixing(by="weights", weights=(3.0, 2.0, 1.0)), (1 / 2, 1 / 3, 1 / 6)),
]


@pytest.mark.parametrize(("mixing", "expected"), MIXTURES)
def test_an_epoch_has_each_task_as_often_as_its_share_says(mixing, expected):
    assert list(shares(THERE, mixing).values()) == pytest.approx(expected)
    data = as_one(mixed(_parts(), THERE, mixing))
    source = data.splits["train"]
    # As many as the tasks have in all, or more, so that the task with the least share for its size is there as a whole.
    least = max(60, max(size / share for size, share in zip(THERE.values(), expected, strict=True)))
    assert least - 1e-6 <= len(source) < least + len(THERE)
    seen = Counter(source[place]["route"] for place in range(len(source)))
    for task, share in enumerate(expected):
        assert abs(seen[task] - len(source) * share) < len(THERE)
    for task, size in enumerate(THERE.values()):
        each = Counter(int(source[place]["own"]) for place in range(len(source)) if source[place]["route"] == task)
        # As many passes over all of them as there is room for, and in a last one none twice.
        assert len(each) == size
        assert max(each.values()) - min(each.get(n, 0) for n in range(size)) <= 1


@pytest.mark.parametrize("mixing", [case[0] for case in MIXTURES], ids=lambda mixing: mixing.by)
def test_what_is_drawn_has_the_shares_and_keeps_them_after_an_interruption(mixing):
    data = as_one(mixed(_parts(), THERE, mixing), shares(THERE, mixing))
    source, seed = data.splits["train"], 4
    stream = iter(Pipeline(source, data.transform, 10, training=True, seed=seed))
    passes = 2 * len(source) // 10
    tasks = [next(stream)["task"] for _ in range(7)]
    state = stream.state()
    rest = [next(stream)["task"] for _ in range(passes - 7)]
    again = iter(Pipeline(source, data.transform, 10, training=True, seed=seed))
    again.restore(state)
    resumed = [next(again)["task"] for _ in range(passes - 7)]
    np.testing.assert_array_equal(resumed, rest)
    # In the midst of a pass it is what it is; a whole one has the shares.
    seen = np.concatenate(tasks + resumed)
    for rows in (70, len(source), len(seen)):
        assert source.drawn(rows, seed) == np.bincount(seen[:rows], minlength=3).tolist()
    expected = len(source) * np.array(list(shares(THERE, mixing).values()))
    assert (np.abs(source.drawn(len(source), seed) - expected) < len(THERE)).all()


@dataclasses.dataclass(frozen=True)
class _Route:
    """A row that says its task alone."""

    def __call__(self, example, generator=None):
        return {"route": np.asarray(example["route"], np.int32)}


def test_draws_are_counted_in_many_examples_as_training_takes_them():
    source = Joined([[{}] * 3_000, [{}] * 2_000])  # large data are shuffled in another way
    stream = iter(Pipeline(source, _Route(), 500, training=True, seed=7))
    routes = np.concatenate([next(stream)["route"] for _ in range(12)])
    assert source.drawn(1_500, 7) == np.bincount(routes[:1_500]).tolist()
    assert source.drawn(6_000, 7) == np.bincount(routes).tolist() != source.drawn(6_000, 8)
    assert source.drawn(5_000, 7) == [3_000, 2_000]


def test_the_loss_of_a_mixture_is_the_mean_over_its_rows():
    tasks = (Matching("pairs"), Classification("kinds", 5))
    generator = np.random.default_rng(0)
    width, number = 6, np.array([0, 1, 1, 1, 1, 0, 1, 1])
    valid = np.array([1, 1, 1, 1, 1, 1, 1, 0], bool)
    draw = lambda: jnp.asarray(generator.normal(size=(8, width)), jnp.float32)  # noqa: E731
    fields = dict.fromkeys(field.name for field in dataclasses.fields(CLIPOutput))
    output = CLIPOutput(**fields | {"image_features": draw(), "text_features": draw()})
    label = np.where(number == 0, number, generator.integers(0, 5, 8))
    rows = {"task": jnp.asarray(number), "label": jnp.asarray(label), "valid": jnp.asarray(valid)}
    many = MixedTasks(tasks, shares=(0.25, 0.75))
    heads = jax.tree.map(lambda a: jnp.asarray(generator.normal(size=a.shape), a.dtype), many.init(4 * width))
    found, _ = many.loss(heads, output, rows)
    single = []
    for row in np.flatnonzero(valid):
        one = jax.tree.map(lambda a: a[row : row + 1], (output, rows))  # noqa: B023
        task = tasks[number[row]]
        single.append(task.loss(heads[task.name], *one)[0])
    np.testing.assert_allclose(found, np.mean(single), rtol=1e-5)
    equal, _ = ManyTasks(tasks).loss(heads, output, rows)
    by_task = [
        np.mean([loss for row, loss in zip(np.flatnonzero(valid), single, strict=True) if number[row] == n])
        for n in (0, 1)
    ]
    np.testing.assert_allclose(equal, np.mean(by_task), rtol=1e-5)
    assert abs(float(found) - float(equal)) > 1e-3
    with pytest.raises(UserError, match="2 tasks were given 1 shares; give one for each"):
        MixedTasks(tasks, shares=(1.0,))


def test_every_way_says_what_it_draws():
    mixing = Mixing(by="weights", weights=(3.0, 2.0, 1.0))
    given = shares(THERE, mixing)
    sharing = Sharing(
        backbone=backbone(),
        parts=mixed(_parts(), THERE, mixing),
        adapter=Bottleneck(rank=3),
        budget=Budget(steps=15, batch_size=12, seeds=(3,)),
        rates=dict.fromkeys(("head", "adapters", "fusion", "full"), (1e-3,)),
        compute=Compute(),
        mesh=make_mesh(MeshConfig()),
        folder=Path(),
        shares=given,
    )
    assert sharing.drawn("one") == sharing.drawn("each") == {"few": 90, "many": 60, "most": 30}  # one pass
    assert sharing.drawn("full") == {"few": 90, "many": 60, "most": 30}  # 6, 4 and 2 of every batch
    stages = np.zeros(3, int)
    for stage, steps in ((0, 7), (1, 8)):
        data = sharing._half(stage)
        assert isinstance(data.task, MixedTasks)
        stream = iter(Pipeline(data.splits["train"], data.transform, 12, training=True, seed=3))
        stages += sum(np.bincount(next(stream)["task"], minlength=3) for _ in range(steps))
    assert list(sharing.drawn("fusion").values()) == stages.tolist()


def test_the_report_says_what_was_drawn_and_how_often_each_example_is_seen():
    drawn = {"one": {"few": 310, "many": 190, "most": 100}, "full": {"few": 300, "many": 200, "most": 100}}
    table = report(THERE, Mixing(by="weights", weights=(3.0, 2.0, 1.0)), drawn)
    rows = {row["task"]: row for row in table.rows}
    assert {name: row["examples"] for name, row in rows.items()} == THERE
    assert {name: row["share"] for name, row in rows.items()} == pytest.approx(
        {"few": 1 / 2, "many": 1 / 3, "most": 1 / 6}
    )
    assert {name: row["drawn"] for name, row in rows.items()} == drawn["one"]
    assert rows["few"]["drawn_share"] == pytest.approx(310 / 600)
    assert {name: row["passes"] for name, row in rows.items()} == pytest.approx(
        {"few": 310 / 6, "many": 190 / 24, "most": 100 / 30}
    )
    assert rows["few"]["drawn_by_way"] == {"one": 310, "full": 300}
    shown = next(line for line in table.markdown().splitlines() if line.startswith("| few "))
    assert shown.split() == ["|", "few", "|", "6", "|", "50.00", "|", "310", "|", "51.67", "|", "51.67", "|"]


def test_a_task_without_a_single_example_is_refused():
    with pytest.raises(UserError, match="most has no share of 16,777,216 examples"):
        mixed(_parts(), THERE, Mixing(by="weights", weights=(1.0, 1.0, 1e-9)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.mixing.by=sizes"], r"--config\.mixing\.by cannot be 'sizes'; allowed: size, balanced, temperature"),
        (["--config.mixing.weights=1,2"], r"weights go with by=weights alone"),
        (["--config.mixing.by=weights", "--config.mixing.weights=1,2"], "5 tasks are mixed, and 2 weights given"),
        (["--config.mixing.by=weights", "--config.mixing.weights=1,2,nan,1,1"], "must be above 0"),
        (["--config.mixing.by=temperature", "--config.mixing.temperature=0"], "temperature of a mixture must be above"),
    ],
)
def test_what_makes_no_mixture_is_refused_on_the_command_line(arguments, message):
    with pytest.raises(UserError, match=message):
        launching.parse_config(multitask, arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_experiment_mixes_as_it_is_told_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(multitask, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    config = multitask.Config(
        backbone=str(export_word_clip(tmp_path / "backbone")),
        tasks=("scene_shapes", "statements"),
        ways=("one", "full"),
        adapter_rates=(1e-2,),
        full_rates=(1e-3,),
        budget=Budget(steps=2, batch_size=8, log_every=1),
        sizes=Generated(train=16, validation=6, test=8),
        mixing=Mixing(by="weights", weights=(3.0, 1.0)),
        text_length=20,
        data_dir=str(tmp_path / "data"),
    )
    multitask.run(config, tmp_path / "run")
    told = [json.loads(line) for line in (tmp_path / "run/mixture.jsonl").read_text().splitlines()]
    assert [(row["task"], row["share"]) for row in told] == [("scene_shapes", 0.75), ("statements", 0.25)]
    sharing = multitask._sharing(config, load_backbone(config.backbone), tmp_path)
    data = as_one(sharing.parts, sharing.shares)
    stream = iter(Pipeline(data.splits["train"], data.transform, 8, training=True, seed=0))
    counts = np.bincount(np.concatenate([next(stream)["task"] for _ in range(2)]), minlength=2).tolist()
    assert [row["drawn"] for row in told] == [row["drawn_by_way"]["one"] for row in told] == counts
    assert [row["drawn_by_way"]["full"] for row in told] == [12, 4]
    config_told = json.loads((tmp_path / "run/mixture.json").read_text())
    assert config_told == {"by": "weights", "temperature": 2.0, "weights": [3.0, 1.0]}
    (joint,) = (tmp_path / "run/runs/one").glob("**/settings.json")
    settings = json.loads(joint.read_text())
    assert (settings["examples"]["train"], settings["model"]["task"]["shares"]) == (64, [0.75, 0.25])
    for task, size, examples in (("scene_shapes", 6, 48), ("statements", 2, 16)):
        (alone,) = (tmp_path / f"run/runs/full/{task}").glob("**/settings.json")
        settings = json.loads(alone.read_text())
        assert (settings["batch_size"], settings["examples"]["train"]) == (size, examples)
    other = dataclasses.replace(config, mixing=Mixing(by="weights", weights=(1.0, 3.0)))
    with pytest.raises(UserError, match=r"belongs to a run that mixed tasks by .*3\.0, 1\.0.*Choose another --workdir"):
        multitask.run(other, tmp_path / "run")
