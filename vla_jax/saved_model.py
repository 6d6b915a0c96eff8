"""A trained model again: a backbone, and what was saved of the adapters, heads or weights trained on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from vla_jax import names
from vla_jax.adapters import Placement
from vla_jax.backbones.loading import Backbone
from vla_jax.errors import UserError
from vla_jax.model import MODALITIES, AdaptedModel, Task


def saved_model(
    leaves: Mapping[str, Any], description: Mapping[str, Any], backbone: Backbone, task: Task, where: Any
) -> tuple[AdaptedModel, dict[str, Any]]:
    """The model and its whole tree of parameters.

    Args:
        leaves: what was saved, by full name (``adapters/...``, ``heads/...``, ``backbone/...``).
        description: of the model, as :meth:`vla_jax.model.AdaptedModel.description` writes it; its ``placements`` and
            ``modalities`` are read.
        backbone: the one it was trained on.
        task: what the model is asked; its head need not be among the leaves for a task that has none to ask for.
        where: what the leaves were read from, for messages.

    Raises:
        UserError: if adapters are missing among the leaves.
    """
    placements = tuple(map(Placement.from_description, description["placements"]))
    modalities = tuple(description.get("modalities", MODALITIES))
    model = AdaptedModel(backbone, task, placements, modalities=modalities)
    wanted = names.flatten({"adapters": model.plan.shapes()}) if model.plan.groups else {}
    if missing := wanted.keys() - leaves.keys():
        # Parameters below frozen/ are not saved: the plan makes them from the backbone again.
        made = names.flatten({"adapters": model.plan.init(jax.random.key(0), backbone.params)})
        if lacking := sorted(name for name in missing if "/frozen/" not in name):
            raise UserError(f"{where} has no {lacking[0]}; were its adapters trained by another run?")
        leaves = {name: made[name] for name in missing} | dict(leaves)
    return model, names.unflatten(names.flatten({"backbone": backbone.params}) | dict(leaves))
