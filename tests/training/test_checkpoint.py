"""Checkpoints: what they hold, what they weigh, where they can be read again, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from vla_jax import names
from vla_jax.adapters import LoRA, Placement, place
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError
from vla_jax.slots import LINEAR_SLOTS
from vla_jax.training import checkpoint, checksums
from vla_jax.training.checkpoint import Checkpointer, SaveError, load_adapters, save_adapters
from vla_jax.training.checkpoint_folder import absolute, check_whole
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.step import TrainState

IDENTITY = Identity("tiny", "abc123", {"method": "bottleneck", "vision": {"slots": ("mlp_out",), "rank": 8}})


def trained(classes: int = 4, rank: int = 8, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "adapters": {"a": {"vision": {"down": {"kernel": leaf(2, 16, rank)}, "up": {"kernel": leaf(2, rank, 16)}}}},
        "heads": {"answers": {"classifier": {"kernel": leaf(16, classes), "bias": leaf(classes)}}},
    }


def train_state(tree: dict, step: int = 0) -> TrainState:
    """A state with every kind of optimiser state: moments, counts, empty states and masked-out groups."""
    groups = {name: "heads" if name.startswith("heads/") else "adapters" for name in names.flatten(tree)}
    decayed = names.unflatten({name: leaf.ndim > 1 for name, leaf in names.flatten(tree).items()})
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"adapters": optax.adamw(optax.linear_schedule(0, 1e-3, 10)), "heads": optax.sgd(0.1, momentum=0.9)},
            names.unflatten(groups),
        ),
        optax.masked(optax.add_decayed_weights(0.1), decayed),
    )
    state = optimizer.init(tree)
    if step:
        _, state = optimizer.update(jax.tree.map(jnp.sin, tree), state, tree)
    return TrainState(step=jnp.int32(step), trainable=tree, optimizer=state)


def assert_equal(one: object, other: object) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def test_restores_state_and_data_as_saved(tmp_path: Path) -> None:
    state = train_state(trained(), step=5)
    with Checkpointer(tmp_path, IDENTITY, every=5) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.save(5, state, b"\x00\xffposition")
        assert not checkpointer.save(5, state, force=True)  # That step is saved already.
        checkpointer.wait()
        restored = checkpointer.restore(train_state(trained(seed=1)))
    assert_equal(restored.state, state)
    assert restored.state.step.dtype == jnp.int32
    assert restored.data_state == b"\x00\xffposition"


@pytest.mark.parametrize("data_state", [None, {"shard": 3, "seen": [1, 2]}, "text", b""])
def test_data_state_of_any_kind(tmp_path: Path, data_state: object) -> None:
    state = train_state(trained())
    with Checkpointer(tmp_path, IDENTITY, every=1) as checkpointer:
        checkpointer.save(1, state, data_state)
        checkpointer.wait()
        assert checkpointer.restore(state).data_state == data_state


def test_saves_at_the_interval_and_keeps_the_newest(tmp_path: Path) -> None:
    state = train_state(trained())
    with Checkpointer(tmp_path, IDENTITY, every=2, keep=3) as checkpointer:
        saved = [step for step in range(1, 12) if checkpointer.save(step, state)]
        assert checkpointer.save(11, state, force=True)
    assert saved == [2, 4, 6, 8, 10]
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [8, 10, 11]


def test_saves_in_the_background_from_a_copy(tmp_path: Path) -> None:
    """Buffers given away right after ``save`` returns do not change what is written."""
    increment = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    tree = {"adapters": {"a": {"kernel": jnp.zeros((512, 1024))}}}
    with Checkpointer(tmp_path, IDENTITY, every=1, keep=9) as checkpointer:
        for step in range(1, 6):
            tree = increment(tree)
            state = TrainState(step=jnp.int32(step), trainable=tree, optimizer=())
            checkpointer.save(step, state)
    for step in range(1, 6):
        loaded, _ = load_adapters(tmp_path, step=step)
        np.testing.assert_array_equal(loaded["adapters"]["a"]["kernel"], step)


def test_waits_until_a_checkpoint_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checksums.write

    def slow_or_full(folder: Any, told: Mapping[str, Any]) -> None:
        if folder.name.startswith("2"):
            raise OSError(28, "No space left on device")
        time.sleep(0.2)
        write(folder, told)

    monkeypatch.setattr(checksums, "write", slow_or_full)
    with Checkpointer(tmp_path, IDENTITY, every=1, keep=9, wait=True) as checkpointer:
        state = train_state(trained())
        assert checkpointer.save(1, state)
        check_whole(absolute(tmp_path) / "1")
        assert [folder.name for folder in tmp_path.iterdir()] == ["1"]
        with pytest.raises(SaveError, match=r"step 2 could not be saved .*that of step 1 is still good"):
            checkpointer.save(2, state)
        assert checkpointer.save(3, state)
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["1", "3"]


def test_metadata_is_complete(tmp_path: Path) -> None:
    tree = trained()
    with Checkpointer(tmp_path, IDENTITY, every=1) as checkpointer:
        checkpointer.save(7, train_state(tree, 7))
    content = json.loads((tmp_path / "7" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert content["backbone"] == "tiny"
    assert content["fingerprint"] == "abc123"
    assert content["adapters"] == {"method": "bottleneck", "vision": {"slots": ["mlp_out"], "rank": 8}}
    assert content["step"] == 7
    assert content["version"]
    assert content["leaves"] == {n: [list(x.shape), "float32"] for n, x in names.flatten(tree).items()}
    _, metadata = load_adapters(tmp_path)
    assert metadata.identity == IDENTITY
    assert metadata.step == 7


def test_size_and_content(tmp_path: Path) -> None:
    """Rank 96 in every layer of both towers of a CLIP B/32: 1.1 times the parameters' bytes plus 64 KiB at most."""
    rng = np.random.default_rng(0)

    def bottleneck(width: int, rank: int = 96, depth: int = 12) -> dict:
        def leaf(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=(depth, *shape)), jnp.float32)

        return {
            "mlp_out": {
                "down": {"kernel": leaf(width, rank), "bias": leaf(rank)},
                "up": {"kernel": leaf(rank, width), "bias": leaf(width)},
            }
        }

    tree = {"adapters": {"main": {"vision": bottleneck(768), "text": bottleneck(512)}}}
    bound = 1.1 * names.size_in_bytes(tree) + 64 * 1024
    save_adapters(tmp_path / "alone", tree, IDENTITY, step=3)
    assert folder_bytes(tmp_path / "alone") <= bound
    # On eight devices every leaf is written in pieces, which must not cost more.
    state = train_state(jax.device_put(tree, NamedSharding(mesh(8, 1), PartitionSpec())))
    with Checkpointer(tmp_path / "run", IDENTITY, every=1) as checkpointer:
        checkpointer.save(1, state)
    assert folder_bytes(tmp_path / "run" / "1" / "adapters") <= bound
    stored = ocp.checkpointables_metadata(tmp_path / "run" / "1").metadata["adapters"]
    assert names.flatten(stored).keys() == names.flatten(tree).keys()
    assert_equal(load_adapters(tmp_path / "alone")[0], tree)


