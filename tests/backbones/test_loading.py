from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hub_clip import random_clip, save_clip, small_settings, torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from vla_jax.backbones import clip_config, convert, sources
from vla_jax.backbones.loading import load_backbone, load_config
from vla_jax.errors import UserError
from vla_jax.names import flatten


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_clip(random_clip(small_settings()), tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def loaded(original):
    return load_backbone(original)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def rewrite(folder: Path, change) -> None:
    """Changes a folder's dict of tensors and writes it back."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors) or tensors
    save_file({name: np.asarray(tensor) for name, tensor in changed.items()}, folder / "model.safetensors")


def assert_same_params(ours, theirs) -> None:
    ours, theirs = flatten(ours.params), flatten(theirs.params)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def test_a_folder_gives_float32_arrays_of_the_documented_shapes(original, loaded):
    flat = flatten(loaded.params)
    assert {leaf.dtype.name for leaf in flat.values()} == {"float32"}
    assert flat["vision/patch_embedding/kernel"].shape == (8, 8, 3, 48)
    assert flat["vision/blocks/mlp/fc1/kernel"].shape == (3, 48, 112)
    assert flat["vision/position_embedding"].shape == (17, 48)
    assert flat["text/projection/kernel"].shape == (32, 24)
    assert flat["logit_scale"].shape == ()
    assert (loaded.name, loaded.folder) == (str(original), original)
    assert load_config(original) == loaded.config


def test_a_sharded_index_is_the_same_backbone(original, loaded, tmp_path):
    save_clip(random_clip(small_settings()), tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    sharded = load_backbone(tmp_path)
    assert_same_params(sharded, loaded)
    assert sharded.fingerprint == loaded.fingerprint


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_files_are_widened_exactly(folder, tmp_path, dtype):
    rewrite(folder, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    narrow = load_backbone(folder)
    rewrite(folder, lambda tensors: {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    wide = load_backbone(folder)
    assert {leaf.dtype.name for leaf in flatten(narrow.params).values()} == {"float32"}
    assert_same_params(narrow, wide)
    assert narrow.fingerprint == wide.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_the_storage_dtype_rounds_once_and_keeps_the_fingerprint(original, loaded, dtype):
    stored = load_backbone(original, dtype=dtype)
    assert stored.fingerprint == loaded.fingerprint
    for name, leaf in flatten(stored.params).items():
        assert leaf.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(leaf, flatten(loaded.params)[name].astype(dtype), err_msg=name)


def test_position_buffers_of_old_files_are_ignored_knowingly(folder, loaded):
    rewrite(folder, lambda tensors: tensors.update({"text_model.embeddings.position_ids": np.arange(12)[None]}))
    old = load_backbone(folder)
    assert_same_params(old, loaded)
    assert old.fingerprint == loaded.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update(logit_scale=tensors["logit_scale"] + 1e-6),
        lambda tensors: tensors.update(_swapped(tensors, "q", "k")),
    ],
    ids=["one value", "two tensors exchanged"],
)
def test_other_weights_have_another_fingerprint(folder, loaded, change):
    assert re.fullmatch("[0-9a-f]{64}", loaded.fingerprint)
    rewrite(folder, change)
    assert load_backbone(folder).fingerprint != loaded.fingerprint


def _swapped(tensors, one, other):
    names = [f"text_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in (one, other)]
    return dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))


def test_another_image_size_changes_only_the_positions(original, loaded):
    resized = load_backbone(original, image_size=48)
    assert resized.config.image_size == load_config(original, image_size=48).image_size == 48
    assert resized.fingerprint == loaded.fingerprint
    for name, leaf in flatten(resized.params).items():
        if name == "vision/position_embedding":
            assert leaf.shape == (37, 48)
        else:
            np.testing.assert_array_equal(leaf, flatten(loaded.params)[name], err_msg=name)
    with pytest.raises(UserError, match=r"50 .*patch_size 8"):
        load_backbone(original, image_size=50)


def mesh_of_eight():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("form", ["function", "tree"])
def test_arrays_lie_where_their_shardings_say(original, loaded, form):
    mesh = mesh_of_eight()

    def rule(name: str) -> NamedSharding:
        cut = name.startswith("backbone/") and name.endswith("fc1/kernel")
        return NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor") if cut else PartitionSpec())

    shapes = convert.abstract_params(load_config(original))
    tree = jax.tree_util.tree_map_with_path(
        lambda path, _: rule("backbone/" + "/".join(entry.key for entry in path)), shapes
    )
    placed = load_backbone(original, shardings=rule if form == "function" else tree)
    assert_same_params(placed, loaded)
    for name, leaf in flatten(placed.params).items():
        assert leaf.sharding == rule(f"backbone/{name}"), name
    kernel = placed.params["vision"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 12, 56)


def test_a_tree_of_shardings_must_cover_the_parameters(original):
    whole = NamedSharding(mesh_of_eight(), PartitionSpec())
    with pytest.raises(UserError, match="nothing about backbone/vision"):
        load_backbone(original, shardings={"logit_scale": whole})
    with pytest.raises(UserError, match="did you mean 'backbone/logit_scale'"):
        load_backbone(original, shardings={"logit_scales": whole})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != "visual_projection.weight"},
            "without a tensor: visual_projection",
        ),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "Tensors without a parameter: extra"),
        (
            lambda t: t.update({"text_projection.weights": t.pop("text_projection.weight")}),
            r"text_projection.weight \(nearest: text_projection.weights\)",
        ),
        (lambda t: t.update(logit_scale=np.zeros(1, np.float32)), r"'logit_scale' .* shape \(1,\), .*asks for \(\)"),
        (lambda t: t.update(logit_scale=np.int32(3)), "'logit_scale' .* is I32; allowed: F32, F16, BF16"),
    ],
    ids=["missing", "extra", "renamed", "shape", "integers"],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        load_backbone(folder)


@pytest.mark.parametrize("depth", [2, 4], ids=["too shallow", "too deep"])
def test_a_depth_that_the_file_does_not_have_is_an_error(folder, depth):
    settings = small_settings(vision_num_hidden_layers=depth)
    (folder / "config.json").write_text(json.dumps(settings))
    layer = min(depth, 3)
    with pytest.raises(UserError, match=rf"vision_model\.encoder\.layers\.{layer}\..*and 6 more"):
        load_backbone(folder)


def test_broken_files_are_named(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_backbone(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read as JSON"):
        load_backbone(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json"):
        load_backbone(folder)


def test_an_index_that_does_not_fit_its_files_is_an_error(tmp_path):
    save_clip(random_clip(small_settings()), tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = sorted(set(content["weight_map"].values()))
    moved = next(name for name, place in content["weight_map"].items() if place == places[0])
    content["weight_map"][moved] = places[1]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{re.escape(moved)}.*does not hold it"):
        load_backbone(tmp_path)
    (tmp_path / places[1]).unlink()
    with pytest.raises(UserError, match=f"lists {places[1]}, which"):
        load_backbone(tmp_path)


@pytest.mark.torch
def test_pickled_weights_are_refused_with_a_command_that_works(folder, loaded):
    state = random_clip(small_settings()).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({k: v for k, v in state.items() if "text" in k}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({k: v for k, v in state.items() if "text" not in k}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(UserError, match="pickled weights only") as error:
        load_backbone(folder)
    command = str(error.value).splitlines()[1].strip()
    assert "weights_only=True" in command
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    converted = load_backbone(folder)
    assert_same_params(converted, loaded)
    assert converted.fingerprint == loaded.fingerprint


def test_a_folder_without_weights_is_an_error(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor"):
        load_backbone(folder)


def test_weights_too_large_for_float16_are_named(folder):
    rewrite(folder, lambda tensors: tensors.update(logit_scale=np.float32(1e5)))
    with pytest.raises(UserError, match="'logit_scale' does not fit into float16"):
        load_backbone(folder, dtype="float16")


def test_names_that_are_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no such folder.*tiny.*vit_b_32"):
        load_backbone(tmp_path / "absent")
    with pytest.raises(UserError, match="did you mean 'vit_b_32'"):
        load_backbone("random:vit_b32")
    with pytest.raises(UserError, match="did you mean 'float32'"):
        load_backbone("random:vit_b_32", dtype="flaot32")
    monkeypatch.setattr(sources, "_TINY_FOLDER", tmp_path)
    with pytest.raises(UserError, match="pretrain_tiny"):
        load_backbone("tiny")


def test_without_a_network_the_way_around_is_told(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be fetched.*hf download owner/model --local-dir"):
        load_backbone("owner/model")


def test_a_hub_name_is_fetched_without_pickles(monkeypatch, original, loaded):
    import huggingface_hub

    asked = {}

    def fetch(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(original)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same_params(load_backbone("owner/model@refs/pr/5"), loaded)
    assert (asked["name"], asked["revision"]) == ("owner/model", "refs/pr/5")
    taken = list(
        huggingface_hub.utils.filter_repo_objects(
            ["config.json", "pytorch_model.bin", "model.safetensors", "tokenizer.json", "open_clip_model.safetensors"],
            allow_patterns=asked["patterns"],
        )
    )
    assert taken == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_hub_model_without_safetensors_is_refused_with_the_commands(monkeypatch, folder):
    import huggingface_hub

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(folder))
    with pytest.raises(UserError, match="no safetensors on the hub") as error:
        load_backbone("owner/model")
    assert "hf download owner/model --local-dir model\n" in str(error.value)
    assert "model/pytorch_model.bin" in str(error.value)


def test_an_image_processor_that_fits_is_kept_as_it_is(folder):
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_backbone(folder).image_processor
    assert (processor.size.shortest_edge, processor.do_normalize) == (40, False)


def test_image_processor_follows_folder_and_image_size(folder):
    settings = {
        "image_mean": [0.1, 0.2, 0.3],
        "size": 32,
        "crop_size": 32,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_backbone(folder, image_size=48).image_processor
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    picture = np.zeros((60, 90, 3), np.uint8)
    assert processor(picture, return_tensors="np")["pixel_values"].shape == (1, 3, 48, 48)


def test_a_folder_without_tokenizer_says_so(loaded):
    with pytest.raises(UserError, match="has no tokenizer; put"):
        _ = loaded.tokenizer


def test_random_weights_are_the_same_each_time(monkeypatch):
    small = convert.config_from_hub(small_settings())
    monkeypatch.setitem(clip_config.PRESETS, "vit_b_32", small)
    one, two = load_backbone("random:vit_b_32"), load_backbone("random:vit_b_32", dtype="bfloat16")
    assert one.config == small
    assert one.fingerprint == two.fingerprint
    assert flatten(one.params).keys() == {row.ours for row in convert.TABLE}
    for name, leaf in flatten(two.params).items():
        np.testing.assert_array_equal(leaf, flatten(one.params)[name].astype(jnp.bfloat16), err_msg=name)
    params = flatten(one.params)
    for name, fan_in in (("vision/patch_embedding/kernel", 192), ("vision/blocks/mlp/fc2/kernel", 112)):
        assert np.std(params[name]) == pytest.approx(fan_in**-0.5, rel=0.05)
    assert not params["text/blocks/norm1/bias"].any()
    split = NamedSharding(mesh_of_eight(), PartitionSpec())
    placed = load_backbone("random:vit_b_32", shardings=lambda name: split)
    assert {leaf.sharding for leaf in flatten(placed.params).values()} == {split}
    with pytest.raises(UserError, match="has no tokenizer"):
        _ = one.tokenizer


def test_loading_needs_no_pytorch(original):
    program = f"""
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
def without_torch(name, path=None, target=None):
    return None if name.split(".")[0] in ("torch", "torchvision") else find(name, path, target)
importlib.machinery.PathFinder.find_spec = without_torch
from vla_jax.backbones.export import export_backbone
from vla_jax.backbones.loading import load_backbone
backbone = load_backbone({str(original)!r})
backbone.image_processor
tiny = load_backbone("tiny")
assert tiny.tokenizer(["a red circle"])["input_ids"] and tiny.image_processor
export_backbone(backbone.params, backbone.config, sys.argv[1])
assert "torch" not in sys.modules
print(backbone.fingerprint)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(original.parent / "exported")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == load_backbone(original).fingerprint
