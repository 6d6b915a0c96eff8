"""What a CLIP knows of generated scenes without training: classes, retrieval, and Winoground quadruples by tag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Encode = Callable[[Sequence[Any]], np.ndarray]


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

    def examples(kind: str, count: int, **settings: Any) -> list[dict[str, Any]]:
        source = SceneSource(split, kind, SceneConfig(seed=seed, image_size=image_size, **settings), length=count)
        return [source[index] for index in range(count)]

    single = examples("classes", classes)
    features = encode_images([example["image"] for example in single])

    def classify(names: Sequence[str], label: str) -> Interval:
        chosen = np.argmax(cosines(features, class_features(encode_texts, names, CLASS_TEMPLATES)), axis=-1)
        return statistics.accuracy(chosen == np.array([example[label] for example in single]))

    full = examples("captions", candidates, caption_weights=CaptionWeights(1, 0, 0, 0, 0))
    similarity = encode_images([e["image"] for e in full]) @ encode_texts([e["caption"] for e in full]).T
    recall = retrieval.recall(similarity, at=(1,))

    group = {}
    for tag in ("Object", "Attribute", "Relation"):
        drawn = examples("quadruples", quadruples, quadruple_tags=(tag,))
        images = encode_images([e[f"image_{i}"] for e in drawn for i in (0, 1)]).reshape(quadruples, 2, -1)
        texts = encode_texts([e[f"caption_{i}"] for e in drawn for i in (0, 1)]).reshape(quadruples, 2, -1)
        group[tag] = winoground.evaluate(np.einsum("ncd,nid->nci", texts, images)).group

    return ZeroShot(
        shape=classify(SHAPES, "label"),
        color=classify([f"{color} object" for color in COLORS], "color_label"),
        image_to_text=recall.image_to_text[1],
        text_to_image=recall.text_to_image[1],
        candidates=candidates,
        group=group,
    )
