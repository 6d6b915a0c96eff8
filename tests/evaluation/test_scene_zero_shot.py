import numpy as np
import pytest

from vla_jax.data.scenes import CaptionWeights, SceneConfig, SceneSource
from vla_jax.data.scenes.vocabulary import COLORS, SHAPES
from vla_jax.evaluation.scene_zero_shot import zero_shot

SIZES = {"image_size": 32, "split": "test", "classes": 40, "candidates": 24, "quadruples": 12, "seed": 5}
TAGS = ("Object", "Attribute", "Relation")


class Oracle:
    """Knows every picture and every text by heart, from the same sources."""

    def __init__(self, attribute_swaps: bool):
        self.pictures, self.texts = {}, {}
        for example in self._source("classes", 40):
            code = np.zeros(400)
            code[example["label"]] = code[8 + example["color_label"]] = 1
            self.pictures[example["image"].tobytes()] = code
        pairs = [(e["image"], e["caption"]) for e in self._source("captions", 24, (1, 0, 0, 0, 0))]
        for tag in TAGS if attribute_swaps else TAGS[::2]:
            quadruples = self._source("quadruples", 12, tags=(tag,))
            pairs += [(e[f"image_{i}"], e[f"caption_{i}"]) for e in quadruples for i in (0, 1)]
        for number, (image, caption) in enumerate(pairs):
            self.pictures[image.tobytes()] = self.texts[caption] = np.eye(400)[16 + number]

    def _source(self, kind, count, weights=(1, 1, 1, 1, 1), tags=TAGS):
        config = SceneConfig(seed=5, image_size=32, caption_weights=CaptionWeights(*weights), quadruple_tags=tags)
        source = SceneSource("test", kind, config, length=count)
        return [source[index] for index in range(count)]

    def encode_images(self, pictures):
        codes = np.stack([self.pictures.get(picture.tobytes(), np.eye(400)[-1]) for picture in pictures])
        return codes / np.linalg.norm(codes, axis=-1, keepdims=True)

    def encode_texts(self, texts):
        names = {name: index for index, name in enumerate(SHAPES)}
        names |= {f"{name} object": 8 + index for index, name in enumerate(COLORS)}

        def code(text):
            if text in self.texts:
                return self.texts[text]
            found = [index for name, index in names.items() if text.endswith(name)]
            return np.eye(400)[found[0] if found else -1]

        return np.stack([code(text) for text in texts])


def test_an_oracle_gets_everything_right():
    oracle = Oracle(attribute_swaps=True)
    found = zero_shot(oracle.encode_images, oracle.encode_texts, **SIZES)
    assert set(found.summary().values()) == {1.0}
    assert all(found.gates().values())
    assert (found.shape.low, found.candidates) == (pytest.approx(0.912, abs=1e-3), 24)  # Wilson's interval of 40 of 40


def test_who_does_not_know_attribute_swaps_fails_there_alone():
    oracle = Oracle(attribute_swaps=False)
    found = zero_shot(oracle.encode_images, oracle.encode_texts, **SIZES)
    assert (found.group["Attribute"].value, found.group["Object"].value, found.group["Relation"].value) == (0, 1, 1)
    assert [name for name, passed in found.gates().items() if not passed] == ["attribute group score above chance"]


def test_a_constant_finds_nothing():
    constant = lambda given: np.ones((len(given), 4)) / 2  # noqa: E731
    found = zero_shot(constant, constant, **SIZES)
    assert found.image_to_text.value == found.text_to_image.value == 0
    assert {interval.value for interval in found.group.values()} == {0}
    assert not any(found.gates().values())
