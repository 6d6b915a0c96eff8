"""Examples and predictions in words, by kind of task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vla_jax.data.builders.easy_vqa import QUESTION_KINDS
from vla_jax.reporting.page.maps import Pair
from vla_jax.task_kinds import TEXT_KEYS

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Wording:
    """How a kind of task is put into words.

    Attributes:
        kind: one of :data:`vla_jax.task_kinds.MEASURES`.
        names: what a prediction is a place in, where the task chooses from a list.
    """

    kind: str
    names: Sequence[str] = ()

    def text(self, example: Example) -> str:
        """What stands beside the picture; empty where nothing does."""
        key = "captions" if self.kind == "retrieval" and "captions" in example else TEXT_KEYS[self.kind]
        value = example.get(key, "")
        return words(value if isinstance(value, str | bytes) else value[0])

    def truth(self, example: Example) -> str:
        """The right answer; empty where it is no matter of words."""
        if self.kind == "matching":
            return "true" if int(example["label"]) else "false"
        if self.kind == "classification":
            return self.names[int(example["label"])]
        if self.kind == "vqa":
            answers = example["answers"] if "answers" in example else [example["answer"]]
            return " / ".join(dict.fromkeys(map(words, answers)))
        return ""

    def said(self, told: Mapping[str, Any]) -> tuple[str, str]:
        """A prediction, and the number behind it."""
        if "prediction" in told:
            place = int(told["prediction"])
            said = self.names[place] if place < len(self.names) else str(place)
            if "confidence" in told:
                return said, f"{float(told['confidence']):.0%}"
            return said, f"VQA accuracy {float(told['accuracy']):.2f}" if "accuracy" in told else ""
        if "iou" in told:
            return "", f"IoU {float(told['iou']):.2f}"
        if "score" in told:
            return "true" if told["score"] > 0 else "false", signed(float(told["score"]))
        ways = {"image_to_text": "caption", "text_to_image": "picture"}
        found = [name for field, name in ways.items() if told.get(field)]
        return f"found {' and '.join(found) or 'neither'}", ""

    def pictures(self, example: Example) -> list[Any]:
        """The pictures, as they are stored."""
        return [example["image_0"], example["image_1"]] if "image_0" in example else [example["image"]]

    def pairs(self, example: Example) -> list[Pair]:
        """What heat maps are made of: each picture with the text, or with the name of its class."""
        text = f"a photo of a {self.truth(example)}" if self.kind == "classification" else self.text(example)
        return [(picture, text) for picture in self.pictures(example)]

    def note(self, example: Example) -> str:
        """What kind of example it is."""
        if "swap" in example:
            return f"{words(example['swap'])} swapped, {int(example['objects'])} objects"
        if "secondary_tag" in example:
            return ", ".join(dict.fromkeys(words(example[key]) for key in ("tag", "secondary_tag") if key in example))
        kind = next((value for key, value in example.items() if key.endswith("_kind")), "")
        if not isinstance(kind, str | bytes):  # of easy-VQA, as a number
            kind = QUESTION_KINDS[int(kind)]
        return words(kind).replace("_", " ")


def words(value: Any) -> str:
    """A text of a stored example."""
    return value.decode() if isinstance(value, bytes) else str(value)


def signed(value: float) -> str:
    """A score with its sign."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
