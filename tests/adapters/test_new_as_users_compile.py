"""A new adapter leaves features bitwise as they were in programs that are compiled as users compile them.

The properties in ``test_properties.py`` hold for every method; there XLA is told to compile quickly, which leaves out
steps that could round otherwise. Here it is not, for one method of each kind that starts as the identity.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from settings import ALL, backbone, begun, inputs, model, shape_for

from vla_jax.adapters import place


def _features(name, plan=None, adapters=None):
    config = shape_for(name)

    @jax.jit
    def run(params, adapters, images, tokens, mask):
        bound = None if plan is None else plan.bind(adapters)
        out = model(config).apply({"params": params}, images, tokens, mask, adapters=bound)
        return out.image_features, out.text_features, out.logits

    return run(backbone(config), adapters, *inputs(config))


@pytest.mark.parametrize(
    "name", ["bottleneck", "bottleneck_parallel", "lora", "lora_everywhere", "affine_ia3", "affine_shift", "compacter"]
)
def test_a_new_adapter_changes_no_bit(name):
    plan = place(ALL[name], shape_for(name).towers)
    adapters = begun(plan, backbone(shape_for(name)))
    if not ALL[name].method.starts_as_identity:
        pytest.fail(f"{name} does not start as the identity; list another setting")
    for new, plain in zip(_features(name, plan, adapters), _features(name), strict=True):
        np.testing.assert_array_equal(new, plain)
