"""Data files of one's own: every kind of file and task read back, tasks told from columns, splits by picture."""

from __future__ import annotations

import dataclasses
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from own_files import HEIGHT, WIDTH, pictures, write
from PIL import Image

from vla_jax.data.own import TASKS, Columns, OwnData, load_own, task_of
from vla_jax.errors import UserError

FORMATS = ["jsonl", "csv", "tsv", "parquet"]
TOLD = {
    "classification": {"label": ["cat", 'a, dog\n"x"']},
    "matching": {"text": ["ein Bär ist grün", "no"], "label": [1, 0]},
    "retrieval": {"captions": [["one", "two"], ["three", "four, and five"]]},
    "vqa": {"question": ["what?", "who?"], "answers": [["yes", "no", "yes"], ["3"]]},
    "grounding": {"phrase": ["the left one", "the right one"], "box": [[0.0, 1.0, 5.5, 20.0], [2.0, 2.0, 24.0, 3.0]]},
}


def rows(task, names, **more):
    return [
        {"image": name} | {column: values[number % 2] for column, values in TOLD[task].items()} | more
        for number, name in enumerate(names)
    ]


def everything(own):
    """All examples by the picture's name, whichever split they are in."""
    found = {}
    for source in own.splits.values():
        for index in range(len(source)):
            example = source[index]
            found[example["image_id"]] = example
    return found


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_every_file_and_task_is_read_back(task, suffix, tmp_path):
    names = pictures(tmp_path / "photos", 30)
    path = write(tmp_path / f"rows.{suffix}", rows(task, [f"photos/{name}" for name in names]))
    own = load_own(OwnData(str(path), validation_share=0.3, test_share=0.3))
    assert own.task == task
    assert own.classes == (('a, dog\n"x"', "cat") if task == "classification" else ())
    found = everything(own)
    assert len(found) == sum(map(len, own.splits.values())) == 30
    for number, name in enumerate(names):
        example = found[f"photos/{name}"]
        assert example["image"] == (tmp_path / "photos" / name).read_bytes()
        expected = {column: values[number % 2] for column, values in TOLD[task].items()}
        if task == "classification":
            expected = {"class_name": expected["label"], "label": 1 - number % 2}
        for column, value in expected.items():
            if column == "box":
                assert example["box"].dtype == np.float32
            np.testing.assert_array_equal(example[column], value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_texts_about_two_pictures(suffix, tmp_path):
    names = pictures(tmp_path, 60)
    pairs = [(names[number], names[(7 * number + 1) % 60]) for number in range(60)]
    told = [{"first": a, "second": b, "text": f"{a} {b}", "label": n % 2} for n, (a, b) in enumerate(pairs)]
    columns = Columns(image="first", image_1="second")
    data = OwnData(str(write(tmp_path / f"rows.{suffix}", told)), columns=columns, validation_share=0.3, test_share=0.3)
    own = load_own(data)
    assert (own.task, own.two_pictures) == ("matching", True)
    where = {}
    for split, source in own.splits.items():
        for index in range(len(source)):
            example = source[index]
            given = [example["image_id"], example["image_id_1"]]
            assert "image" not in example
            assert [example["image_0"], example["image_1"]] == [(tmp_path / name).read_bytes() for name in given]
            assert example["text"] == " ".join(given)
            where |= {(name, split): None for name in given}
    assert own.summary.pictures == 60
    assert own.summary.shared == sum(len({s for n, s in where if n == name}) > 1 for name in names) > 0
    # The first picture decides: in a file with it alone, every row is in the same split.
    alone = [{"image": row["first"], "text": row["text"], "label": row["label"]} for row in told]
    other = load_own(dataclasses.replace(data, path=str(write(tmp_path / "alone.jsonl", alone)), columns=Columns()))
    assert not other.two_pictures
    for split, source in own.splits.items():
        texts = [source.annotation(index)["text"] for index in range(len(source))]
        assert texts == [other.splits[split].annotation(index)["text"] for index in range(len(source))]


@pytest.mark.parametrize("suffix", FORMATS)
def test_sources_are_read_from_threads_and_after_pickling(suffix, tmp_path):
    names = pictures(tmp_path, 40)
    path = write(tmp_path / f"rows.{suffix}", [{"image": n, "text": f"says {n}", "label": 1} for n in names])
    source = load_own(OwnData(str(path))).splits["train"]
    plain = [source[index]["text"] for index in range(len(source))]
    assert plain == [f"says {source.annotation(index)['image_id']}" for index in range(len(source))]
    copied = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).permutation(len(source)).tolist() * 5
        assert [example["text"] for example in pool.map(copied.__getitem__, order)] == [plain[i] for i in order]
    with pytest.raises(IndexError):
        source[len(source)]
    assert [example["text"] for example in source] == plain


