"""The multitask experiment on a small random backbone: its rows, its files, its stages, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import rich.console

from experiments import multitask
from experiments.multitask import PRESETS, Config, check, run
from vla_jax import comparison, names, task_routes
from vla_jax.adapters import Bottleneck, Placement, fuse, place
from vla_jax.backbones.loading import load_backbone
from vla_jax.data_sets import Generated
from vla_jax.errors import UserError
from vla_jax.many_tasks import as_one
from vla_jax.model import AdaptedModel
from vla_jax.reporting.page.gallery import make_galleries
from vla_jax.reporting.page.maps import HeatMaps
from vla_jax.reporting.page.workdir import read_work_directory
from vla_jax.task_set import member_data
from vla_jax.tasks.grounding import heat_map
from vla_jax.training.checkpoint import load_adapters, save_adapters
from vla_jax.training.metrics import run_record
from vla_jax.training.sharding import make_mesh
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASKS, WAYS, TEST = ("grounding", "statements"), ("each", "fusion", "full"), 12
_FOLDERS = {"each": "each/each", "fusion": "fusion/second/fusion"}


@pytest.fixture(scope="module")
def config(small_backbone_folder, tmp_path_factory):
    return Config(
        backbone=str(small_backbone_folder),
        tasks=TASKS,
        ways=WAYS,
        adapter_rates=(1e-2,),
        fusion_rates=(1e-2,),
        full_rates=(1e-3,),
        budget=Budget(steps=2, batch_size=8, log_every=1),
        sizes=Generated(train=16, validation=6, test=TEST),
        text_length=20,
        router_examples=8,
        data_dir=str(tmp_path_factory.mktemp("data")),
    )


@pytest.fixture(scope="module", autouse=True)
def _on_one_device():
    """Programs for one device are compiled in a fraction of the time; those for several are other tests' business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_record(folder, config)
    return folder, {row["name"]: row for row in run(config, folder)}


def _stored(folder, run: str) -> dict[str, np.ndarray]:
    (path,) = (folder / "runs").glob(f"{run}/learning_rate_*/seed_0/test.npz")
    return dict(np.load(path))


def _by_task(folder, name: str) -> dict[str, np.ndarray]:
    """Which test examples of each task a way has right, from the files of its runs."""
    if name == "full":
        return {task: _stored(folder, f"full/{task}/full")["correct"] for task in TASKS}
    found = _stored(folder, _FOLDERS[name])
    return {task: found["correct"][found["task"] == number] for number, task in enumerate(TASKS)}


@pytest.mark.slow
def test_rows_say_what_the_runs_have_right_and_how_they_differ(trained):
    folder, rows = trained
    assert list(rows) == ["each", "routed", "fusion", "full"]
    means = {}
    for name in WAYS:
        right = _by_task(folder, name)
        assert {task: own.shape for task, own in right.items()} == dict.fromkeys(TASKS, (TEST,))
        for task, own in right.items():
            assert rows[name][task].value == pytest.approx(own.mean())
        means[name] = np.mean([own.mean() for own in right.values()])
        assert rows[name]["mean"].value == pytest.approx(means[name])
    for name in ("fusion", "full"):
        assert rows[name]["against_each"].value == pytest.approx(means[name] - means["each"])
    assert rows["each"]["against_each"] is None
    (best,) = (name for name, row in rows.items() if row["best"])
    assert means[best] == max(means[name] for name in ("each", "fusion"))


@pytest.mark.slow
def test_rows_count_what_is_trained_once(trained):
    _, rows = trained
    # Width 16 over 4, on the MLPs of two towers of two blocks; heads of grounding (256 wide) and statements.
    down, up, sites = 16 * 4 + 4, 4 * 16 + 16, 4
    heads = (2 * 8 * 256 + 256) + (256 * 5 + 5) + (4 * 8 + 1)
    fusion = 2 * sites * (3 * 16 * 16 + 2 * 16)
    each = 2 * sites * (down + up)
    assert rows["each"]["trained"] == heads + each
    assert rows["fusion"]["trained"] == heads + each + fusion
    assert rows["routed"]["trained"] == rows["each"]["trained"] + 2 * (16 + 1)
    assert rows["full"]["trained"] > 2 * sites * 16 * 32 + heads
    assert rows["fusion"]["parameters_per_task"] == rows["fusion"]["trained"] / 2


