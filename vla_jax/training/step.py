"""The training state and the compiled steps that train and evaluate.

Only the trainable subtree is differentiated, and the frozen one is an argument of the compiled step. That makes it
impossible, rather than merely avoided, that a gradient, an optimiser moment, a clip norm or an output buffer is spent
on a frozen weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from vla_jax import names
from vla_jax.errors import UserError
from vla_jax.training.optimizer import learning_rates
from vla_jax.training.sharding import batch_sharding, place, replicated
from vla_jax.training.table import ResolvedTable

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFunction = Callable[[names.Tree, Batch, jax.Array], tuple[jax.Array, Metrics]]
MetricFunction = Callable[[names.Tree, Batch], dict[str, jax.Array]]


@struct.dataclass
class TrainState:
    """What training changes, and all of it: nothing here is frozen.

    Attributes:
        step: int32 [], the number of steps taken.
        trainable: the trained leaves, float32, a nested dict.
        optimizer: the optax state.
    """

    step: Any
    trainable: Any
    optimizer: Any


@dataclass(frozen=True)
class StepShardings:
    """Where a step's arguments live.

    Attributes:
        state: a :class:`TrainState` whose leaves are shardings.
        frozen: the shardings of the frozen leaves, a nested dict.
        batch: the sharding of every array of a batch.
        replicated: the sharding of scalars and of whatever every device holds.
    """

    state: TrainState
    frozen: Any
    batch: NamedSharding
    replicated: NamedSharding


def as_master(trainable: names.Tree) -> Any:
    """The tree with its floating leaves as float32, the dtype in which weights are updated."""
    return as_stored(trainable, jnp.float32)


def as_stored(tree: names.Tree, dtype: Any) -> Any:
    """The tree with its floating leaves in ``dtype``, such as bfloat16 for frozen weights; others stay as they are."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def step_shardings(
    table: ResolvedTable, trainable: names.Tree, optimizer: optax.GradientTransformation, mesh: Mesh
) -> StepShardings:
    """The shardings of state, frozen tree and batch.

    A moment lives where its parameter lives, found by name; whatever else the optimiser keeps is replicated.

    Args:
        table: the resolved parameter table.
        trainable: the trained leaves, as arrays or as shapes.
        optimizer: the optimiser of those leaves.
        mesh: the mesh.
    """
    trained, frozen = names.split(table.shardings(mesh), table.trainable)
    by_name, whole = names.flatten(trained), replicated(mesh)
    shapes = {name: leaf.shape for name, leaf in names.flatten(trainable).items()}

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            name = "/".join(map(str, keys[start:]))
            if name in by_name and leaf.shape == shapes[name]:
                return by_name[name]
        return whole

    moments = jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(optimizer.init, trainable))
    state = TrainState(step=whole, trainable=trained, optimizer=moments)
    return StepShardings(state=state, frozen=frozen, batch=batch_sharding(mesh), replicated=whole)


def init_state(
    trainable: names.Tree, optimizer: optax.GradientTransformation, shardings: StepShardings | None = None
) -> TrainState:
    """The state before the first step.

    Args:
        trainable: the trained leaves; cast to float32. The state holds copies, so that giving its buffers to a step
            does not take them from the caller.
        optimizer: the optimiser.
        shardings: where the state lives; the default device if left out.

    Returns:
        The state, in place, with step 0.
    """
    copies = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), as_master(trainable))
    if shardings is None:
        return TrainState(jnp.zeros((), jnp.int32), copies, jax.jit(optimizer.init)(copies))
    copies = place(copies, shardings.state.trainable)
    moments = jax.jit(optimizer.init, out_shardings=shardings.state.optimizer)(copies)
    return TrainState(place(np.zeros((), np.int32), shardings.replicated), copies, moments)


