from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from vla_jax.data.scenes import SceneConfig, SceneSource
from vla_jax.errors import UserError
from vla_jax.evaluation import statistics, winoground


def literal(score):
    """The paper's definitions, one example, with s(c, i) as a function."""

    def s(c, i):
        return score[c][i]

    text = s(0, 0) > s(1, 0) and s(1, 1) > s(0, 1)
    image = s(0, 0) > s(0, 1) and s(1, 1) > s(1, 0)
    return text, image, text and image


def test_outcomes_equal_the_literal_definitions():
    """Few values, so that all kinds of ties occur."""
    scores = np.random.default_rng(0).integers(0, 4, (3000, 2, 2)).astype(float)
    found = winoground.outcomes(scores)
    expected = np.array([literal(score) for score in scores.tolist()])
    np.testing.assert_array_equal(np.stack([found.text, found.image, found.group], 1), expected)


def test_ties_are_what_an_infinitesimal_favour_would_turn():
    scores = np.random.default_rng(1).integers(0, 3, (2000, 2, 2)).astype(float)
    strict, favoured = winoground.outcomes(scores), winoground.outcomes(scores + 0.01 * np.eye(2))
    for name in ("text", "image", "group"):
        ties = getattr(favoured, name) & ~getattr(strict, name)
        assert ties.any()
        np.testing.assert_array_equal(getattr(strict, f"{name}_ties"), ties)


def test_random_scores_reach_chance():
    found = winoground.evaluate(np.random.default_rng(0).random((200_000, 2, 2)))
    for name, chance in winoground.CHANCE.items():
        assert getattr(found, name).value == pytest.approx(chance, abs=0.004)
    assert winoground.CHANCE == {"text": 0.25, "image": 0.25, "group": 1 / 6}


@pytest.mark.parametrize("text_only", [False, True])
def test_controls_that_see_too_little_reach_nothing(text_only):
    """A constant ties everywhere; a scorer of captions alone ties between pictures."""
    scores = np.zeros((50, 2, 2))
    if text_only:
        scores += np.random.default_rng(0).random((50, 2, 1))
    found = winoground.evaluate(scores)
    assert (found.text.value, found.image.value, found.group.value) == (0, 0, 0)
    assert found.image_ties == 1
    assert found.text_ties == (0 if text_only else 1)
    assert found.group_ties == (0 if text_only else 1)


def test_seeds_are_averaged_and_compared():
    perfect = np.broadcast_to(np.eye(2), (40, 2, 2))
    constant = np.zeros((40, 2, 2))
    assert winoground.evaluate(np.stack([perfect, constant])).group.value == 0.5
    found = winoground.compare(perfect, constant)
    assert set(found) == {"text", "image", "group"}
    assert (found["group"].value, found["group"].wins, found["group"].losses) == (1, 40, 0)
    assert found["group"].p_value == pytest.approx(2 / 2**40)


def examples(*fields):
    return [
        winoground.Example(str(index), ("a", "b"), ("x", "y"), tag, secondary, predicates, collapsed)
        for index, (tag, secondary, predicates, collapsed) in enumerate(fields)
    ]


def test_groups_follow_both_rules_for_secondary_tags():
    groups = winoground.groups_of_examples(
        examples(
            ("Noun", "Symbolic", 1, "Object"),
            ("Scope", "", 2, "Relation"),
            ("Noun", "Pragmatics, Symbolic", 1, "Object"),
            ("Noun", "Pragmatics, Symbolic", 2, "Both"),
        )
    )
    assert {name: positions.tolist() for name, positions in groups.items()} == {
        "collapsed_tag: Both": [3],
        "collapsed_tag: Object": [0, 2],
        "collapsed_tag: Relation": [1],
        "tag: Noun": [0, 2, 3],
        "tag: Scope": [1],
        "num_main_preds: 1": [0, 2],
        "num_main_preds: 2": [1, 3],
        "secondary_tag contains: Pragmatics": [2, 3],
        "secondary_tag contains: Symbolic": [0, 2, 3],
        "secondary_tag is: Symbolic": [0],
    }


def test_groups_are_scored_apart_and_add_up():
    scores = np.random.default_rng(0).random((60, 2, 2))
    labels = ["object", "relation", "attribute"] * 20
    found = winoground.evaluate_groups(scores, winoground.group_by(labels))
    assert list(found) == ["object", "relation", "attribute"]
    assert found["relation"] == winoground.evaluate(scores[1::3])
    whole = winoground.evaluate(scores)
    assert np.mean([part.text.value for part in found.values()]) == pytest.approx(whole.text.value)


