"""``vla-report`` as a shell sees it: what it writes, what it prints, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vla_jax import report_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(capsys):
    """Runs the command: its status, and what it printed on both streams."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            report_command.main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.fixture
def begun(tmp_path):
    """The work directory of an experiment that has just begun."""
    folder = tmp_path / "begun"
    run = folder / "runs/statements/lora/learning_rate_0.1/seed_0"
    run.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"backbone": "tiny", "tasks": ["statements"]}))
    (run / "metrics.jsonl").write_text('{"step": 5, "train/loss": 0.7}\n')
    return folder


def test_an_unfinished_run_gives_the_page_of_what_there_is(run, begun):
    status, out, err = run(begun)
    assert status == 0
    assert out.startswith(f"{begun / 'report.html'} (")
    content = (begun / "report.html").read_text()
    for sentence in (
        "There is no result table yet.",
        "LoRA (statements) has not been tested; it was last seen at step 5.",
    ):
        assert f"note: {sentence}" in err.splitlines()
        assert sentence in content
    assert "Learning curves" in content
    assert "Gallery" not in content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: workdir; `vla-report --help` shows how to call it"),
        (["none"], "there is no folder none; give the --workdir of an experiment"),
        (["."], ". is no work directory: it has none of config.json, results.jsonl, runs"),
        (["begun", "--examples=-1"], "--examples cannot be negative, got -1"),
        (["begun", "--examples=few"], "invalid int value: 'few'"),
        (["begun", "--out", "begun"], "--out begun is a folder; give the page's file, such as begun/report.html"),
        (
            ["begun", "--out", "begun/config.json/page.html"],
            "the page cannot be written to begun/config.json/page.html",
        ),
        (["begun", "--example=3"], "unrecognized arguments: --example=3"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_two(run, begun, monkeypatch, arguments, message):
    monkeypatch.chdir(begun.parent)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_it_is_installed_and_helps_at_once():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["vla-report"] == "vla_jax.report_command:main"
    code = "import sys; from vla_jax.report_command import main\n"
    code += "try: main(['--help'])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--examples N" in done.stdout
    assert done.stdout.endswith("False\n")