def test_a_picture_never_stands_on_both_sides_and_stays_where_it_is(tmp_path):
    names = pictures(tmp_path, 200)
    several = [
        {"image": name, "question": f"q{turn}", "answer": "a b"[: 1 + 2 * (turn % 2)]}
        for name in names
        for turn in range(3)
    ]
    data = OwnData(str(write(tmp_path / "rows.jsonl", several)), validation_share=0.2, test_share=0.1)

    def where(own):
        return {
            source.annotation(index)["image_id"]: split
            for split, source in own.splits.items()
            for index in range(len(source))
        }

    own = load_own(data)
    assert own.summary.shared == 0
    assert own.summary.pictures == 200
    assert {split: len(source) % 3 for split, source in own.splits.items()} == dict.fromkeys(own.splits, 0)
    # 40 and 20 pictures are expected; these are three standard deviations.
    assert abs(len(own.splits["validation"]) / 3 - 40) < 17
    assert abs(len(own.splits["test"]) / 3 - 20) < 13
    before = where(own)
    # Other rows in another order, other spellings of the same path: every picture stays.
    shuffled = [dict(row, image=f"./x/../{row['image']}") for row in reversed(several[30:])]
    assert where(load_own(dataclasses.replace(data, path=str(write(tmp_path / "b.jsonl", shuffled))))) == {
        name: before[name] for name in names[10:]
    }
    assert where(load_own(dataclasses.replace(data, split_seed=1))) != before


def test_a_split_column_says_where_rows_go_and_what_it_leaves_out_is_held_out(tmp_path):
    names = pictures(tmp_path, 60)
    said = ["Training", "val", "test"]
    full = [{"image": n, "text": "t", "label": 0, "split": said[i % 3]} for i, n in enumerate(names)]
    own = load_own(OwnData(str(write(tmp_path / "full.csv", full))))
    assert own.summary.held_out == ()
    for turn, split in enumerate(("train", "validation", "test")):
        assert [own.splits[split].annotation(i)["image_id"] for i in range(20)] == names[turn::3]
        assert "split" not in own.splits[split].annotation(0)
    part = [row | {"split": "dev" if i % 3 == 1 else "train"} for i, row in enumerate(full)]
    own = load_own(OwnData(str(write(tmp_path / "part.csv", part)), test_share=0.3))
    assert own.summary.held_out == ("test",)
    assert [own.splits["validation"].annotation(i)["image_id"] for i in range(20)] == names[1::3]
    assert len(own.splits["train"]) + len(own.splits["test"]) == 40
    # A column of that name that means something else.
    other = [row | {"split": "yes"} for row in full]
    data = OwnData(str(write(tmp_path / "other.csv", other)), columns=Columns(split=""))
    assert load_own(data).summary.held_out == ("validation", "test")


def test_several_files(tmp_path):
    train = write(tmp_path / "train.csv", rows("classification", pictures(tmp_path, 30)))
    (tmp_path / "elsewhere").mkdir()
    test = write(tmp_path / "elsewhere/test.jsonl", rows("classification", pictures(tmp_path / "elsewhere", 6)))
    own = load_own(OwnData(str(train), test_path=str(test), validation_share=0.2))
    assert own.summary.held_out == ("validation",)
    assert len(own.splits["test"]) == 6
    assert own.splits["test"].place(5) == f"{test}:6"
    assert own.summary.shared == 0  # 0.png of one folder is not that of the other
    # With one folder for both they are the same pictures, which is said.
    (tmp_path / "elsewhere/test.jsonl").rename(tmp_path / "test.jsonl")
    own = load_own(OwnData(str(train), test_path=str(tmp_path / "test.jsonl"), images=str(tmp_path)))
    assert own.summary.shared == 6


