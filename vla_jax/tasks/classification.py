"""Classification: one of several classes, such as the answer to a question on a picture, by softmax cross-entropy.

Three heads, from none to many trained weights: :class:`ZeroShotClassification` compares a picture with texts that name
the classes, :class:`PrototypeClassification` with one learned feature a class, :class:`Classification` is a linear map.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from vla_jax.backbones.clip import CLIPOutput, normalise
from vla_jax.data.text import Tokenize
from vla_jax.errors import UserError
from vla_jax.names import Tree
from vla_jax.tasks.heads import apply_linear, linear_head, masked_mean, pair_features

Batch = Mapping[str, jax.Array]


class _Classifier(abc.ABC):
    """What all of them do with their logits."""

    @abc.abstractmethod
    def logits(self, head: Tree, output: CLIPOutput, batch: Batch) -> Float[Array, "batch classes"]:
        """One logit a class."""

    def loss(self, head: Tree, output: CLIPOutput, batch: Batch) -> tuple[Float[Array, ""], dict]:
        """Mean cross-entropy over the global batch, and accuracy."""
        logits = self.logits(head, output, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
        valid = batch.get("valid")
        return masked_mean(losses, valid), {"accuracy": masked_mean(right, valid)}

    def predict(self, head: Tree, output: CLIPOutput, batch: Batch) -> dict[str, jax.Array]:
        """The likeliest class and whether it is right, its probability, and whether the right one is among five.

        Returns:
            ``prediction`` int32, ``correct`` bool, ``confidence`` float32 and ``top_5`` bool, ``[batch]`` each; see
            :mod:`vla_jax.evaluation.calibration`.
        """
        logits, label = self.logits(head, output, batch), batch["label"]
        prediction = jnp.argmax(logits, -1).astype(jnp.int32)
        return {
            "prediction": prediction,
            "correct": prediction == label,
            "confidence": jax.nn.softmax(logits.astype(jnp.float32)).max(-1),
            "top_5": within(logits, label, 5),
        }

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The predictions themselves: each stands for its own example."""
        return dict(found)


@dataclasses.dataclass(frozen=True)
class Classification(_Classifier):
    """A linear classifier on both towers' features, or on those of the one that there is.

    Attributes:
        name: the head's name, ``heads/<name>/classifier``.
        classes: number of classes.
    """

    name: str
    classes: int

    def __post_init__(self):
        _check_classes(self.classes)

    def init(self, features: int) -> dict[str, Tree]:
        """The head for this many features."""
        return {"classifier": linear_head(features, self.classes)}

    def logits(self, head: Tree, output: CLIPOutput, batch: Batch | None = None) -> Float[Array, "batch classes"]:
        """One logit a class."""
        del batch
        return apply_linear(head["classifier"], pair_features(output))


@dataclasses.dataclass(frozen=True)
class PrototypeClassification(_Classifier):
    """Pictures compared with one learned feature a class by their cosine; trained for models shown pictures alone.

    Attributes:
        name: the head's name, ``heads/<name>/prototypes`` and ``.../log_scale``.
        classes: number of classes.
    """

    name: str
    classes: int

    def __post_init__(self):
        _check_classes(self.classes)

    def init(self, features: int) -> dict[str, jax.Array]:
        """Directions drawn once and for all; :meth:`from_examples` gives better ones."""
        drawn = np.random.default_rng(0).standard_normal((self.classes, features))
        return {"prototypes": jnp.asarray(drawn, jnp.float32), "log_scale": jnp.zeros((), jnp.float32)}

    def from_examples(
        self, features: Float[np.ndarray, "examples width"], labels: Int[np.ndarray, "examples"]
    ) -> dict[str, jax.Array]:
        """The head whose prototypes are the classes' mean features (Snell et al. 2017, equation 1)."""
        found = prototypes(features, labels, self.classes)
        return {"prototypes": jnp.asarray(found, jnp.float32), "log_scale": jnp.zeros((), jnp.float32)}

    def logits(self, head: Tree, output: CLIPOutput, batch: Batch | None = None) -> Float[Array, "batch classes"]:
        """Scaled cosines."""
        del batch
        factor = jnp.exp(head["log_scale"]) * output.scale
        return factor * normalise(output.image_features) @ normalise(head["prototypes"]).T