@pytest.mark.parametrize(
    ("ranks", "leaves"),
    [
        ((), 28),
        # Every block has a rank, and so leaves, of its own; the projections are two maps more.
        (tuple((rf".*/(attn|mlp)_\w+/{block}", 1 + block) for block in range(12)), 12 * 24 + 4),
    ],
)
def test_lora_on_every_linear_map_of_b_32_stays_within_the_bound(ranks, leaves, tmp_path: Path) -> None:
    plan = place([Placement(LoRA(rank=4), slots=LINEAR_SLOTS, ranks=ranks)], CLIPConfig.preset("vit_b_32").towers)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), plan.shapes())
    tree = {"adapters": drawn}
    assert len(names.flatten(tree)) == leaves
    save_adapters(tmp_path / "alone", tree, IDENTITY, step=0)
    assert folder_bytes(tmp_path / "alone") <= 1.1 * names.size_in_bytes(tree) + 64 * 1024


def test_small_adapters_stay_within_the_bound(tmp_path: Path) -> None:
    tree = trained()
    save_adapters(tmp_path / "alone", tree, IDENTITY, step=0)
    assert folder_bytes(tmp_path / "alone") <= 1.1 * names.size_in_bytes(tree) + 64 * 1024


def test_restores_onto_another_mesh_and_dtype(tmp_path: Path) -> None:
    tree = trained()
    saved = jax.device_put(train_state(tree, 2), NamedSharding(mesh(8, 1), PartitionSpec()))
    with Checkpointer(tmp_path, IDENTITY, every=1) as checkpointer:
        checkpointer.save(2, saved)
        checkpointer.wait()

        other = mesh(2, 4)
        kernel, whole = NamedSharding(other, PartitionSpec(None, "fsdp")), NamedSharding(other, PartitionSpec())

        def place(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=kernel if leaf.ndim == 3 else whole)

        restored = checkpointer.restore(jax.tree.map(place, saved)).state
    assert_equal(restored, jax.device_get(saved))
    down = restored.trainable["adapters"]["a"]["vision"]["down"]["kernel"]
    assert down.sharding == kernel
    assert {shard.data.shape for shard in down.addressable_shards} == {(2, 4, 8)}
    assert restored.step.sharding == whole

    shardings = {name: kernel if leaf.ndim == 3 else whole for name, leaf in names.flatten(tree).items()}
    adapters, _ = load_adapters(tmp_path, shardings=names.unflatten(shardings), dtype=jnp.bfloat16)
    for name, leaf in names.flatten(adapters).items():
        assert leaf.sharding == shardings[name]
    assert_equal(adapters, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree))

    sharded = jax.device_put(tree, names.unflatten(shardings))
    save_adapters(tmp_path / "alone", sharded, IDENTITY, step=2)
    alone, _ = load_adapters(tmp_path / "alone")
    assert_equal(alone, tree)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(alone))


