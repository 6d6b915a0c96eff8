"""UniAdapter (Lu et al. 2024): bottlenecks beside the MLP of which the towers share the down-projection.

``y + s W_u^m relu(W_d LN(x))``: a parallel :class:`~vla_jax.adapters.bottleneck.Bottleneck` whose down-projection and
LayerNorm are one parameter of both towers, layer by layer. The towers must be equally wide, as BLIP's are. Its third
up-projection belongs to cross-attention over both streams, which a backbone of two towers does not have. The authors'
code normalises the raw stream; here x is the MLP's input, which the backbone's own LayerNorm has normalised already.
"""

from __future__ import annotations

from vla_jax.adapters.base import Share
from vla_jax.adapters.bottleneck import Bottleneck
from vla_jax.adapters.placement import Placement


def uniadapter() -> Placement:
    """512 units beside the MLP of every layer, factor 0.1, starting as the identity.

    The authors' code starts the text tower's up-projection at zero and draws the others.
    """
    method = Bottleneck(rank=512, parallel=True, scale=0.1, layer_norm=True)
    sharing = (Share("(down|norm)/.*", ("towers",)),)
    return Placement(method, "uniadapter", slots=("mlp_out",), sharing=sharing)
