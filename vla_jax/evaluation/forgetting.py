"""What adapting to other pictures costs on the scenes that a backbone was made for.

A model is asked without training (classes by name, retrieval, Winoground's quadruples) before it is adapted and after.
With adapters it can also be asked with the adapters taken out again, which must give the features of the backbone to
the last bit; a tower that was trained itself has no way back.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping

import jax
import numpy as np

from vla_jax.adapters import Plan
from vla_jax.backbones.clip import CLIP, normalise
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.cached import evaluate
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.text import Tokenize
from vla_jax.evaluation import winoground
from vla_jax.evaluation.scene_zero_shot import SceneQuestions
from vla_jax.evaluation.scorers import Reading
from vla_jax.foreign import load_arrays
from vla_jax.names import Tree
from vla_jax.training.sharding import batch_sharding, place, replicated

MEASURES: Mapping[str, str] = {
    "shape": "shape",
    "color": "colour",
    "image_to_text": "R@1 to text",
    "text_to_image": "R@1 to picture",
    "text": "text score",
    "image": "image score",
    "group": "group score",
}
"""What is asked, and how it is called in tables."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a model gets right on the old domain; by measure, bool ``[questions]``.

    Attributes:
        right: the model as it is.
        off: with its adapters taken out; None where it has none.
        exact: whether the features without the adapters are the backbone's to the last bit.
    """

    right: Mapping[str, np.ndarray]
    off: Mapping[str, np.ndarray] | None = None
    exact: bool = False

    def to_bytes(self) -> bytes:
        """This as the content of a file."""
        arrays = {f"right/{name}": array for name, array in self.right.items()} | {"exact": np.asarray(self.exact)}
        arrays |= {f"off/{name}": array for name, array in (self.off or {}).items()}
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Kept:
        """What :meth:`to_bytes` wrote."""
        stored = load_arrays(content)
        right, off = (
            {name.removeprefix(part): stored[name] for name in stored if name.startswith(part)}
            for part in ("right/", "off/")
        )
        return cls(right, off or None, bool(stored["exact"]))


_Program = Callable[[Tree, Mapping[str, jax.Array]], dict[str, jax.Array]]


class OldDomain:
    """Questions about plain scenes for models whose image tower was adapted to something else.

    Their text tower is the backbone's, so that texts are encoded once.
    """

    def __init__(
        self,
        backbone: Backbone,
        questions: SceneQuestions,
        compute: Compute,
        mesh: jax.sharding.Mesh,
        batch_size: int = 64,
    ):
        """Prepares the questions; nothing is computed yet.

        Args:
            backbone: the backbone as it was before.
            questions: what is asked.
            compute: how the backbone is run.
            mesh: where.
            batch_size: pictures, or texts, at a time.
        """
        self.questions, self.mesh, self.batch_size = questions, mesh, batch_size
        self._clip = CLIP(backbone.config, compute)
        self._params = {"backbone": place(backbone.params, replicated(mesh))}
        tokenize = Tokenize(backbone.tokenizer, backbone.config.context_length)
        self._reading = Reading(Preprocess(backbone.image_processor), tokenize)
        self._programs: dict[Plan | None, _Program] = {}

    @functools.cached_property
    def before(self) -> Kept:
        """What the backbone gets right."""
        return Kept(self.right(self._features_before))

    def kept(self, params: Tree, plan: Plan) -> Kept:
        """What an adapted model gets right, with its adapters and without.

        Args:
            params: its tree.
            plan: its adapters, which may be none.
        """
        if not plan.groups:
            return Kept(self.right(self.features(params)))
        without = self.features(params)
        exact = np.array_equal(without, self._features_before)
        return Kept(self.right(self.features(params, plan)), self.right(without), exact)

    @functools.cached_property
    def _features_before(self) -> np.ndarray:
        return self.features(self._params)

    @functools.cached_property
    def _texts(self) -> np.ndarray:
        """The backbone's normalised features of all texts, ``[texts, projection]``."""

        def encode(params: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            output = self._clip.apply({"params": params["backbone"]}, None, batch["tokens"], batch["text_mask"])
            return {"feature": normalise(output.text_features)}

        return self._run(jax.jit(encode), self._params, [{"text": text} for text in self.questions.texts])

    def features(self, params: Tree, plan: Plan | None = None) -> np.ndarray:
        """A model's normalised features of all pictures, float32 ``[pictures, projection]``.

        Args:
            params: its tree, with ``backbone`` and what the plan needs below ``adapters``; the rest is not looked at.
            plan: the adapters that are in it; None takes all of them out.
        """
        if plan not in self._programs:

            def encode(params: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
                adapters = None if plan is None else plan.bind(params["adapters"])
                output = self._clip.apply({"params": params["backbone"]}, batch["image"], adapters=adapters)
                return {"feature": normalise(output.image_features)}

            self._programs[plan] = jax.jit(encode)
        used = {"backbone": params["backbone"]} | ({} if plan is None else {"adapters": params["adapters"]})
        return self._run(self._programs[plan], used, [{"image": picture} for picture in self.questions.pictures])

    def right(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """By measure, which questions a model gets right, bool ``[questions]``; quadruples of all tags together.

        Args:
            features: of :meth:`features`.
        """
        answers = self.questions.judge(features, self._texts)
        found = dict(vars(answers))
        tags = found.pop("quadruples").values()
        found |= {part: np.concatenate([getattr(judged, part) for judged in tags]) for part in winoground.CHANCE}
        return {name: found[name] for name in MEASURES}

    def _run(self, program: _Program, params: Tree, parts: list[dict[str, object]]) -> np.ndarray:
        pipeline = Pipeline(parts, self._reading, self.batch_size, training=False)
        with jax.set_mesh(self.mesh):
            return evaluate(pipeline, functools.partial(program, params), batch_sharding(self.mesh))["feature"]
