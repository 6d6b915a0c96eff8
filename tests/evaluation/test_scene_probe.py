from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest

from vla_jax.data.scenes import SceneConfig
from vla_jax.errors import UserError
from vla_jax.evaluation import scene_probe, winoground
from vla_jax.evaluation.scene_probe import SceneProbe

SCENE = SceneConfig(image_size=32)


@pytest.fixture(scope="module")
def probe():
    return SceneProbe(length=4, scene=SCENE)


def test_every_cell_has_its_swap_and_its_number_of_objects(probe):
    assert probe.cells[:5] == [("color", 2), ("size", 2), ("texture", 2), ("places", 2), ("color", 3)]
    assert collections.Counter(number for _, number in probe.cells) == {2: 4, 3: 5, 4: 5, 5: 5}
    assert len(probe) == 4 * 19
    swaps, objects = probe.difficulty
    secondary = {"color": "Adjective-Color", "size": "Adjective-Size", "texture": "Adjective-Texture"}
    secondary |= {"places": "Noun Phrase", "relations": "Preposition"}
    for index in range(len(probe)):
        example = probe[index]
        assert (example["id"], example["swap"], example["objects"]) == (index, swaps[index], objects[index])
        assert example["secondary_tag"] == secondary[example["swap"]]
        for number in (0, 1):
            assert len(example[f"scene_{number}"]["objects"]) == example["objects"]
        assert sorted(example["caption_0"].split()) == sorted(example["caption_1"].split())
        assert not np.array_equal(example["image_0"], example["image_1"])


def test_a_probe_is_the_same_in_every_process_and_cells_do_not_depend_on_each_other(probe):
    again = pickle.loads(pickle.dumps(probe))
    alone = SceneProbe(length=4, scene=SCENE, swaps=("places",), objects=(4,))
    at = 4 * probe.cells.index(("places", 4)) + 1
    for other in (again[at], alone[1]):
        assert other["caption_0"] == probe[at]["caption_0"]
        np.testing.assert_array_equal(other["image_1"], probe[at]["image_1"])


def test_the_table_follows_the_score_as_difficulty_grows():
    """Of 10 quadruples a cell, 10 - number are right in groups, and one more is a tie; rows are mixed."""
    probe = SceneProbe(length=10, scene=SCENE, swaps=("relations", "color"))
    swaps, objects = probe.difficulty
    place = np.arange(len(probe)) % 10
    right = place < 10 - objects
    scores = np.where(right[:, None, None], np.eye(2), np.where((place == 9)[:, None, None], 0.0, 1 - np.eye(2)))
    order = np.random.default_rng(0).permutation(len(probe))
    rows = scene_probe.by_difficulty(scores[order], swaps[order], objects[order])
    assert [(row["swap"], row["objects"]) for row in rows] == [
        *(("color", number) for number in (2, 3, 4, 5)),
        *(("relations", number) for number in (3, 4, 5)),
    ]
    for row in rows:
        assert row["group"].value == pytest.approx((10 - row["objects"]) / 10)
        assert row["group"].low < row["group"].value < row["group"].high
        assert (row["group_ties"], row["examples"]) == (0.1, 10)
    seeds = np.stack([scores, np.zeros_like(scores)])
    halved = scene_probe.by_difficulty(seeds, swaps, objects)
    assert [row["text"].value for row in halved] == [pytest.approx(row["text"].value / 2) for row in rows]
    lines = scene_probe.table(rows, "Title").markdown().splitlines()
    assert lines[0] == "**Title**"
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells[:3] == ["color", "2", "10"]
    assert [cell.split()[0] for cell in cells[3:6]] == ["80.0"] * 3
    assert cells[6:] == ["10.0"] * 3


def test_random_scores_are_at_chance_in_every_cell(probe):
    swaps, objects = (np.repeat(values, 1500) for values in probe.difficulty)
    rows = scene_probe.by_difficulty(np.random.default_rng(0).random((len(swaps), 2, 2)), swaps, objects)
    for name, chance in winoground.CHANCE.items():
        # Standard errors are below 0.0057 with 6,000 in each of 19 cells.
        np.testing.assert_allclose([row[name].value for row in rows], chance, rtol=0, atol=0.022)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swaps": ("colour",)}, "unknown swap 'colour'; did you mean 'color'"),
        ({"objects": (2, 6)}, "a probe with 6 objects; scenes with something to swap have 2 to 5"),
        ({"objects": (1,)}, "a probe with 1 objects"),
        ({"swaps": ("color", "color")}, "name one twice"),
        ({"swaps": ("relations",), "objects": (2,)}, "no swap of .* can be made"),
        ({"length": 0}, "length 0 must be at least 1"),
    ],
)
def test_impossible_probes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SceneProbe(scene=SCENE, **changes)


def test_scores_need_a_difficulty_each():
    with pytest.raises(UserError, match="of 2 swaps and 3 numbers of objects"):
        scene_probe.by_difficulty(np.zeros((3, 2, 2)), ["color"] * 2, [2, 3, 4])
