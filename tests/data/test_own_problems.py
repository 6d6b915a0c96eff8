"""The check of data files of one's own: every kind of problem at its line, and none where there is none."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from own_files import HEIGHT, WIDTH, pictures, write

from vla_jax.data.own import Columns, OwnData, Scan, load_own
from vla_jax.data.own import pictures as own_pictures
from vla_jax.errors import UserError

GOOD = {
    "classification": {"label": "cat"},
    "matching": {"text": "it is so", "label": 1},
    "retrieval": {"caption": "a caption"},
    "vqa": {"question": "what?", "answers": ["a"]},
    "grounding": {"phrase": "it", "box": [1, 2, 3, 4]},
}
BAD = {
    "classification": [
        ({"label": ""}, "label", "name or the number of a class; got ''"),
        ({"label": True}, "label", "got True"),
        ({"label": None}, "column", "nothing in the column 'label'"),
        ({"label": float("nan")}, "column", "nothing in the column 'label'"),
        ({"image": 3}, "path", "got 3"),
        ({"image": "../secret.png"}, "path", "leaves the folder"),
        ({"image": "a/../../secret.png"}, "path", "leaves the folder"),
        ({"image": "/etc/passwd"}, "path", "is absolute"),
        ({"image": "https://a.b/c.png"}, "path", "is an address on the net"),
        ({"image": "a\0.png"}, "path", "path of a picture is a text"),
        ({"image": "."}, "missing picture", "there is no picture"),
        ({"image": "none.png"}, "missing picture", "there is no picture"),
        ({"image": "torn.png"}, "unreadable picture", "cannot be decoded"),
        ({"image": "text.png"}, "unreadable picture", "no picture that can be read"),
    ],
    "matching": [
        ({"label": 2}, "label", "0 or 1, false or true, no or yes; got 2"),
        ({"label": "cat"}, "label", "task=classification"),
        ({"text": " "}, "text", "the text in the column 'text' is empty"),
        ({"text": 5}, "text", "is to hold a text; got 5"),
        ({"text": None}, "column", "nothing in the column 'text'"),
    ],
    "retrieval": [({"caption": ""}, "text", "is empty"), ({"caption": ["a"]}, "text", r"got \['a'\]")],
    "vqa": [
        ({"answers": []}, "answer", "empty; at least one answer"),
        ({"answers": ["a", ""]}, "answer", "an entry of the column 'answers' is empty"),
        ({"answers": [["a"]]}, "answer", r"is \['a'\]; each is to be a text"),
        ({"answers": "[1, "}, "answer", "is not JSON"),
        ({"answers": None}, "column", "nothing in the column 'answers'"),
        ({"question": ""}, "text", "is empty"),
    ],
    "grounding": [
        ({"box": [1, 2, 3]}, "box", "a box is four numbers"),
        ({"box": "a b c d"}, "box", "a box is four numbers"),
        ({"box": [1, 2, 3, float("inf")]}, "box", "four finite numbers"),
        ({"box": [5, 2, 3, 4]}, "box", "holds nothing, read as xyxy; is box_format xywh?"),
        ({"box": [1, 2, WIDTH + 2, 4]}, "box", rf"outside its picture of {WIDTH} x {HEIGHT}"),
        ({"box": [-2, 2, 3, 4]}, "box", "outside its picture"),
    ],
}


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path, 60)
    torn = (tmp_path / "0.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(torn[: len(torn) // 2])
    (tmp_path / "text.png").write_text("a picture")
    return tmp_path


def good(task, count=60):
    told = [{"image": f"{number}.png"} | GOOD[task] for number in range(count)]
    return [row | {"label": ["cat", "dog"][n % 2]} for n, row in enumerate(told)] if task == "classification" else told


def problems(path, task="", **settings):
    decode = settings.pop("decode", True)
    scan = Scan(OwnData(str(path), **settings), task, decode=decode)
    return list(scan.problems()), scan.summary()


@pytest.mark.parametrize("task", GOOD)
def test_every_problem_is_found_at_its_line(task, folder):
    rows, expected = good(task), {}
    for number, (change, kind, message) in enumerate(BAD[task]):
        rows.insert(4 * number, rows[4 * number] | change)
        expected[4 * number + 1] = (kind, message)
    path = write(folder / "rows.jsonl", rows)
    found, summary = problems(path, task)
    assert {problem.line: problem.kind for problem in found} == {line: kind for line, (kind, _) in expected.items()}
    assert len(found) == len(expected) == summary.bad
    assert summary.rows == len(rows)
    assert sum(summary.splits.values()) == len(rows) - summary.bad
    for problem in found:
        assert problem.file == str(path)
        with pytest.raises(ValueError, match=expected[problem.line][1]):
            raise ValueError(problem.message)
    assert problems(write(folder / "good.jsonl", good(task)), task)[0] == []


def test_a_second_picture_is_looked_at_as_the_first_is(folder):
    rows = [row | {"image_1": f"{59 - number}.png"} for number, row in enumerate(good("matching"))]
    assert problems(write(folder / "good.jsonl", rows))[0] == []
    bad = {3: ("path", "../secret.png"), 5: ("missing picture", "none.png"), 8: ("unreadable picture", "torn.png")}
    for line, (_, name) in bad.items():
        rows[line - 1] |= {"image_1": name}
    rows[9] |= {"image": "none.png", "image_1": "none.png"}
    del rows[11]["image_1"]
    found, summary = problems(write(folder / "rows.jsonl", rows))
    expected = [(line, kind) for line, (kind, _) in bad.items()] + [(10, "missing picture")] * 2 + [(12, "column")]
    assert [(problem.line, problem.kind) for problem in found] == expected
    assert "there is nothing in the column 'image_1'" in found[-1].message
    assert (summary.bad, sum(summary.splits.values())) == (5, 55)


def test_lines_are_counted_as_an_editor_counts_them(folder):
    rows = good("matching")
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = ["", "{broken", "   ", "[1]", '"text"', json.dumps({"image": "0.png"})]
    (folder / "rows.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    found, _ = problems(folder / "rows.jsonl")
    assert [(problem.line, problem.kind) for problem in found] == [
        (5, "row"),
        (7, "row"),
        (8, "row"),
        (9, "column"),
        (9, "column"),
        (67, "row"),
    ]
    assert [part in problem.message for part, problem in zip(
        ["is not JSON", "but list", "but str", "'text'", "'label'", "is not UTF-8"], found, strict=True
    )] == [True] * 6  # fmt: skip

    (folder / "rows.csv").write_bytes(
        b'image,text,label\n0.png,"two\nlines",1\n\n1.png,short\n2.png,a,b,c\n3.png,\xff,1\n4.png,,0\n'
        + b"".join(b"%d.png,good,1\n" % number for number in range(60))
        + b'5.png,"never closed,1\n6.png,good,1\n'
    )
    found, summary = problems(folder / "rows.csv")
    assert [(problem.line, problem.kind) for problem in found] == [
        (5, "row"), (6, "row"), (7, "row"), (8, "column"), (69, "row"),
    ]  # fmt: skip
    assert "has 2 cells, and the header 3" in found[0].message
    assert "is a quotation mark left open?" in found[-1].message
    assert summary.rows == 66

    rows[4] |= {"label": 5}
    found, _ = problems(write(folder / "rows.parquet", rows))
    assert [(problem.line, problem.kind) for problem in found] == [(5, "label")]


def test_labels_without_a_class_in_training_are_found_in_the_other_splits(folder):
    rows = [row | {"split": ["train", "val", "test"][n % 3]} for n, row in enumerate(good("classification"))]
    rows[4]["label"] = "fox"  # of validation
    rows[3]["label"] = "owl"  # of training
    rows[5]["label"] = "owl"
    found, summary = problems(write(folder / "rows.csv", rows))
    assert [(problem.line, problem.kind) for problem in found] == [(6, "label")]
    assert "the label 'fox' is none of the 3 classes of the training rows" in found[0].message
    assert summary.classes == ("cat", "dog", "owl")
    found, _ = problems(folder / "rows.csv", classes=("cat", "dog", "fox"))
    assert [problem.line for problem in found] == [5, 7]
    assert "the label 'owl' is none of the classes cat, dog, fox" in found[0].message
    alone = [row | {"label": "cat"} for row in rows]
    found, _ = problems(write(folder / "alone.csv", alone))
    assert ["at least 2 classes; found 'cat'" in problem.message for problem in found] == [True]
    assert found[0].line is None


def test_repeated_ids_name_the_first_row(folder):
    rows = [row | {"id": number} for number, row in enumerate(good("vqa"))]
    for number, repeated in ((10, 3), (20, "3"), (30, 7), (40, None)):
        rows[number]["id"] = repeated
    train = write(folder / "train.jsonl", rows)
    test = write(folder / "test.jsonl", [row | {"id": 1000 + n} for n, row in enumerate(rows)] + [rows[5]])
    found, summary = problems(train, test_path=str(test))
    assert [(problem.file, problem.line, problem.kind) for problem in found] == [
        (str(train), 41, "column"),
        (str(train), 11, "duplicate id"),
        (str(train), 21, "duplicate id"),
        (str(train), 31, "duplicate id"),
        (str(test), 61, "duplicate id"),
    ]
    places = [f"{train}:4", f"{train}:4", f"{train}:8", f"{train}:6"]
    assert [f"stands at {place} already" in p.message for place, p in zip(places, found[1:], strict=True)] == [True] * 4
    assert summary.bad == 5
    assert problems(train, columns=Columns(id=""))[0] == []


def test_empty_splits_and_splits_that_disagree(folder):
    rows = [row | {"split": "train"} for row in good("matching", 4)]
    found, _ = problems(write(folder / "few.csv", rows), validation_share=0.0)
    assert [(problem.kind, problem.line) for problem in found][:1] == [("empty split", None)]
    assert "the split validation has no good row; raise validation_share" in found[0].message
    rows = good("matching")
    rows[5] |= {"split": "tset"}
    rows = [{"split": "train"} | row for row in rows]
    found, _ = problems(write(folder / "rows.jsonl", rows))
    assert [(problem.line, problem.kind) for problem in found] == [(6, "split")]
    assert "a split is train, validation or test; got 'tset'" in found[0].message
    # A file for testing whose column says otherwise.
    test = write(folder / "test.jsonl", [rows[0], rows[1] | {"split": "test"}])
    found, _ = problems(write(folder / "b.jsonl", rows[:5] + rows[6:]), test_path=str(test))
    assert [(problem.file, problem.line, problem.kind) for problem in found] == [(str(test), 1, "split")]
    assert "is of split train, and the file is given for test" in found[0].message


def test_absolute_paths_in_a_named_folder_and_links_in_it(folder, tmp_path_factory):
    photos = tmp_path_factory.mktemp("photos")
    pictures(photos, 2)
    (folder / "linked").symlink_to(photos)
    rows = good("matching")
    rows[0]["image"] = "linked/1.png"
    assert problems(write(folder / "rows.jsonl", rows))[0] == []
    rows[1]["image"] = str(folder / "2.png")
    rows[2]["image"] = str(photos / "1.png")
    found, _ = problems(write(folder / "rows.jsonl", rows), images=str(folder))
    assert [(problem.line, problem.kind) for problem in found] == [(3, "path")]


def test_training_refuses_what_is_wrong_but_does_not_decode(folder):
    rows = good("matching", 60)
    rows[0]["image"] = "torn.png"
    path = write(folder / "rows.jsonl", rows)
    assert [problem.kind for problem in problems(path)[0]] == ["unreadable picture"]
    assert problems(path, decode=False)[0] == []
    load_own(OwnData(str(path)))
    bad = [row | {"label": 7} for row in rows[:25]]
    with pytest.raises(UserError, match=r"rows.jsonl:20: label: .*\n  and 5 more\n`vla-data check") as told:
        load_own(OwnData(str(write(path, bad + rows))))
    assert str(told.value).count("rows.jsonl:") == 20


def test_a_picture_of_many_rows_is_looked_at_once(folder, monkeypatch):
    opened = []
    real = own_pictures.opened

    def counting(path):
        opened.append(str(path))
        return real(path)

    monkeypatch.setattr(own_pictures, "opened", counting)
    rows = [{"image": f"{n % 60}.png", "question": "q", "answers": "a"} for n in range(3000)]
    assert problems(write(folder / "rows.jsonl", rows))[0] == []
    assert sorted(opened) == sorted({str(folder / f"{n}.png") for n in range(60)})


@pytest.mark.slow
def test_memory_does_not_grow_with_texts(folder):
    peaks = {}
    for length in (10, 2000):
        rows = [{"image": f"{n % 60}.png", "text": "x" * length, "label": 1} for n in range(5_000)]
        path = write(folder / f"{length}.jsonl", rows)
        del rows
        tracemalloc.start()
        assert problems(path, decode=False)[0] == []
        peaks[length] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # Ten megabytes of text; a chunk of 256 rows, twice over, is one.
    assert peaks[2000] - peaks[10] < 3e6


def test_progress_adds_up(folder):
    for suffix in ("jsonl", "csv", "parquet"):
        scan = Scan(OwnData(str(write(folder / f"rows.{suffix}", good("matching") * 20))), decode=False)
        told = []
        assert list(scan.problems(told.append)) == []
        header = len(b"image,text,label\r\n") if suffix == "csv" else 0
        assert len(told) > 3
        assert sum(told) == scan.size - header


def test_a_scan_can_be_repeated(folder):
    scan = Scan(OwnData(str(write(folder / "rows.jsonl", good("classification")))))
    for _ in range(2):
        assert list(scan.problems()) == []
    again = scan.summary()
    assert (again.rows, again.bad) == (60, 0)
    fresh = Scan(dataclasses.replace(scan.data))
    assert list(fresh.problems()) == []
    assert fresh.summary() == again
    for split in ("train", "validation", "test"):
        for name, column in scan.rows(split).items():
            np.testing.assert_array_equal(fresh.rows(split)[name], column)
