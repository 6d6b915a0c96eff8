"""SugarCrepe (Hsieh et al. 2023): a caption of a COCO picture against one with another object, attribute or relation.

Published layout (https://github.com/RAIVNLab/sugar-crepe): ``data/<category>.json``, each an object of examples by
number with ``filename``, ``caption`` and ``negative_caption``; pictures from COCO's val2017. The metric is the share of
examples whose caption scores strictly above the negative one, by category.

Published for CLIP ViT-B/32, in per cent: replace object, attribute, relation 90.92, 80.08, 69.20; swap object,
attribute 61.38, 63.96; add object, attribute 77.21, 68.79. Over the examples of each kind of change that is 80.76,
63.27, 75.09; most of the gain of "compositional" training is that of plain fine-tuning (84.76, 70.83, 85.58 against
NegCLIP's 85.36, 75.33, 87.29), so a plainly fine-tuned model belongs beside every result. ``swap_obj.json`` has lost an
example since: 61.38 is 151 of 246, and there are 245.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.image import read_picture
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation import choices
from vla_jax.evaluation.annotations import check_pictures, fields, picture_below, read_json
from vla_jax.evaluation.choices import Accuracy
from vla_jax.foreign import shown

CATEGORIES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CHANGES = ("add", "replace", "swap")
RIGHT = 0
_DOWNLOAD = (
    "Clone https://github.com/RAIVNLab/sugar-crepe for {annotations}/<category>.json, and unpack "
    "http://images.cocodataset.org/zips/val2017.zip so that {images}/000000000139.jpg exists."
)


@dataclass(frozen=True)
class Example:
    """One caption with its negative, of a category, about the picture of this file name."""

    identifier: str
    category: str
    filename: str
    captions: tuple[str, str]


class SugarCrepe:
    """The examples by position, category after category: ``id``, ``image`` (bytes), ``image_id``, ``captions``.

    ``kind`` is the category. The right caption stands first.

    Args:
        annotations: the folder of the seven JSON files.
        images: COCO's ``val2017``.
        categories: which to read, of :data:`CATEGORIES`.

    Raises:
        UserError: an unknown category; a file or picture is not there, with what to download; an example is damaged.
    """

    def __init__(self, annotations: str | Path, images: str | Path, categories: Sequence[str] = CATEGORIES):
        self.images = Path(images)
        download = _DOWNLOAD.format(annotations=annotations, images=images)
        self.examples: list[Example] = []
        for category in categories:
            if category not in CATEGORIES:
                raise unknown("category of SugarCrepe", category, CATEGORIES)
            self.examples += _read(Path(annotations) / f"{category}.json", category, self.images, download)
        if not self.examples:
            raise UserError(f"no category of SugarCrepe was asked for; there are {', '.join(CATEGORIES)}")
        check_pictures(((f"example {e.identifier}", self.images / e.filename) for e in self.examples), download)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self.examples[position]
        return {
            "id": example.identifier,
            "image": read_picture(self.images / example.filename),
            "image_id": example.filename,
            "captions": example.captions,
            "kind": example.category,
        }


def _read(path: Path, category: str, images: Path, download: str) -> list[Example]:
    content = read_json(path, download)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: not an object of examples by number. {download}")
    examples = []
    for key, entry in content.items():
        names = {"filename": str, "caption": str, "negative_caption": str}
        where = f"{path}, example {shown(key)}"
        filename, caption, negative = fields(entry, names, where)
        picture_below(images, filename, where)
        examples.append(Example(f"{category}/{key}", category, filename, (caption, negative)))
    return examples


def evaluate(examples: Sequence[Example], scores: np.ndarray) -> dict[str, Accuracy]:
    """The accuracy of every category, and of all examples of each kind of change.

    Args:
        examples: of :class:`SugarCrepe`.
        scores: float [examples, 2 captions] or [seeds, examples, 2], the right caption first.

    Returns:
        By category, and by ``add``, ``replace`` and ``swap``; those without examples are left out. Intervals draw
        pictures, since many of them have several examples.
    """
    category = np.array([example.category for example in examples])
    change = np.array([example.category.split("_")[0] for example in examples])
    groups = {name: np.flatnonzero(category == name) for name in CATEGORIES}
    groups |= {name: np.flatnonzero(change == name) for name in CHANGES}
    pictures = np.array([example.filename for example in examples])
    return choices.evaluate_groups(scores, RIGHT, {name: at for name, at in groups.items() if at.size}, pictures)