@pytest.mark.parametrize(
    ("scores", "message"), [(np.zeros((4, 2, 3)), "2 captions"), (np.full((1, 2, 2), np.nan), "4 of 4 scores are NaN")]
)
def test_scores_that_cannot_be_judged_are_refused(scores, message):
    with pytest.raises(UserError, match=message):
        winoground.evaluate(scores)


def test_scores_file_keeps_every_bit_in_any_order_of_lines(tmp_path):
    scores = np.random.default_rng(0).normal(size=(5, 2, 2)) * 1e-3
    identifiers = [7, 0, "c1_i0", 12, 3]
    winoground.write_scores(tmp_path / "scores.jsonl", identifiers, scores)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(lines[2]) == {"label": "7_c1_i0", "score": scores[0, 1, 0]}
    np.random.default_rng(1).shuffle(lines)
    (tmp_path / "scores.jsonl").write_text("\n".join(lines))
    np.testing.assert_array_equal(winoground.read_scores(tmp_path / "scores.jsonl", identifiers), scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "1 of 8 labels are missing, first '1_c1_i1'"),
        (lambda lines: [*lines, lines[0]], "line 9: label '0_c0_i0' stands already in line 1"),
        (lambda lines: [*lines, '{"label": "2_c0_i0", "score": 1}'], "line 9: label '2_c0_i0' names no example"),
        (lambda lines: ['{"label": "0_c2_i0", "score": 1}', *lines], "line 1: label '0_c2_i0' is not of the form"),
        (lambda lines: ['{"label": "0_c0_i0", "score": "1"}', *lines[1:]], "line 1: the score of '0_c0_i0' is '1'"),
        (lambda lines: ['{"label": "0_c0_i0", "score": NaN}', *lines[1:]], "line 1: the score of '0_c0_i0' is nan"),
        (lambda lines: ['{"label": "0_c0_i0", "score": 1e999}', *lines[1:]], "line 1: the score of '0_c0_i0' is inf"),
        (
            lambda lines: [f'{{"label": "0_c0_i0", "score": 1{"0" * 400}}}', *lines[1:]],
            "line 1: the score of '0_c0_i0'",
        ),
        (lambda lines: ['{"label": "0_c0_i0", "score": true}', *lines[1:]], "line 1: the score of '0_c0_i0' is True"),
        (lambda lines: [lines[0], "{", *lines[1:]], "line 2: not JSON"),
        (lambda lines: [lines[0], "[1]", *lines[1:]], "line 2: a JSON object is expected"),
    ],
)
def test_a_faulty_scores_file_is_named_by_its_line(tmp_path, change, message):
    path = tmp_path / "scores.jsonl"
    winoground.write_scores(path, [0, 1], np.zeros((2, 2, 2)))
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(UserError, match=message):
        winoground.read_scores(path, [0, 1])


def test_scores_that_json_cannot_hold_are_not_written(tmp_path):
    with pytest.raises(UserError, match="finite"):
        winoground.write_scores(tmp_path / "scores.jsonl", [0], np.full((1, 2, 2), np.inf))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for index in range(3):
        for image in (0, 1):
            picture = Image.new("RGBA", (6, 4), (10 * index, 20 * image, 30, 128))
            picture.save(tmp_path / "images" / f"ex_{index}_img_{image}.png")
        lines.append(
            {
                "id": index,
                "image_0": f"ex_{index}_img_0",
                "image_1": f"ex_{index}_img_1",
                "caption_0": "a dog on a cat",
                "caption_1": "a cat on a dog",
                "tag": "Noun",
                "secondary_tag": "",
                "num_main_preds": 1,
                "collapsed_tag": "Object",
            }
        )
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_directory_is_read_at_random_in_the_form_of_generated_quadruples(directory):
    source = winoground.Winoground(directory)
    assert len(source) == 3
    assert source.identifiers == ["0", "1", "2"]
    example = source[2]
    assert (example["id"], example["caption_0"], example["caption_1"]) == ("2", "a dog on a cat", "a cat on a dog")
    for number in (0, 1):
        with Image.open(io.BytesIO(example[f"image_{number}"])) as picture:
            assert picture.size == (6, 4)
            assert picture.getpixel((0, 0)) == (20, 20 * number, 30, 128)
    assert winoground.groups_of_examples(source.examples)["collapsed_tag: Object"].tolist() == [0, 1, 2]
    generated = SceneSource("test", "quadruples", SceneConfig(image_size=32), length=1)[0]
    assert example.keys() == generated.keys() - {"scene_0", "scene_1"}


