"""Adapters of every form that meant harm and did some before: refused, in little time and memory."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
from hostile_checks import change_json, refused
from hostile_models import CONFIG, PLACEMENTS, small_adapter, small_backbone
from safetensors.numpy import save_file

from vla_jax import patterns
from vla_jax.adapters import LoRA, Placement, Stack, place
from vla_jax.exchange import checkpoints
from vla_jax.exchange.adapter_file import HEADER, read_adapter_file, write_adapter_file
from vla_jax.exchange.described import planned
from vla_jax.exchange.peft_export import export_peft
from vla_jax.exchange.peft_import import import_peft
from vla_jax.exchange.sites import adapter_of, plan_of
from vla_jax.foreign import MOST_HEADER_BYTES

CATASTROPHIC = "(a|aa|_|[a-z]|.)*(x|x.)+!$"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Patterns that take too long are found out sooner."""
    monkeypatch.setattr(patterns, "SECONDS", 0.3)


def test_a_header_is_bounded(tmp_path):
    path = tmp_path / "adapter.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' + b" " * MOST_HEADER_BYTES + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused("at most 16,777,216 are read", read_adapter_file, path)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0, (1 << 64) - 1], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]},
        {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]},
    ],
)
def test_tensors_that_cannot_be_are_refused(tmp_path, tensor):
    path = tmp_path / "adapter.safetensors"
    header = json.dumps({"a": tensor, "__metadata__": {HEADER: json.dumps(small_adapter().description)}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(tensor["data_offsets"][1]))
    refused("cannot be read|allowed: float32", read_adapter_file, path)


@pytest.mark.parametrize("name", ["adapters/../../x", "adapters//x", "/etc/passwd", "adapters/\x1b[2J", "a" * 3000, ""])
def test_leaves_are_named_as_paths_below_each_other(tmp_path, name):
    adapter = small_adapter()
    save_file({name: np.ones(2, np.float32)}, tmp_path / "a.safetensors", {HEADER: json.dumps(adapter.description)})
    refused("no path of names", read_adapter_file, tmp_path / "a.safetensors")


def described(**changes) -> list[dict]:
    """The placements of an adapter, the first of them changed."""
    placements = place(PLACEMENTS, CONFIG.towers).describe()
    return [placements[0] | changes, *placements[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": [[CATASTROPHIC, 1]]},
        {"ranks": [["(?:(?:a{999}){999}){999}", 1]]},
        {"ranks": [["a" * 40_000, 1]]},
        {"method": {"kind": "lora", "rank": 10**18}},
        {"method": {"kind": "lora", "rank": 2.5}},
        {"method": {"kind": "lora", "alpha": "16"}},
        {"method": {"kind": "lora", "rank_stabilised": "no"}},
        {"tasks": ["x"] * 20_000},
        {"slots": [["attn_q"]]},
        {"name": 5},
        {"tied": "yes"},
        {"layers": 0},
    ],
)
def test_placements_are_bounded_and_of_their_types(changes):
    refused(".", planned, described(**changes), CONFIG.towers)


def test_stacks_of_weights_are_counted_before_one_is_traced():
    first = described()[0]
    many = [first | {"name": f"name_{number}"} for number in range(400)]
    refused("stacks of weights; 1,024 are the most", planned, many, CONFIG.towers)


def test_nested_compositions_take_no_time():
    method = LoRA(rank=1)
    for number in range(40):
        method = Stack(((f"child_{number}", method),))
    assert Placement(method, slots=("attn_q",)).method.slots == LoRA.slots


@pytest.mark.parametrize(
    "change_",
    [
        {"towers": {"vision": {"depth": 10**9, "width": 8, "mlp_width": 8}}},
        {"towers": {"vision": {"depth": True, "width": 8, "mlp_width": 8}}},
        {"towers": []},
        {"adapters": []},
        {"backbone": 5},
        {"backbone": "\x1b[2J"},
        {"step": -1},
        {"fingerprint": None},
    ],
)
def test_descriptions_are_of_their_types(tmp_path, change_):
    description = small_adapter().description | change_
    save_file(dict(small_adapter().leaves), tmp_path / "a.safetensors", {HEADER: json.dumps(description)})
    refused("the description in the header", read_adapter_file, tmp_path / "a.safetensors")


def test_leaves_have_the_shapes_that_placements_ask_for(tmp_path):
    adapter = small_adapter()
    name = "adapters/lora/text/attn_q/a"
    wrong = dataclasses.replace(adapter, leaves={**adapter.leaves, name: np.ones((1, 1, 1), np.float32)})
    read = read_adapter_file(write_adapter_file(tmp_path / "a.safetensors", wrong))
    refused(r"has the shape \[1, 1, 1\], and the checkpoint's placements ask for", adapter_of, read)
    assert plan_of(adapter).leaves()


@pytest.fixture
def peft_folder(tmp_path):
    leaves = {name: leaf for name, leaf in small_adapter().leaves.items() if name.startswith("adapters/lora/")}
    return export_peft(
        tmp_path / "peft", dataclasses.replace(small_adapter(), leaves=leaves, adapters={"placements": described()[:1]})
    )


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": CATASTROPHIC},
        {"exclude_modules": CATASTROPHIC},
        {"rank_pattern": {CATASTROPHIC: 2}},
        {"layers_to_transform": [0], "layers_pattern": CATASTROPHIC, "target_modules": ["q_proj"]},
        {"target_modules": "(?:(?:a{999}){999}){999}"},
        {"target_modules": "(?R)"},
        {"target_modules": "(?:q_proj){e<=3}"},
        {"rank_pattern": {"(?|(?R)x)": 2}},
        {"target_modules": ["x"] * 5000},
        {"r": 10**12},
        {"lora_alpha": 10**400},
        {"lora_dropout": -1},
        {"use_dora": "no"},
        {"peft_type": ["LORA"]},
        {"target_modules": "q\x1b[2J"},
    ],
)
def test_settings_of_peft_are_bounded_and_of_their_types(peft_folder, values):
    change_json(peft_folder / "adapter_config.json", **values)
    refused(".", import_peft, peft_folder, small_backbone())


def test_a_backbone_that_is_no_name_is_none(peft_folder):
    assert checkpoints.summary(peft_folder).backbone == "small"
    change_json(peft_folder / "adapter_config.json", base_model_name_or_path=["../x"])
    assert checkpoints.summary(peft_folder).backbone == ""
