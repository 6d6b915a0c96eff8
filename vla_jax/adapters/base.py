"""What every adapter method has, and the initialisers and activations that several of them use."""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from vla_jax.errors import UserError, unknown
from vla_jax.slots import Site

Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "swish", "identity"]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "swish": jax.nn.swish,
    "identity": lambda x: x,
}

# Uniform within 1/sqrt(fan in): what torch's Linear and peft's lora_A start from.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


AXES = ("layers", "tasks", "towers", "slots")
"""What parameters can be shared over."""


class Share(NamedTuple):
    """Parameters that several places use together.

    Attributes:
        pattern: a regular expression that must match the whole of a parameter's name within its module, such as
            ``down/.*``.
        over: what they are shared over, of :data:`AXES`; none for parameters that are not shared after all.
    """

    pattern: str
    over: tuple[str, ...]


class Method(abc.ABC):
    """An adapter method: a frozen dataclass of its settings.

    Attributes:
        kind: the method's name in configurations, checkpoints and messages.
        slots: where it may sit.
        joint: whether it takes both towers' streams instead of one slot's input and output.
        uses_weights: whether it needs the frozen map at its slot, which must be a linear one.
        conditioned: whether it needs the image's feature; it then sits at the text tower's slot ``tokens``.
    """

    kind: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]
    joint: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = False
    conditioned: ClassVar[bool] = False

    @abc.abstractmethod
    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer.

        Made with ``parent=None``, since it is applied inside a backbone's own module. It is called as
        ``module(x, y) -> y'`` with ``[tokens, width]`` arrays (a joint method:
        ``module(image, text, words) -> (image', text')``; one that uses weights: ``module(x, y, weights)``, a
        :class:`~vla_jax.slots.LinearWeights`; a conditioned one: ``module(x, y, image_feature)``; one at the slot
        ``side``: ``module(states, y, seen)``) and given a ``dropout`` key in training. Parameters whose names begin
        with ``frozen/`` are stored and not trained.
        """

    @abc.abstractmethod
    def parameter_counts(self, site: Site) -> dict[str, int]:
        """How many numbers each parameter of one layer at a site has, by its name within the module, in closed form.

        Raises:
            UserError: where the method does not fit the site.
        """

    @property
    def sharing(self) -> tuple[Share, ...]:
        """What places share by the method's definition; the first pattern that matches wins."""
        return ()

    @property
    @abc.abstractmethod
    def starts_as_identity(self) -> bool:
        """Whether a new adapter returns y: bit for bit, or to rounding where it uses the frozen weights."""

    @property
    def uses_dropout(self) -> bool:
        """Whether training needs a dropout key."""
        return False

    def with_rank(self, rank: int) -> Self:
        """The same method with another rank."""
        return self._replaced("rank", rank)

    def with_alpha(self, alpha: float) -> Self:
        """The same method with another numerator of its scale."""
        return self._replaced("alpha", alpha)

    def _replaced(self, field: str, value: Any) -> Self:
        if field not in {field.name for field in dataclasses.fields(self)}:
            raise UserError(f"{self.kind} has no {field} that a table could set")
        return dataclasses.replace(self, **{field: value})

    def describe(self) -> dict[str, Any]:
        """The settings as JSON-able values, with the method's kind."""
        return {"kind": self.kind} | dataclasses.asdict(self)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The method with the settings that :meth:`describe` gave, less the kind, as JSON may have changed them."""
        return cls(**settings)


@dataclasses.dataclass(frozen=True)
class Sized:
    """The width of a bottleneck, given as it is or as a share of the stream it sits in.

    Attributes:
        rank: the bottleneck's width.
        reduction: the stream's width over the bottleneck's; used where ``rank`` is None.
    """

    rank: int | None = None
    reduction: int | None = 16

    def __post_init__(self):
        if self.rank is None and self.reduction is None:
            raise UserError("give either rank or reduction; both are None")
        for name in ("rank", "reduction"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    def rank_for(self, width: int) -> int:
        """The bottleneck's width in a stream of this width.

        Raises:
            UserError: for a rank above the width, where nothing would be narrow, or a reduction that leaves nothing.
        """
        if self.rank is not None and self.rank > width:
            raise UserError(f"rank {self.rank} is above the width of {width} it is to narrow; allowed: 1 to {width}")
        if self.rank is not None:
            return self.rank
        if self.reduction > width:
            raise UserError(f"reduction {self.reduction} leaves nothing of a width of {width}; give a rank instead")
        return width // self.reduction


def check_activation(name: str) -> None:
    """Raises a :class:`UserError` for an activation that does not exist."""
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)


@functools.cache
def methods() -> Mapping[str, type[Method]]:
    """Every method of this package by its kind, found by looking through the package's files."""
    import vla_jax.adapters as package

    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        contents = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        for value in contents.values():
            if inspect.isclass(value) and issubclass(value, Method) and not inspect.isabstract(value):
                found[value.kind] = value
    return MappingProxyType(dict(sorted(found.items())))


def method_from_description(description: Mapping[str, Any]) -> Method:
    """The method that :meth:`Method.describe` described."""
    settings = dict(description)
    kind = settings.pop("kind", None)
    known = methods()
    if kind not in known:
        raise unknown("adapter method", str(kind), known)
    allowed = [field.name for field in dataclasses.fields(known[kind])]
    for name in settings:
        if name not in allowed:
            raise unknown(f"setting of {kind}", name, allowed)
    return known[kind].from_settings(settings)


class Linear(nn.Module):
    """A linear map in the dtype of its input, over float32 parameters."""

    features: int
    kernel_init: Callable[..., jax.Array] = uniform_fan_in
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., in]`` to ``[..., features]``."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(x.dtype)
        return y
