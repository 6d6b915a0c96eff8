"""A bank of named tasks: weights that come and go in a fixed number of places, so that nothing is compiled anew.

A plan whose placements name tasks stacks one set of weights a task. The bank's placements name places instead, and the
bank keeps which task holds which place:

    plan = place(Placement(LoRA(), slots=("attn_q",), tasks=free_places(16)), towers)
    bank = TaskBank(plan, plan.init(key)).add("counting", trained).add("colours", key=key)
    step(backbone, bank.params, batch | {"route": bank.route(["colours", "counting", None])})

Names live on the host alone. Neither the plan, nor its description in a checkpoint, nor any array's shape depends on
them, which is why a compiled step serves the bank for as long as it lives.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.adapters.placement import Placement
from vla_jax.adapters.placing import place
from vla_jax.adapters.plan import Plan
from vla_jax.errors import UserError, unknown
from vla_jax.names import Tree, flatten
from vla_jax.slots import TowerShape

FREE = ""
"""The name of a place that no task holds."""


def free_places(capacity: int) -> tuple[str, ...]:
    """Names for ``Placement(tasks=...)`` that stand for places rather than for tasks.

    Raises:
        UserError: for fewer than one place.
    """
    if capacity < 1:
        raise UserError(f"a bank of tasks needs at least 1 place, got {capacity}")
    return tuple(f"place_{k}" for k in range(capacity))


@dataclasses.dataclass(frozen=True, eq=False)
class TaskBank:
    """Named tasks and their weights. What changes it returns another bank; the given one stays as it is.

    Attributes:
        plan: where the weights belong; its placements with tasks all have the same ones.
        params: the tree below ``adapters/``, with weights for every place.
        names: the task at each place, :data:`FREE` where there is none. Left out, these are the plan's own tasks, and
            none where the plan has :func:`free_places`.
    """

    plan: Plan
    params: Tree
    names: tuple[str, ...] | None = None

    def __post_init__(self):
        places = _places(self.plan)
        names = self.names
        if names is None:
            names = tuple(FREE if re.fullmatch(r"place_\d+", name) else name for name in places)
        if len(names) != len(places):
            raise UserError(f"a bank of {len(places)} places has a name or '' for each; got {len(names)} names")
        for name in names:
            if name != FREE and names.count(name) > 1:
                raise UserError(f"two places of the bank hold a task named {name!r}; give each task a name of its own")
        _check("the bank", flatten(self.params), _shapes(self.plan))
        object.__setattr__(self, "names", tuple(names))
        object.__setattr__(self, "params", jax.tree.map(jnp.asarray, dict(self.params)))

    @property
    def capacity(self) -> int:
        """How many tasks there is room for."""
        return len(self.names)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that there are, in the order of their places."""
        return tuple(name for name in self.names if name != FREE)

    def route(self, names: Sequence[str | None]) -> np.ndarray:
        """The place of each example's task, as every routed adapter takes it.

        A router's own numbers become places with ``bank.route(router.tasks)``: its k-th task has the k-th of these.

        Args:
            names: each example's task; None or ``""`` for the bare backbone.

        Returns:
            int32 ``[batch]``, -1 for the bare backbone.

        Raises:
            UserError: for a name that no task has.
        """
        return np.array([self._place(name) if name else -1 for name in names], np.int32)

    def get(self, name: str) -> dict[str, Any]:
        """One task's weights, as ``plan.single()`` takes them; those that tasks share are among them.

        Raises:
            UserError: for a name that no task has.
        """
        return self.plan.select_task(self.params, self._place(name))

    def add(
        self, name: str, params: Tree | None = None, *, key: jax.Array | None = None, backbone: Tree | None = None
    ) -> TaskBank:
        """The bank with one more task, in its first free place.

        Args:
            name: the new task's.
            params: its weights, as :meth:`get` gives them; what tasks share may be left out. None for new ones.
            key: what new weights are drawn from.
            backbone: the tree below ``backbone/``, for new weights of methods that start from the frozen ones.

        Raises:
            UserError: if the bank is full, the name is taken or empty, the weights are another plan's or were trained
                beside other shared ones, or there are neither weights nor a key.
        """
        self._check_new(name)
        if FREE not in self.names:
            raise UserError(
                f"the bank is full, its {self.capacity} places hold {', '.join(self.names)}; remove a task, or "
                "make the plan with more free_places"
            )
        if params is None:
            if key is None:
                raise UserError(f"task {name!r} needs either weights or a key from which new ones are drawn")
            axes = self.plan.leaves()
            new = flatten(self.plan.single().init(key, backbone))
            own = {path: value for path, value in new.items() if axes[path].by_task}
        else:
            own = self._checked(f"task {name!r}", params)
        return self._with(self.names.index(FREE), name, own)

    def remove(self, name: str) -> TaskBank:
        """The bank without a task; its place is free again, and nothing of its weights is left there.

        Raises:
            UserError: for a name that no task has.
        """
        index = self._place(name)
        return self._with(index, FREE, jax.tree.map(jnp.zeros_like, flatten(self.get(name))))

    def rename(self, name: str, to: str) -> TaskBank:
        """The bank in which a task has another name; its place and its weights stay.

        Raises:
            UserError: for a name that no task has, or a new one that is taken or empty.
        """
        index = self._place(name)
        self._check_new(to)
        return dataclasses.replace(self, names=_replaced(self.names, index, to))

    def swap(self, name: str, params: Tree) -> TaskBank:
        """The bank in which a task has other weights; :meth:`get` gives the present ones.

        Raises:
            UserError: for a name that no task has, or weights that :meth:`add` would refuse.
        """
        return self._with(self._place(name), name, self._checked(f"task {name!r}", params))

    def with_params(self, params: Tree) -> TaskBank:
        """The bank with all weights replaced, such as by those that training has made of them.

        Raises:
            UserError: for weights of another plan.
        """
        return dataclasses.replace(self, params=params)

    def describe(self) -> dict[str, Any]:
        """What the weights are and whose, as JSON-able values."""
        return {"placements": self.plan.describe(), "tasks": list(self.names)}

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], towers: Mapping[str, TowerShape], params: Tree
    ) -> TaskBank:
        """The bank that :meth:`describe` described, with its weights.

        Args:
            description: what :meth:`describe` gave.
            towers: the backbone's (``CLIPConfig.towers``).
            params: the weights, as they were saved.

        Raises:
            UserError: for a description that lacks something, or weights that it does not describe.
        """
        for field in ("placements", "tasks"):
            if field not in description:
                raise UserError(
                    f"the description of a bank has no {field!r}; it has {', '.join(description) or 'nothing'}"
                )
        plan = place([Placement.from_description(row) for row in description["placements"]], towers)
        return cls(plan, params, tuple(description["tasks"]))

    def _place(self, name: str) -> int:
        if name == FREE or name not in self.names:
            raise unknown("task", name, self.tasks)
        return self.names.index(name)

    def _check_new(self, name: str) -> None:
        if name == FREE:
            raise UserError("a task needs a name; '' stands for a place that is free")
        if name in self.names:
            raise UserError(f"there is a task named {name!r} already; swap replaces its weights, rename frees the name")

    def _checked(self, what: str, params: Tree) -> dict[str, jax.Array]:
        """Weights that are one task's own, once it is sure that they belong here."""
        given, axes, present = flatten(params), self.plan.leaves(), flatten(self.params)
        shapes = _shapes(self.plan.single())
        _check(what, given, {path: shape for path, shape in shapes.items() if path in given or axes[path].by_task})
        for path, value in given.items():
            if not axes[path].by_task and not np.array_equal(value, present[path]):
                raise UserError(
                    f"{what} was trained beside another {path!r}, which all tasks of the bank share; leave it out only "
                    "if the task's own weights serve beside the bank's"
                )
        return {path: value for path, value in given.items() if axes[path].by_task}

    def _with(self, index: int, name: str, own: Mapping[str, Any]) -> TaskBank:
        # Through the host, since one task's weights may lie on other devices than the bank's.
        changed = self.plan.set_task(self.params, index, jax.tree.map(np.asarray, dict(own)))
        return dataclasses.replace(self, params=changed, names=_replaced(self.names, index, name))


def _places(plan: Plan) -> tuple[str, ...]:
    """The tasks that every placement with tasks has."""
    given = {placement.tasks for placement in plan.placements if placement.tasks}
    if not given:
        raise UserError("a bank's placements need tasks; give them tasks=free_places(capacity)")
    if len(given) > 1:
        shown = " and ".join(sorted(", ".join(tasks) for tasks in given))
        raise UserError(f"a bank's placements need the same tasks; they have {shown}")
    return given.pop()


@functools.lru_cache(maxsize=64)
def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(plan.shapes()).items()}


def _check(what: str, given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for path in given:
        if path not in shapes:
            raise unknown(f"parameter of {what}", path, shapes)
    for path, shape in shapes.items():
        if path not in given:
            raise UserError(f"the weights of {what} lack {path!r}")
        if jnp.shape(given[path]) != shape:
            raise UserError(f"{path!r} of {what} has shape {jnp.shape(given[path])}; the plan's is {shape}")


def _replaced(names: tuple[str, ...], index: int, name: str) -> tuple[str, ...]:
    return (*names[:index], name, *names[index + 1 :])
