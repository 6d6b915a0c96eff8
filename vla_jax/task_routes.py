"""Which task an example is of, told by a router from the frozen backbone's features where nobody says it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from vla_jax import names
from vla_jax.adapters import RouterConfig
from vla_jax.adapters.features import Labelled
from vla_jax.adapters.router import router_features
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.cached import Chosen, evaluate
from vla_jax.data.pipeline import Pipeline
from vla_jax.errors import UserError
from vla_jax.many_tasks import as_one
from vla_jax.model import AdaptedModel, Batch
from vla_jax.reporting.table import write_atomically
from vla_jax.training.sharding import batch_sharding, place, replicated
from vla_jax.variants import TaskData


@dataclasses.dataclass(frozen=True)
class TaskRoutes:
    """What a router chose.

    Attributes:
        routes: int32 ``[examples]``, for every task's test examples, one task after the other, the task that it takes
            them for; -1 where the picture cannot be read.
        parameters: of the router.
    """

    routes: np.ndarray
    parameters: int

    @property
    def stored(self) -> int:
        """Bytes of the router, in float32."""
        return 4 * self.parameters


def learn_routes(
    backbone: Backbone,
    parts: Mapping[str, TaskData],
    examples: int,
    path: Path,
    *,
    batch_size: int = 64,
    seed: int = 0,
    compute: Compute,
    mesh: jax.sharding.Mesh,
) -> TaskRoutes:
    """Trains a linear router on training examples of all tasks and lets it choose for the test examples.

    It sees the bare backbone's features of picture and text. What it chose is kept, and read the next time.

    Args:
        backbone: the backbone.
        parts: the tasks with their data.
        examples: of each task for training, or as many as there are.
        path: the file in which the choices are kept.
        batch_size: examples that go through the backbone at a time.
        seed: of the order in which the router sees examples.
        compute: how the backbone is run.
        mesh: where.

    Raises:
        UserError: if the file has choices that were made with other settings.
    """
    settings = {
        "backbone": backbone.fingerprint,
        "tasks": list(parts),
        "examples": examples,
        "sizes": {name: {split: len(source) for split, source in part.splits.items()} for name, part in parts.items()},
        "seed": seed,
    }
    if path.is_file():
        return _read(path, settings)
    few = {
        name: dataclasses.replace(
            part,
            splits={
                "train": Chosen(part.splits["train"], np.arange(min(examples, len(part.splits["train"])))),
                "test": part.splits["test"],
            },
        )
        for name, part in parts.items()
    }
    data = as_one(few)
    model = AdaptedModel(backbone, data.task, compute=compute)
    params = place({"backbone": backbone.params}, replicated(mesh))

    def look(params: names.Tree, batch: Batch) -> dict[str, jax.Array]:
        output = model.apply(params, batch)
        return {"features": router_features(output.image_features, output.text_features), "task": batch["task"]}

    program = jax.jit(look)
    train, test = (
        evaluate(
            Pipeline(data.splits[split], data.transform, batch_size, training=False),
            lambda batch: program(params, batch),
            batch_sharding(mesh),
            description=f"frozen features of {split}",
        )
        for split in ("train", "test")
    )
    known, new = (Labelled(found["features"], found["task"]) for found in (train, test))
    fitted = RouterConfig(tuple(parts)).fit(known, new, jax.random.key(seed))
    routes = np.full(len(data.splits["test"]), -1, np.int32)
    routes[test["index"]] = fitted.router.route(test["features"])
    found = TaskRoutes(routes, names.count(fitted.router.params))
    content = io.BytesIO()
    np.savez_compressed(content, routes=routes, parameters=found.parameters, settings=json.dumps(settings))
    write_atomically(path, content.getvalue())
    return found


def _read(path: Path, settings: Mapping[str, object]) -> TaskRoutes:
    with np.load(path) as stored:
        if json.loads(str(stored["settings"])) != settings:
            raise UserError(
                f"the routes in {path} were learnt with other tasks, sizes or backbone; choose another --workdir, the "
                "old settings, or delete that file"
            )
        return TaskRoutes(stored["routes"], int(stored["parameters"]))
