"""The scorer that a saved model is, whichever way it judges pairs."""

from __future__ import annotations

from typing import Any

from vla_jax.backbones.loading import Backbone
from vla_jax.errors import UserError
from vla_jax.evaluation.scorers import Asking, Score, Scorer, model_scorer
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.model import MODALITIES, AdaptedModel
from vla_jax.saved_model import saved_model
from vla_jax.tasks.matching import Matching


def backbone_scorer(backbone: Backbone, asking: Asking) -> Scorer:
    """The backbone without anything in it: the cosine of its features."""
    return model_scorer(AdaptedModel(backbone, Matching()), {"backbone": backbone.params}, asking, "cosine")


def saved_scorer(saved: SavedAdapter, backbone: Backbone, asking: Asking, where: Any) -> tuple[Scorer, Score]:
    """The scorer of what was trained on a backbone.

    A matching head that was trained with it judges pairs. Without one it is the cosine of the two features: of a dual
    encoder each by itself, of fusion adapters those of the pair.

    Args:
        saved: adapters, heads or weights as they were saved.
        backbone: the one they were trained on.
        asking: how batches are made and where they are computed.
        where: what they were read from, for messages.

    Returns:
        The scorer, and ``head`` or ``cosine``.

    Raises:
        UserError: for a model of one modality that has no matching head, or adapters that are not whole.
    """
    task = saved.adapters.get("task", {})
    judge = Matching(str(task["name"])) if task.get("kind") == "Matching" else Matching()
    model, params = saved_model(saved.leaves, saved.adapters, backbone, judge, where)
    score: Score = "head" if f"heads/{judge.name}/classifier/kernel" in saved.leaves else "cosine"
    if score == "cosine" and set(model.modalities) != set(MODALITIES):
        raise UserError(
            f"{where} is shown the {model.modalities[0]} alone and has no matching head; it judges no pairs"
        )
    return model_scorer(model, params, asking, score), score
