"""The mesh: sizes, errors, placement, and the hint that keeps activations cut along the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vla_jax.errors import UserError
from vla_jax.mesh import keep_batch_cut
from vla_jax.training.hlo import collective_bytes
from vla_jax.training.sharding import MeshConfig, batch_sharding, check_batch, make_mesh, place, replicated


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=1, tensor=4), (2, 1, 4)),
    ],
)
def test_mesh_takes_all_devices_with_auto_axes(config: MeshConfig, shape: tuple[int, int, int]):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_given_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).devices.shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(tensor=3), r"data=-1, fsdp=1, tensor=3 does not fit 8 devices.*one of \[1, 2, 4, 8\]"),
        (MeshConfig(data=2, fsdp=2), "holds 4 devices, but there are 8"),
        (MeshConfig(data=16), "holds 16 devices, but there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config: MeshConfig, message: str):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


@pytest.mark.parametrize(
    ("sizes", "message"), [({"tensor": 0}, "axis 'tensor' is 0"), ({"fsdp": -1}, "data and fsdp are all -1")]
)
def test_a_mesh_that_fits_no_devices_is_refused(sizes: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        MeshConfig(**sizes)


def test_batches_are_cut_over_data_and_fsdp_and_bad_sizes_name_good_ones():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for size in (4, 8, 100):
        check_batch(size, mesh)
    with pytest.raises(UserError, match=r"batch size 30 .* 4 equal parts \(mesh data=2 x fsdp=2\).*: 28 and 32"):
        check_batch(30, mesh)
    with pytest.raises(UserError, match=r"that can: 4$"):
        check_batch(3, mesh)
    with pytest.raises(UserError, match=r"that can: 4$"):
        check_batch(0, mesh)
    batch = place({"x": np.arange(24.0).reshape(8, 3)}, batch_sharding(mesh))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}


def test_place_keeps_values_and_dtypes_and_cuts_as_told():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    tree = {"a": np.arange(64, dtype=np.int32).reshape(8, 8), "b": jnp.arange(4, dtype=jnp.bfloat16)}
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    placed = place(tree, {"a": cut, "b": replicated(mesh)})
    assert placed["a"].sharding == cut
    assert placed["a"].addressable_shards[0].data.shape == (2, 4)
    assert placed["b"].sharding == replicated(mesh)
    for name in tree:
        assert placed[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(placed[name], tree[name])
    assert place(placed, {"a": cut, "b": replicated(mesh)})["a"] is placed["a"]


def test_the_hint_changes_no_value_and_is_silent_without_a_mesh():
    x = jnp.arange(16.0).reshape(8, 2)
    assert keep_batch_cut(x) is x
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        kept = jax.jit(keep_batch_cut)(x)
    np.testing.assert_array_equal(kept, x)
    assert kept.sharding.is_equivalent_to(batch_sharding(mesh), 2)


def test_with_the_hint_fsdp_gathers_a_layer_and_never_sums_activations():
    width, depth, batch = 32, 5, 64
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    layers = jax.ShapeDtypeStruct(
        (depth, width, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=batch_sharding(mesh))

    def run(x: jax.Array, layers: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(keep_batch_cut(x) @ w), None), x, layers)[0]

    with jax.set_mesh(mesh):
        found = collective_bytes(jax.jit(run, out_shardings=batch_sharding(mesh)).lower(x, layers).compile())
    assert found["all-gather"] == depth * width * width * 4
    assert sum(found.values()) == found["all-gather"]
