"""``vla-data`` as a shell sees it: what it prints, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_jax import data_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    for number in range(60):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs the command: its status, and what it printed on both streams."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            data_command.main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def good():
    return [{"image": f"{number}.png", "label": ["cat", "dog"][number % 2]} for number in range(60)]


def test_a_good_file_ends_with_zero_and_a_summary(folder, run):
    status, out, err = run("check", write(folder / "rows.jsonl", good()))
    assert (status, out) == (0, "")
    for part in ("classification", "60, 0 of them bad", "2: cat, dog", "good to train on", "a share of the training"):
        assert part in err


def test_every_bad_row_is_a_line_and_the_status_one(folder, run):
    rows = good()
    rows[3]["image"] = "[red]none.png"
    rows[5]["label"] = ""
    (folder / "7.png").write_text("torn")
    path = write(folder / "rows.jsonl", rows)
    status, out, err = run("check", path)
    assert status == 1
    assert out.splitlines() == [
        f"{path}:4: missing picture: there is no picture {folder}/[red]none.png",
        f"{path}:6: label: a label is the name or the number of a class; got ''",
        f"{path}:8: unreadable picture: the picture {folder}/7.png cannot be decoded: it is no picture that can be "
        "read",
    ]
    assert "60, 3 of them bad" in err
    assert "to be mended" in err
    status, out, _ = run("check", path, "--no-decode")
    assert status == 1
    assert len(out.splitlines()) == 2


def test_json_is_an_object_a_line(folder, run):
    rows = good()
    rows[3]["image"] = "none.png"
    rows[5]["label"] = "owl"
    path = write(folder / "rows.jsonl", rows)
    status, out, _ = run("check", path, "--json", "--classes", "cat,dog")
    assert status == 1
    first, second, last = map(json.loads, out.splitlines())
    assert (first["line"], first["kind"]) == (4, "missing picture")
    assert second == {
        "file": str(path),
        "line": 6,
        "kind": "label",
        "message": "the label 'owl' is none of the classes cat, dog",
    }
    assert last["summary"]["bad"] == 2
    assert last["summary"]["problems"] == {"missing picture": 1, "label": 1}


def test_columns_tasks_files_and_folders_can_be_named(folder, run):
    rows = [{"file": row["image"], "title": "a"} for row in good()]
    (folder / "lists").mkdir()
    path = write(folder / "lists/rows.jsonl", rows)
    test = write(folder / "lists/test.jsonl", rows[:5])
    named = ("--column", "image=file", "--column", "caption=title", "--images", folder)
    status, out, err = run("check", path, "--test", test, "--task", "retrieval", *named)
    assert (status, out) == (0, "")
    assert "5 pictures stand in more than one split" in err
    status, _, err = run("check", path, *named[:4])
    assert status == 1  # no picture lies beside the file
    boxes = [{"image": f"{n}.png", "phrase": "p", "box": [4, 4, 3, 3]} for n in range(60)]
    path = write(folder / "boxes.jsonl", boxes)
    assert run("check", path, "--box-format", "xywh")[0] == 0
    assert run("check", path)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "`vla-data check --help` shows how to call it"),
        (["check", "none.jsonl"], "there is no data file none.jsonl"),
        (["check", "rows.jsonl", "--task", "vqa"], "vqa needs the column question and answers or answer; the file has"),
        (["check", "rows.jsonl", "--task", "vq"], "unknown task 'vq'; did you mean 'vqa'?"),
        (["check", "rows.jsonl", "--column", "caption"], "write --column caption=COLUMN"),
        (["check", "rows.jsonl", "--column", "capt=x"], "unknown column name 'capt'; did you mean 'caption'"),
        (["check", "rows.jsonl", "--column", "caption=x"], "unknown column 'x'"),
        (["check", "rows.jsonl", "--images", "nowhere"], "there is no folder of pictures nowhere"),
        (["look"], "invalid choice: 'look'"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_status_two(folder, run, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    write(folder / "rows.jsonl", good())
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_it_is_installed_and_starts_without_jax(folder):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["vla-data"] == "vla_jax.data_command:main"
    code = "import sys; from vla_jax.data_command import main\ntry: main()\nfinally: assert 'jax' not in sys.modules"
    command = [sys.executable, "-c", code, "check", str(write(folder / "rows.jsonl", good())), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["rows"] == 60
