"""Commands in the documents are commands that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vla_jax.launching import load_experiment, parse_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
OWN = {"--experiment", "--workdir", "--dry_run", "--distributed", "--coordinator", "--num_processes", "--process_id"}


def _commands() -> list[tuple[str, str]]:
    """Every ``launch.py --...`` in a block of code, or between backquotes, with the document it stands in."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        blocks = re.findall(r"^```(?:bash|yaml)\n(.*?)^```", text, re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
        for line in lines:
            for command in re.findall(r"launch\.py ([^#&|]*)", line):
                if "--experiment" in command and "NAME" not in command:
                    found.append((document.name, command.strip().removesuffix("'")))
    return found


@pytest.mark.parametrize(("document", "command"), _commands())
def test_commands_are_understood(document: str, command: str) -> None:
    arguments = shlex.split(command)
    names = [argument for argument in arguments if argument.split("=")[0] in OWN]
    rest = [argument for argument in arguments if argument not in names]
    (name,) = (argument.partition("=")[2] for argument in names if argument.startswith("--experiment="))
    experiment = load_experiment(name)
    assert isinstance(parse_config(experiment, rest), type(experiment.PRESETS["default"]))


def test_documents_have_commands() -> None:
    found = _commands()
    assert {"README.md", "tpu.md", "running.md"} <= {document for document, _ in found}
    assert len(found) >= 10


def test_the_memory_arithmetic_is_what_its_script_says(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import memory

    clip, decoder = memory.models()
    assert (decoder.parameters, decoder.trained) == (6_738_415_616, 32 * 2 * 16 * 2 * 4096)
    assert clip.trained == 16 * 4 * (32 * 1280 + 24 * 1024)
    assert clip.activations == 2 * (32 * 257 * 1280 + 24 * 77 * 1024)
    table = memory.section([{"rows": memory.rows([clip, decoder])}])
    assert table in (ROOT / "docs" / "scaling.md").read_text()


TABLES = {"results": "fusion_ablation", "methods": "method_comparison"}
"""The README's tables whose folder below ``docs`` has another name than they."""


def _table(text: str) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of the Markdown table in a text."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    heading, _, *rows = [[cell.strip() for cell in cells] for cells in lines]
    return heading, rows


def test_the_tables_of_the_readme_are_those_that_were_written() -> None:
    found = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", (ROOT / "README.md").read_text(), re.S)
    assert {"results", "methods", "multitask", "domain_adaptation", "compositionality"} <= {name for name, _ in found}
    for name, text in found:
        headings, written = _table((ROOT / "docs" / TABLES.get(name, name) / "results.md").read_text())
        shown_headings, shown = _table(text)
        # Columns may be left out, but not rows, nor the order of either. Headings may stand twice ("against full").
        columns, start = [], 0
        for heading in shown_headings:
            columns.append(headings.index(heading, start))
            start = columns[-1] + 1
        assert shown == [[row[column] for column in columns] for row in written], name
