"""Counting collectives: on written HLO with every form, and on programs whose traffic is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax.training.hlo import COLLECTIVES, collective_bytes
from vla_jax.training.sharding import MeshConfig, make_mesh

WRITTEN = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %permuted = f32[4]{0} collective-permute(%g), channel_id=7, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %permuted)
}

%body.1 (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %gathered = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1
  %done = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%gathered)
  %while.9 = (s32[], f32[4]{0}) while(%start), condition=%condition.2, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %r = (s32[], bf16[8,128]{1,0}) tuple(%i, %x)
}

%condition.2 (p: (s32[], bf16[8,128])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%branch_a (p: f32[8]) -> f32[8] {
  ROOT %ra = f32[8]{0} all-reduce(%p), to_apply=%add
}

%branch_b (p: f32[8]) -> f32[8] {
  ROOT %rb = (f32[1,2]{1,0}, f32[1,2]{1,0}) all-to-all(%p, %q), dimensions={0}
}

%wrapped (p: f32[16]) -> f32[2] {
  %p = f32[16]{0} parameter(0)
  ROOT %scattered = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

ENTRY %main.2 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %both = (f32[3,5]{1,0}, pred[7]{0}, /*index=2*/f32[]) all-reduce(%a, %b, /*index=2*/%c), to_apply=%add, metadata={op_name="all-gather(f32[9])"}
  %start = f32[8]{0} all-reduce-start(%x), to_apply=%add
  %finish = f32[8]{0} all-reduce-done(%start)
  %sent = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %async = ((f32[16]{0}), f32[2]{0}) async-start(%x), calls=%wrapped
  %async_done = f32[2]{0} async-done(%async), calls=%wrapped
  %while.1 = (s32[], bf16[8,128]{1,0}) while(%init), condition=%condition.2, body=%body.1, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %while.2 = (s32[], f32[4]{0}) while(%init), condition=%condition.2, body=%inner_body
  ROOT %conditional = f32[8]{0} conditional(%i, %x, %x), branch_computations={%branch_a, %branch_b}
}
"""  # noqa: E501 - an instruction is one line


def test_every_form_of_a_collective_in_written_hlo():
    assert collective_bytes(WRITTEN) == {
        # a tuple with a boolean array and a scalar, an asynchronous one, one in a branch
        "all-reduce": (15 * 4 + 7 + 4) + 8 * 4 + 8 * 4,
        # three runs of the outer loop; the start's shape holds the operand too
        "all-gather": 3 * 64 * 128 * 2,
        # wrapped in an asynchronous computation that start and done both name; what it takes is counted
        "reduce-scatter": 16 * 4,
        "all-to-all": 2 * 2 * 4,
        # asynchronous; five runs inside three; once in a loop of unknown length
        "collective-permute": 8 * 4 + 3 * 5 * 4 * 4 + 4 * 4,
    }


def compiled(function, *shapes_and_specs):
    mesh = make_mesh(MeshConfig())
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes_and_specs
    ]
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(*arguments).compile()


def test_a_contraction_over_the_cut_dimension_is_one_sum_of_the_result():
    program = compiled(lambda x, y: x.T @ y, ((16, 24), PartitionSpec("data")), ((16, 10), PartitionSpec("data")))
    assert collective_bytes(program) == dict.fromkeys(COLLECTIVES, 0) | {"all-reduce": 24 * 10 * 4}


def test_a_gather_inside_a_scan_counts_once_a_layer():
    def run(x, layers):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    program = compiled(run, ((4, 16), PartitionSpec()), ((6, 16, 16), PartitionSpec(None, None, "data")))
    # The activation, [4, 16], is put together before each of the six products, and once more as the result; the first
    # is whole when it comes, but the loop's body is one for all.
    assert collective_bytes(program) == dict.fromkeys(COLLECTIVES, 0) | {"all-gather": (6 + 1) * 4 * 16 * 4}


def test_a_program_on_one_device_sends_nothing():
    program = jax.jit(lambda x: x @ x.T).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
    assert collective_bytes(program) == dict.fromkeys(COLLECTIVES, 0)
