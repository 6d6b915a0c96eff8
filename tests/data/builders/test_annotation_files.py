"""Reading annotation files: what is wrong is named with its file and row, and no pickle runs code."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
from published_layouts import python2_pickle, write

from vla_jax.data.builders._files import (
    ManualFolder,
    Row,
    Unique,
    read_json,
    read_json_lines,
    read_rows,
)
from vla_jax.data.builders._plain_pickle import read_plain_pickle
from vla_jax.errors import UserError


def row(**values):
    return Row(values, Path("file.json"), 7)


def test_numbers_become_text():
    assert row(answer=2).text("answer") == "2"
    assert row(answer=2.5).text("answer") == "2.5"
    assert row(answer="").text("answer") == ""
    assert row(answer=None).text("answer", "none") == "none"
    assert row().text("answer", "none") == "none"


@pytest.mark.parametrize("value", [None, True, ["a"], {"a": 1}])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(UserError, match=r"file\.json, row 7: 'answer' must be a text"):
        row(answer=value).text("answer")


def test_whole_numbers():
    assert row(id=3).integer("id") == 3
    assert row(id="03").integer("id") == 3
    for value in (3.0, "3.0", True, "٣", None):
        with pytest.raises(UserError, match="'id' must be a whole number"):
            row(id=value).integer("id")


def test_truths_in_every_published_spelling():
    assert [row(label=value).truth("label") for value in ("true", "True", 1, True, "1")] == [1] * 5
    assert [row(label=value).truth("label") for value in ("false", "False", 0, False, "0")] == [0] * 5
    for value in ("yes", 2, None, [], -1):
        with pytest.raises(UserError, match="'label' must be true or false"):
            row(label=value).truth("label")


def test_fields_that_are_missing_or_of_another_kind():
    with pytest.raises(UserError, match="the field 'question' is missing; it has answer, id"):
        row(answer="a", id=1).text("question")
    with pytest.raises(UserError, match="'answers' must be a list"):
        row(answers="ab").items("answers")
    with pytest.raises(UserError, match="expected an object with named fields; found 'text'"):
        Row("text", Path("file.json"), 7)


def test_ids_that_stand_twice():
    unique = Unique("question_id")
    unique.add(5, row())
    with pytest.raises(UserError, match=r"row 7: the question_id 5 stands twice; the first is in row 7"):
        unique.add(5, row())


def test_json_is_read_and_its_faults_have_a_line(tmp_path):
    file = tmp_path / "file.json"
    write(file, b"\xef\xbb\xbf" + json.dumps({"rows": [{"a": "Où"}]}).encode())
    assert [(r.number, r.values) for r in read_rows(file, "rows")] == [(1, {"a": "Où"})]
    write(file, '{"rows": [\n{"a": 1},\n{"a": }\n]}')
    with pytest.raises(UserError, match=rf"{file}: no valid JSON at line 3, column 7"):
        read_json(file)
    write(file, '{"rows": 3}')
    with pytest.raises(UserError, match="expected an object with a list 'rows'"):
        read_rows(file, "rows")
    write(file, b"PK\x03\x04\xff")
    with pytest.raises(UserError, match="no UTF-8 text at byte 4; is the file unpacked"):
        read_json(file)


def test_keys_that_stand_twice(tmp_path):
    file = tmp_path / "file.json"
    write(file, '{"1": {"a": 1}, "2": {"a": 2}, "1": {"a": 3}}')
    assert read_json(file)["1"] == {"a": 3}
    with pytest.raises(UserError, match="the id '1' stands twice"):
        read_json(file, unique_keys=True)


def test_json_lines_pass_over_empty_lines_and_keep_numbers(tmp_path):
    file = tmp_path / "file.jsonl"
    write(file, '{"a": 1}\n\n{"a": 2}')
    assert [(r.number, r.values["a"]) for r in read_json_lines(file)] == [(1, 1), (3, 2)]
    write(file, '{"a": 1}\n\n{"a": 2\n{"a": 3}')
    with pytest.raises(UserError, match=r"file\.jsonl, row 3: no valid JSON"):
        list(read_json_lines(file))


def test_plain_pickles_of_both_pythons(tmp_path):
    content = [{"ref_id": 1, "sentences": [{"sent": "a cup"}], "box": (1.5, None, True, 2**40)}]
    for pickled in (python2_pickle(content), pickle.dumps(content), pickle.dumps(content, 0)):
        write(tmp_path / "refs.p", pickled)
        assert read_plain_pickle(tmp_path / "refs.p") == content


class Malicious:
    """Unpickled as usual, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickles_do_nothing(tmp_path, protocol):
    trace = tmp_path / "trace"
    write(tmp_path / "refs.p", pickle.dumps([{"ref_id": Malicious(trace)}], protocol))
    with pytest.raises(UserError, match=r"refs\.p: this is not the published pickle of plain values: it asks for"):
        read_plain_pickle(tmp_path / "refs.p")
    assert not trace.exists()
    # The same bytes are dangerous: what is refused is not harmless anyway.
    pickle.loads((tmp_path / "refs.p").read_bytes())
    assert trace.exists()


def test_pickles_of_harmless_classes_and_damaged_ones_are_refused(tmp_path):
    for content in (pickle.dumps(OrderedDict(a=1)), pickle.dumps([1, 2])[:-4], b"", b"{}"):
        write(tmp_path / "refs.p", content)
        with pytest.raises(UserError, match="not the published pickle"):
            read_plain_pickle(tmp_path / "refs.p")


def test_a_data_sets_own_subfolder_comes_first(tmp_path):
    folder = ManualFolder(tmp_path, "vsr", "Get it.")
    assert folder.find("images") is None
    (tmp_path / "images").mkdir()
    assert folder.find("pictures", "images") == tmp_path / "images"
    (tmp_path / "vsr" / "images").mkdir(parents=True)
    assert folder.find("pictures", "images") == tmp_path / "vsr" / "images"
    with pytest.raises(UserError, match=r"'vsr' needs a\.json or b\.json, which is not there; looked in .*\nGet it\."):
        folder.require("a.json", "b.json")


def test_all_missing_pictures_are_counted(tmp_path):
    write(tmp_path / "images" / "deep" / "down" / "1.png", b"")
    folder = ManualFolder(tmp_path, "vsr", "Get it.")
    pictures = folder.pictures("images")
    assert pictures.find("1.png", row()) == tmp_path / "images" / "deep" / "down" / "1.png"
    # A path below the folder is that file and no other of its name.
    for name in ("2.png", "cup/2.png", "mug/2.png"):
        write(tmp_path / "images" / name, b"")
    again = folder.pictures("images")
    for name in ("2.png", "cup/2.png", "mug/2.png"):
        assert again.find(name, row()) == tmp_path / "images" / name
    (tmp_path / "images" / "mug" / "up").symlink_to(tmp_path / "images")
    assert folder.pictures("images").find("mug/2.png", row()) == tmp_path / "images" / "mug" / "2.png"
    folder.check_pictures()
    for number in range(2, 7):
        pictures.find(f"{number}.png", Row({}, Path("file.json"), number))
    with pytest.raises(UserError, match=r"5 picture\(s\) .*2\.png \(file\.json, row 2\)") as caught:
        folder.check_pictures()
    assert "row 4" in str(caught.value)
    assert "row 5" not in str(caught.value)
