"""Hyperformer: one small network makes the bottleneck of every place from embeddings of what that place is.

``I = LN(W_2 relu(W_1 [task; layer; site]))`` and, for the kernels and biases of both maps, ``D = W_D I``, so that
``y + U f(D y)`` (Karimi Mahabadi et al. 2021b). A further layer, task or slot costs an embedding instead of weights.
The LayerNorm that the paper also generates behind the bottleneck is left out, as VL-Adapter (Sung et al. 2022) does.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import ACTIVATIONS, Activation, Linear, Method, Share, Sized, check_activation
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError, unknown
from vla_jax.slots import Site

Init = Literal["zero_up", "normal"]


@dataclasses.dataclass(frozen=True)
class Hyperformer(Sized, Method):
    """Bottlenecks made by a hypernetwork.

    Each tower has one hypernetwork, since what it generates has the tower's width. Embeddings of tasks are shared by
    the towers; those of layers and slots are a tower's own.

    Attributes:
        rank: the bottleneck's width.
        reduction: the slot's width over the bottleneck's, where ``rank`` is None.
        embedding: width of each embedding.
        hidden: units of the network that joins them.
        projection: width of what it makes of them, from which weights are generated.
        per_slot: each slot has a generator of its own (Hyperformer), instead of an embedding of its own beside one
            generator for all of them (Hyperformer++).
        activation: between the two maps.
        init: ``zero_up`` starts as the identity; ``normal`` draws all kernels from N(0, 0.01), as published. Embeddings
            are drawn from N(0, 1).
    """

    kind: ClassVar[str] = "hyperformer"
    slots: ClassVar[tuple[str, ...]] = ("attn_in", "attn_out", "attn_sublayer", "mlp_in", "mlp_out", "block_out")

    reduction: int | None = 32
    embedding: int = 64
    hidden: int = 128
    projection: int = 64
    per_slot: bool = False
    activation: Activation = "gelu_tanh"
    init: Init = "zero_up"

    def __post_init__(self):
        super().__post_init__()
        check_activation(self.activation)
        if self.init not in ("zero_up", "normal"):
            raise unknown("hyperformer init", self.init, ("zero_up", "normal"))
        for name, least in (("embedding", 1), ("hidden", 1), ("projection", 2)):
            # A LayerNorm over one number makes a constant of it.
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def sharing(self) -> tuple[Share, ...]:
        """Layers, tasks and slots of a tower share everything but the embeddings that tell them apart."""
        own_generators = (Share("(down|up)_.*", ("layers", "tasks")),) if self.per_slot else ()
        return (
            Share("task_embedding", ("layers", "slots", "towers")),
            Share("layer_embedding", ("tasks", "slots")),
            Share("slot_embedding", ("layers", "tasks")),
            *own_generators,
            Share(".*", ("layers", "tasks", "slots")),
        )

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The embeddings of a place, in the order in which they are joined."""
        return ("task_embedding", "layer_embedding", *(() if self.per_slot else ("slot_embedding",)))

    def generated(self, width: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what is generated for a slot of this width."""
        rank = self.rank_for(width)
        return {"down_kernel": (width, rank), "down_bias": (rank,), "up_kernel": (rank, width), "up_bias": (width,)}

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        del site
        return HyperformerModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """``e`` an embedding; ``k e h + h + h p + p + 2 p`` to join k of them; ``(p + 1) m`` to generate m numbers."""
        counts = dict.fromkeys(self.embeddings, self.embedding)
        joined = len(self.embeddings) * self.embedding
        counts |= {"join/kernel": joined * self.hidden, "join/bias": self.hidden}
        counts |= {"project/kernel": self.hidden * self.projection, "project/bias": self.projection}
        counts |= {"norm/scale": self.projection, "norm/bias": self.projection}
        for name, shape in self.generated(site.widths[1]).items():
            size = math.prod(shape)
            counts |= {f"{name}/kernel": self.projection * size, f"{name}/bias": size}
        return counts

    @property
    def starts_as_identity(self) -> bool:
        """A generator of zeros makes an up-projection of zero."""
        return self.init == "zero_up"


class HyperformerModule(nn.Module):
    """One place's bottleneck, generated and applied."""

    method: Hyperformer

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        """Adds to y, the sublayer's output, what the bottleneck makes of it."""
        del x
        method, normal = self.method, nn.initializers.normal(0.01)
        draw = nn.initializers.normal(1.0)
        embeddings = [self.param(name, draw, (method.embedding,), jnp.float32) for name in method.embeddings]
        hidden = jax.nn.relu(Linear(method.hidden, normal, name="join")(jnp.concatenate(embeddings)))
        place = Linear(method.projection, normal, name="project")(hidden)
        place = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="norm")(place)  # [projection]
        made = {}
        for name, shape in method.generated(y.shape[-1]).items():
            zero = method.init == "zero_up" and name.startswith("up")
            generator = Linear(math.prod(shape), nn.initializers.zeros if zero else normal, name=name)
            made[name] = generator(place).reshape(shape).astype(y.dtype)
        hidden = ACTIVATIONS[method.activation](y @ made["down_kernel"] + made["down_bias"])
        return y + hidden @ made["up_kernel"] + made["up_bias"]


def hyperformer() -> Placement:
    """Hyperformer++ after both sublayers, a thirty-second of the width (Karimi Mahabadi et al. 2021b).

    The authors train all LayerNorms beside it.
    """
    return Placement(Hyperformer(init="normal"), "hyperformer", slots=("attn_sublayer", "mlp_out"))


def vl_adapter_hyperformer() -> Placement:
    """VL-Adapter's settings (Sung et al. 2022): a generator for each slot, made small by a projection to 8."""
    method = Hyperformer(reduction=8, embedding=512, projection=8, per_slot=True, init="normal")
    return Placement(method, "vl_adapter_hyperformer", slots=("attn_sublayer", "mlp_out"))