def test_directory_says_what_to_download_and_where_to(directory, tmp_path):
    with pytest.raises(UserError, match=r"huggingface\.co/datasets/facebook/winoground.*nowhere/images/ex_0_img_0"):
        winoground.Winoground(tmp_path / "nowhere")
    (directory / "images" / "ex_1_img_1.png").unlink()
    with pytest.raises(UserError, match=r"1 of 6 pictures are missing.*ex_1_img_1\.png.*images\.zip"):
        winoground.Winoground(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, lines[0]], "line 4: example '0' stands there twice, first in line 1"),
        (lambda lines: [lines[0], lines[1].replace("caption_1", "caption")], "line 2: fields caption_1 are missing"),
        (lambda lines: [lines[0].replace('"Noun"', "7")], "line 1: field tag is 7, not str"),
        (lambda lines: [lines[0].replace('"a dog on a cat"', '" "')], "line 1: field caption_0 is empty"),
        (lambda lines: [lines[0].replace('main_preds": 1', 'main_preds": "one"')], "line 1: num_main_preds is 'one'"),
        (lambda lines: ["", " "], "holds no example"),
    ],
)
def test_damaged_examples_are_named(directory, change, message):
    path = directory / "examples.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(UserError, match=message):
        winoground.Winoground(directory)


def test_a_caption_may_hold_the_line_separators_that_only_json_leaves_alone(directory):
    path = directory / "examples.jsonl"
    path.write_text(path.read_text().replace("a dog on", "a\u2028dog on"), encoding="utf-8")
    assert winoground.read_examples(path)[0].captions[0] == "a\u2028dog on a cat"


def test_bootstrap_intervals_are_those_of_drawing_examples():
    """Against scipy's percentile bootstrap; the quantiles of 10,000 draws have standard errors below 0.002."""
    scores = np.random.default_rng(3).random((400, 2, 2))
    found = winoground.evaluate(scores, statistics.bootstrap_accuracy)
    assert found.text.value == winoground.evaluate(scores).text.value
    correct = winoground.outcomes(scores).text.astype(float)
    drawn = stats.bootstrap((correct,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    expected = drawn.confidence_interval
    np.testing.assert_allclose([found.text.low, found.text.high], [expected.low, expected.high], rtol=0, atol=0.008)


def test_trained_models_are_compared_example_by_example():
    perfect, constant = np.broadcast_to(np.eye(2), (40, 2, 2)), np.zeros((40, 2, 2))
    half = np.where(np.arange(40)[:, None, None] < 25, perfect, constant)
    found = winoground.compare_trained(perfect, half)["group"]
    assert (found.both, found.only_a, found.only_b, found.neither) == (25, 15, 0, 0)
    assert found.p_value == pytest.approx(2 / 2**15)


@pytest.fixture
def relabelling(directory):
    path = directory / "new_tag_assignments.json"
    path.write_text(json.dumps({"0": ["Complex Reasoning", "Unusual Text"], "1": [], "2": ["Unusual Text"]}))
    return path


def test_relabelling_is_read_as_published(directory, relabelling):
    examples = winoground.read_examples(directory / "examples.jsonl")
    groups = winoground.relabelled_groups(examples, winoground.read_relabelling(relabelling, examples))
    assert {name: positions.tolist() for name, positions in groups.items()} == {
        "relabelled: Complex Reasoning": [0],
        "relabelled: Unusual Text": [0, 2],
        "relabelled: no tag": [1],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": [], "1": []}', "1 of 3 examples are missing, first '2'"),
        ('{"0": [], "1": [], "2": [], "9": []}', "1 ids name no example, first '9'"),
        ('{"0": [], "1": "Complex Reasoning", "2": []}', "the tags of '1' are 'Complex Reasoning', not a list"),
        ('{"0": ["A", "A"], "1": [], "2": []}', "example '0' has the tag 'A' twice"),
        ('{"0": [], "1": [], "1": ["A"], "2": []}', "the key '1' stands twice"),
        ('{"0": [],\n"1": [', "line 2: not JSON"),
        ("[]", "not an object of tags by id.*why-winoground-hard"),
    ],
)
def test_a_damaged_relabelling_is_named(directory, relabelling, content, message):
    examples = winoground.read_examples(directory / "examples.jsonl")
    relabelling.write_text(content)
    with pytest.raises(UserError, match=message):
        winoground.read_relabelling(relabelling, examples)


def test_an_absent_relabelling_says_where_it_comes_from(directory):
    with pytest.raises(UserError, match=r"github\.com/ajd12342/why-winoground-hard"):
        winoground.read_relabelling(directory / "nothing.json", winoground.read_examples(directory / "examples.jsonl"))
