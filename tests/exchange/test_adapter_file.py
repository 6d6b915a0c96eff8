from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from vla_jax.errors import UserError
from vla_jax.exchange.adapter_file import SavedAdapter, read_adapter_file, write_adapter_file


def saved() -> SavedAdapter:
    """Leaves of several dtypes and orders in memory, a scalar among them."""
    draw = np.random.default_rng(0).standard_normal
    return SavedAdapter(
        leaves={
            "adapters/lora/vision/attn_q/a": draw((3, 8, 2)).astype(np.float32),
            "adapters/lora/vision/attn_q/b": draw((2, 8, 3)).astype(np.float32).T,
            "heads/matching/classifier/kernel": draw((4, 1)).astype(ml_dtypes.bfloat16),
            "backbone/logit_scale": np.float32(2.5),
        },
        adapters={"placements": [{"name": "lora", "layers": "all"}], "task": {"kind": "Matching"}},
        backbone="tiny",
        fingerprint="ab" * 32,
        towers={"vision": {"depth": 3, "width": 8, "mlp_width": 32, "features": None}},
        step=12,
        version="1.2",
    )


def test_a_file_holds_everything(tmp_path):
    adapter = saved()
    again = read_adapter_file(write_adapter_file(tmp_path / "new" / "adapter.safetensors", adapter))
    assert again.description == adapter.description
    assert again.leaves.keys() == adapter.leaves.keys()
    for name, leaf in adapter.leaves.items():
        assert again.leaves[name].dtype == leaf.dtype
        np.testing.assert_array_equal(again.leaves[name], leaf, err_msg=name)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = write_adapter_file(tmp_path / "adapter.safetensors", saved())
    write_adapter_file(path, dataclasses.replace(saved(), step=13))
    assert read_adapter_file(path).step == 13
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]


READER = """
import json, sys
import ml_dtypes
from safetensors import safe_open
with safe_open(sys.argv[1], "numpy") as file:
    description = json.loads(file.metadata()["vla_jax"])
    sizes = {name: file.get_tensor(name).size for name in file.keys()}
assert not any(name.split(".")[0] in ("jax", "flax", "vla_jax") for name in sys.modules)
print(json.dumps([description, sizes]))
"""
OWN_READER = """
import sys
sys.modules["jax"] = sys.modules["flax"] = None  # importing them fails
from vla_jax.exchange.adapter_file import read_adapter_file
print(read_adapter_file(sys.argv[1]).step)
"""


def test_a_file_is_read_without_jax(tmp_path):
    adapter = saved()
    path = write_adapter_file(tmp_path / "adapter.safetensors", adapter)

    def run(program):
        command = [sys.executable, "-c", program, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    description, sizes = json.loads(run(READER))
    assert description == json.loads(json.dumps(adapter.description))
    assert sizes == {name: leaf.size for name, leaf in adapter.leaves.items()}
    assert run(OWN_READER) == "12\n"


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = write_adapter_file(tmp_path / "adapter.safetensors", saved())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"adapter\.safetensors cannot be read as safetensors .* cut off"):
        read_adapter_file(path)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_adapter_file(tmp_path / "none.safetensors")
    save_file({"a": np.zeros(2)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not say what it holds"):
        read_adapter_file(tmp_path / "other.safetensors")
    for name in ("adapter_model.bin", "adapter.pt", "adapter.pkl"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match="may be pickled"):
            read_adapter_file(tmp_path / name)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "cannot be read: JSONDecodeError"),
        ("[]", "cannot be read"),
        (json.dumps({"format": 1, "step": 3}), "missing .* required"),
        (json.dumps({"format": 1, "colour": "red"}), "colour"),
        (json.dumps({"format": 2}), "has format 2, this version reads 1"),
        (json.dumps({}), "KeyError"),
    ],
)
def test_a_broken_description_is_refused(tmp_path, header, message):
    save_file({"a": np.zeros(2)}, tmp_path / "adapter.safetensors", metadata={"vla_jax": header})
    with pytest.raises(UserError, match=message):
        read_adapter_file(tmp_path / "adapter.safetensors")


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.safetensors, got .*adapter\.npz; try .*adapter\.safetensors"):
        write_adapter_file(tmp_path / "adapter.npz", saved())
    with pytest.raises(UserError, match="no trained leaf"):
        write_adapter_file(tmp_path / "adapter.safetensors", dataclasses.replace(saved(), leaves={}))
    with pytest.raises(UserError, match="cannot be written as JSON"):
        write_adapter_file(tmp_path / "adapter.safetensors", dataclasses.replace(saved(), adapters={"a": np.tanh}))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_adapter_file(tmp_path / "file" / "adapter.safetensors", saved())
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_but_safetensors_is_written(tmp_path):
    path = write_adapter_file(tmp_path / "adapter.safetensors", saved())
    with safe_open(path, "numpy") as file:
        assert set(file.metadata()) == {"vla_jax"}
