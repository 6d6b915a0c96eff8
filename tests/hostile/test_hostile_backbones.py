"""Folders of models that meant harm and did some before: refused, in little time and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from hostile_checks import refused
from hostile_models import CONFIG, small_backbone

from vla_jax.backbones import convert
from vla_jax.backbones.export import export_backbone
from vla_jax.backbones.loading import load_backbone, load_config
from vla_jax.backbones.weights import INDEX_NAME, WEIGHTS_NAME, conversion_command
from vla_jax.errors import UserError
from vla_jax.foreign import MOST_NESTED, parse_json, read_bytes, shown


@pytest.fixture
def backbone_folder(tmp_path):
    return export_backbone(small_backbone().params, CONFIG, tmp_path / "clip")


@pytest.mark.parametrize(
    "place_", ["../outside.safetensors", "/outside.safetensors", "x/../../outside.safetensors", 3, "..", "a\0"]
)
def test_an_index_names_files_beside_it_alone(backbone_folder, place_):
    shutil.move(backbone_folder / WEIGHTS_NAME, backbone_folder.parent / "outside.safetensors")
    index = {
        "weight_map": dict.fromkeys((name for name, _ in convert.hub_tensors(small_backbone().params, CONFIG)), place_)
    }
    (backbone_folder / INDEX_NAME).write_text(json.dumps(index))
    refused("no file beside it", load_backbone, backbone_folder)
    (backbone_folder.parent / "outside.safetensors").rename(backbone_folder / "inside.safetensors")
    (backbone_folder / INDEX_NAME).write_text(json.dumps(index).replace(json.dumps(place_), '"inside.safetensors"'))
    assert load_backbone(backbone_folder).config == CONFIG


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_config", "num_hidden_layers", 10**9),
        ("text_config", "hidden_size", 10**12),
        ("vision_config", "image_size", 1 << 40),
        ("text_config", "vocab_size", -1),
        ("text_config", "max_position_embeddings", 0),
        ("text_config", "hidden_act", ["gelu"]),
        ("vision_config", "layer_norm_eps", "small"),
        ("vision_config", "layer_norm_eps", 10**400),
        ("text_config", "num_attention_heads", {}),
    ],
)
def test_a_configuration_is_bounded_before_shapes_are_made_of_it(backbone_folder, section, key, value):
    path = backbone_folder / "config.json"
    settings = json.loads(path.read_text())
    settings[section][key] = value
    path.write_text(json.dumps(settings))
    refused(f"{section}.{key}", load_config, backbone_folder)


def test_json_is_bounded_in_size_and_depth(backbone_folder, tmp_path):
    path = backbone_folder / "config.json"
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused("nested more than 100 deep", load_config, backbone_folder)
    path.write_text('{"projection_dim": NaN}')
    refused("NaN is no JSON", load_config, backbone_folder)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    refused("at most", load_config, backbone_folder)
    for text in ("[" * MOST_NESTED + "]" * MOST_NESTED, '{"a":' * 5000, '"\\ud800"', "1" * 5000):
        with pytest.raises(ValueError, match=r"nested|surrogate|digits"):
            parse_json(text)
    assert parse_json("[" * (MOST_NESTED - 1) + "]" * (MOST_NESTED - 1))
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    os.mkfifo(tmp_path / "pipe")
    refused("no regular file", read_bytes, tmp_path / "pipe", 10)


def test_a_command_to_copy_runs_nothing_that_files_are_named_after(tmp_path):
    names_ = [
        "$(touch owned).bin",
        "`touch owned`.bin",
        "';touch owned;'.bin",
        '";touch owned;".bin',
        "a\ntouch owned\n.bin",
    ]
    command = conversion_command(tmp_path, [tmp_path / name for name in names_])
    run = subprocess.run(
        command.replace("python", "printf %s", 1).replace(" -c", "", 1),
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(tmp_path.iterdir()) == []
    compile(run.stdout, "command", "exec")  # what Python would be given is a program


def test_a_tokenizer_brings_no_code(backbone_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked at the terminal"))
    (backbone_folder / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: pass\n")
    told = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["code.Evil", "code.Evil"]}}
    (backbone_folder / "tokenizer_config.json").write_text(json.dumps(told))
    (backbone_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        _ = load_backbone(backbone_folder).tokenizer
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 10**9}, "crop_size": {"height": 8, "width": 8}},
        {"crop_size": 10**9},
        {"image_mean": [0.5]},
        {"rescale_factor": "1"},
        {"resample": 99},
        {"do_resize": "yes"},
    ],
)
def test_settings_of_pictures_are_bounded_and_of_their_types(backbone_folder, settings):
    (backbone_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: {next(iter(settings))}"):
        _ = load_backbone(backbone_folder).image_processor
    (backbone_folder / "preprocessor_config.json").write_text(json.dumps({"preprocess": 3, "__class__": "x"}))
    assert callable(load_backbone(backbone_folder).image_processor.preprocess)


def test_messages_do_not_steer_the_terminal():
    message = str(UserError("a\x1b[2Jb\x07\u202ec\ud800\nd\te"))
    assert message == "a\\x1b[2Jb\\x07\\u202ec\\ud800\nd\te"
    assert len(shown("x" * 10**6)) < 100
    assert len(shown([["y" * 1000] * 1000] * 1000)) <= 200
    assert shown(10**5000) == "a int"