def test_a_sharding_for_every_leaf_or_an_error(tmp_path: Path) -> None:
    save_adapters(tmp_path / "alone", trained(), IDENTITY, step=0)
    shardings = {"adapters": {}}
    with pytest.raises(UserError, match=r"no sharding for .*heads/answers/classifier/bias"):
        load_adapters(tmp_path / "alone", shardings=shardings)


def without(tree: dict, name: str) -> dict:
    return names.unflatten({n: leaf for n, leaf in names.flatten(tree).items() if n != name})


KERNEL = "adapters/a/vision/down/kernel"
MISMATCHES = {
    "missing": (
        names.merge(trained(), {"adapters": {"b": {"scale": jnp.ones(3)}}}),
        IDENTITY,
        [r"missing parameter adapters/b/scale: .* expected float32\[3\]"],
    ),
    "extra": (
        without(trained(), KERNEL),
        IDENTITY,
        [rf"extra parameter {KERNEL}: the checkpoint has float32\[2, 16, 8\], expected none"],
    ),
    "shape": (
        trained(rank=4),
        IDENTITY,
        [rf"shape of parameter {KERNEL}: the checkpoint has float32\[2, 16, 8\], expected float32\[2, 16, 4\]"],
    ),
    "head size": (
        trained(classes=13),
        IDENTITY,
        [r"head size of parameter heads/answers/classifier/bias: the checkpoint has float32\[4\], .* float32\[13\]"],
    ),
    "fingerprint": (
        trained(),
        Identity("other", "def456", IDENTITY.adapters),
        [r"backbone fingerprint: the checkpoint has abc123 \(tiny\), expected def456 \(other\)"],
    ),
    "method": (
        trained(),
        Identity("tiny", "abc123", {**IDENTITY.adapters, "method": "lora"}),
        [r'adapter configuration method: the checkpoint has "bottleneck", expected "lora"'],
    ),
    "several": (
        trained(classes=13),
        Identity("tiny", "def456", {"method": "bottleneck", "vision": {"slots": ["mlp_out", "attn_q"], "rank": 16}}),
        [
            "backbone fingerprint",
            r"configuration vision.rank: the checkpoint has 8, expected 16",
            r'configuration vision.slots.1: the checkpoint has nothing, expected "attn_q"',
            "head size",
        ],
    ),
}


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder, IDENTITY, every=1) as checkpointer:
        checkpointer.save(1, train_state(trained(), 1))
    return folder


@pytest.mark.parametrize("kind", MISMATCHES)
def test_every_mismatch_is_named(saved_run: Path, kind: str) -> None:
    tree, identity, messages = MISMATCHES[kind]
    with Checkpointer(saved_run, identity, every=1) as checkpointer, pytest.raises(UserError) as resumed:
        checkpointer.restore(train_state(tree))
    with pytest.raises(UserError) as loaded:
        load_adapters(saved_run, identity=identity, expected=tree)
    for message in messages:
        assert resumed.match(message)
        assert loaded.match(message)
    assert "moment" not in str(resumed.value)  # The optimiser's echo of the same mistake is left out.


def test_a_clean_match_loads(saved_run: Path) -> None:
    renamed = Identity("a copy in another folder", "abc123", IDENTITY.adapters)
    tree, _ = load_adapters(saved_run, identity=renamed, expected=jax.eval_shape(trained))
    assert_equal(tree, trained())


