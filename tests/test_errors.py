from __future__ import annotations

import pytest

from vla_jax.errors import UserError, nearest, unknown

SLOTS = ("attn_q", "attn_k", "mlp_out", "block_out")


@pytest.mark.parametrize(
    ("given", "best"), [("attn_p", "attn_q"), ("mlpout", "mlp_out"), ("block_uot", "block_out"), ("MLP", None)]
)
def test_the_nearest_name_comes_first(given, best):
    near = nearest(given, SLOTS)
    assert near[:1] == ([best] if best else [])


def test_no_more_names_than_asked_for():
    assert len(nearest("attn_", SLOTS, count=1)) == 1
    assert len(nearest("attn_", SLOTS, count=2)) == 2


def test_names_of_any_type_can_be_compared():
    assert nearest(124, [123, 777]) == ["123"]


def test_a_near_miss_is_answered_with_the_near_names_and_all_that_exist():
    error = unknown("slot", "mlp_uot", SLOTS)
    assert isinstance(error, UserError)
    assert str(error) == "unknown slot 'mlp_uot'; did you mean 'mlp_out'? Allowed: attn_q, attn_k, mlp_out, block_out."


def test_several_near_names_are_joined():
    message = str(unknown("slot", "mlp", ("mlp_a", "mlp_ab", "x")))
    assert message == "unknown slot 'mlp'; did you mean 'mlp_a' or 'mlp_ab'? Allowed: mlp_a, mlp_ab, x."


def test_a_name_like_no_other_is_answered_with_all_that_exist_and_a_hint():
    error = unknown("tower", "audio", ("vision", "text"), "Towers are fixed.")
    assert str(error) == "unknown tower 'audio'; allowed: vision, text. Towers are fixed."


def test_where_nothing_exists_the_message_says_so():
    assert str(unknown("task", "vqa", ())) == "unknown task 'vqa'; allowed: none."


@pytest.mark.parametrize("given", ["parameter_3", "zzz"])
def test_a_long_list_is_cut_after_forty_names(given):
    message = str(unknown("parameter", given, [f"parameter_{i}" for i in range(100, 150)]))
    assert "parameter_139, and 10 more." in message
    assert "parameter_140" not in message


def test_names_may_come_from_an_iterator():
    assert str(unknown("tower", "x", iter(("vision", "text")))) == "unknown tower 'x'; allowed: vision, text."


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="unknown slot"):
        raise unknown("slot", "x", SLOTS)
