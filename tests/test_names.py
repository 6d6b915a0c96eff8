from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.names import count, flatten, merge, size_in_bytes, split, unflatten

TREE = {"b": {"x": {"kernel": 1, "bias": 2}, "y": 3}, "a": 4}
FLAT = {"b/x/kernel": 1, "b/x/bias": 2, "b/y": 3, "a": 4}


def test_names_are_the_keys_joined_in_the_trees_own_order():
    assert list(flatten(TREE).items()) == list(FLAT.items())


def test_a_prefix_stands_before_every_name():
    assert flatten(TREE, "adapters/one") == {f"adapters/one/{name}": leaf for name, leaf in FLAT.items()}


def test_unflatten_is_the_inverse():
    assert unflatten(FLAT) == TREE
    assert unflatten(flatten(TREE)) == TREE
    assert flatten(unflatten(FLAT)) == FLAT


def test_empty_dicts_leave_no_trace():
    assert flatten({"a": {}, "b": {"c": {}}, "d": 1}) == {"d": 1}
    assert flatten({}) == {}
    assert unflatten({}) == {}


def test_only_mappings_are_branches():
    assert flatten({"a": [1, 2], "b": (3,)}) == {"a": [1, 2], "b": (3,)}


def test_a_name_below_a_leaf_is_refused():
    with pytest.raises(UserError, match="'a/b' lies below another parameter's name"):
        unflatten({"a": 1, "a/b": 2})


def test_split_sends_every_leaf_to_one_side():
    kept, rest = split(TREE, lambda name: name.endswith("bias") or name == "a")
    assert kept == {"b": {"x": {"bias": 2}}, "a": 4}
    assert rest == {"b": {"x": {"kernel": 1}, "y": 3}}


def test_a_name_above_another_is_refused_in_either_order():
    with pytest.raises(UserError, match="above another"):
        unflatten({"a/b": 1, "a": 2})
    with pytest.raises(UserError, match="above another"):
        merge({"a": {"b": 1}}, {"a": 2})


@pytest.mark.parametrize("keep", [lambda _: True, lambda _: False, lambda name: "x" in name])
def test_merge_undoes_split(keep):
    assert merge(*split(TREE, keep)) == TREE


def test_merge_takes_any_number_of_trees():
    assert merge() == {}
    assert merge({"a": {"b": 1}}, {"a": {"c": 2}}, {"d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_a_leaf_in_two_trees_is_refused_and_named():
    with pytest.raises(UserError, match="'b/y' stands in two"):
        merge(TREE, {"b": {"y": 3}})


def test_merge_leaves_its_trees_alone():
    first, second = {"a": {"b": 1}}, {"a": {"c": 2}}
    merge(first, second)["a"]["b"] = 9
    assert first == {"a": {"b": 1}}
    assert second == {"a": {"c": 2}}


def test_scalars_and_bytes_are_counted_over_all_leaves():
    arrays = {"a": np.zeros((3, 4), np.float32), "b": {"c": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}}
    assert count(arrays) == 3 * 4 + 5
    assert size_in_bytes(arrays) == 4 * 3 * 4 + 2 * 5
    assert count({}) == size_in_bytes({}) == 0
    assert count({"scalar": jax.ShapeDtypeStruct((), jnp.int8)}) == 1