def test_another_optimizer_is_named(saved_run: Path) -> None:
    tree = trained()
    state = TrainState(step=jnp.int32(0), trainable=tree, optimizer=optax.sgd(0.1, momentum=0.9).init(tree))
    message = rf"missing optimizer state 0/trace/{KERNEL}"
    with Checkpointer(saved_run, IDENTITY, every=1) as checkpointer, pytest.raises(UserError, match=message):
        checkpointer.restore(state)


def test_many_mismatches_are_counted(tmp_path: Path) -> None:
    tree = {"adapters": {str(index): {"scale": jnp.ones(2)} for index in range(30)}}
    save_adapters(tmp_path / "alone", tree, IDENTITY, step=0)
    with pytest.raises(UserError, match="and 21 more parameters") as raised:
        load_adapters(tmp_path / "alone", expected={"adapters": {"0": {"scale": jnp.ones(2)}}})
    assert len(str(raised.value).splitlines()) == 1 + 8 + 1 + 1


def test_leftovers_of_a_killed_save_are_ignored(tmp_path: Path) -> None:
    state = train_state(trained(), 1)
    with Checkpointer(tmp_path, IDENTITY, every=1) as checkpointer:
        checkpointer.save(1, state)
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    (leftover / "adapters.orbax-checkpoint-tmp").mkdir(parents=True)
    assert load_adapters(tmp_path)[1].step == 1
    with Checkpointer(tmp_path, IDENTITY, every=1) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert_equal(checkpointer.restore(state).state, state)
        assert checkpointer.save(2, state)
    assert not leftover.exists()
    assert load_adapters(tmp_path)[1].step == 2


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with Checkpointer(folder, IDENTITY, every=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, train_state(trained(), step))
    return folder


