"""Pictures, rows and annotations that meant harm and did some before: refused, in little time and memory."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile_checks import refused
from PIL import EpsImagePlugin, Image

from vla_jax.data.builders._files import ManualFolder, read_json_lines, read_rows
from vla_jax.data.builders._plain_pickle import read_plain_pickle
from vla_jax.data.image import MOST_PIXELS, Preprocess, UnreadablePicture, opened
from vla_jax.data.own import OwnData, Scan, load_own
from vla_jax.data.own.tables import MOST_ROW_BYTES
from vla_jax.errors import UserError
from vla_jax.evaluation.aro import Aro
from vla_jax.evaluation.sugarcrepe import SugarCrepe
from vla_jax.evaluation.valse import Valse
from vla_jax.evaluation.winoground import read_examples, read_scores
from vla_jax.reporting.page.workdir import read_work_directory


def png(width: int, height: int) -> bytes:
    """A picture that claims a size, and has as little data as can be."""
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * min(height, 4)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def preprocess():
    from transformers import CLIPImageProcessorPil

    return Preprocess(CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}))


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (8193, 8193), (1, 60_000), (60_000, 3), (0, 5)])
def test_pictures_that_grow_are_not_decoded(preprocess, width, height):
    with pytest.raises(UnreadablePicture, match=rf"{width} x {height}|pixels\) exceeds|no picture"):
        preprocess(png(width, height))
    with pytest.raises(UnreadablePicture):
        preprocess(np.zeros((1, 101, 3), np.uint8))
    assert opened(io.BytesIO(png(8192, MOST_PIXELS // 8192))).size == (8192, 8192)


def test_no_picture_runs_ghostscript(preprocess, monkeypatch, tmp_path):
    def run(*arguments, **settings):
        raise AssertionError("Ghostscript was run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "EPS")
    with pytest.raises(UnreadablePicture, match="no picture that can be read"):
        preprocess(file.getvalue())
    with pytest.raises(AssertionError), Image.open(file) as image:  # what PIL does with it by itself
        image.load()


def rows(folder: Path, *changed: dict, name: str = "rows.jsonl") -> list[str]:
    """Writes good rows and others behind them, and gives what is wrong with those."""
    Image.new("RGB", (5, 4)).save(folder / "0.png")
    good = [{"id": n, "image": "0.png", "label": n % 2, "split": ("train", "val", "test")[n % 3]} for n in range(6)]
    lines = [
        json.dumps({"id": str(n + 6), "image": "0.png", "label": 0, "split": "train"} | row)
        for n, row in enumerate(changed)
    ]
    (folder / name).write_text("\n".join([*map(json.dumps, good), *lines]))
    found = list(Scan(OwnData(str(folder / name)), "classification").problems())
    for problem in found:
        str(problem).encode()
    assert {problem.line for problem in found} == {7 + n for n in range(len(changed))}
    return [problem.kind for problem in found]


def test_rows_that_ended_in_other_errors_are_problems_of_their_line(tmp_path):
    assert rows(tmp_path, {"id": "\ud800"}, {"label": "\udfff"}) == ["row", "row"]
    assert rows(tmp_path, {"image": "a" * 300}, {"image": "a/" * 3000}) == ["missing picture", "path"]
    assert rows(tmp_path, {"label": "1" * 5000}, {"label": "a\x1b[2J"}, {"id": "\x07"}) == ["label", "label", "column"]
    assert (
        rows(tmp_path, {"image": "\x1b]0;x\x07.png"}, {"image": "../0.png"}, {"image": "/etc/passwd"}) == ["path"] * 3
    )
    assert rows(tmp_path, {"split": [[[]]]}, {"label": {"a": 1}}) == ["split", "label"]
    (tmp_path / "torn.png").write_bytes(png(60_000, 60_000))
    assert rows(tmp_path, {"image": "torn.png"}) == ["unreadable picture"]


def test_labels_that_look_like_numbers_are_sorted(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "0.png")
    lines = [
        {"image": "0.png", "label": ("--5", "-", "7")[n % 3], "split": ("train", "val", "test")[n // 3]}
        for n in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_own(OwnData(str(tmp_path / "rows.jsonl")), "classification").classes == ("-", "--5", "7")


def test_a_box_of_endless_numbers_is_a_problem(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text(f'{{"image": "0.png", "phrase": "it", "box": [0, 0, 1{"0" * 400}, 2]}}\n')
    kinds = [problem.kind for problem in Scan(OwnData(str(tmp_path / "rows.jsonl"))).problems()]
    assert kinds[0] == "box"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_line_without_an_end_is_not_held(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b"image,label\n" if name.endswith("csv") else b'{"image": "0.png", "label": 1}\n')
        for _ in range(40):
            file.write(b"x" * MOST_ROW_BYTES)
    tracemalloc.start()
    found = list(Scan(OwnData(str(path)), "classification").problems())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found[0].line, found[0].kind) in ((2, "row"), (1, "missing picture"))
    assert any("bytes" in problem.message for problem in found)
    assert peak < 20 * MOST_ROW_BYTES


def test_pictures_of_annotations_stay_in_their_folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png", "\0", "a" * 5000):
        crepe = {"0": {"filename": name, "caption": "a", "negative_caption": "b"}}
        (tmp_path / "images" / "swap_obj.json").write_text(json.dumps(crepe))
        refused("leaves the folder|no path", SugarCrepe, tmp_path / "images", tmp_path / "images", ["swap_obj"])
        valse = {"0": {"dataset": "SWiG", "image_file": name, "caption": "a", "foil": "b", "mturk": {"caption": 3}}}
        (tmp_path / "images" / "plurals.json").write_text(json.dumps(valse))
        refused("leaves the folder|no path", Valse, tmp_path / "images", tmp_path / "images", instruments=["plurals"])
        quadruple = {"id": 1, "caption_0": "a", "caption_1": "b", "image_0": name, "image_1": "b", "tag": "c"}
        (tmp_path / "examples.jsonl").write_text(json.dumps(quadruple))
        refused("leaves the folder|no path", read_examples, tmp_path / "examples.jsonl")
        aro = {"image_path": name, "true_caption": "a", "false_caption": "b", "relation_name": "on"}
        aro |= {f"bbox_{side}": 2 for side in "xywh"}
        (tmp_path / "visual_genome_relation.json").write_text(json.dumps([aro]))
        refused("leaves the folder|no path", Aro, tmp_path, "relation")


@pytest.mark.parametrize("number", [10**9, 10**400, float("inf"), float("nan")])
def test_boxes_of_annotations_are_bounded(tmp_path, number):
    aro = {"image_path": "a.png", "true_caption": "a", "false_caption": "b", "relation_name": "on"}
    aro |= {"bbox_x": 0, "bbox_y": 0, "bbox_w": number, "bbox_h": 10}
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps([aro]))
    refused("cannot be cut out", Aro, tmp_path, "relation")


@pytest.mark.parametrize("content", ["[" * 5000, "1" * 5000, '{"label": "\\ud800", "score": 1}'])
def test_json_that_ended_in_other_errors_is_named(tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    refused("line 1", read_scores, tmp_path / "file.json", [1])
    refused(".", read_rows, tmp_path / "file.json", "images")
    refused("row 1", lambda path: list(read_json_lines(path)), tmp_path / "file.json")
    (tmp_path / "results.jsonl").write_text(content)
    refused("results.jsonl", read_work_directory, tmp_path)


def test_data_sets_are_read_from_their_folder_alone(tmp_path):
    (tmp_path / "manual").mkdir()
    (tmp_path / "secret").mkdir()
    folder = ManualFolder(tmp_path / "manual", "coco_captions", "Get it.")
    refused("leaves the folder", folder.find, "../secret")
    refused("leaves the folder", folder.pictures, str(tmp_path / "secret"))


def test_a_pickle_takes_no_memory_for_what_it_claims(tmp_path):
    for content in (b"]r\xff\xff\xff\x7f.", b"\x8e" + struct.pack("<Q", 1 << 40) + b".", b"\x8b\xff\xff\xff\x7f."):
        (tmp_path / "refs.p").write_bytes(content)
        tracemalloc.start()
        try:
            found = read_plain_pickle(tmp_path / "refs.p")
        except UserError as error:
            found = str(error)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        assert found == [] or "not the published pickle" in found
    (tmp_path / "refs.p").write_bytes(pickle.dumps([{"a": (1, 2.5, None, True, "é", -(2**40))}], 2))
    assert read_plain_pickle(tmp_path / "refs.p") == [{"a": (1, 2.5, None, True, "é", -(2**40))}]