def test_captions_of_one_picture_are_one_example(tmp_path):
    names = pictures(tmp_path, 60)
    path = write(
        tmp_path / "a.csv", [{"image": name, "title": f"{turn} of {name}"} for turn in range(3) for name in names]
    )
    own = load_own(OwnData(str(path), columns=Columns(caption="title")))
    assert own.task == "retrieval"
    found = everything(own)
    assert {name: example["captions"] for name, example in found.items()} == {
        name: [f"{turn} of {name}" for turn in range(3)] for name in names
    }
    train = own.splits["train"]
    assert [train.annotation(i)["image_id"] for i in range(len(train))] == [
        name for name in names if name in {train.annotation(i)["image_id"] for i in range(len(train))}
    ]


def test_classes_are_numbered_by_size_by_letter_or_as_given(tmp_path):
    names = pictures(tmp_path, 24)
    numbered = write(tmp_path / "n.jsonl", [{"image": n, "label": [10, 9.0, "2"][i % 3]} for i, n in enumerate(names)])
    assert load_own(OwnData(str(numbered))).classes == ("2", "9", "10")
    own = load_own(OwnData(str(numbered), classes=("10", "2", "9")))
    assert own.classes == ("10", "2", "9")
    for index in range(len(own.splits["train"])):
        example = own.splits["train"][index]
        assert (
            own.classes[example["label"]]
            == example["class_name"]
            == ["10", "9", "2"][int(example["image_id"][:-4]) % 3]
        )


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_candidate_boxes_may_differ_in_number(suffix, tmp_path):
    names = pictures(tmp_path, 12)
    boxes = [[[2, 3, 12, 18]], [[2, 3, 12, 18], [0, 0, 5, 5]]]
    rows = [{"image": n, "phrase": "it", "box": [2, 3, 12, 18], "boxes": boxes[i % 2]} for i, n in enumerate(names)]
    data = OwnData(str(write(tmp_path / f"rows.{suffix}", rows)), validation_share=0.3, test_share=0.3)
    own = load_own(data)
    assert own.has_boxes
    for source in own.splits.values():
        for index in range(len(source)):
            example = source[index]
            expected = boxes[names.index(example["image_id"]) % 2]
            np.testing.assert_array_equal(example["boxes"], np.float32(expected))
    # A column of that name may mean something else, and is then left alone.
    without = load_own(dataclasses.replace(data, columns=Columns(boxes="")))
    assert not without.has_boxes
    assert "boxes" not in without.splits["train"][0]
    assert without.fingerprint != own.fingerprint


def test_boxes_may_be_corner_and_size_and_pictures_lie_elsewhere(tmp_path):
    names = pictures(tmp_path / "photos", 60)
    told = [{"image": name, "phrase": "it", "box": "2 3 10 15"} for name in names]
    data = OwnData(str(write(tmp_path / "rows.csv", told)), images=str(tmp_path / "photos"), box_format="xywh")
    source = load_own(data).splits["train"]
    np.testing.assert_array_equal(source[0]["box"], [2, 3, 12, 18])
    assert Image.open(io.BytesIO(source[0]["image"])).size == (WIDTH, HEIGHT)
    # Absolute paths are good inside a folder that was named.
    told = [row | {"image": str(tmp_path / "photos" / row["image"])} for row in told]
    moved = load_own(dataclasses.replace(data, path=str(write(tmp_path / "absolute.csv", told)))).splits["train"]
    assert [moved.annotation(i) for i in range(3)] != []
    assert moved[0]["image_id"] == source[0]["image_id"]


def test_answers_of_odd_types_become_texts(tmp_path):
    names = pictures(tmp_path, 24)
    given = [3, True, 2.0, [1, "two"], "one", '["a", "b"]']
    told = [{"image": n, "question": "q", "answer": given[i % 6], "id": i} for i, n in enumerate(names)]
    found = everything(load_own(OwnData(str(write(tmp_path / "rows.jsonl", told)))))
    expected = [["3"], ["yes"], ["2"], ["1", "two"], ["one"], ["a", "b"]]
    for index, name in enumerate(names):
        assert found[name]["answers"] == expected[index % 6]
        assert found[name]["question_id"] == str(index)


def test_a_file_of_a_spreadsheet_with_a_byte_order_mark(tmp_path):
    names = pictures(tmp_path, 60)
    for suffix in ("csv", "jsonl"):
        path = write(tmp_path / f"rows.{suffix}", rows("matching", names))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        found = everything(load_own(OwnData(str(path))))
        assert found["0.png"]["text"] == "ein Bär ist grün"