DAMAGES = {
    "truncated": (lambda content: content[: len(content) // 2], "bytes and had"),
    "altered": (lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:], "has another content"),
    "missing": (None, "is missing"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damaged_file_is_named(two_steps: Path, tmp_path: Path, how: str) -> None:
    newest = two_steps / "2"
    names_of_files = [str(file.relative_to(newest)) for file in newest.rglob("*") if file.is_file()]
    names_of_files.remove("commit_success.txt")  # Orbax's note, which nobody reads here
    assert {"checksums.json", "_CHECKPOINT_METADATA", "data/data"} & set(names_of_files)
    change, message = DAMAGES[how]
    for name in names_of_files:
        own = tmp_path / name.replace("/", "_")
        shutil.copytree(two_steps, own)
        file = own / "2" / name
        if change is None:
            file.unlink()
        else:
            file.write_bytes(change(file.read_bytes()))
        if name == "checksums.json" and how == "missing":
            continue  # as of an earlier version: see below
        with pytest.raises(
            UserError, match="The checkpoint of step 1 before it is whole: to go on from there"
        ) as refused:
            check_whole(absolute(own / "2"))
        assert name in str(refused.value)
        if name not in ("checksums.json", "_CHECKPOINT_METADATA"):
            assert message in str(refused.value)


def test_a_damaged_checkpoint_is_not_loaded(two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    newest = tmp_path / "run" / "2"
    victim = newest / "optimizer" / "manifest.ocdbt"
    victim.write_bytes(victim.read_bytes()[:-3])
    state = train_state(trained())
    with Checkpointer(tmp_path / "run", IDENTITY, every=1) as checkpointer:
        with pytest.raises(UserError, match=r"is damaged, nothing was loaded: optimizer/manifest.ocdbt has \d+ bytes"):
            checkpointer.restore(state)
        assert int(checkpointer.restore(state, step=1).state.step) == 1
    load_adapters(newest)  # which needs no file of the optimiser
    (newest / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(UserError, match=r"_CHECKPOINT_METADATA cannot be read .*step 1 before it is whole"):
        load_adapters(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "1")
    with pytest.raises(UserError, match="There is no whole checkpoint before it; to start anew"):
        load_adapters(tmp_path / "run")
    assert "unchecked" not in caplog.text


def test_checkpoints_without_checksums_are_used_and_said_to_be_unchecked(
    two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(two_steps / "2", tmp_path / "2")
    (tmp_path / "2" / "checksums.json").unlink()
    assert_equal(load_adapters(tmp_path)[0], trained())
    assert f"{tmp_path / '2'} has no checksums: it is used as it is, unchecked" in caplog.text


def test_adapters_saved_alone_have_checksums_too(tmp_path: Path) -> None:
    save_adapters(tmp_path / "alone", trained(), IDENTITY, step=0)
    victim = tmp_path / "alone" / "adapters" / "_METADATA"
    victim.write_text(victim.read_text().replace("16", "17"))
    with pytest.raises(UserError, match="is damaged, nothing was loaded: adapters/_METADATA has another content"):
        load_adapters(tmp_path / "alone")
    save_adapters(tmp_path / "alone", trained(), IDENTITY, step=0)
    load_adapters(tmp_path / "alone")


def test_a_position_of_the_data_serves_another_number_of_processes(tmp_path: Path) -> None:
    """What two processes would have saved, of whom only one is left."""
    state = train_state(trained(), 1)
    tell = checkpoint.distributed.gather

    def saved_by_two(folder: Path, *others: object) -> Path:
        with pytest.MonkeyPatch.context() as patched:
            both = [json.dumps({"json": other}) for other in others]
            patched.setattr(checkpoint.distributed, "gather", lambda text: both if text.startswith("{") else tell(text))
            with Checkpointer(folder, IDENTITY, every=1) as checkpointer:
                checkpointer.save(1, state, None)
        return folder

    position = {"batches": 3}
    same = saved_by_two(tmp_path / "same", {"position": position, "at": 1}, {"position": position, "at": 2})
    with Checkpointer(same, IDENTITY, every=1) as checkpointer:
        assert checkpointer.restore(state).data_state == {"position": position}
    for other in ({"position": {"batches": 4}}, {"position": None}, {"at": 2}, "text"):
        apart = saved_by_two(tmp_path / str(hash(str(other))), {"position": position}, other)
        with (
            Checkpointer(apart, IDENTITY, every=1) as checkpointer,
            pytest.raises(UserError, match=r"saved by 2 processes and is resumed by 1, .*Resume with 2 processes"),
        ):
            checkpointer.restore(state)


def test_what_is_not_there(tmp_path: Path, saved_run: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        load_adapters(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no complete checkpoint; it has steps none"):
        load_adapters(tmp_path)
    with pytest.raises(UserError, match=r"holds no complete checkpoint of step 9; it has steps \[1\]"):
        load_adapters(saved_run, step=9)
    ocp.save(tmp_path / "foreign", {"x": jnp.ones(2)})
    with pytest.raises(UserError, match="not written by this package"):
        load_adapters(tmp_path / "foreign")


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every >= 1 and keep >= 1"):
        Checkpointer(tmp_path, IDENTITY, every=0)
    with pytest.raises(UserError, match="cannot be kept in a checkpoint"):
        Identity("tiny", "abc", {"activation": jnp.tanh})


PROCESS = """
import sys
import jax
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=index)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vla_jax.training.checkpoint import Checkpointer, Identity
from vla_jax.training.step import TrainState
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
values = np.arange(8, dtype=np.float32)
state = TrainState(
    step=jax.device_put(np.int32(4), whole),
    trainable={"adapters": {"x": jax.make_array_from_callback((8,), split, lambda i: values[i])}},
    optimizer=(),
)
with Checkpointer(folder, Identity("tiny", "abc", {}), every=4) as checkpointer:
    assert checkpointer.save(4, state, {"seen": "a" * (index + 1)})
    checkpointer.wait()
    restored = checkpointer.restore(state)
    assert restored.data_state == {"seen": "a" * (index + 1)}, restored.data_state
    assert int(restored.state.step) == 4
    [shard] = restored.state.trainable["adapters"]["x"].addressable_shards
    np.testing.assert_array_equal(shard.data, values[shard.index])
"""


@pytest.mark.slow
def test_two_processes_keep_their_own_data_states(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "process.py"
    script.write_text(textwrap.dedent(PROCESS))
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script)]
    running = [
        subprocess.Popen(
            [*command, str(index), port, str(tmp_path / "run")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    # One process reads the same weights, but it may not go on with half of the data.
    assert_equal(load_adapters(tmp_path / "run")[0], {"adapters": {"x": np.arange(8, dtype=np.float32)}})
    state = TrainState(step=jnp.int32(0), trainable={"adapters": {"x": jnp.zeros(8)}}, optimizer=())
    message = "saved by 2 processes and is resumed by 1"
    identity = Identity("tiny", "abc", {})
    with Checkpointer(tmp_path / "run", identity, every=4) as checkpointer, pytest.raises(UserError, match=message):
        checkpointer.restore(state)
