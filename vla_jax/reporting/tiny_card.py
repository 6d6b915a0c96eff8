"""The card of the embedded backbone, written from what was run and measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.evaluation.scene_zero_shot import ZeroShot
from vla_jax.evaluation.statistics import Interval

_CHANCE = {"shape": 12.5, "color": 12.5, "group": 16.67}


def card(config: Mapping[str, Any], shape: CLIPConfig, found: ZeroShot, *, parameters: int, hours: float) -> str:
    """The card in Markdown.

    Args:
        config: the experiment's configuration as a dict.
        shape: the backbone's shape.
        found: zero-shot numbers of the exported weights on test scenes.
        parameters: of the backbone.
        hours: of training, evaluations left out.
    """
    recall = 100 / found.candidates
    rows = [
        ("shape of a single object, of 8", found.shape, _CHANCE["shape"]),
        ("colour of a single object, of 8", found.color, _CHANCE["color"]),
        (f"recall at 1, picture to full description, of {found.candidates}", found.image_to_text, recall),
        (f"recall at 1, full description to picture, of {found.candidates}", found.text_to_image, recall),
    ]
    rows += [(f"quadruples, {tag.lower()} swaps: group score", i, _CHANCE["group"]) for tag, i in found.group.items()]
    table = "\n".join(f"| {name} | {_per_cent(interval)} | {chance:.1f} |" for name, interval, chance in rows)
    steps = "\n".join(_phase(phase, 2 * config["pairs"]) for phase in config["phases"])
    device = jax.devices()[0]
    accelerators = f"{jax.device_count()} {device.device_kind}"
    hardware = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else accelerators
    sizes = f"{shape.image_size} px, patches of {shape.patch_size} px", f"{shape.context_length} tokens"
    twins = f"{100 * config['twin_share']:.0f} %"
    seeds = f"{config['seed']} to {config['seed'] + len(config['phases']) - 1}"
    return f"""# tiny: a small CLIP for generated scenes

A plain CLIP in the hub's format, {parameters / 1e6:.1f} million parameters in float16, made for tests and for
experiments on a laptop. It knows generated scenes of simple objects and the words about them, nothing of photographs.

| | image tower | text tower |
| --- | --- | --- |
| width, depth, heads | {_tower(shape.vision)} | {_tower(shape.text)} |
| input | {sizes[0]} | {sizes[1]} |
| vocabulary | | {shape.vocabulary_size} tokens: whole words |

Joint space: {shape.projection} dimensions. Pictures of another size are resized by the image processor.

## Zero-shot numbers

On scenes of the test split, whose contents do not occur in training; per cent with 95 % interval, measured on the
exported float16 weights.

| | measured | chance |
| --- | --- | --- |
{table}

## Data

Scenes of the package's generator (`vla_jax.data.scenes`), training split, seeds {seeds}: pictures of one to five
objects of eight shapes, eight colours, two sizes and four textures on a 3 x 3 grid, with captions: full descriptions,
short ones, relations, counts, and questions with their answers. No scene is seen twice.

## Recipe

Not contrastive learning alone. The generator's annotations are exact, and supervise both towers densely:

- every patch token predicts, by a linear head, shape, colour, size and texture of the object in its cell;
- the image's feature and the text's feature predict, by shared linear heads, these attributes for every cell, which
  attribute values some object has together, which shapes and colours lie left of and above which, and how many objects
  have each shape and each colour;
- symmetric InfoNCE between images and texts, where {twins} of the pairs have a twin in the batch that
  differs by one swap.

The heads were thrown away afterwards. Patches are aligned with the cells of the grid, which makes learning fast and
means that objects elsewhere, or much larger than a cell, are less well known. Phases, with AdamW (weight decay
{config["weight_decay"]}) and cosine schedules:

{steps}

The phases' lengths were chosen while looking at the validation split, never at the test split. All settings are in
`pretraining.json`, the losses and the validation numbers along the way in `training_log.jsonl`.

## Making it again

    python launch.py --experiment=pretrain_tiny --workdir=runs/tiny

leaves this folder in `runs/tiny/tiny`. It took {hours:.1f} hours of training on {hardware} that other work shared.
"""


def _per_cent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _tower(tower: Any) -> str:
    return f"{tower.width}, {tower.depth}, {tower.heads}"


def _phase(phase: Mapping[str, Any], images: int) -> str:
    towers = [name for name in ("image", "text") if phase[f"{name}s"]]
    what = "both towers" if len(towers) == 2 else f"the {towers[0]} tower alone"
    line = (
        f"- `{phase['name']}`: {phase['steps']} steps of {images} pictures, {what}, up to {phase['max_objects']} "
        f"objects, peak learning rate {phase['learning_rate']}"
    )
    shares = ", ".join(f"{kind} {weight:g}" for kind, weight in phase["captions"].items())
    return f"{line}; captions: {shares}" if phase["texts"] else line