def test_the_fingerprint_is_of_what_is_read(tmp_path):
    names = pictures(tmp_path, 60)
    path = write(tmp_path / "rows.jsonl", rows("matching", names))
    data = OwnData(str(path))
    first = load_own(data).fingerprint
    assert load_own(data).fingerprint == first
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    assert load_own(OwnData(str(tmp_path / "copy.jsonl"))).fingerprint == first
    assert load_own(dataclasses.replace(data, split_seed=1)).fingerprint != first
    assert load_own(data, "classification").fingerprint != first
    write(path, rows("matching", names[::-1]))
    assert load_own(data).fingerprint != first


def test_what_changed_after_the_check_is_named(tmp_path):
    names = pictures(tmp_path, 60)
    path = write(tmp_path / "rows.jsonl", rows("matching", names))
    source = load_own(OwnData(str(path))).splits["train"]
    name = source.annotation(0)["image_id"]
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"rows.jsonl:{names.index(name) + 1}: the picture .*{name} cannot be read"):
        source[0]
    path.write_bytes(path.read_bytes().replace(b'"label": 1', b'"label": 7').replace(b'{"image', b'x"image'))
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+ cannot be read any more; the file has changed"):
        source[0]


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        ("image label", "classification"),
        ("image text label", "matching"),
        ("image text", "retrieval"),
        ("image caption", "retrieval"),
        ("image captions", "retrieval"),
        ("image question answer", "vqa"),
        ("image question answers text", None),
        ("image phrase box", "grounding"),
        ("image caption label", None),
        ("image question answer phrase box", None),
    ],
)
def test_the_task_is_told_from_the_columns_where_it_is_clear(columns, task):
    if task:
        assert task_of(columns.split()) == task
    else:
        with pytest.raises(UserError, match=r"fit .* and .*; say which with task=\w+\|\w+"):
            task_of(columns.split())


def test_columns_that_fit_nothing_say_what_each_task_lacks():
    with pytest.raises(UserError, match="no task fits the columns image, question") as told:
        task_of(["image", "question"])
    assert "vqa lacks answers or answer;" in str(told.value)
    assert "grounding lacks phrase and box" in str(told.value)
    with pytest.raises(UserError, match="vqa needs the column image and answers or answer; the file has question"):
        task_of(["question"], "vqa")
    with pytest.raises(UserError, match="unknown task 'vqq'; did you mean 'vqa'"):
        task_of(["image"], "vqq")
    assert task_of(["image", "caption", "label"], "retrieval") == "retrieval"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_path": "a"}, "stand beside path"),
        ({"path": "a", "test_path": "a"}, "one file serves two splits"),
        ({"validation_share": 0.5, "test_share": 0.5}, "together below 1"),
        ({"validation_share": -0.1}, "at least 0"),
        ({"classes": ("a", "a")}, "classes name one twice: a, a"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        OwnData(**settings)
    with pytest.raises(UserError, match="column for image has no name"):
        Columns(image="")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no data file .*none\.jsonl"):
        load_own(OwnData(str(tmp_path / "none.jsonl")))
    contents = {
        "empty.jsonl": (b"", "is empty"),
        "rows.xlsx": (b"x", r"unknown; allowed: \.jsonl"),
        "rows.json": (b' [{"image": 1}]', "is one JSON array; write one object a line"),
        "rows.csv": (b"image;text\n", "separated by semicolons"),
        "twice.csv": (b"image,text,text\n", "names a column twice: image, text, text"),
        "rows.parquet": (b"PAR1 nothing", "cannot be read as Parquet"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_own(OwnData(str(tmp_path / name)))
    path = write(tmp_path / "good.csv", rows("matching", pictures(tmp_path, 4)))
    with pytest.raises(UserError, match=r"unknown column 'tex'; did you mean 'text'.*columns\.caption says"):
        load_own(OwnData(str(path), columns=Columns(caption="tex")))
    with pytest.raises(UserError, match="there is no folder of pictures"):
        load_own(OwnData(str(path), images=str(tmp_path / "none")))
    other = write(tmp_path / "other.csv", [{"image": "0.png", "label": 1}])
    with pytest.raises(UserError, match=r"other\.csv \(test\) and .*good\.csv differ in the columns text"):
        load_own(OwnData(str(path), test_path=str(other)))
