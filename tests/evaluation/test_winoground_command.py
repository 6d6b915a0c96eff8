"""The command over examples and scores that have the published composition and the published numbers of right ones.

The data set asks its readers not to pass it on, nor are the scores of its authors here: both are put together so that
they have as many examples of each kind, and as many right ones among them, as the published tables say.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from vla_jax.evaluation import winoground
from vla_jax.evaluation.winoground.__main__ import main

# What CLIP ViT-B/32 has right of the 400 published examples, counted from the published percentages.
GROUP, TEXT, IMAGE, NOTHING = "group", "text alone", "image alone", "nothing"
COUNTS = {GROUP: 32, TEXT: 91, IMAGE: 10, NOTHING: 267}
BY_TAG = {
    GROUP: {"Object": 9, "Relation": 13, "Both": 10},
    TEXT: {"Object": 40, "Relation": 40, "Both": 11},
    IMAGE: {"Object": 2, "Relation": 7, "Both": 1},
    NOTHING: {"Object": 90, "Relation": 173, "Both": 4},
}
BY_PREDICATES = {GROUP: {1: 30, 2: 2}, TEXT: {1: 73, 2: 18}, IMAGE: {1: 8, 2: 2}, NOTHING: {1: 181, 2: 86}}
BY_SECONDARY = {
    GROUP: {"Symbolic": 1, "Pragmatics": 1},
    TEXT: {"Symbolic": 10, "Pragmatics": 5, "Series": 2},
    IMAGE: {},
    NOTHING: {
        "Symbolic": 17, "Pragmatics": 11, "Series": 21, "Symbolic, Series": 5, "Symbolic, Pragmatics": 5,
        "Pragmatics, Series": 2, "Morpheme-Level, Series": 1, "Symbolic, Morpheme-Level": 3,
    },
}  # fmt: skip
# Text, image and group score in per cent, as the paper prints them.
PUBLISHED = {
    "all": (30.75, 10.50, 8.00),
    "collapsed_tag: Object": (34.75, 7.80, 6.38),
    "collapsed_tag: Relation": (22.75, 8.58, 5.58),
    "collapsed_tag: Both": (80.77, 42.31, 38.46),
    "num_main_preds: 1": (35.27, 13.01, 10.27),
    "num_main_preds: 2": (18.52, 3.70, 1.85),
    "secondary_tag is: Symbolic": (39.29, 3.57, 3.57),
    "secondary_tag is: Pragmatics": (35.29, 5.88, 5.88),
    "secondary_tag is: Series": (8.70, 0.00, 0.00),
}
SIZES = {
    "collapsed_tag: Object": 141, "collapsed_tag: Relation": 233, "collapsed_tag: Both": 26,
    "num_main_preds: 1": 292, "num_main_preds: 2": 108,
    "secondary_tag contains: Symbolic": 41, "secondary_tag is: Symbolic": 28,
    "secondary_tag contains: Series": 31, "secondary_tag is: Series": 23,
    "secondary_tag contains: Pragmatics": 24, "secondary_tag is: Pragmatics": 17,
}  # fmt: skip
# Text, image and group score in per cent of further rows of the paper's table 3.
OTHER_MODELS = {
    "human": (89.50, 88.50, 85.50),
    "FLAVA ITM": (32.25, 20.50, 14.25),
    "FLAVA contrastive": (25.25, 13.50, 9.00),
    "ViLT": (34.75, 14.00, 9.25),
    "ViLBERT base": (23.75, 7.25, 4.75),
    "VinVL": (37.75, 17.75, 14.50),
    "UNITER large": (38.00, 14.00, 10.50),
}
# How often each choice of tags occurs in the relabelling of Diwan et al. 2022, by their initials.
RELABELLED = {
    "": 172, "C": 53, "I": 31, "A": 29, "T": 25, "V": 18, "N": 17, "VC": 8, "IC": 4, "TV": 4, "AC": 3, "AI": 3, "AT": 3,
    "NI": 3, "NT": 3, "IT": 3, "AV": 2, "ITC": 2, "ITV": 2, "TC": 2, "AN": 1, "ANI": 1, "ANT": 1, "AIT": 1, "AIV": 1,
    "ATC": 1, "NC": 1, "NIC": 1, "NIT": 1, "NITC": 1, "IV": 1, "IVC": 1, "TVC": 1,
}  # fmt: skip
RELABELLED_TAGS = {
    "C": "Complex Reasoning", "I": "Unusual Image", "T": "Unusual Text", "A": "Ambiguously Correct",
    "V": "Visually Difficult", "N": "Non Minimal",
}  # fmt: skip
# s(c, i) for each outcome.
SCORES = {
    GROUP: [[2.0, 1.0], [1.0, 2.0]],
    TEXT: [[2.0, 4.0], [1.0, 5.0]],
    IMAGE: [[2.0, 1.0], [4.0, 5.0]],
    NOTHING: [[1.0, 2.0], [2.0, 1.0]],
}


def spread(counts: dict, total: int, rest=None) -> list:
    values = [value for value, count in counts.items() for _ in range(count)]
    return values + [rest] * (total - len(values))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """``examples.jsonl`` and the scores of two models, in random order."""
    folder = tmp_path_factory.mktemp("winoground")
    rows = []
    for outcome, total in COUNTS.items():
        columns = (
            spread(BY_TAG[outcome], total),
            spread(BY_PREDICATES[outcome], total),
            spread(BY_SECONDARY[outcome], total, ""),
        )
        rows += [(outcome, *row) for row in zip(*columns, strict=True)]
    order = np.random.default_rng(0).permutation(len(rows))
    lines, scores = [], []
    for number, at in enumerate(order):
        outcome, collapsed, predicates, secondary = rows[at]
        captions = {"caption_0": "a dog on a cat", "caption_1": "a cat on a dog"}
        images = {f"image_{image}": f"ex_{number}_img_{image}" for image in (0, 1)}
        tags = {"tag": "Noun", "secondary_tag": secondary, "num_main_preds": predicates, "collapsed_tag": collapsed}
        lines.append(json.dumps({"id": number} | captions | images | tags))
        scores.append(SCORES[outcome])
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")
    scores = np.array(scores) * np.random.default_rng(1).uniform(1, 3, (len(rows), 1, 1))
    winoground.write_scores(folder / "clip.jsonl", range(len(rows)), scores)
    better = scores.copy()
    improved = np.flatnonzero([rows[at][0] == NOTHING for at in order])[:12]
    worse = np.flatnonzero([rows[at][0] == GROUP for at in order])[:3]
    better[improved], better[worse] = np.eye(2), 0.0
    winoground.write_scores(folder / "other.jsonl", range(len(rows)), better)
    chosen = [[RELABELLED_TAGS[tag] for tag in tags] for tags, count in RELABELLED.items() for _ in range(count)]
    labels = {str(number): tags for number, tags in enumerate(chosen)}
    (folder / "relabelling.json").write_text(json.dumps(labels))
    return folder


def printed(capsys, folder, *more, scores=("clip",)) -> str:
    files = [f"--scores={folder / name}.jsonl" for name in scores]
    assert main([f"--examples={folder / 'examples.jsonl'}", *files, *more]) == 0
    return capsys.readouterr().out


def test_published_numbers_come_out_of_a_published_score_file(published, capsys):
    found = json.loads(printed(capsys, published, "--json"))
    clip = found["models"]["clip"]
    for name, expected in PUBLISHED.items():
        part = clip["all"] if name == "all" else clip["groups"][name]
        values = tuple(round(100 * part[score]["value"], 2) for score in ("text", "image", "group"))
        assert values == pytest.approx(expected, abs=1e-9), name
    assert {name: clip["groups"][name]["examples"] for name in SIZES} == SIZES
    assert (found["examples"], found["comparisons"]) == (400, [])
    group = clip["all"]["group"]
    assert group["low"] == pytest.approx(0.055, abs=0.003)
    assert group["high"] == pytest.approx(0.1075, abs=0.003)


def test_controls_stand_beside_the_model(published, capsys):
    found = json.loads(printed(capsys, published, "--json"))
    constant = found["controls"]["constant scorer"]["all"]
    assert [constant[part]["value"] for part in ("text", "image", "group")] == [0, 0, 0]
    assert [constant[f"{part}_ties"] for part in ("text", "image", "group")] == [1, 1, 1]
    assert found["chance"] == {"text": 0.25, "image": 0.25, "group": 1 / 6}
    assert found["models"]["clip"]["all"]["group_ties"] == 0


def test_the_table_shows_the_published_numbers(published, capsys):
    lines = printed(capsys, published).splitlines()
    shown = {
        name: line for line in lines for name in ("all examples", *SIZES, "constant scorer") if f" {name} " in line
    }
    for name, expected in PUBLISHED.items():
        line = shown["all examples" if name == "all" else name]
        assert [f"{value:.2f} [" in line for value in expected] == [True] * 3, line
    assert shown["constant scorer"].count("100.00") == 3
    assert "Paired" not in "\n".join(lines)


def test_two_files_are_compared_on_the_same_examples(published, capsys):
    found = json.loads(printed(capsys, published, "--json", scores=("other", "clip")))
    (pair,) = found["comparisons"]
    assert (pair["a"], pair["b"]) == ("other", "clip")
    group = pair["group"]
    assert (group["both"], group["only_a"], group["only_b"], group["neither"]) == (29, 12, 3, 356)
    # Of 15 fair coins at most 3 or at least 12 on one side: 2 * (1 + 15 + 105 + 455) / 2**15.
    assert group["p_value"] == pytest.approx(2 * 576 / 2**15)
    assert group["value"] == pytest.approx(9 / 400)
    assert group["low"] < 9 / 400 < group["high"]
    assert "+2.25 [" in printed(capsys, published, scores=("other", "clip"))


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_the_other_rows_of_the_published_table(name, published, tmp_path, capsys):
    text, image, group = (round(4 * percent) for percent in OTHER_MODELS[name])
    counts = {GROUP: group, TEXT: text - group, IMAGE: image - group}
    outcomes = spread(counts, 400, NOTHING)
    scores = np.array([SCORES[outcome] for outcome in np.random.default_rng(2).permutation(outcomes)])
    winoground.write_scores(tmp_path / "model.jsonl", range(400), scores)
    found = json.loads(printed(capsys, published, f"--scores={tmp_path / 'model.jsonl'}", "--json", scores=()))
    row = found["models"]["model"]["all"]
    values = [round(100 * row[score]["value"], 2) for score in ("text", "image", "group")]
    assert values == pytest.approx(OTHER_MODELS[name], abs=1e-9)


def test_relabelled_examples_are_groups_too(published, capsys):
    groups = json.loads(printed(capsys, published, "--json", f"--relabelling={published / 'relabelling.json'}"))
    groups = groups["models"]["clip"]["groups"]
    found = {name.partition(": ")[2]: part for name, part in groups.items() if name.startswith("relabelled: ")}
    # As published in section 3.
    assert {name: part["examples"] for name, part in found.items()} == {
        "Complex Reasoning": 78, "Unusual Image": 56, "Unusual Text": 50, "Ambiguously Correct": 46,
        "Visually Difficult": 38, "Non Minimal": 30, "no tag": 172,
    }  # fmt: skip
    # The first 172 examples are those without a tag.
    scores = winoground.read_scores(published / "clip.jsonl", range(400))[:172]
    right = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
    assert found["no tag"]["text"]["value"] == pytest.approx(right.mean())


def test_models_of_the_same_file_name_keep_their_folders(published, tmp_path, capsys):
    (tmp_path / "clip.jsonl").write_bytes((published / "clip.jsonl").read_bytes())
    scores = [f"--scores={folder / 'clip.jsonl'}" for folder in (published, tmp_path)]
    assert main([f"--examples={published / 'examples.jsonl'}", *scores, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["models"]) == [str(folder / "clip.jsonl") for folder in (published, tmp_path)]
    assert main([f"--examples={published / 'examples.jsonl'}", scores[0], scores[0]]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_a_faulty_file_ends_the_command_with_its_line_and_nothing_imports_jax(published, tmp_path):
    lines = (published / "clip.jsonl").read_text().splitlines()
    lines[6] = '{"label": "1_c1_i0", "score": NaN}'
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    arguments = [f"--examples={published / 'examples.jsonl'}", f"--scores={tmp_path / 'bad.jsonl'}"]
    command = [sys.executable, "-m", "vla_jax.evaluation.winoground", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert (
        ended.stderr == f"error: {tmp_path / 'bad.jsonl'}, line 7: the score of '1_c1_i0' is nan, not a finite number\n"
    )
    code = "import runpy, sys"
    code += "\ntry: runpy.run_module('vla_jax.evaluation.winoground', run_name='__main__', alter_sys=True)"
    code += "\nexcept SystemExit: print(sorted({'jax', 'tensorflow', 'torch'} & sys.modules.keys()))"
    light = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert light.stdout == "[]\n"
