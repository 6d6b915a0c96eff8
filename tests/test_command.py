"""``vla-adapter`` as a shell sees it: what it prints, what it writes, how it ends."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from vla_jax import command, names
from vla_jax.adapters import LoRA, Placement, place
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import parameter_shapes
from vla_jax.backbones.export import export_backbone
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import TowerConfig
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.checkpoints import read_adapter, write_adapter

TOWER = TowerConfig(width=8, depth=2, heads=2, mlp_width=16)
CONFIG = CLIPConfig(TOWER, TOWER, 8, 4, vocabulary_size=20, context_length=6, projection=8, eos_token_id=19)
LORA = Placement(LoRA(rank=2, alpha=4.0), "lora", slots=("attn_q", "attn_v"))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_clip(folder: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    flat = {name: generator.standard_normal(s).astype(np.float32) for name, s in parameter_shapes(CONFIG).items()}
    return export_backbone(names.unflatten(flat), CONFIG, folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), 0)


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="module")
def backbone(clip):
    return load_backbone(clip)


def saved(backbone, placement=LORA, seed=0, **more) -> SavedAdapter:
    """Random adapters with leaves beside them, given by name."""
    generator = np.random.default_rng(seed)
    plan = place(placement, CONFIG.towers)
    shapes = names.flatten({"adapters": plan.shapes()})
    leaves = {name: generator.standard_normal(leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    towers = {name: shape._asdict() for name, shape in CONFIG.towers.items()}
    described = {"placements": plan.describe(), "task": {"kind": "Matching", "name": "matching"}}
    return SavedAdapter(leaves | more, described, backbone.name, backbone.fingerprint, towers, step=7)


@pytest.fixture
def checkpoint(backbone, tmp_path):
    return write_adapter(tmp_path / "checkpoint", saved(backbone), "folder")


@pytest.fixture
def run(capsys):
    """Runs the command: its status, and what it printed on both streams."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            command.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def test_list(run, backbone, checkpoint, tmp_path):
    write_adapter(tmp_path / "deep" / "down" / "adapter.safetensors", saved(backbone), "file")
    write_adapter(tmp_path / "hub", saved(backbone), "peft")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    status, out, _ = run("list", tmp_path)
    lines = out.splitlines()
    assert status == 0
    for name in ("checkpoint", "deep/down/adapter.safetensors", "hub"):
        (line,) = (line for line in lines if f"{tmp_path / name} " in line)
        assert str(backbone.name) in line
        assert "256" in line  # 2 towers, 2 slots, 2 layers, 2 (8 + 8)
    assert any("unreadable" in line and "cannot be read as JSON" in line for line in lines)


def test_show(run, backbone, checkpoint):
    status, out, _ = run("show", checkpoint)
    assert status == 0
    for text in (backbone.name, backbone.fingerprint, "256 in 8 arrays, 1,024 bytes", "kind Matching", "lora"):
        assert text in out
    assert "rank 2, alpha 4.0" in out
    leaves = saved(backbone).leaves
    for tower in ("vision", "text"):
        for slot in ("attn_q", "attn_v"):
            for layer in range(2):
                a, b = (leaves[f"adapters/lora/{tower}/{slot}/{name}"][layer] for name in "ab")
                assert f"{np.linalg.norm(2.0 * a @ b):.4g}" in out  # alpha over rank is two


def test_show_tells_what_was_trained_beside_adapters(run, backbone, tmp_path):
    head = {"heads/matching/classifier/bias": np.array([3.0, 4.0], np.float32)}
    path = write_adapter(tmp_path / "adapter.safetensors", saved(backbone, **head), "file")
    (line,) = (line for line in run("show", path)[1].splitlines() if "heads/matching" in line)
    assert "5" in line.split()


