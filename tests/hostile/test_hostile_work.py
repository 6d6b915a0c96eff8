"""Checkpoints and work directories that meant harm and did some before: refused, in little time and memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from hostile_checks import refused
from hostile_models import small_adapter

from vla_jax import names
from vla_jax.foreign import load_arrays
from vla_jax.reporting.page.render import page
from vla_jax.reporting.page.workdir import read_work_directory
from vla_jax.training import checksums
from vla_jax.training.checkpoint import load_adapters, save_adapters
from vla_jax.training.checkpoint_metadata import Identity


@pytest.fixture
def checkpoint(tmp_path):
    adapter = small_adapter()
    identity = Identity(adapter.backbone, adapter.fingerprint, adapter.adapters)
    save_adapters(tmp_path / "checkpoint", names.unflatten(dict(adapter.leaves)), identity, 3)
    return tmp_path / "checkpoint"


def test_sums_lead_to_no_other_file(checkpoint):
    (checkpoint.parent / "secret").write_text("0123456789")
    sums = json.loads((checkpoint / checksums.FILE).read_text())
    for name in ("adapters/../../secret", str(checkpoint.parent / "secret"), "", "adapters", "."):
        (checkpoint / checksums.FILE).write_text(json.dumps(sums | {"files": {name: [3, "0"]}}))
        assert checksums.problem(epath.Path(checkpoint)) == f"{name} is missing"
    (checkpoint / checksums.FILE).write_text(json.dumps(sums | {"files": {"adapters/../../secret": [3, "0"]}}))
    refused("secret is missing", load_adapters, checkpoint)


def test_a_checkpoint_of_pipes_and_loops_is_refused(checkpoint):
    os.mkfifo(checkpoint / "adapters" / "pipe")
    refused("pipe is no regular file", load_adapters, checkpoint)
    (checkpoint / "adapters" / "pipe").unlink()
    for number in range(10):
        (checkpoint / "adapters" / f"loop_{number}").symlink_to(checkpoint)
    refused("loop_0 is no regular file", load_adapters, checkpoint)


def altered(checkpoint: Path, alter) -> None:
    """Alters what a checkpoint says of itself, and its sum with it."""
    path = checkpoint / checksums.METADATA
    content = json.loads(path.read_text())
    alter(content["custom_metadata"])
    path.write_text(json.dumps(content))
    (checkpoint / checksums.FILE).unlink()
    checksums.write(epath.Path(checkpoint), content["custom_metadata"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("leaves", {"heads/x": [[1 << 34], "float32"]}, "no trained weights can be compressed like that"),
        ("leaves", {"heads/x": [[1 << 60], "float32"]}, "cannot be read"),
        ("leaves", {"heads/x": [[2], "object"]}, "cannot be read"),
        ("leaves", {"heads/x": [[2], "1" * 5000]}, "cannot be read"),
        ("leaves", {"heads/x": [[2], "(" * 200 + "2" + ")" * 200 + "f4"]}, "cannot be read"),
        ("leaves", {"heads/x": [[True], "float32"]}, "cannot be read"),
        ("leaves", [], "cannot be read"),
        ("step", "3", "cannot be read"),
        ("adapters", 3, "cannot be read"),
        ("backbone", None, "cannot be read"),
    ],
)
def test_what_a_checkpoint_says_is_bounded_and_of_its_type(checkpoint, field, value, message):
    altered(checkpoint, lambda told: told.update({field: value}))
    refused(message, load_adapters, checkpoint)


def test_archives_of_arrays_are_bounded_and_plain(tmp_path):
    path = tmp_path / "test.npz"
    np.savez_compressed(path, zeros=np.zeros(10_000_000, np.uint8))
    refused("unpacks to 10,000,", load_arrays, path, 1_000_000, megabytes=1)
    assert load_arrays(path)["zeros"].shape == (10_000_000,)
    np.savez(path, objects=np.array([Path("x")], object))
    refused("cannot be read as arrays", load_arrays, path)
    path.write_bytes(b"PK\x03\x04")
    refused("cannot be read as arrays", load_arrays, path.read_bytes())


def test_a_page_is_made_of_a_work_directory_that_says_anything(tmp_path):
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    config = {"budget": 5, "tasks": 3, "backbone": [attack], attack: attack}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "versions.json").write_text(json.dumps({"commit": attack, "device": attack}))
    (tmp_path / "results.md").write_text(f"**{attack}**\n\n| variant | x (%) |\n| --- | ---: |\n| {attack} | 1.0 |\n")
    (tmp_path / "results.jsonl").write_text(json.dumps({"name": "lora", "variant": attack}))
    made = page(read_work_directory(tmp_path), [])
    assert "<script>alert" not in made
    assert "<img src=x" not in made
    assert "&lt;script&gt;alert(1)" in made
    assert "{{ 7 * 7 }}" in made
    (tmp_path / "metrics.jsonl").write_text('3\n{"step": "x"}\n{"step": 1e400}\n{"step": 2}\n')
    assert [run.last_step for run in read_work_directory(tmp_path).runs] == [2]


def test_a_table_whose_rule_has_other_columns_is_none(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    (tmp_path / "results.md").write_text("| variant | accuracy |\n| --- |\n| LoRA | 50.0 |\n")
    assert read_work_directory(tmp_path).tables == ()
    (tmp_path / "results.md").write_text("| variant | accuracy |\n| --- | ---: |\n| LoRA | 50.0 |\n")
    assert len(read_work_directory(tmp_path).tables) == 1
