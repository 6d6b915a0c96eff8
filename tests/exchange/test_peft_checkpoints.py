"""Checkpoints of peft that cannot be used, or adapters that peft has no form for: each a clear error."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from exchanged_clip import CONFIG, drawn, loaded, write_backbone
from safetensors.numpy import load_file, save_file

from vla_jax.adapters import Affine, Bottleneck, LoRA, Placement
from vla_jax.errors import UserError
from vla_jax.exchange.peft_config import IGNORED, PROVENANCE, READ, read_config
from vla_jax.exchange.peft_export import export_peft
from vla_jax.exchange.peft_import import import_peft
from vla_jax.exchange.sites import chosen

PLACEMENT = Placement(LoRA(rank=2), slots=("attn_q", "attn_v"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return loaded(write_backbone(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def checkpoint(backbone, tmp_path):
    return export_peft(tmp_path / "checkpoint", drawn(backbone, (PLACEMENT,)))


def change_settings(folder, **changes):
    path = folder / "adapter_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value != "absent"}))


def change_tensors(folder, change, metadata=None):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("megatron_config", {"layers": 2}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("lora_bias", True),
        ("target_parameters", ["weight"]),
        ("trainable_token_indices", [3]),
        ("alora_invocation_tokens", [3]),
        ("loftq_config", {"loftq_bits": 4}),
        ("invented_next_year", 3),
        ("r", 0),
        ("r", 2.5),
        ("r", True),
        ("lora_alpha", "much"),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", [4]),
        ("alpha_pattern", {"q_proj": None}),
        ("layers_to_transform", ["first"]),
        ("layers_pattern", 3),
        ("target_modules", 3),
        ("modules_to_save", "visual_projection"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_a_field_that_changes_what_is_computed_is_refused(checkpoint, backbone, field, value):
    change_settings(checkpoint, **{field: value})
    with pytest.raises(UserError) as error:
        import_peft(checkpoint, backbone)
    assert f"{field} = {value!r} is not supported" in str(error.value)
    assert "supported: " in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "CLIPModel"}, "revision": "abc", "peft_version": "9", "task_type": "X"},
        {"invented_next_year": None},
        {"invented_next_year": False, "another": [], "a_third": {}},
        {"eva_config": {"rho": 2.0}, "megatron_core": "megatron.core", "qalora_group_size": 16},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": None, "alpha_pattern": None, "layers_to_transform": None},
    ],
)
def test_fields_without_effect_are_passed_over(checkpoint, backbone, changes):
    before = import_peft(checkpoint, backbone)
    change_settings(checkpoint, **changes)
    after = import_peft(checkpoint, backbone)
    assert after.description == before.description
    for name, leaf in before.leaves.items():
        np.testing.assert_array_equal(after.leaves[name], leaf)


def test_absent_fields_have_pefts_defaults(checkpoint, backbone):
    change_settings(checkpoint, r="absent", lora_alpha="absent", lora_dropout="absent")
    with pytest.raises(UserError, match=r"lora_A.weight \(2, 24\), not \(8, 24\)"):
        import_peft(checkpoint, backbone)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_prompts_are_refused_with_the_reason(checkpoint, backbone, kind):
    change_settings(checkpoint, peft_type=kind)
    with pytest.raises(UserError, match=f"peft_type '{kind}' cannot be used with CLIP: .* CLIPModel takes neither"):
        import_peft(checkpoint, backbone)


@pytest.mark.parametrize("kind", ["LOHA", "VERA", None])
def test_other_methods_are_refused(checkpoint, backbone, kind):
    change_settings(checkpoint, peft_type=kind)
    with pytest.raises(UserError, match=f"peft_type {kind!r} is not supported; supported: LORA, IA3, LN_TUNING"):
        import_peft(checkpoint, backbone)


def test_no_field_is_in_two_lists():
    for kind, read in READ.items():
        assert not read & (PROVENANCE | IGNORED[kind])


def test_missing_and_extra_tensors_are_named(checkpoint, backbone):
    name = "base_model.model.vision_model.encoder.layers.1.self_attn.q_proj.lora_A.weight"
    change_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"missing: {name}"):
        import_peft(checkpoint, backbone)
    change_tensors(checkpoint, lambda tensors: tensors.update({name.replace("q_proj", "fc1"): np.zeros((2, 24))}))
    with pytest.raises(UserError, match=r"missing: .*q_proj.*; extra: .*fc1"):
        import_peft(checkpoint, backbone)


def test_a_tensor_of_another_shape_is_named(checkpoint, backbone):
    name = "base_model.model.text_model.encoder.layers.0.self_attn.v_proj.lora_B.weight"
    change_tensors(checkpoint, lambda tensors: tensors.update({name: np.zeros((2, 16), np.float32)}))
    with pytest.raises(UserError, match=r"of another shape: .*v_proj.lora_B.weight \(2, 16\), not \(16, 2\)"):
        import_peft(checkpoint, backbone)


@pytest.mark.parametrize("change", [{"width": 32}, {"depth": 4}, {"depth": 2}])
def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path, change):
    other = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, **change))
    other = loaded(write_backbone(tmp_path / "other", other))
    with pytest.raises(UserError, match="was trained on a backbone with fingerprint"):
        import_peft(checkpoint, other)
    change_tensors(checkpoint, lambda tensors: None)  # as peft writes it, without a fingerprint
    with pytest.raises(UserError, match=r"are not those that its adapter_config\.json asks for on backbone"):
        import_peft(checkpoint, other)


def test_a_truncated_checkpoint_is_refused(checkpoint, backbone):
    path = checkpoint / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot be read as safetensors .* cut off"):
        import_peft(checkpoint, backbone)


def test_integers_are_refused(checkpoint, backbone):
    name = "base_model.model.text_model.encoder.layers.0.self_attn.v_proj.lora_B.weight"
    change_tensors(checkpoint, lambda tensors: tensors.update({name: np.zeros((16, 2), np.int8)}))
    with pytest.raises(UserError, match=r"v_proj.lora_B.weight' in .* is int8; allowed: float32, float16, bfloat16"):
        import_peft(checkpoint, backbone)


def test_missing_and_pickled_files_are_refused(checkpoint, backbone, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        import_peft(tmp_path / "none", backbone)
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        import_peft(tmp_path, backbone)
    weights = checkpoint / "adapter_model.safetensors"
    weights.unlink()
    with pytest.raises(UserError, match=r"there is no file .*adapter_model\.safetensors"):
        import_peft(checkpoint, backbone)
    (checkpoint / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(UserError, match="holds pickled weights only") as error:
        import_peft(checkpoint, backbone)
    assert "weights_only=True" in str(error.value)
    assert f"{weights}" in str(error.value)


@pytest.mark.torch
def test_the_command_that_converts_pickled_weights_works(checkpoint, backbone):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    before = import_peft(checkpoint, backbone)
    weights = checkpoint / "adapter_model.safetensors"
    tensors = {name: torch.tensor(tensor) for name, tensor in load_file(weights).items()}
    torch.save(tensors, checkpoint / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(UserError) as error:
        import_peft(checkpoint, backbone)
    command = shlex.split(str(error.value).splitlines()[-1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    after = import_peft(checkpoint, backbone)
    for name, leaf in before.leaves.items():
        np.testing.assert_array_equal(after.leaves[name], leaf)


def test_targets_that_are_no_linear_maps_are_refused(checkpoint, backbone):
    change_settings(checkpoint, target_modules=["patch_embedding"])
    with pytest.raises(UserError, match=r"choose vision_model\.embeddings\.patch_embedding, which is no linear map"):
        import_peft(checkpoint, backbone)
    change_settings(checkpoint, peft_type="IA3", target_modules=["q_proj"], feedforward_modules=["q_proj"])
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    for name in settings.keys() - (PROVENANCE | READ["IA3"]):
        change_settings(checkpoint, **{name: "absent"})
    with pytest.raises(UserError, match=r"feedforward_modules choose .*q_proj, .*; supported: fc1 and fc2"):
        import_peft(checkpoint, backbone)
    change_settings(checkpoint, feedforward_modules=None)
    with pytest.raises(UserError, match="feedforward_modules is missing"):
        import_peft(checkpoint, backbone)


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object, got list"):
        read_config(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    ("placements", "trained", "message"),
    [
        ((Placement(Bottleneck(rank=2), slots=("mlp_out",)),), "", "peft has no form for 'bottleneck' on CLIP"),
        (
            (PLACEMENT, Placement(Affine(scale=True, shift=False), "scales", slots=("attn_k",))),
            "",
            "holds one method, got affine, lora",
        ),
        (
            (PLACEMENT, Placement(LoRA(rank=2, dropout=0.5), "other", slots=("mlp_fc1",))),
            "",
            "one dropout for a whole checkpoint, got 0.0, 0.5",
        ),
        (
            (PLACEMENT, Placement(LoRA(rank=2), "other", slots=("attn_v",))),
            "",
            "adapters 'adapter' and 'other' both sit at vision/attn_v/0",
        ),
        (
            (dataclasses.replace(PLACEMENT, tasks=("a", "b")),),
            "",
            "has weights for 2 tasks; name the one that is meant, of a, b",
        ),
        ((Placement(Affine(scale=True, shift=True), slots=("attn_k",)),), "", "peft scales and does not shift"),
        ((Placement(Affine(scale=True, shift=False), slots=("block_out",)),), "", "at vision/block_out/0 does neither"),
        (
            (Placement(Affine(scale=True, shift=False), slots=("mlp_hidden", "mlp_fc2")),),
            "",
            "either what goes into .*fc2 or what comes out of it, not both",
        ),
        ((), "norm1/scale", "only .*layer_norm1.weight was trained; train .*layer_norm1.bias too"),
        ((), "class_embedding", "peft saves modules whole"),
        ((), "logit_scale", "peft saves modules whole, and of the model only logit_scale was trained"),
        (
            (Placement(LoRA(rank=2), slots=("projection",)),),
            "projection",
            "text_projection is both trained itself and adapted",
        ),
        ((), "", "nothing that peft has a form for"),
    ],
)
def test_what_peft_has_no_form_for_is_refused(backbone, tmp_path, placements, trained, message):
    with pytest.raises(UserError, match=message):
        export_peft(tmp_path / "out", drawn(backbone, placements, trained))
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_no_linear_map_is_refused(backbone, tmp_path):
    adapter = drawn(backbone, (PLACEMENT,))
    adapter = dataclasses.replace(adapter, leaves=adapter.leaves | {"heads/a/temperature": np.ones(())})
    with pytest.raises(UserError, match="no form for head leaf 'heads/a/temperature'"):
        export_peft(tmp_path / "out", adapter)


def test_one_of_several_adapters_is_chosen(backbone, tmp_path):
    both = drawn(backbone, (PLACEMENT, Placement(LoRA(rank=3), "other", slots=("attn_v",))))
    again = import_peft(export_peft(tmp_path / "out", chosen(both, ("other",))), backbone, name="other")
    assert {name: leaf.shape for name, leaf in again.leaves.items()} == {
        name: leaf.shape for name, leaf in both.leaves.items() if name.startswith("adapters/other/")
    }


def test_a_file_in_the_folders_place_is_refused(backbone, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        export_peft(tmp_path / "file", drawn(backbone, (PLACEMENT,)))