@pytest.mark.slow
def test_the_second_stage_weighs_the_adapters_of_the_first_as_they_were(config, trained):
    folder, _ = trained
    first, second = (
        load_adapters(next((folder / "runs/fusion" / stage).glob("*/*/seed_0/adapters")))[0]
        for stage in ("first", "second")
    )
    learnt = names.flatten(second)
    assert {name for name in learnt if name.startswith("heads/")} == set(names.flatten({"heads": first["heads"]}))
    assert all("/fuse/" in name for name in learnt if name.startswith("adapters/"))
    value = learnt["adapters/fusion/vision/mlp_out/fuse/value/kernel"]
    assert value.shape == (2, 2, 16, 16)  # layers, tasks
    assert 0 < np.abs(value - np.eye(16)).max() < 0.1  # it has learnt, from the identity on

    model, params, data = _fused(config, first, second)
    source = data.splits["test"]
    rows = [data.transform(source[index], None) for index in range(len(source))]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    found = data.task.finish(jax.tree.map(np.asarray, jax.jit(model.predict)(params, batch)))
    stored = _stored(folder, "fusion/second/fusion")
    np.testing.assert_array_equal(found["correct"], stored["correct"])


def _fused(config, first, second):
    """AdapterFusion's model with its parameters and data, of what both stages have trained."""
    backbone = load_backbone(config.backbone)
    towers, tasks = backbone.config.towers, {task: _data(config, task, backbone) for task in TASKS}
    placed = Placement(Bottleneck(reduction=4, parallel=True, scale=4.0), slots=("mlp_out",), tasks=TASKS)
    adapters = {"adapter": first["adapters"]["bottleneck"]}
    plan, begun = fuse(place(placed, towers), adapters, towers, jax.random.key(5), tasks=TASKS)
    data = as_one(tasks)
    model = AdaptedModel(backbone, data.task, plan.placements)
    children = {name: leaf for name, leaf in names.flatten({"adapters": begun}).items() if "/fuse/" not in name}
    return model, names.merge({"backbone": backbone.params}, names.unflatten(children), second), data


@pytest.mark.slow
def test_the_gallery_shows_what_every_way_says_of_the_examples_of_a_task(config, trained):
    folder, _ = trained
    galleries = make_galleries(read_work_directory(folder), 4, None, lambda text: None)
    assert [gallery.group for gallery in galleries] == list(TASKS)
    right = {way: _by_task(folder, way) for way in WAYS}
    for number, gallery in enumerate(galleries):
        assert gallery.problems == ()
        shown = [example for shelf in gallery.examples for example in shelf.shown]
        assert len(shown) == 4
        for example in shown:
            frozen, *answers = example.answers
            assert [answer.title for answer in answers] == ["one adapter each", "AdapterFusion", "one full model each"]
            for way, answer in zip(WAYS, answers, strict=True):
                assert answer.right == right[way][gallery.group][example.place]
                assert (answer.box is not None) == (gallery.group == "grounding")
                assert np.shape(answer.heat) == np.shape(frozen.heat) == (1, 4, 4)
                if gallery.group == "statements":
                    score = _stored(folder, _FOLDERS.get(way, f"{way}/statements/{way}"))["statements/score"]
                    place = example.place + (TEST * number if way != "full" else 0)
                    assert answer.score.replace("\N{MINUS SIGN}", "-") == f"{score[place]:+.2f}"


