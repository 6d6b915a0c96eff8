"""Adapters, checkpoints, models and arguments as others write them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import types
from random import Random
from typing import Any, Literal

import numpy as np
from hostile_kind import Files, Kind
from hostile_mutations import mutated_bytes, mutated_json, mutated_safetensors
from safetensors.numpy import save

from vla_jax import names
from vla_jax.adapters import Bottleneck, LoRA, Placement, place
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import config_to_hub, hub_tensors, parameter_shapes
from vla_jax.backbones.loading import Backbone, load_backbone
from vla_jax.backbones.transformer import TowerConfig
from vla_jax.backbones.weights import INDEX_NAME, WEIGHTS_NAME
from vla_jax.data.own import OwnData
from vla_jax.errors import UserError
from vla_jax.exchange import checkpoints
from vla_jax.exchange.adapter_file import HEADER, SavedAdapter, read_adapter_file
from vla_jax.exchange.peft_export import export_peft
from vla_jax.exchange.peft_import import import_peft
from vla_jax.exchange.sites import adapter_of
from vla_jax.launching import parse_config
from vla_jax.training import checksums
from vla_jax.training.checkpoint import load_adapters, save_adapters
from vla_jax.training.checkpoint_folder import absolute, check_size
from vla_jax.training.checkpoint_metadata import Identity, Metadata

CONFIG = CLIPConfig(
    vision=TowerConfig(width=8, depth=2, heads=2, mlp_width=12),
    text=TowerConfig(width=6, depth=2, heads=2, mlp_width=8),
    image_size=8,
    patch_size=4,
    vocabulary_size=11,
    context_length=5,
    projection=4,
    eos_token_id=10,
)


PLACEMENTS = (
    Placement(LoRA(rank=2), "lora", slots=("attn_q", "mlp_fc1"), ranks=(("vision/attn_q/1", 1),)),
    Placement(Bottleneck(rank=2), "bottleneck", towers=("text",), slots=("mlp_out",), layers="last 1"),
)


@functools.cache
def small_weights() -> dict[str, np.ndarray]:
    """Random weights of :data:`CONFIG`, by name."""
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in parameter_shapes(CONFIG).items()
    }


@functools.cache
def small_backbone() -> Backbone:
    """A backbone of :data:`CONFIG`."""
    return Backbone("small", CONFIG, names.unflatten(small_weights()), "ab" * 32, None)


@functools.cache
def small_adapter() -> SavedAdapter:
    """An adapter on it, as training leaves one."""
    placements = PLACEMENTS
    plan = place(placements, CONFIG.towers)
    leaves = {
        f"adapters/{name}": np.ones(leaf.shape, np.float32) for name, leaf in names.flatten(plan.shapes()).items()
    }
    return SavedAdapter(
        leaves | {"heads/matching/kernel": np.ones((4, 1), np.float32)},
        {"placements": plan.describe(), "task": {"kind": "Matching"}},
        "small",
        "ab" * 32,
        {tower: shape._asdict() for tower, shape in CONFIG.towers.items()},
        step=3,
        version="1",
    )


class AdapterFile(Kind):
    """Our own file: a safetensors header with a description, and what the description comes to."""

    name, share = "adapter file", 260

    def seed(self) -> Files:
        adapter = small_adapter()
        return {"a.safetensors": save(dict(adapter.leaves), {HEADER: json.dumps(adapter.description)})}

    def mutated(self, random: Random) -> Files:
        return self._one(random, mutated_safetensors, "a.safetensors")

    def read(self) -> Any:
        path = self.folder / "a.safetensors"
        adapter_of(read_adapter_file(path))
        return checkpoints.summary(path)


class CheckpointMetadata(Kind):
    """What a checkpoint says of itself and of its files, before Orbax reads an array."""

    name, share = "checkpoint metadata", 120

    def seed(self) -> Files:
        leaves = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in small_adapter().leaves.items()}
        told = {"backbone": "small", "fingerprint": "ab", "adapters": dict(small_adapter().adapters), "step": 3}
        told |= {"version": "1", "leaves": leaves, "optimizer": {"0/count": [[], "int32"]}}
        array = bytes(400)
        sums = {"adapters/d/data": [len(array), hashlib.sha256(array).hexdigest()]}
        content = {"files": sums, "metadata": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}
        return {
            checksums.METADATA: json.dumps({"custom_metadata": told}).encode(),
            checksums.FILE: json.dumps(content).encode(),
            "adapters/d/data": array,
        }

    def mutated(self, random: Random) -> Files:
        return self._one(random, mutated_json, random.choice((checksums.METADATA, checksums.FILE)))

    def read(self) -> Any:
        folder = absolute(self.folder)
        checksums.problem(folder)  # who altered the metadata may have altered the sums, so that both are looked at
        try:
            metadata = Metadata.from_json(checksums.read(folder / checksums.METADATA)["custom_metadata"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(str(error)) from error
        check_size(folder, metadata)
        return metadata


class CheckpointFolder(Kind):
    """A checkpoint that Orbax wrote, whose sums are those of what was altered: what who sends one would do."""

    name, share = "checkpoint folder", 10

    def seed(self) -> Files:
        adapter, folder = small_adapter(), self.folder / "made"
        identity = Identity(adapter.backbone, adapter.fingerprint, adapter.adapters)
        save_adapters(folder, names.unflatten(dict(adapter.leaves)), identity, adapter.step)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        shutil.rmtree(folder)
        return files

    def mutated(self, random: Random) -> Files:
        name = random.choice([name for name in self.valid if name != checksums.FILE and self.valid[name]])
        files = self._one(random, mutated_json if self.valid[name].startswith(b"{") else mutated_bytes, name)
        try:
            told = json.loads(files[checksums.METADATA])["custom_metadata"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return files
        summed = {name: content for name, content in files.items() if name not in (checksums.FILE, checksums.METADATA)}
        sums = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in summed.items()}
        content = {"files": sums, "metadata": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}
        return files | {checksums.FILE: json.dumps(content).encode()}

    def read(self) -> Any:
        return load_adapters(self.folder)


class BackboneFolder(Kind):
    """A model in the hub's format: configuration, weights in one file or several with an index, picture settings."""

    name, share = "backbone folder", 60

    def seed(self) -> Files:
        tensors = dict(hub_tensors(names.unflatten(small_weights()), CONFIG))
        half = sorted(tensors)[: len(tensors) // 2]
        parts = [{n: t for n, t in tensors.items() if (n in half) == first} for first in (True, False)]
        placed = {name: f"model-0000{1 + (name not in half)}-of-00002.safetensors" for name in tensors}
        self.sharded = {f"model-0000{n}-of-00002.safetensors": save(part) for n, part in enumerate(parts, 1)}
        self.sharded[INDEX_NAME] = json.dumps({"metadata": {}, "weight_map": placed}).encode()
        pictures = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3}
        return {
            "config.json": json.dumps(config_to_hub(CONFIG)).encode(),
            "preprocessor_config.json": json.dumps(pictures | {"do_resize": True, "resample": 3}).encode(),
            WEIGHTS_NAME: save(tensors),
        }

    def mutated(self, random: Random) -> Files:
        kind = random.randrange(10)
        if kind < 5:
            return self._one(random, mutated_safetensors, WEIGHTS_NAME)
        if kind < 7:
            files = {n: content for n, content in self.valid.items() if n != WEIGHTS_NAME} | self.sharded
            return files | {INDEX_NAME: mutated_json(random, files[INDEX_NAME])}
        return self._one(random, mutated_json, "config.json" if kind < 9 else "preprocessor_config.json")

    def read(self) -> Any:
        return load_backbone(self.folder).image_processor


