from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from exchanged_clip import drawn, loaded, write_backbone

from vla_jax.adapters import Bottleneck, LoRA, Placement
from vla_jax.errors import UserError
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.checkpoints import (
    FORMS,
    find_adapters,
    form_of,
    load_backbone_of,
    read_adapter,
    summary,
    write_adapter,
)

LORA = Placement(LoRA(rank=2), slots=("attn_q", "attn_v"), layers="last 1")
PATHS = {"file": "adapter.safetensors", "folder": "checkpoint", "peft": "hub"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def backbone(folder):
    return loaded(folder)


@pytest.fixture
def saved(backbone) -> SavedAdapter:
    return drawn(backbone, (LORA,))


def same_leaves(one: SavedAdapter, other: SavedAdapter) -> None:
    assert one.leaves.keys() == other.leaves.keys()
    for name, leaf in one.leaves.items():
        np.testing.assert_array_equal(leaf, other.leaves[name], err_msg=name)


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_an_adapter_goes_from_any_form_to_any_other(saved, tmp_path, first, second):
    one, two = tmp_path / "one" / PATHS[first], tmp_path / "two" / PATHS[second]
    write_adapter(one, saved, first)
    assert form_of(one) == first
    write_adapter(two, read_adapter(one), second)
    again = read_adapter(two)
    same_leaves(again, saved)
    assert again.towers == saved.towers
    assert (again.backbone, again.fingerprint) == (saved.backbone, saved.fingerprint)
    if "peft" not in (first, second):  # which keeps neither names of adapters nor steps
        assert (again.adapters, again.step) == (json.loads(json.dumps(saved.adapters)), 7)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_what_is_trained_beside_adapters_travels_along(backbone, tmp_path, form):
    saved = drawn(backbone, (Placement(Bottleneck(rank=2), slots=("mlp_out",)),), trained="post_norm")
    head = {"heads/matching/classifier/bias": np.ones(1, np.float32)}
    saved = dataclasses.replace(saved, leaves=saved.leaves | head)
    write_adapter(tmp_path / PATHS[form], saved, form)
    same_leaves(read_adapter(tmp_path / PATHS[form]), saved)


def test_an_adapter_is_read_as_the_runs_newest(saved, tmp_path):
    for step in (5, 10):
        write_adapter(tmp_path / str(step), dataclasses.replace(saved, step=step), "folder")
    assert read_adapter(tmp_path).step == 10


@pytest.mark.parametrize("form", FORMS)
def test_another_backbone_is_refused(saved, tmp_path, form):
    other = write_backbone(tmp_path / "other", seed=1)
    write_adapter(tmp_path / PATHS[form], saved, form)
    with pytest.raises(UserError, match=r"was trained on .* with fingerprint [0-9a-f]{64}, and .* has [0-9a-f]{64}"):
        read_adapter(tmp_path / PATHS[form], str(other))
    with pytest.raises(UserError, match="give the backbone it was trained on"):
        load_backbone_of(saved, str(other))
    assert load_backbone_of(saved).fingerprint == saved.fingerprint


def test_a_backbone_that_is_gone_is_asked_for(saved, folder, tmp_path):
    gone = dataclasses.replace(saved, backbone="/no/such/folder")
    write_adapter(tmp_path / "checkpoint", gone, "folder")
    with pytest.raises(UserError, match=r"cannot be told without its backbone, '/no/such/folder': .*\(--backbone\)"):
        read_adapter(tmp_path / "checkpoint")
    same_leaves(read_adapter(tmp_path / "checkpoint", str(folder)), saved)
    write_adapter(tmp_path / "adapter.safetensors", gone, "file")
    same_leaves(read_adapter(tmp_path / "adapter.safetensors"), saved)  # which knows the towers itself
    write_adapter(tmp_path / "hub", dataclasses.replace(saved, backbone=""), "peft")
    with pytest.raises(UserError, match=r"does not say which backbone it was trained on; give it \(--backbone\)"):
        read_adapter(tmp_path / "hub")


def test_adapters_are_found_wherever_they_lie(saved, tmp_path):
    for form in FORMS:
        write_adapter(tmp_path / "runs" / "a" / PATHS[form], saved, form)
    write_backbone(tmp_path / "runs" / "backbone")  # safetensors, and no adapter
    (tmp_path / "runs" / "a" / "20.orbax-checkpoint-tmp").mkdir()
    found = {form_of(path): summary(path) for path in find_adapters(tmp_path / "runs")}
    assert set(found) == set(FORMS)
    parameters = sum(leaf.size for leaf in saved.leaves.values())
    for form, one in found.items():
        assert (one.parameters, one.backbone) == (parameters, saved.backbone)
        assert one.methods == (("LORA",) if form == "peft" else ("lora",))
        assert one.step == (None if form == "peft" else 7)
    assert [summary(path).path for path in find_adapters(tmp_path / "runs" / "a" / PATHS["peft"])]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_in_the_way_is_not_replaced(saved, tmp_path, form):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").touch()
    in_the_way = {"file": ["folder.safetensors"], "folder": ["file", "notes"], "peft": ["file"]}[form]
    for name in in_the_way:
        with pytest.raises(UserError):
            write_adapter(tmp_path / name, saved, form)
    assert (tmp_path / "notes" / "thesis.txt").exists()


def test_what_is_no_adapter_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nothing; give an adapter's file"):
        form_of(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match="unknown form of an adapter 'files'; did you mean 'file'"):
        write_adapter(tmp_path / "a", saved, "files")
    with pytest.raises(UserError, match="there is no folder"):
        list(find_adapters(tmp_path / "nothing"))
    write_adapter(tmp_path / "hub", saved, "peft")
    with pytest.raises(UserError, match="or the folder of a checkpoint of peft"):
        read_adapter(tmp_path / "hub" / "adapter_model.safetensors")
