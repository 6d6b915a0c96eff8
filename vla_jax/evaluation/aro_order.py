"""ARO's order sets (Yuksekgonul et al. 2023, section 2.2): a caption among four with its words in another order.

The sets are made of the captions of COCO or Flickr30k (Karpathy's split, as BLIP's files ``coco_karpathy_test.json``
and ``flickr30k_test.json`` have it: a list with ``image`` and a list ``caption``), one example a caption. The four
others exchange, at random: nouns among themselves and adjectives among themselves; all words but these; the words
within each three; the threes. The authors draw anew in each run; here an example's words are a function of seed and
place.

A shuffle may give the caption itself, in a short one most often. That is a tie and fails here; the authors' metric, by
which the first of equal scores wins, counts it as right, and gives a constant scorer 100 %. Compare with their numbers
only after adding the ties.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.image import read_picture
from vla_jax.errors import UserError
from vla_jax.evaluation import choices
from vla_jax.evaluation.annotations import check_pictures, fields, picture_below, read_json
from vla_jax.evaluation.choices import Accuracy
from vla_jax.foreign import shown

RIGHT = 0
MOST_WORDS = 30
Tag = Callable[[str], Sequence[tuple[str, str]]]
_NOUNS = ("NN", "NNS", "NNP", "NNPS")
_ADJECTIVES = ("JJ", "JJR", "JJS")
_DOWNLOAD = (
    "It is one of coco_karpathy_test.json and flickr30k_test.json from "
    "https://storage.googleapis.com/sfr-vision-language-research/datasets/, beside the pictures that it names."
)


def cleaned(caption: str) -> str:
    """A caption in lower case, without ``. ! " ( ) * # : ; ~``, cut to 30 words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()[:MOST_WORDS])


def shuffles(tagged: Sequence[tuple[str, str]], generator: np.random.Generator) -> tuple[str, str, str, str]:
    """The four captions in another order.

    Args:
        tagged: words and punctuation of a caption with their Penn Treebank tags.
        generator: of the order.
    """
    words = [word for word, _ in tagged]
    nouns, adjectives = ([at for at, (_, tag) in enumerate(tagged) if tag in tags] for tags in (_NOUNS, _ADJECTIVES))
    rest = [at for at in range(len(words)) if at not in nouns and at not in adjectives]

    def exchanged(*groups: Sequence[int]) -> str:
        result = list(words)
        for group in groups:
            for at, other in zip(group, generator.permutation(group), strict=True):
                result[at] = words[int(other)]
        return " ".join(result)

    threes = [range(start, min(start + 3, len(words))) for start in range(0, len(words), 3)]
    order = [at for number in generator.permutation(len(threes)) for at in threes[int(number)]]
    return exchanged(nouns, adjectives), exchanged(rest), exchanged(*threes), " ".join(words[at] for at in order)


class OrderSet:
    """The examples by position: ``id``, ``image`` (bytes), ``image_id``, ``captions`` (five, the right one first).

    Args:
        annotations: the JSON file.
        images: the folder that its ``image`` paths start from.
        tag: splits a text into words with their Penn Treebank tags. The authors' is spaCy's ``en_core_web_sm``:
            ``lambda text: [(token.text, token.tag_) for token in nlp(text)]``.
        seed: of the words' order.

    Raises:
        UserError: a file or picture is not there, with what to download, or an example is damaged.
    """

    def __init__(self, annotations: str | Path, images: str | Path, tag: Tag, seed: int = 0):
        self.tag, self.seed = tag, seed
        content = read_json(annotations, _DOWNLOAD)
        if not isinstance(content, list) or not content:
            raise UserError(f"{annotations}: not a list of pictures with their captions. {_DOWNLOAD}")
        self.examples: list[tuple[Path, str]] = []
        for number, entry in enumerate(content):
            where = f"{annotations}, entry {number}"
            image, captions = fields(entry, {"image": str, "caption": list}, where)
            if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
                raise UserError(f"{where}: caption is {shown(captions)}, not a list of texts")
            path = picture_below(Path(images), image, where)
            self.examples += [(path, caption) for caption in captions]
        named = ((f"caption {number} of {annotations}", image) for number, (image, _) in enumerate(self.examples))
        check_pictures(named, f"Pictures are looked for in {images}. {_DOWNLOAD}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        image, caption = self.examples[position]
        others = shuffles(self.tag(caption), np.random.default_rng([self.seed, position]))
        return {
            "id": str(position),
            "image": read_picture(image),
            "image_id": image.name,
            "captions": tuple(map(cleaned, (caption, *others))),
        }


def evaluate(source: OrderSet, scores: np.ndarray) -> Accuracy:
    """The share of captions that score strictly above all four shuffles; the interval draws pictures.

    Args:
        source: the set.
        scores: float [examples, 5] or [seeds, examples, 5], the right caption first.
    """
    return choices.evaluate(scores, RIGHT, np.array([str(image) for image, _ in source.examples]))
