"""The bank of named tasks: what it holds after every change, and that no change compiles anything anew."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from settings import BATCH, CONFIG, backbone, drawn, inputs, model

from vla_jax import names
from vla_jax.adapters import Bottleneck, LoRA, Placement, place
from vla_jax.adapters.base import Share
from vla_jax.adapters.task_bank import TaskBank, free_places
from vla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CAPACITY = 3
OWN = Placement(LoRA(rank=2), "own", slots=("attn_q",), towers=("vision",), tasks=free_places(CAPACITY))
HALF = Placement(
    Bottleneck(rank=4), "half", slots=("mlp_out",), sharing=(Share("down/.*", ("tasks",)),), tasks=free_places(CAPACITY)
)
COMMON = Placement(Bottleneck(rank=4), "common", slots=("mlp_out",), towers=("text",))
PLACEMENTS = {"own": (OWN,), "half_shared": (HALF,), "beside_a_common_one": (OWN, COMMON)}


@functools.cache
def plan_of(name="own"):
    return place(PLACEMENTS[name], CONFIG.towers)


@functools.cache
def started(name="own"):
    """A bank without tasks, whose weights are no zeros."""
    plan = plan_of(name)
    return TaskBank(plan, drawn(plan.shapes(), 1, 0.2))


def trained(seed, name="own"):
    """One task's weights, with the bank's own where tasks share them."""
    plan, bank = plan_of(name), started(name)
    own = names.flatten(drawn(plan.single().shapes(), seed, 0.2))
    present, leaves = names.flatten(bank.params), plan.leaves()
    return names.unflatten({path: leaf if leaves[path].by_task else present[path] for path, leaf in own.items()})


def equal(ours, theirs):
    assert names.flatten(ours).keys() == names.flatten(theirs).keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def untouched(bank, places):
    """The rows of some places, of everything that is stacked over tasks."""
    leaves = bank.plan.leaves()
    return [
        np.take(leaf, places, axis=leaves[path].task_axis)
        for path, leaf in names.flatten(bank.params).items()
        if leaves[path].by_task
    ]


# What a bank holds


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_task_comes_back_as_it_was_added_and_others_stay(name):
    start = started(name)
    bank = start.add("first", trained(2, name)).add("second", trained(3, name))
    equal(bank.get("first"), trained(2, name))
    equal(bank.get("second"), trained(3, name))
    for before, after in zip(untouched(start, [2]), untouched(bank, [2]), strict=True):
        np.testing.assert_array_equal(before, after)
    assert bank.names == ("first", "second", "")
    assert bank.tasks == ("first", "second")
    assert start.tasks == ()  # a change makes another bank
    assert bank.capacity == CAPACITY


@pytest.mark.parametrize("name", PLACEMENTS)
def test_nothing_is_left_of_a_task_that_was_removed(name):
    bank = started(name).add("first", trained(2, name)).add("second", trained(3, name)).remove("first")
    assert bank.names == ("", "second", "")
    equal(bank.get("second"), trained(3, name))
    assert not any(rows.any() for rows in untouched(bank, [0]))
    again = bank.add("third", trained(4, name))  # in the place that became free
    assert again.names == ("third", "second", "")
    equal(again.get("third"), trained(4, name))
    shared = [path for path, leaf in bank.plan.leaves().items() if not leaf.by_task]
    for path in shared:
        np.testing.assert_array_equal(names.flatten(again.params)[path], names.flatten(started(name).params)[path])
    assert bool(shared) == (name != "own")


def test_a_renamed_task_keeps_its_place_and_its_weights():
    bank = started().add("first", trained(2)).add("second", trained(3)).rename("first", "other")
    assert bank.names == ("other", "second", "")
    equal(bank.get("other"), trained(2))
    assert bank.rename("other", "first").names == ("first", "second", "")


def test_swapped_weights_take_the_place_of_the_present_ones():
    bank = started().add("first", trained(2)).add("second", trained(3))
    present = bank.get("second")
    other = bank.swap("second", trained(4))
    equal(other.get("second"), trained(4))
    equal(other.get("first"), trained(2))
    equal(other.swap("second", present).params, bank.params)


def test_weights_that_tasks_share_may_be_left_out():
    own = {path: leaf for path, leaf in names.flatten(trained(2, "half_shared")).items() if "/up/" in path}
    assert own
    bank = started("half_shared").add("first", names.unflatten(own))
    equal(bank.get("first"), trained(2, "half_shared"))


def test_new_weights_are_those_of_a_plan_for_one_task():
    bank = started().add("first", trained(2)).add("fresh", key=jax.random.key(4))
    equal(bank.get("fresh"), bank.plan.single().init(jax.random.key(4)))
    assert any(leaf.any() for leaf in jax.tree.leaves(bank.get("fresh")))


def test_new_weights_may_start_from_the_frozen_ones():
    placement = dataclasses.replace(OWN, method=LoRA(rank=2, decomposed=True))
    plan, frozen = place(placement, CONFIG.towers), images_and_texts()[0]
    bank = TaskBank(plan, drawn(plan.shapes(), 1, 0.2))
    fresh = bank.add("fresh", key=jax.random.key(4), backbone=frozen).get("fresh")
    kernels = np.asarray(frozen["vision"]["blocks"]["attn"]["q"]["kernel"])
    np.testing.assert_allclose(
        fresh["own"]["vision"]["attn_q"]["magnitude"], np.linalg.norm(kernels, axis=1), rtol=1e-5
    )
    with pytest.raises(UserError, match="starts from the frozen weights"):
        bank.add("fresh", key=jax.random.key(4))


def test_a_bank_over_named_tasks_begins_with_these():
    plan = place(dataclasses.replace(OWN, tasks=("first", "second", "place_2")), CONFIG.towers)
    bank = TaskBank(plan, started().params)
    assert bank.names == ("first", "second", "")
    equal(bank.get("second"), plan.select_task(bank.params, 1))


def test_trained_weights_replace_all():
    bank = started().add("first", trained(2))
    after = jax.tree.map(lambda a: 2 * a, bank.params)
    assert bank.with_params(after).names == bank.names
    equal(bank.with_params(after).get("first"), jax.tree.map(lambda a: 2 * a, trained(2)))


# Routes


def test_routes_are_the_places_of_names():
    bank = started().add("first", trained(2)).add("second", trained(3)).remove("first").add("third", trained(4))
    route = bank.route(["second", None, "third", "", "second"])
    np.testing.assert_array_equal(route, [1, -1, 0, -1, 1])
    assert route.dtype == np.int32
    assert bank.route([]).shape == (0,)


# Compilation


@functools.cache
def images_and_texts():
    return backbone(CONFIG), *inputs(CONFIG)


@functools.cache
def program(plan):
    """What gives the image features of the plain batch, whose every example has these adapters."""
    params, *shown = images_and_texts()

    @jax.jit
    def run(adapters):
        return model(CONFIG).apply({"params": params}, *shown, adapters=plan.bind(adapters)).image_features

    return run


def make_step(plan):
    """A training step: features as they were, and weights after a step down the gradient."""

    @jax.jit
    def step(params, adapters, images, tokens, mask, route):
        def loss(adapters):
            out = model(CONFIG).apply(
                {"params": params}, images, tokens, mask, adapters=plan.bind(adapters), route=route
            )
            return jnp.sum(out.image_features**2), out.image_features

        gradient, found = jax.grad(loss, has_aux=True)(adapters)
        return jax.tree.map(lambda a, g: a - 0.01 * g, adapters, gradient), found

    return step


@pytest.mark.parametrize("devices", [1, 8])
def test_no_change_compiles_a_step_anew(devices):
    bank, (params, *shown) = started(), images_and_texts()
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        params, weights = jax.device_put((params, bank.params), NamedSharding(mesh, PartitionSpec()))
        shown = jax.device_put(shown, NamedSharding(mesh, PartitionSpec("data")))
        bank = bank.with_params(weights)
    step = make_step(bank.plan)
    plain = program(place((), CONFIG.towers))({})
    single = {seed: program(bank.plan.single())(trained(seed)) for seed in (2, 3)}

    def check(bank, route, expected):
        """Rows of the batch against those of other runs; each step's weights are thrown away again."""
        _, found = step(params, bank.params, *shown, route)
        for row, other in enumerate(expected):
            assert np.linalg.norm(found[row] - other[row]) <= 1e-5 * np.linalg.norm(other[row])

    names_of = [None, "one", "two", "one", None, "two", "two", "one"]
    of_name = {None: plain, "one": single[2], "two": single[3]}
    elsewhere = jax.device_put(trained(2), jax.devices()[devices - 1])
    bank = bank.add("one", elsewhere).add("two", trained(3))
    check(bank, bank.route(names_of), [of_name[name] for name in names_of])
    bank = bank.remove("one").add("three", key=jax.random.key(0)).add("one", trained(2))
    assert bank.names == ("three", "two", "one")
    check(bank, bank.route(names_of), [of_name[name] for name in names_of])
    bank = bank.rename("two", "four").swap("four", trained(2)).swap("one", trained(3))
    check(bank, bank.route(["four", "one"] * 4), [single[2], single[3]] * 4)
    # And weights that a step made are taken up as they are.
    before = bank.get("three")
    bank = bank.with_params(step(params, bank.params, *shown, bank.route(["four"] * BATCH))[0])
    equal(bank.get("three"), before)
    assert not np.array_equal(*(jax.tree.leaves(weights)[0] for weights in (bank.get("four"), trained(2))))
    step(params, bank.remove("four").params, *shown, bank.route(["one"] * BATCH))
    assert step._cache_size() == 1