@dataclass(frozen=True)
class Step:
    """A compiled step, run with its mesh set, so that models can say how their activations are cut.

    Attributes:
        program: the jitted function.
        mesh: the mesh, or None on one device.
        constants: arguments that are the same in every call and follow those of the call. The seed is one of them and
            not a constant of the program, so that runs that differ in the seed alone share one entry of a compilation
            cache.
    """

    program: Any
    mesh: Mesh | None = None
    constants: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        with self._mesh_set():
            return self.program(*arguments, *self.constants)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """The lowered program for arguments of these shapes, to be compiled and looked into."""
        with self._mesh_set():
            return self.program.lower(*arguments, *self.constants)

    def _mesh_set(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def make_train_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    shardings: StepShardings | None = None,
) -> Step:
    """The compiled training step.

    Args:
        loss_function: ``(params, batch, key) -> (loss, metrics)`` with the merged tree, a batch, and a key of its own
            for this step, folded from the seed and the number of the step, so that dropout continues on resume as
            if it had not been interrupted. The loss is a mean over the global batch, float32 [].
        optimizer: the optimiser, as :func:`vla_jax.training.optimizer.make_optimizer` builds it.
        seed: the seed of the keys, 0 to 2**32 - 1.
        shardings: where arguments live and results go; as the arguments are placed if left out.

    Returns:
        ``step(state, frozen, batch) -> (state, metrics)``. The given state's buffers are reused for the new one: the
        given one cannot be read afterwards. The loss function's metrics come back with ``loss``, ``gradient_norm``
        (of the trainable leaves, before clipping; under accumulation, of this part alone), ``learning_rate``
        (of the last update; ``learning_rate/<group>`` for each further group) and ``skipped``: 1 where loss or gradient
        was not finite. Such a step is counted and changes nothing else: trained leaves and optimiser stay as they were.

    Raises:
        UserError: if the seed is out of range, or, on tracing, if a metric has one of these names.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is out of range; allowed: 0 to {2**32 - 1}")

    def train_step(state: TrainState, frozen: names.Tree, batch: Batch, seed: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(trainable: names.Tree) -> tuple[jax.Array, Metrics]:
            return loss_function(names.merge(trainable, frozen), batch, key)

        def update(gradients: Any, trainable: names.Tree, moments: Any) -> tuple[Any, Any]:
            updates, moments = optimizer.update(gradients, moments, trainable)
            return optax.apply_updates(trainable, updates), moments

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trainable)
        # The norm is not finite where any gradient is not. A choice between new and old leaves, one by one, would keep
        # the compiler from reusing the new moments: it made full fine-tuning on a CPU a third slower.
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        trainable, moments = jax.lax.cond(
            finite, update, lambda _, *kept: kept, gradients, state.trainable, state.optimizer
        )
        own = {"loss": loss, "gradient_norm": norm, "skipped": (~finite).astype(jnp.int32), **learning_rates(moments)}
        if taken := sorted(own.keys() & metrics.keys()):
            raise UserError(f"the loss function's metrics use the step's own names {taken}; rename them")
        return TrainState(state.step + 1, trainable, moments), metrics | own

    if shardings is None:
        return Step(jax.jit(train_step, donate_argnums=0), constants=(np.uint32(seed),))
    program = jax.jit(
        train_step,
        in_shardings=(shardings.state, shardings.frozen, shardings.batch, shardings.replicated),
        out_shardings=(shardings.state, shardings.replicated),
        donate_argnums=0,
    )
    return Step(program, shardings.batch.mesh, (np.uint32(seed),))


def make_eval_step(metric_function: MetricFunction, *, shardings: StepShardings | None = None) -> Step:
    """The compiled evaluation step.

    Args:
        metric_function: ``(params, batch) -> results``, arrays of any shape, with the merged tree.
        shardings: where arguments live; as they are placed if left out.

    Returns:
        ``step(trainable, frozen, batch) -> results``; with shardings every process can read the results whole.
    """

    def eval_step(trainable: names.Tree, frozen: names.Tree, batch: Batch) -> dict[str, jax.Array]:
        return metric_function(names.merge(trainable, frozen), batch)

    if shardings is None:
        return Step(jax.jit(eval_step))
    program = jax.jit(
        eval_step,
        in_shardings=(shardings.state.trainable, shardings.frozen, shardings.batch),
        out_shardings=shardings.replicated,
    )
    return Step(program, shardings.batch.mesh)