class PeftFolder(Kind):
    """A checkpoint of peft: ``adapter_config.json`` and its tensors."""

    name, share = "peft folder", 100

    def seed(self) -> Files:
        adapter = dataclasses.replace(
            small_adapter(), adapters={"placements": small_adapter().adapters["placements"][:1]},
            leaves={n: t for n, t in small_adapter().leaves.items() if n.startswith("adapters/lora/")},
        )  # fmt: skip
        folder = export_peft(self.folder / "made", adapter)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        return files

    def mutated(self, random: Random) -> Files:
        if random.random() < 0.6:
            return self._one(random, mutated_json, "adapter_config.json")
        return self._one(random, mutated_safetensors, "adapter_model.safetensors")

    def read(self) -> Any:
        checkpoints.summary(self.folder)
        return import_peft(self.folder, small_backbone())


@dataclasses.dataclass(frozen=True)
class Settings:
    """A configuration with fields of the kinds that experiments have."""

    preset: str = "default"
    data: OwnData = dataclasses.field(default_factory=OwnData)
    rates: tuple[float, ...] = (1e-3,)
    tasks: tuple[str, ...] = ("a", "b")
    steps: int = 10
    dtype: Literal["float32", "bfloat16"] = "float32"
    limit: int | None = None
    fast: bool = False


class Arguments(Kind):
    """The arguments of a launch."""

    name, share = "launch arguments", 10
    experiment = types.SimpleNamespace(PRESETS={"default": Settings(), "other": Settings("other", steps=3)})

    def seed(self) -> Files:
        arguments = ["--config.preset=other", "--config.steps=4", "--config.rates=1e-3,2e-3", "--config.limit=none"]
        arguments += ["--config.fast=true", "--config.data.columns.image=file", "--config.data.test_share", "0.2"]
        return {"arguments.json": json.dumps(arguments).encode()}

    def mutated(self, random: Random) -> Files:
        return self._one(random, mutated_json, "arguments.json")

    def read(self) -> Any:
        try:
            given = json.loads((self.folder / "arguments.json").read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError("no list of arguments") from error
        # A process's arguments are texts without NUL, whatever else.
        given = [str(one)[:20_000].replace("\0", "") for one in given] if isinstance(given, list) else [str(given)]
        return parse_config(self.experiment, [one for one in given if one not in ("--help", "-h")])
