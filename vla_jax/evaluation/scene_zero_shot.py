"""What a CLIP knows of generated scenes without training: classes, retrieval, and Winoground quadruples by tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vla_jax.backbones.clip import CLIP, normalise
from vla_jax.data.image import Preprocess
from vla_jax.data.scenes import CaptionWeights, SceneConfig, SceneSource
from vla_jax.data.scenes.vocabulary import CLASS_TEMPLATES, COLORS, SHAPES
from vla_jax.data.text import Tokenize
from vla_jax.evaluation import retrieval, statistics, winoground
from vla_jax.evaluation.statistics import Interval
from vla_jax.evaluation.zero_shot import class_features, cosines
from vla_jax.tasks.classification import class_texts

Encode = Callable[[Sequence[Any]], np.ndarray]
TAGS = ("Object", "Attribute", "Relation")
"""The kinds of quadruples, by Winoground's tags."""
_COLOR_NAMES = tuple(f"{color} object" for color in COLORS)
_SHAPE_TEXTS, _COLOR_TEXTS = (class_texts(names, CLASS_TEMPLATES) for names in (SHAPES, _COLOR_NAMES))


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot numbers on held-out scenes, each a fraction with its 95 % interval.

    Attributes:
        shape: accuracy of a single object's shape, of eight.
        color: accuracy of a single object's colour, of eight.
        image_to_text: recall at 1 of the full description of each picture.
        text_to_image: recall at 1 of the picture of each full description.
        candidates: descriptions, and pictures, that retrieval chooses from.
        group: group score of the quadruples by tag.
    """

    shape: Interval
    color: Interval
    image_to_text: Interval
    text_to_image: Interval
    candidates: int
    group: dict[str, Interval]

    def summary(self) -> dict[str, float]:
        """The estimates alone, by name."""
        found = {name: getattr(self, name).value for name in ("shape", "color", "image_to_text", "text_to_image")}
        return found | {f"group_{tag.lower()}": interval.value for tag, interval in self.group.items()}

    def gates(self) -> dict[str, bool]:
        """Whether each requirement on the embedded backbone holds; chance of a group score is one sixth."""
        return {
            "shape at least 90 %": self.shape.value >= 0.9,
            "color at least 98 %": self.color.value >= 0.98,
            "image to text at least 60 %": self.image_to_text.value >= 0.6,
            "text to image at least 60 %": self.text_to_image.value >= 0.6,
            "attribute group score above chance": self.group["Attribute"].low > winoground.CHANCE["group"],
        }


def clip_encoders(
    clip: CLIP, preprocess: Preprocess, tokenize: Tokenize, batch_size: int = 64
) -> Callable[[Any], tuple[Encode, Encode]]:
    """Compiles a CLIP's encoders once, for any parameters.

    Args:
        clip: the model.
        preprocess: makes pixels of pictures.
        tokenize: makes tokens of texts.
        batch_size: pictures, or texts, that are encoded at a time.

    Returns:
        A function from the parameters below ``backbone/`` to the encoders of pictures and of texts that
        :func:`zero_shot` takes.
    """
    image_program = jax.jit(lambda p, x: normalise(clip.apply({"params": p}, x).image_features))
    text_program = jax.jit(lambda p, x: normalise(clip.apply({"params": p}, None, x).text_features))

    def encode(program: Any, params: Any, rows: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            padded = np.concatenate([part, np.repeat(part[:1], batch_size - len(part), axis=0)])
            parts.append(np.asarray(program(params, padded))[: len(part)])
        return np.concatenate(parts)

    def encoders(params: Any) -> tuple[Encode, Encode]:
        return (
            lambda pictures: encode(image_program, params, np.stack([preprocess(p) for p in pictures])),
            lambda texts: encode(text_program, params, tokenize.batch(texts)[0]),
        )

    return encoders


@dataclass(frozen=True)
class Answers:
    """What is right, question by question; every array is bool [questions].

    Attributes:
        shape: of a single object.
        color: of a single object.
        image_to_text: the picture's own description scores strictly highest.
        text_to_image: the description's own picture scores strictly highest.
        quadruples: by tag, Winoground's text, image and group score of each.
    """

    shape: np.ndarray
    color: np.ndarray
    image_to_text: np.ndarray
    text_to_image: np.ndarray
    quadruples: dict[str, winoground.Outcomes]


@dataclass(frozen=True)
class SceneQuestions:
    """What a CLIP is asked about held-out scenes, drawn once for any number of models.

    Attributes:
        single: examples of single objects, whose shape and colour are asked for.
        described: examples with full descriptions, which are candidates for each other.
        quadruples: by tag, examples in Winoground's format.
    """

    single: Sequence[Mapping[str, Any]]
    described: Sequence[Mapping[str, Any]]
    quadruples: Mapping[str, Sequence[Mapping[str, Any]]]

    @classmethod
    def draw(
        cls,
        *,
        image_size: int,
        split: str,
        classes: int = 512,
        candidates: int = 256,
        quadruples: int = 400,
        seed: int = 1000,
    ) -> SceneQuestions:
        """Draws the questions; arguments as of :func:`zero_shot`."""

        def examples(kind: str, count: int, **settings: Any) -> list[dict[str, Any]]:
            source = SceneSource(split, kind, SceneConfig(seed=seed, image_size=image_size, **settings), length=count)
            return [source[index] for index in range(count)]

        return cls(
            examples("classes", classes),
            examples("captions", candidates, caption_weights=CaptionWeights(1, 0, 0, 0, 0)),
            {tag: examples("quadruples", quadruples, quadruple_tags=(tag,)) for tag in TAGS},
        )

    @property
    def pictures(self) -> list[np.ndarray]:
        """All pictures, uint8, in the order in which :meth:`judge` takes their features."""
        pairs = [example[f"image_{i}"] for drawn in self.quadruples.values() for example in drawn for i in (0, 1)]
        return [example["image"] for example in (*self.single, *self.described)] + pairs

    @property
    def texts(self) -> list[str]:
        """All texts, in the order in which :meth:`judge` takes their features."""
        pairs = [example[f"caption_{i}"] for drawn in self.quadruples.values() for example in drawn for i in (0, 1)]
        return [*_SHAPE_TEXTS, *_COLOR_TEXTS, *(example["caption"] for example in self.described), *pairs]

    def judge(self, images: np.ndarray, texts: np.ndarray) -> Answers:
        """What a model gets right.

        Args:
            images: normalised features of :attr:`pictures`, ``[pictures, projection]``.
            texts: normalised features of :attr:`texts`, ``[texts, projection]``.
        """
        pairs = [2 * len(drawn) for drawn in self.quadruples.values()]
        single, described, *pictures = _cut(images, [len(self.single), len(self.described), *pairs])
        shapes, colors, captions, *sentences = _cut(
            texts, [len(_SHAPE_TEXTS), len(_COLOR_TEXTS), len(self.described), *pairs]
        )

        def classify(of_names: np.ndarray, names: Sequence[str], label: str) -> np.ndarray:
            chosen = np.argmax(cosines(single, class_features(lambda _: of_names, names, CLASS_TEMPLATES)), axis=-1)
            return chosen == np.array([example[label] for example in self.single])

        similarity = described @ captions.T  # [pictures, descriptions]
        quadruples = {}
        for tag, seen, said in zip(self.quadruples, pictures, sentences, strict=True):
            two = (len(seen) // 2, 2, -1)
            scores = np.einsum("ncd,nid->nci", said.reshape(two), seen.reshape(two))
            quadruples[tag] = winoground.outcomes(scores)
        return Answers(
            shape=classify(shapes, SHAPES, "label"),
            color=classify(colors, _COLOR_NAMES, "color_label"),
            image_to_text=retrieval.ranks(similarity) == 0,
            text_to_image=retrieval.ranks(similarity.T) == 0,
            quadruples=quadruples,
        )


def _cut(rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Consecutive parts of so many rows each."""
    return np.split(rows, np.cumsum(counts)[:-1])


def zero_shot(
    encode_images: Encode,
    encode_texts: Encode,
    *,
    image_size: int,
    split: str,
    classes: int = 512,
    candidates: int = 256,
    quadruples: int = 400,
    seed: int = 1000,
) -> ZeroShot:
    """Measures a CLIP on one split.

    Args:
        encode_images: uint8 pictures to normalised features [pictures, projection].
        encode_texts: texts to normalised features [texts, projection].
        image_size: side of the pictures.
        split: the split of the scenes.
        classes: pictures of a single object.
        candidates: pairs for retrieval.
        quadruples: of each tag.
        seed: of the scenes.
    """
    questions = SceneQuestions.draw(
        image_size=image_size, split=split, classes=classes, candidates=candidates, quadruples=quadruples, seed=seed
    )
    answers = questions.judge(encode_images(questions.pictures), encode_texts(questions.texts))
    return ZeroShot(
        shape=statistics.accuracy(answers.shape),
        color=statistics.accuracy(answers.color),
        image_to_text=statistics.accuracy(answers.image_to_text),
        text_to_image=statistics.accuracy(answers.text_to_image),
        candidates=candidates,
        group={tag: statistics.accuracy(judged.group) for tag, judged in answers.quadruples.items()},
    )
