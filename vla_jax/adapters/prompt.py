"""Learned tokens in a tower's stream: prompt tuning, CoOp, and VPT (shallow and deep).

At the slot ``tokens`` they are inserted: into a text after its start token, where they are given positions like words
(Lester et al. 2021; CoOp, Zhou et al. 2022a), into an image behind its patches, without positions (VPT, Jia et al.
2022, as it is done for CLIP). With the slot ``prompts`` too they are deep: what a block made of the inserted tokens is
thrown away and the next block gets learned ones of its own.

CoOp's class name stands at the end, behind the context, as its published default has it; the middle and the front are
not there, since the context would have to be cut at each text's class name. Contexts of each class's own are tasks:
``tasks`` names the classes, and every text is routed to its class.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vla_jax.adapters.learned_tokens import LearnedModule, LearnedTokens
from vla_jax.adapters.placement import Placement
from vla_jax.adapters.plan import Plan
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import Site


@dataclasses.dataclass(frozen=True)
class Prompt(LearnedTokens):
    """Learned tokens at a tower's input, and with the slot ``prompts`` at the input of its other blocks.

    Attributes:
        length: how many tokens.
        std: standard deviation that tokens learned directly are drawn with.
        hidden: width of the network that makes them; None learns them directly.
    """

    kind: ClassVar[str] = "prompt"
    slots: ClassVar[tuple[str, ...]] = ("tokens", "prompts")
    vectors: ClassVar[tuple[str, ...]] = ("prompt",)

    length: int = 16

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        return PromptModule(self, deep=site.slot == "prompts", parent=None)


class PromptModule(LearnedModule):
    """The tokens of one layer."""

    deep: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "tokens width"], y: Float[Array, "inserted width"]
    ) -> Float[Array, "inserted_or_length width"]:
        """Tokens behind those that are inserted already, or in their place where the prompt is deep."""
        (prompt,) = self.vectors(y)
        return prompt if self.deep else jnp.concatenate([y, prompt])


def prompt_tuning(length: int = 20, towers: tuple[str, ...] = ("text",), hidden: int | None = None) -> Placement:
    """Prompt tuning (Lester et al. 2021): tokens at the input.

    VL-Adapter's row (Sung et al. 2022) has 40 of them, made by a network 800 wide: ``prompt_tuning(40, hidden=800)``.
    """
    return Placement(Prompt(length, hidden=hidden), "prompt_tuning", towers=towers, slots=("tokens",))


def coop(context: int = 16) -> Placement:
    """CoOp (Zhou et al. 2022a): context words in front of the class name; 16, or 4 with :func:`start_from_phrase`."""
    return Placement(Prompt(context), "coop", towers=("text",), slots=("tokens",))


def vpt_shallow(length: int = 8) -> Placement:
    """VPT shallow (Jia et al. 2022): tokens at the image tower's input."""
    return Placement(Prompt(length), "vpt_shallow", towers=("vision",), slots=("tokens",))


def vpt_deep(length: int = 8) -> Placement:
    """VPT deep (Jia et al. 2022): tokens at the input of each of the image tower's blocks.

    Eight of them in all twelve blocks is how MaPLe's authors run it on CLIP B/16.
    """
    return Placement(Prompt(length), "vpt_deep", towers=("vision",), slots=("tokens", "prompts"))


def start_from_phrase(
    plan: Plan, params: Tree, name: str, token_embedding: ArrayLike, tokens: ArrayLike, mask: ArrayLike
) -> dict[str, Any]:
    """Starts an adapter's text prompt from a phrase such as "a photo of a", as CoOp, CoCoOp and MaPLe do.

    Args:
        plan: where the adapters sit.
        params: the tree below ``adapters/``.
        name: the adapter's; its prompt at the text tower's input is set, for all tasks.
        token_embedding: the backbone's ``text/token_embedding``, ``[vocabulary, width]``.
        tokens: the phrase as :class:`vla_jax.data.text.Tokenize` gives it, int ``[length]``, start and end included.
        mask: bool ``[length]``, false on padding.

    Returns:
        The parameters with that prompt set.

    Raises:
        UserError: for an adapter that learns no prompt there, or a phrase of another length than the prompt.
    """
    leaves = [
        leaf
        for group in plan.groups
        if (group.path[0], group.site.tower, group.site.slot) == (name, "text", "tokens")
        for leaf in group.leaves
        if leaf.name == "prompt"
    ]
    if not leaves:
        raise UserError(
            f"adapter {name!r} learns no tokens of the text directly; a phrase can start a Prompt, CoCoOp or MaPLe at "
            "the text tower's slot tokens, without hidden"
        )
    flat = flatten(params)
    prompt = flat[leaves[0].path]
    words = np.asarray(tokens)[np.asarray(mask, bool)][1:-1]
    if len(words) != prompt.shape[-2]:
        raise UserError(
            f"the phrase has {len(words)} tokens between start and end, and the prompt of adapter {name!r} has "
            f"{prompt.shape[-2]}; give a phrase of that many, or the method the length {len(words)}"
        )
    start = jnp.asarray(token_embedding)[words].astype(prompt.dtype)  # [length, width]
    return unflatten(flat | {leaves[0].path: jnp.broadcast_to(start, prompt.shape)})
