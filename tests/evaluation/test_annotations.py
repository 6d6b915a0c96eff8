from __future__ import annotations

import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation import annotations


def test_json_is_read_or_named_by_its_line(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"a": [1, {"b": "\N{GREEK SMALL LETTER PI}"}]}', encoding="utf-8")
    assert annotations.read_json(path, "") == {"a": [1, {"b": "\N{GREEK SMALL LETTER PI}"}]}
    for content, message in [
        (b'{"a": 1,\n"b" 2}', "line 2: not JSON"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            annotations.read_json(path, "")
    with pytest.raises(UserError, match=r"other\.json' is not there\. Get it there\."):
        annotations.read_json(tmp_path / "other.json", "Get it there.")


def test_json_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": "\u2028"}\n', encoding="utf-8")
    assert annotations.read_json_lines(path) == [(1, {"a": 1}), (4, {"a": "\u2028"})]
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        annotations.read_json_lines(path)


def test_fields_must_be_there_and_of_their_kind():
    entry = {"text": "a", "number": 2, "flag": True}
    assert annotations.fields(entry, {"number": (int, float), "text": str}, "entry 3") == [2, "a"]
    with pytest.raises(UserError, match="entry 3: fields a, b are missing"):
        annotations.fields(entry, {"b": str, "a": str}, "entry 3")
    with pytest.raises(UserError, match="entry 3: field flag is True, not int"):
        annotations.fields(entry, {"flag": int}, "entry 3")
    with pytest.raises(UserError, match="entry 3: a JSON object is expected, given 'text'"):
        annotations.fields("text", {"a": str}, "entry 3")