def test_show_of_tasks_and_of_pissa(run, backbone, tmp_path):
    placement = dataclasses.replace(LORA, tasks=("counting", "colours"), slots=("attn_q",))
    path = write_adapter(tmp_path / "adapter.safetensors", saved(backbone, placement), "file")
    out = run("show", path)[1]
    assert "Norms of lora, task counting, vision" in out
    assert "Norms of lora, task colours, text" in out

    placement = Placement(LoRA(rank=2, init="pissa"), "pissa", slots=("attn_q",), towers=("text",))
    adapter = saved(backbone, placement)
    trained = {name: leaf for name, leaf in adapter.leaves.items() if "frozen" not in name}
    path = write_adapter(tmp_path / "pissa.safetensors", dataclasses.replace(adapter, leaves=trained), "file")
    kernel = np.asarray(backbone.params["text"]["blocks"]["attn"]["q"]["kernel"])
    left, values, right = np.linalg.svd(kernel[1])
    a, b = (trained[f"adapters/pissa/text/attn_q/{name}"][1] for name in "ab")
    # What it started from, the best approximation of rank 2, is no update.
    assert f"{np.linalg.norm(8.0 * a @ b - (left[:, :2] * values[:2]) @ right[:2]):.4g}" in run("show", path)[1]


@pytest.mark.parametrize(("form", "name"), [("file", "a.safetensors"), ("folder", "a"), ("peft", "a")])
def test_convert(run, backbone, checkpoint, tmp_path, form, name):
    out = tmp_path / "new" / name
    assert run("convert", checkpoint, out, "--to", form) == (0, f"{out}\n", "")
    again = read_adapter(out)
    assert sum(leaf.size for leaf in again.leaves.values()) == 256
    assert run("diff", checkpoint, out)[0] == int(form == "peft")  # where the adapter's name is lost


def test_convert_takes_one_task_and_some_adapters(run, backbone, tmp_path):
    tasks = dataclasses.replace(LORA, tasks=("counting", "colours"))
    whole = saved(backbone, tasks)
    path = write_adapter(tmp_path / "tasks.safetensors", whole, "file")
    status, _, err = run("convert", path, tmp_path / "hub", "--to", "peft")
    assert status == 2
    assert "counting, colours" in err
    assert run("convert", path, tmp_path / "hub", "--to", "peft", "--task", "colours")[0] == 0
    name = "adapters/{}/text/attn_v/b"
    one = read_adapter(tmp_path / "hub").leaves[name.format("adapter")]
    np.testing.assert_array_equal(one, whole.leaves[name.format("lora")][:, 1])
    assert "unknown task" in run("convert", path, tmp_path / "x", "--to", "peft", "--task", "colour")[2]
    assert (
        "unknown adapter 'lore'; did you mean 'lora'"
        in run("convert", path, tmp_path / "x", "--to", "folder", "--only", "lore")[2]
    )


def test_merge(run, backbone, checkpoint, clip, tmp_path):
    status, out, err = run("merge", checkpoint, "--backbone", clip, "--out", tmp_path / "merged")
    assert (status, out, err) == (0, f"{tmp_path / 'merged'}\n", "")
    merged = load_backbone(tmp_path / "merged").params["text"]["blocks"]["attn"]["v"]["kernel"]
    leaves = saved(backbone).leaves
    added = 2.0 * leaves["adapters/lora/text/attn_v/a"] @ leaves["adapters/lora/text/attn_v/b"]
    np.testing.assert_allclose(merged, backbone.params["text"]["blocks"]["attn"]["v"]["kernel"] + added, rtol=1e-4)


def test_merge_tells_of_heads_left_out(run, backbone, tmp_path):
    head = {"heads/matching/classifier/bias": np.ones(2, np.float32)}
    path = write_adapter(tmp_path / "adapter.safetensors", saved(backbone, **head), "file")
    status, _, err = run("merge", path, "--out", tmp_path / "merged")
    assert status == 0
    assert "left out, since the hub's CLIP has no place for them: heads/matching" in err


