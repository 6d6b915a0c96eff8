"""One of several processes that evaluate a source together; each writes what it found. Run by ``test_cached.py``."""

import sys

import jax
import numpy as np

from vla_jax.data.cached import ArraySource, as_rows, evaluate
from vla_jax.data.pipeline import Pipeline
from vla_jax.training.sharding import MeshConfig, batch_sharding, make_mesh

if __name__ == "__main__":
    address, count, index, examples, path = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    jax.distributed.initialize(coordinator_address=address, num_processes=count, process_id=index)
    source = ArraySource({"x": np.arange(3 * examples, dtype=np.float32).reshape(examples, 3)})
    sharding = batch_sharding(make_mesh(MeshConfig()))
    found = evaluate(
        Pipeline(source, as_rows, 8, training=False), jax.jit(lambda batch: {"double": 2 * batch["x"]}), sharding
    )
    np.savez(path, **found)