@dataclasses.dataclass(frozen=True)
class PictureFeatures:
    """No classifier yet: pictures' features beside their labels, of which a head can be made before training."""

    name: str = "picture_features"

    def init(self, features: int) -> dict[str, Tree]:
        """A head without parameters."""
        del features
        return {}

    def loss(self, head: Tree, output: CLIPOutput, batch: Batch) -> tuple[Float[Array, ""], dict]:
        """There is nothing to be trained."""
        raise UserError("features are not trained; train a classifier on them")

    def predict(self, head: Tree, output: CLIPOutput, batch: Batch) -> dict[str, jax.Array]:
        """``features`` float32 ``[batch, width]`` and ``label`` int32 ``[batch]``."""
        del head
        return {"features": output.image_features.astype(jnp.float32), "label": batch["label"]}

    def finish(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The features themselves."""
        return dict(found)


@dataclasses.dataclass(frozen=True)
class ZeroShotClassification(_Classifier):
    """Pictures compared with texts that name the classes (Radford et al. 2021, section 3.1); adapters may be trained.

    A class's feature is the mean of its texts' normalised features, normalised again. The texts are encoded with each
    batch, by the adapted text tower; where nothing in it is trained, a comparison encodes them once for all steps
    (:meth:`vla_jax.model.AdaptedModel.encoded_as`).

    Attributes:
        name: the head's name, ``heads/<name>/log_scale``: the logarithm of a factor on the backbone's scale.
        tokens: of each class's texts, class by class, as many each; ids padded to one length.
        lengths: of each of these, how many ids are not padding.
        classes: number of classes.
    """

    name: str
    tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    classes: int

    def __post_init__(self):
        _check_classes(self.classes)
        if not self.tokens or len(self.tokens) % self.classes or len(self.tokens) != len(self.lengths):
            raise UserError(
                f"each of {self.classes} classes needs as many texts as the others; got {len(self.tokens)} texts and "
                f"{len(self.lengths)} lengths"
            )

    @classmethod
    def of_names(
        cls, name: str, classes: Sequence[str], templates: Sequence[str], tokenize: Tokenize
    ) -> ZeroShotClassification:
        """The task of telling named classes apart.

        Args:
            name: the head's name.
            classes: the classes' names, in the order of labels.
            templates: sentences with ``{}`` where the name stands; several make an ensemble.
            tokenize: makes tokens.

        Raises:
            UserError: for two classes of one name, no template, or one without a place for the name.
        """
        tokens, masks = tokenize.batch(class_texts(classes, templates))
        return cls(name, tuple(map(tuple, tokens.tolist())), tuple(masks.sum(1).tolist()), len(classes))

    @property
    def texts(self) -> tuple[Int[np.ndarray, "texts length"], Bool[np.ndarray, "texts length"]]:
        """Tokens and mask of all classes' texts; see :class:`vla_jax.model.Task`."""
        tokens = np.array(self.tokens, np.int32)
        return tokens, np.arange(tokens.shape[1]) < np.array(self.lengths)[:, None]

    def init(self, features: int) -> dict[str, jax.Array]:
        """The head, which does not depend on the features' width."""
        del features
        return {"log_scale": jnp.zeros((), jnp.float32)}

    def logits(self, head: Tree, output: CLIPOutput, batch: Batch) -> Float[Array, "batch classes"]:
        """Scaled cosines of each picture with each class."""
        image, text = output.image_features, output.text_features
        if image is None or text is None:
            raise UserError("zero-shot classification compares pictures with texts; show the model both modalities")
        text = normalise(normalise(text).reshape(-1, len(self.tokens) // self.classes, text.shape[-1]).mean(1))
        factor = jnp.exp(head.get("log_scale", 0.0)) * output.scale  # asked without a head, it is the backbone's
        examples = len(batch["label"])
        if len(image) == examples:
            return factor * normalise(image) @ text.T
        # One row a pair: what the picture's feature is depends on the text beside it.
        image = normalise(normalise(image).reshape(len(text), -1, image.shape[-1]).mean(1))
        return factor * jnp.sum(image * text, -1).reshape(examples, self.classes)


def class_texts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class's name in every template, class by class.

    Raises:
        UserError: for two classes of one name, no template, or one without a place for the name.
    """
    if len(set(classes)) < len(classes):
        twice = sorted({name for name in classes if list(classes).count(name) > 1})
        raise UserError(f"classes are told apart by their names; given twice: {', '.join(map(repr, twice))}")
    if not templates:
        raise UserError("class names need at least one template, such as 'a photo of a {}.'")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the template {template!r} has no {{}} for the class's name")
    return [template.format(name) for name in classes for template in templates]


def within(logits: Float[Array, "batch classes"], label: Int[Array, "batch"], k: int) -> Bool[Array, "batch"]:
    """Whether fewer than k classes score at least as high as the right one: equal scores count against the model.

    With no more than k classes every label is among them.
    """
    right = jnp.take_along_axis(logits, label[:, None], axis=-1)
    return (~(logits < right)).sum(-1) - 1 < k  # a logit that is not a number stands before every other


def prototypes(
    features: Float[np.ndarray, "examples width"], labels: Int[np.ndarray, "examples"], classes: int
) -> Float[np.ndarray, "classes width"]:
    """Each class's mean of normalised features, normalised again.

    Raises:
        UserError: for a label outside the classes, or a class without an example.
    """
    counts = np.bincount(labels, minlength=classes)
    if len(counts) > classes or not counts.all():
        missing = np.flatnonzero(counts[:classes] == 0)
        what = f"class {missing[0]} has no example" if missing.size else f"label {labels.max()} names no class"
        raise UserError(
            f"{classes} classes need examples with labels 0 to {classes - 1}, and each at least one; {what}"
        )
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    sums = np.zeros((classes, features.shape[-1]), np.float64)
    np.add.at(sums, labels, unit)
    return (sums / np.linalg.norm(sums, axis=-1, keepdims=True)).astype(features.dtype)


def _check_classes(classes: int) -> None:
    if classes < 2:
        raise UserError(f"classification needs at least 2 classes, got {classes}")
