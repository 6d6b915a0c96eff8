"""What every benchmark measures with: processes of their own, times, memory, the same batch for everybody.

Frameworks are imported inside the functions, so that no process holds one that it does not measure.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

TOKENS = 77

# Of the square product whose speed stands for the machine's; large enough that launch and packing do not count.
PRODUCT_SIZE = {"cpu": 4096, "gpu": 8192}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepare(model: str, folder: str) -> dict[str, Any]:
    """Writes random weights that both frameworks load, and says what there is to load and to run them on."""
    import jax

    from vla_jax.backbones.export import export_backbone
    from vla_jax.backbones.loading import load_backbone

    backbone = load_backbone(f"random:{model}")
    export_backbone(backbone.params, backbone.config, folder)
    return {"device": jax.default_backend(), "device_name": jax.devices()[0].device_kind, "config": backbone.config}


def make_batch(batch: int, image_size: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Images ``float32 [batch, 3, size, size]`` and tokens ``int32 [batch, 77]``, the same in every process."""
    import numpy as np

    generator = np.random.default_rng(0)
    images = generator.standard_normal((batch, 3, image_size, image_size), np.float32)
    tokens = generator.integers(1, vocabulary - 2, (batch, TOKENS), np.int32)
    tokens[:, -1] = vocabulary - 1  # the end of the text, which is where its feature is read
    return images, tokens


def peak_resident() -> int:
    """The most memory this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes; the call waits for its own results."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(forward: Callable[[bool], Callable[[], Any]], pairs: int) -> tuple[list[float], list[float]]:
    """Times forwards without and with adapters side by side, each first in every other pair; one pair warms up.

    Args:
        forward: ``forward(adapters) -> function to time``; what it does itself is not timed.
        pairs: timed pairs.

    Returns:
        Seconds without and with adapters.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(-1, pairs):
        for adapters in (False, True) if pair % 2 == 0 else (True, False):
            seconds = timed(forward(adapters))
            if pair >= 0:
                times[adapters].append(seconds)
    return times


def best_product(multiply: Callable[[], Any], size: int) -> float:
    """FLOP/s of a square product, the best of some runs."""
    multiply()
    return 2 * size**3 / min(timed(multiply) for _ in range(5))
