"""The eleven data sets on which few-shot methods for CLIP are compared, from TFDS or in their published splits.

Published figures (CoOp, CoCoOp, Tip-Adapter, MaPLe, CLIP-LoRA, ...) are on the splits that CoOp's authors fixed
(Zhou et al. 2022), which the data set ``few_shot`` of :mod:`vla_jax.data.builders` reads from a folder:
``load_source("few_shot", "train", data_dir, config="dtd", manual_dir=folder)``. TFDS divides most of these sets
otherwise and has neither FGVCAircraft nor UCF101's frames (it has the videos), so figures on its splits compare with
each other only.

None of TFDS's builders of these sets downloads and unpacks without TensorFlow, but all that it has prepared as
array_record are read without it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from vla_jax.data.sources import split_range
from vla_jax.data.stages import Source
from vla_jax.errors import UserError, unknown


def _spaces(name: str) -> str:
    return name.replace("_", " ")


def _year_first(name: str) -> str:
    words = name.split(" ")
    return " ".join([words[-1], *words[:-1]])


def _place(name: str) -> str:
    # "/b/badminton_court/indoor" is an indoor badminton court.
    return _spaces(" ".join(reversed(name.split("/")[2:])))


_LAND = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


@dataclass(frozen=True)
class FewShotSet:
    """One of the eleven data sets.

    Attributes:
        name: as papers call it.
        template: CoOp's prompt for zero-shot CLIP, with ``{}`` for the class name (CoOp, ``trainers/zsclip.py``).
        tfds: its name in TFDS, with a configuration behind a slash; None if TFDS has no pictures of it.
        splits: by split of ours, the one of TFDS; those that TFDS does not have are left out.
        class_name: makes words of a label's name in TFDS; None where it is a number that has to be looked up.
        image: the field of TFDS with the picture.
        label: the field of TFDS with the label.
        folder: the folder of its files as CoOp's ``DATASETS.md`` lays them out; empty for ImageNet, which has no list.
        pictures: the folder in it below which lists name pictures; empty for the folder itself.
    """

    name: str
    template: str
    tfds: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    class_name: Callable[[str], str] | None = _spaces
    image: str = "image"
    label: str = "label"
    folder: str = ""
    pictures: str = ""

    def prompts(self, class_names: Sequence[str]) -> list[str]:
        """CoOp's prompt of each class."""
        return [self.template.format(_spaces(name)) for name in class_names]


_TWO = {"train": "train", "test": "test"}
_THREE = {"train": "train", "validation": "validation", "test": "test"}
# The validation pictures are what everybody tests on.
_TESTED_ON_VALIDATION = {"train": "train", "test": "validation"}
_PHOTO = "a photo of a {}."

FEW_SHOT_SETS: Mapping[str, FewShotSet] = {
    "imagenet": FewShotSet("ImageNet", _PHOTO, "imagenet2012", _TESTED_ON_VALIDATION, class_name=None),
    "caltech101": FewShotSet(
        "Caltech101", _PHOTO, "caltech101", _TWO, folder="caltech-101", pictures="101_ObjectCategories"
    ),
    "oxford_pets": FewShotSet(
        "OxfordPets",
        "a photo of a {}, a type of pet.",
        "oxford_iiit_pet",
        _TWO,
        folder="oxford_pets",
        pictures="images",
    ),
    "stanford_cars": FewShotSet("StanfordCars", _PHOTO, "cars196", _TWO, _year_first, folder="stanford_cars"),
    "flowers102": FewShotSet(
        "OxfordFlowers",
        "a photo of a {}, a type of flower.",
        "oxford_flowers102",
        _THREE,
        folder="oxford_flowers",
        pictures="jpg",
    ),
    "food101": FewShotSet(
        "Food101",
        "a photo of {}, a type of food.",
        "food101",
        _TESTED_ON_VALIDATION,
        folder="food-101",
        pictures="images",
    ),
    "fgvc_aircraft": FewShotSet(
        "FGVCAircraft", "a photo of a {}, a type of aircraft.", folder="fgvc_aircraft", pictures="images"
    ),
    "sun397": FewShotSet("SUN397", _PHOTO, "sun397/tfds", _THREE, _place, folder="sun397", pictures="SUN397"),
    "dtd": FewShotSet("DescribableTextures", "{} texture.", "dtd", _THREE, folder="dtd", pictures="images"),
    "eurosat": FewShotSet(
        "EuroSAT",
        "a centered satellite photo of {}.",
        "eurosat/rgb",
        {"train": "train"},
        _LAND.__getitem__,
        folder="eurosat",
        pictures="2750",
    ),
    "ucf101": FewShotSet("UCF101", "a photo of a person doing {}.", folder="ucf101", pictures="UCF-101-midframes"),
}
"""The eleven by name."""


