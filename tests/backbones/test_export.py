from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hub_clip import random_clip, random_images, random_texts, save_clip, small_settings, torch, transformers
from safetensors import safe_open

from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.export import export_backbone
from vla_jax.backbones.loading import load_backbone
from vla_jax.errors import UserError
from vla_jax.names import flatten


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    model = random_clip(small_settings(vision_hidden_act="gelu"))
    return load_backbone(save_clip(model, tmp_path_factory.mktemp("original")))


@pytest.mark.torch
@pytest.mark.parametrize("pooling", ["first_eos", "largest_id"])
def test_transformers_loads_the_export_and_gives_the_same_features(tmp_path, backbone, pooling):
    config = dataclasses.replace(backbone.config, pooling=pooling)
    model, report = transformers.CLIPModel.from_pretrained(
        export_backbone(backbone.params, config, tmp_path), output_loading_info=True
    )
    assert not any(report.values())  # nothing missing, unexpected or misshapen
    tokens, mask = random_texts(50, 12, eos=49, lengths=(12, 5), pad=49)
    images = random_images(32)
    with torch.no_grad():
        theirs = model.eval()(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
            attention_mask=torch.tensor(mask, dtype=torch.long),
        )
    ours = CLIP(config).apply({"params": backbone.params}, images, tokens, mask)
    for mine, reference in (
        (ours.image_features, theirs.vision_model_output.pooler_output),
        (ours.text_features, theirs.text_model_output.pooler_output),
        (ours.logits, theirs.logits_per_image),
    ):
        error = np.linalg.norm(np.asarray(mine) - reference.numpy()) / np.linalg.norm(reference.numpy())
        assert error <= 1e-5


def test_export_and_loading_undo_each_other(tmp_path, backbone):
    again = load_backbone(export_backbone(backbone.params, backbone.config, tmp_path / "deep" / "folder"))
    assert again.config == backbone.config
    assert again.fingerprint == backbone.fingerprint
    for name, leaf in flatten(again.params).items():
        np.testing.assert_array_equal(leaf, flatten(backbone.params)[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_written_rounded_once(tmp_path, backbone, dtype):
    export_backbone(backbone.params, backbone.config, tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {jnp.dtype(dtype)}  # noqa: SIM118
    for name, leaf in flatten(load_backbone(tmp_path).params).items():
        rounded = flatten(backbone.params)[name].astype(dtype).astype(jnp.float32)
        np.testing.assert_array_equal(leaf, rounded, err_msg=name)


def test_tokenizer_and_image_processor_travel_along(tmp_path, backbone):
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    tokenizer = transformers.CLIPTokenizer(vocab=words, merges=[])
    export_backbone(backbone.params, backbone.config, tmp_path, tokenizer=tokenizer)
    again = load_backbone(tmp_path)
    assert again.tokenizer("a b a")["input_ids"] == tokenizer("a b a")["input_ids"] == [0, 2, 3, 2, 1]
    assert again.image_processor.crop_size["height"] == 32
    settings = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (0, 1)


def test_a_given_image_processor_is_written(tmp_path, backbone):
    processor = transformers.CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.25])
    export_backbone(backbone.params, backbone.config, tmp_path, image_processor=processor)
    assert list(load_backbone(tmp_path).image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_weights_too_large_for_float16_are_refused(tmp_path, backbone):
    params = {**backbone.params, "logit_scale": jnp.float32(1e5)}
    with pytest.raises(UserError, match="'logit_scale' does not fit into float16"):
        export_backbone(params, backbone.config, tmp_path / "new", dtype="float16")
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_folders_place_is_refused(tmp_path, backbone):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        export_backbone(backbone.params, backbone.config, tmp_path / "file")