def test_combine(run, backbone, checkpoint, tmp_path):
    second = write_adapter(tmp_path / "second.safetensors", saved(backbone, seed=1), "file")
    out = tmp_path / "both.safetensors"
    assert run("combine", checkpoint, second, "--weights", "0.25", "-0.5", "--out", out)[:2] == (0, f"{out}\n")
    one, two, both = (read_adapter(path).leaves for path in (checkpoint, second, out))
    product = lambda leaves: leaves["adapters/lora/vision/attn_q/a"] @ leaves["adapters/lora/vision/attn_q/b"]  # noqa: E731
    np.testing.assert_allclose(1.0 * product(both), 2.0 * (0.25 * product(one) - 0.5 * product(two)), atol=1e-4)
    assert run("combine", checkpoint, second, "--how", "linear", "--out", tmp_path / "mean")[0] == 0
    assert read_adapter(tmp_path / "mean").leaves.keys() == one.keys()


def test_diff(run, backbone, checkpoint, tmp_path):
    same = write_adapter(tmp_path / "same.safetensors", saved(backbone), "file")
    assert run("diff", checkpoint, same) == (0, "", "")
    changed = saved(backbone)
    name = "adapters/lora/vision/attn_q/a"
    leaf = changed.leaves[name].copy()
    leaf[1, 3, 0] += 0.5
    changed = dataclasses.replace(changed, leaves=changed.leaves | {name: leaf})
    status, out, _ = run("diff", checkpoint, write_adapter(tmp_path / "changed.safetensors", changed, "file"))
    (line,) = (line for line in out.splitlines() if "adapters/" in line)
    assert status == 1
    assert name in line
    assert "0.5" in line
    other = saved(backbone, Placement(LoRA(rank=3, alpha=4.0), "lora", slots=("attn_q",)))
    status, out, _ = run("diff", checkpoint, write_adapter(tmp_path / "other.safetensors", other, "file"))
    assert status == 1
    for text in ("adapters.placements.0.method.rank", "adapters/lora/text/attn_v/a", "[2, 8, 3]"):
        assert text in out


@pytest.mark.parametrize("name", ["show", "convert", "merge", "combine", "diff"])
def test_another_backbone_is_one_clear_line(run, checkpoint, other_clip, tmp_path, name):
    arguments = {
        "show": [checkpoint],
        "convert": [checkpoint, tmp_path / "out", "--to", "peft"],
        "merge": [checkpoint, "--out", tmp_path / "out"],
        "combine": [checkpoint, checkpoint, "--out", tmp_path / "out"],
        "diff": [checkpoint, checkpoint],
    }[name]
    status, out, err = run(name, *arguments, "--backbone", other_clip)
    assert (status, out) == (2, "")
    assert err.startswith("error: the adapter was trained on ")
    assert "fingerprint" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["shew", "a"], "invalid choice: 'shew'"),
        (["show"], "the following arguments are required: adapter"),
        (["show", "nothing/here"], "there is no nothing/here"),
        (["list", "nothing/here"], "there is no folder nothing/here"),
        (["convert", "a", "b"], "the following arguments are required: --to"),
        (["convert", "a", "b", "--to", "pickle"], "invalid choice: 'pickle'"),
        (["combine", "a", "--weights", "much", "--out", "b"], "invalid float value: 'much'"),
        (["diff", "a"], "the following arguments are required: second"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_adapters(run, clip):
    assert run("list", clip) == (2, "", f"error: there is no adapter at or below {clip}\n")


def test_errors_of_the_algebra_are_one_clear_line(run, checkpoint, tmp_path):
    for more, message in (
        (["--weights", "1"], "one weight for each adapter"),
        (["--how", "mean"], "unknown way to combine 'mean'"),
        (["--how", "ties"], "ties needs density"),
    ):
        status, _, err = run("combine", checkpoint, checkpoint, "--out", tmp_path / "out", *more)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1


def test_the_script_is_installed_and_helps_at_once():
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert settings["project"]["scripts"]["vla-adapter"] == "vla_jax.command:main"
    program = (
        "import sys; from vla_jax.command import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    )
    folder = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=os.environ, check=True
    )
    for name in ("list", "show", "convert", "merge", "combine", "diff"):
        assert f"\n    {name} " in done.stdout
    assert done.stdout.endswith("False\n")