def test_the_plan_and_its_description_do_not_depend_on_names():
    bank = started().add("first", trained(2))
    assert bank.plan is started().plan
    assert bank.plan.describe() == started().plan.describe()


# Saved and restored


def test_saved_and_restored_with_its_names(tmp_path):
    bank = started("half_shared").add("first", trained(2, "half_shared")).add("second", trained(3, "half_shared"))
    bank = bank.remove("first")
    ocp.save_checkpointables(tmp_path / "bank", {"adapters": bank.params}, custom_metadata=bank.describe())
    metadata = ocp.checkpointables_metadata(tmp_path / "bank").custom_metadata
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), bank.params)
    params = ocp.load_checkpointables(tmp_path / "bank", {"adapters": abstract})["adapters"]
    again = TaskBank.from_description(json.loads(json.dumps(metadata)), CONFIG.towers, params)
    assert again.names == ("", "second", "")
    assert again.plan == bank.plan
    equal(again.params, bank.params)
    equal(again.add("third", trained(4, "half_shared")).get("second"), trained(3, "half_shared"))


# Bad input


def test_names_that_do_not_exist_are_refused_with_the_nearest():
    bank = started().add("counting", trained(2)).add("colours", trained(3))
    changes = [
        lambda: bank.route(["counting", "countin"]),
        lambda: bank.get("countin"),
        lambda: bank.remove("countin"),
        lambda: bank.rename("countin", "other"),
        lambda: bank.swap("countin", trained(4)),
    ]
    for change in changes:
        with pytest.raises(UserError, match=r"unknown task 'countin'; did you mean 'counting'\? Allowed: counting"):
            change()
    with pytest.raises(UserError, match="unknown task ''"):
        bank.get("")
    with pytest.raises(UserError, match="unknown task 'any'; allowed: none"):
        started().route(["any"])