TFDS_NAMES: Mapping[str, str] = {of.tfds.partition("/")[0]: name for name, of in FEW_SHOT_SETS.items() if of.tfds}
"""By what TFDS calls a data set, its name here."""


def few_shot_set(name: str) -> FewShotSet:
    """One of the eleven.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in FEW_SHOT_SETS:
        raise unknown("few-shot data set", name, FEW_SHOT_SETS)
    return FEW_SHOT_SETS[name]


class Classified:
    """Examples of TFDS with the names of fields that all parts share: ``image``, ``label`` and ``class_name``.

    Attributes:
        class_names: by label.
        origin: TFDS's name of the data set, with configuration and version.
        split: the split of TFDS that they are of.
        start: the first of its examples that is here.
        stop: the first behind them.
    """

    def __init__(
        self, source: Source, class_names: Sequence[str], of: FewShotSet, origin: str, taken: tuple[str, int, int]
    ):
        self.class_names, self.origin = tuple(class_names), origin
        self.split, self.start, self.stop = taken
        self._source, self._image, self._label = source, of.image, of.label

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The picture's file as bytes, its label as an int, and the class in words."""
        example = self._source[index]
        label = int(example[self._label])
        return {"image": example[self._image], "label": label, "class_name": self.class_names[label]}


def load_tfds_few_shot(
    name: str, split: str, data_dir: str | Path, class_names: str | Path | None = None
) -> Classified:
    """A split of a few-shot data set that TFDS has prepared as array_record; TensorFlow is not needed to read it.

    Args:
        name: a name from :data:`FEW_SHOT_SETS`.
        split: ``train``, ``validation`` or ``test``, or a slice of one.
        data_dir: TFDS's folder.
        class_names: a file with one class a line, a label of TFDS and its name, such as ``n01440764 tench``. ImageNet
            needs it (CoOp's ``classnames.txt`` is one); others have names without.

    Raises:
        UserError: if TFDS does not have the data set or the split, has not prepared it, or class names are missing.
    """
    of = few_shot_set(name)
    if of.tfds is None:
        raise UserError(
            f"TFDS has no pictures of {of.name}; read its published files: the data set 'few_shot' with the "
            f"configuration {name!r}"
        )
    base = split.split("[")[0]
    if base not in of.splits:
        raise unknown(f"split of {of.name} in TFDS", base, of.splits)
    folder = Path(data_dir).expanduser()
    builder = tfds.builder(of.tfds, data_dir=str(folder))
    prepare = f"tfds build {of.tfds} --file_format=array_record --data_dir={shlex.quote(str(folder))}"
    if not builder.is_prepared():
        first = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
        published = f". Or give a manual_dir with CoOp's files of it, which lie in {of.folder}" if of.folder else ""
        raise UserError(
            f"{of.name} ({of.tfds}) is not in {builder.data_dir}, and nothing is downloaded. TFDS prepares it where "
            f"TensorFlow is installed, and nothing of that is needed here afterwards. There, run: {prepare}"
            f"{published}{'. What that needs first: ' + first if first else ''}"
        )
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{builder.data_dir} is in the format {builder.info.file_format.value}, which only TensorFlow reads. Where "
            f"that is installed, run: {prepare} --overwrite"
        )
    theirs = of.splits[base] + split[len(base) :]
    taken = (of.splits[base], *split_range(theirs, builder.info.splits[of.splits[base]].num_examples))
    names = _class_names(of, builder.info.features[of.label].names, class_names)
    encoded = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    source = builder.as_data_source(split=theirs, decoders=encoded)
    return Classified(source, names, of, builder.info.full_name, taken)


def _class_names(of: FewShotSet, labels: Sequence[str], file: str | Path | None) -> list[str]:
    if file is None:
        if of.class_name is None:
            raise UserError(
                f"labels of {of.name} in TFDS are numbers ({labels[0]}); give class_names, a file with one class a "
                f"line, such as '{labels[0]} tench'"
            )
        return [of.class_name(label) for label in labels]
    file = Path(file).expanduser()
    if not file.is_file():
        raise UserError(f"the file of class names {file} does not exist")
    named = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        label, _, name = line.strip().partition(" ")
        if label and not name.strip():
            raise UserError(f"{file}, row {number}: expected a label and a class name; found {line!r}")
        if label in named:
            raise UserError(f"{file}, row {number}: the label {label!r} stands twice")
        if label:
            named[label] = name.strip()
    if missing := [label for label in labels if label not in named]:
        raise UserError(f"{file} has no name for {len(missing)} of {len(labels)} classes of {of.name}: {missing[:3]}")
    return [named[label] for label in labels]