@pytest.mark.slow
def test_maps_of_adapter_fusion_are_those_of_both_stages_together(config, trained, tmp_path):
    folder, _ = trained
    first, second = (next((folder / "runs/fusion" / at).glob("*/*/seed_0/adapters")) for at in ("first", "second"))
    # One step leaves the up-projections at zero; these have learnt more.
    begun, metadata = load_adapters(first)
    generator, first = np.random.default_rng(0), tmp_path / "first"
    noisy = jax.tree.map(lambda a: a + 0.3 * generator.standard_normal(a.shape, np.float32), begun)
    save_adapters(first, noisy, metadata.identity, 1)
    model, params, data = _fused(config, load_adapters(first)[0], load_adapters(second)[0])
    source = data.splits["test"]
    examples = [source[TEST + place] for place in range(3)]  # statements, which are the second task
    rows = [data.transform(example, None) for example in examples]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    expected = jax.jit(lambda: heat_map(model.apply(params, batch)))()
    pairs = [(example["image"], example["text"].decode()) for example in examples]
    maps = HeatMaps(model.backbone, pairs, config.text_length, route=1)
    # Cosines in float32 by two programs, of which one has the heads of both tasks.
    np.testing.assert_allclose(maps.adapted(second, first).reshape(3, -1), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(maps.adapted(second, first) - maps.frozen()).max() > 1e-3
    with pytest.raises(UserError, match=r"has no adapters/fusion/.*; were its adapters trained by another run\?"):
        maps.adapted(second)


def _data(config, task, backbone):
    return member_data(task, config.sizes, config.text_length, config.data_dir, backbone)


@pytest.mark.slow
def test_the_router_is_judged_by_task(trained):
    folder, rows = trained
    with np.load(folder / "runs/routes.npz") as stored:
        right = stored["routes"].reshape(2, TEST) == np.arange(2)[:, None]
    (path,) = (folder / "runs").glob("each/each/learning_rate_*/seed_0/sent.npz")
    sent = np.load(path)["correct"].reshape(2, TEST)
    told = [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]
    for task, row, own, known in zip(TASKS, told, sent, right, strict=True):
        assert row["router"]["value"] == pytest.approx(known.mean())
        assert row["sent"]["value"] == rows["routed"][task].value == pytest.approx(own.mean())
        assert row["strict"]["value"] == pytest.approx((own & known).mean())
        given = _by_task(folder, "each")[task]
        assert row["difference"]["value"] == pytest.approx(own.mean() - given.mean())
        np.testing.assert_array_equal(own[known], given[known])  # the same adapters, the same answers


@pytest.mark.slow
def test_a_finished_run_is_read(config, trained, monkeypatch):
    folder, rows = trained

    def again(*_, **__):
        raise AssertionError("a finished run was computed again")

    monkeypatch.setattr(comparison, "fit", again)
    monkeypatch.setattr(comparison, "evaluate", again)
    monkeypatch.setattr(task_routes, "evaluate", again)
    found = {row["name"]: row for row in run(config, folder)}
    for name, row in rows.items():
        assert (found[name]["mean"], found[name]["trained"]) == (row["mean"], row["trained"])
    for name in ("results.md", "results.csv", "results.png", "parameters.png", "routing.md"):
        assert (folder / name).stat().st_size > 0, name
    with pytest.raises(UserError, match="were learnt with other tasks, sizes or backbone"):
        run(dataclasses.replace(config, ways=("each",), router_examples=9), folder)


def test_the_presets_pass_the_check_and_tell_what_each_way_trains():
    for preset in PRESETS.values():
        report = check(preset)
        console = rich.console.Console(file=io.StringIO(), width=120)
        console.print(report)
        assert console.file.getvalue().count("one adapter each") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("statement", "grounding")}, "unknown task 'statement'; did you mean 'statements'"),
        ({"tasks": ("statements",)}, "at least two tasks"),
        ({"tasks": ("statements", "statements")}, "a task is named twice: statements, statements"),
        ({"ways": ("eech",)}, "unknown way of sharing 'eech'; did you mean 'each'"),
        ({"ways": ()}, "one way of sharing"),
        ({"sizes": Generated(train=1)}, "sizes must be at least 2"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PRESETS["smoke"], **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_length": 49}, "text_length 49 is longer than the backbone's context of 48"),
        ({"budget": Budget(batch_size=63)}, "batch_size 63 cannot be shared equally by 2 tasks; give a multiple of 2"),
        ({"budget": Budget(steps=1, batch_size=48)}, "steps must be at least 2: AdapterFusion has two stages"),
        ({"reduction": 999}, "reduction 999 leaves nothing"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(PRESETS["smoke"], **changes))