def test_names_that_are_taken_or_empty_are_refused():
    bank = started().add("counting", trained(2)).add("colours", trained(3))
    for change in (lambda: bank.add("colours", trained(4)), lambda: bank.rename("counting", "colours")):
        with pytest.raises(UserError, match="a task named 'colours' already; swap replaces its weights"):
            change()
    for change in (lambda: bank.add("", trained(4)), lambda: bank.rename("counting", "")):
        with pytest.raises(UserError, match="a task needs a name"):
            change()


def test_a_full_bank_is_refused():
    bank = started()
    for k in range(CAPACITY):
        bank = bank.add(f"task{k}", trained(k))
    with pytest.raises(UserError, match="the bank is full, its 3 places hold task0, task1, task2; remove a task"):
        bank.add("more", trained(9))
    assert bank.remove("task1").add("more", trained(9)).names == ("task0", "more", "task2")


def test_weights_of_another_plan_are_refused():
    bank, own = started(), names.flatten(trained(2))
    first = next(iter(own))
    with pytest.raises(UserError, match=f"the weights of task 'first' lack {first!r}"):
        bank.add("first", names.unflatten({k: v for k, v in own.items() if k != first}))
    with pytest.raises(UserError, match="unknown parameter of task 'first' 'own/vision/attn_q/c'"):
        bank.add("first", names.unflatten(own | {"own/vision/attn_q/c": own[first]}))
    with pytest.raises(UserError, match=rf"{first!r} of .* has shape \(4, 32, 1\); the plan's is \(4, 32, 2\)"):
        bank.add("first", names.unflatten(own | {first: own[first][..., :1]}))
    with pytest.raises(UserError, match="the weights of the bank lack"):
        bank.with_params({})
    with pytest.raises(UserError, match=r"of the bank has shape .*; the plan's is"):
        bank.with_params(trained(2))


def test_weights_trained_beside_other_shared_ones_are_refused():
    other = jax.tree.map(lambda a: a + 1, trained(2, "half_shared"))
    with pytest.raises(UserError, match=r"trained beside another 'half/.*/down/.*', which all tasks of the bank share"):
        started("half_shared").add("first", other)


def test_a_task_without_weights_or_key_is_refused():
    with pytest.raises(UserError, match="task 'first' needs either weights or a key"):
        started().add("first")


def test_plans_without_one_list_of_tasks_are_refused():
    plan = place(COMMON, CONFIG.towers)
    with pytest.raises(UserError, match=r"placements need tasks; give them tasks=free_places\(capacity\)"):
        TaskBank(plan, drawn(plan.shapes(), 0, 0.1))
    plan = place((OWN, dataclasses.replace(HALF, tasks=free_places(2))), CONFIG.towers)
    with pytest.raises(UserError, match="need the same tasks; they have place_0, place_1 and place_0, place_1, p"):
        TaskBank(plan, drawn(plan.shapes(), 0, 0.1))
    with pytest.raises(UserError, match="at least 1 place, got 0"):
        free_places(0)


def test_lists_of_names_that_do_not_fit_are_refused():
    plan, params = plan_of(), started().params
    with pytest.raises(UserError, match="a bank of 3 places has a name or '' for each; got 2 names"):
        TaskBank(plan, params, ("a", "b"))
    with pytest.raises(UserError, match="two places of the bank hold a task named 'a'"):
        TaskBank(plan, params, ("a", "", "a"))


def test_descriptions_that_lack_something_are_refused():
    description = started().describe()
    for field in ("placements", "tasks"):
        rest = {name: value for name, value in description.items() if name != field}
        with pytest.raises(UserError, match=f"description of a bank has no {field!r}; it has"):
            TaskBank.from_description(rest, CONFIG.towers, started().params)
