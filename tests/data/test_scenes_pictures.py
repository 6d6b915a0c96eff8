"""Scenes and their pictures: a pure function of the index, exact annotations, splits without common content."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from scenes_oracle import digest

from vla_jax.data.scenes import (
    KINDS,
    Scene,
    SceneConfig,
    SceneObject,
    SceneSource,
    annotations,
    draw_scene,
    object_arrays,
    patch_labels,
    render,
    seeded,
)
from vla_jax.data.scenes.quadruples import swap
from vla_jax.data.scenes.render import object_box
from vla_jax.data.scenes.sampling import SPLITS, same_content, split_of
from vla_jax.data.scenes.vocabulary import COLORS, PALETTE, SHAPES, SIZES, TEXTURES
from vla_jax.errors import UserError

WHITE = (255, 255, 255)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_a_function_of_their_index(kind):
    source = SceneSource("train", kind, SceneConfig(seed=9), length=50)
    expected = digest(source)
    assert source[3] is not source[3]
    backwards = {index: source[index] for index in reversed(range(50))}
    for index in (0, 20, 49):
        for name, value in source[index].items():
            np.testing.assert_equal(backwards[index][name], value)
    assert digest(pickle.loads(pickle.dumps(source))) == expected
    for other in (
        SceneSource("train", kind, SceneConfig(seed=10), length=50),
        SceneSource("test", kind, SceneConfig(seed=9), length=50),
    ):
        assert digest(other) != expected


def test_another_process_gives_the_same_examples():
    source = SceneSource("test", "captions", SceneConfig(seed=9), length=30)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from scenes_oracle import digest\n"
        "from vla_jax.data.scenes import SceneConfig, SceneSource\n"
        "print(digest(SceneSource('test', 'captions', SceneConfig(seed=9), length=30)))"
    )
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONHASHSEED": "1234", "PYTHONPATH": str(folder.parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == digest(source)


def test_a_source_is_a_sequence():
    source = SceneSource("train", "classes", length=3)
    assert len(source) == 3
    assert len(list(source)) == 3
    np.testing.assert_equal(source[-1], source[2])
    np.testing.assert_equal(source[np.int64(1)], source[1])
    with pytest.raises(IndexError):
        source[3]
    assert len(SceneSource("train", "classes", SceneConfig(length=1_000_000))) == 1_000_000


def test_grain_reads_a_source():
    source = SceneSource("train", "captions", SceneConfig(patch_grid=8), length=20)
    fields = ("image", "patch_labels", "objects")
    dataset = grain.MapDataset.source(source).shuffle(seed=0).map(lambda e: {name: e[name] for name in fields}).batch(4)
    assert dataset[2]["image"].shape == (4, 64, 64, 3)
    assert dataset[2]["patch_labels"].shape == (4, 8, 8, 4)
    assert dataset[2]["objects"]["boxes"].shape == (4, 5, 4)


def test_splits_share_no_content():
    seen = {}
    for split in SPLITS:
        contents = set()
        # One object only: the fewest contents there are, so that a leak would show.
        source = SceneSource(split, "captions", SceneConfig(max_objects=1))
        for index in range(1500):
            (thing,) = source[index]["scene"]["objects"]
            contents.add((thing["shape"], thing["color"], thing["size"], thing["texture"], thing["cell"]))
        seen[split] = contents
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    # 8 x 8 x 2 x 4 x 9 contents; a tenth of them, give or take four standard deviations, in each held-out split.
    assert all(abs(len(seen[split]) - 461) < 4 * (4608 * 0.09) ** 0.5 + 30 for split in ("validation", "test"))


@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_of_every_kind_lies_in_its_split(split):
    for kind in KINDS:
        source = SceneSource(split, kind)
        for index in range(30):
            scenes = [value for name, value in source[index].items() if "scene" in name]
            for scene in scenes:
                objects = [
                    SceneObject(o["shape_id"], o["color_id"], o["size_id"], o["texture_id"], o["cell"], 0.5, 0.5, 0.2)
                    for o in scene["objects"]
                ]
                assert split_of(Scene(tuple(objects))) == split


@pytest.mark.parametrize("size", [64, 96])
def test_boxes_are_exact_and_apart(size):
    config = SceneConfig(min_objects=5)
    for index in range(60):
        scene = draw_scene(seeded("box", index), config, "train")
        taken = np.zeros((size, size), bool)
        for thing in scene.objects:
            drawn = SceneObject(thing.shape, COLORS.index("black"), 0, TEXTURES.index("solid"), *_place(thing))
            covered = render(Scene((drawn,), WHITE), size)[..., 0] < 255 * 0.9
            rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert object_box(thing, size) == box
            x0, y0, x1, y1 = box
            assert not taken[y0:y1, x0:x1].any()
            taken[y0:y1, x0:x1] = True
            row, column = divmod(thing.cell, 3)
            assert (int(3 * (x0 + x1) / 2 / size), int(3 * (y0 + y1) / 2 / size)) == (column, row)


def _place(thing):
    return thing.cell, thing.x, thing.y, thing.scale


def test_swapped_objects_stay_in_their_cells():
    config = SceneConfig(min_objects=5)
    for index in range(60):
        scene = draw_scene(seeded("swap", index), config, "train")
        for what in ("size", "cell"):
            twin = swap(scene, 0, 1, what)
            for thing in twin.objects:
                for value, index_ in ((thing.x, thing.cell % 3), (thing.y, thing.cell // 3)):
                    assert index_ / 3 <= value - thing.scale / 2
                    assert value + thing.scale / 2 <= (index_ + 1) / 3


@pytest.mark.parametrize(("size", "grid"), [(64, 8), (64, 4), (96, 6), (64, 32)])
def test_patch_labels_equal_counting_pixels(size, grid):
    for index in range(15):
        scene = draw_scene(seeded("patch", index), SceneConfig(), "train")
        expected = np.zeros((grid, grid, 4), np.int32)
        side = size // grid
        masks = []
        for thing in scene.objects:
            drawn = SceneObject(thing.shape, COLORS.index("black"), 0, TEXTURES.index("solid"), *_place(thing))
            masks.append(render(Scene((drawn,), WHITE), size)[..., 0] <= 128)
        for row in range(grid):
            for column in range(grid):
                window = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
                counts = [int(mask[window].sum()) for mask in masks]
                if max(counts) * 4 >= side * side:
                    o = scene.objects[int(np.argmax(counts))]
                    expected[row, column] = (o.shape + 1, o.color + 1, o.size + 1, o.texture + 1)
        labels = patch_labels(scene, grid, size)
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, expected)
    with pytest.raises(UserError, match="divisor of 64"):
        patch_labels(scene, 7, 64)


def test_object_arrays_hold_the_annotations():
    scene = draw_scene(seeded("arrays"), SceneConfig(min_objects=3, max_objects=3), "train")
    arrays = object_arrays(scene)
    assert arrays["mask"].tolist() == [True] * 3 + [False] * 2
    for index, known in enumerate(annotations(scene)["objects"]):
        names = ("shape_id", "color_id", "size_id", "texture_id", "cell")
        assert arrays["attributes"][index].tolist() == [known[name] + 1 for name in names]
        assert arrays["boxes"][index].tolist() == known["box"]
    assert not arrays["attributes"][3:].any()


def test_solid_objects_have_the_palette_s_colours():
    for color, name in enumerate(COLORS):
        scene = Scene((SceneObject(0, color, 1, TEXTURES.index("solid"), 4, 0.5, 0.5, 0.3),), (240, 230, 255))
        picture = render(scene)
        assert tuple(picture[32, 32]) == PALETTE[name]
        assert tuple(picture[0, 0]) == (240, 230, 255)


@pytest.mark.parametrize("extent", [12, 14, 18, 20])
def test_shapes_and_textures_differ_clearly(extent):
    # Two shapes of one texture, and two textures of one shape: a tenth of the smaller shape's pixels, or more, change
    # by a third of full scale.
    solid = TEXTURES.index("solid")
    pictures = {}
    for key in itertools.product(range(len(SHAPES)), range(len(TEXTURES))):
        thing = SceneObject(key[0], COLORS.index("black"), 0, key[1], 4, 0.5, 0.5, extent / 64)
        pictures[key] = render(Scene((thing,), WHITE))[..., 0].astype(int)
    for one, other in itertools.combinations(pictures, 2):
        if one[0] == other[0] or one[1] == other[1]:
            area = min((pictures[shape, solid] < 128).sum() for shape, _ in (one, other))
            changed = (abs(pictures[one] - pictures[other]) > 85).sum()
            assert changed > 0.1 * area, (one, other, changed, area)


def test_small_and_large_do_not_overlap():
    config = SceneConfig()
    scales = {name: [] for name in SIZES}
    for index in range(200):
        for thing in draw_scene(seeded("size", index), config, "train").objects:
            scales[SIZES[thing.size]].append(thing.scale)
    assert 1.25 * max(scales["small"]) < min(scales["large"])


def test_a_narrow_configuration_is_kept_to():
    config = SceneConfig(
        shapes=("circle", "star"),
        colors=("red",),
        textures=("solid",),
        sizes=("large",),
        max_objects=1,
        large=(0.5, 0.6),
    )
    source = SceneSource("train", "captions", config)
    for index in range(50):
        (thing,) = source[index]["scene"]["objects"]
        assert thing["shape"] in ("circle", "star")
        assert (thing["color"], thing["texture"], thing["size"]) == ("red", "solid", "large")
        x0, y0, x1, y1 = thing["box"]
        assert 0 <= x0 < x1 <= 64
        assert 0 <= y0 < y1 <= 64
        assert (int(3 * (x0 + x1) / 128), int(3 * (y0 + y1) / 128)) == (thing["cell"] % 3, thing["cell"] // 3)


def test_narrow_held_out_splits_still_give_examples():
    config = SceneConfig(textures=("solid",), sizes=("large",), max_objects=3)
    for kind in KINDS:
        source = SceneSource("test", kind, config)
        assert len([source[index] for index in range(40)]) == 40


def test_same_content_does_not_depend_on_order_or_jitter():
    scene = draw_scene(seeded("same"), SceneConfig(min_objects=3), "train")
    moved = Scene(
        tuple(reversed([SceneObject(o.shape, o.color, o.size, o.texture, o.cell, 0, 0, 0.1) for o in scene.objects]))
    )
    assert same_content(scene, moved)
    assert not same_content(scene, Scene(scene.objects[1:]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_objects": 6}, "max_objects <= 5"),
        ({"min_objects": 3, "max_objects": 2}, "objects from 3 to 2"),
        ({"image_size": 16}, "give 32 or more"),
        ({"colors": ("red", "grey")}, "did you mean 'gray'"),
        ({"shapes": ()}, "no shape given"),
        ({"shapes": ("star", "star")}, "stands twice"),
        ({"large": (0.3, 0.5)}, "max_objects=1"),
        ({"patch_grid": 7}, "must divide image_size 64"),
        ({"statement_kinds": ("bindings",)}, "did you mean 'binding'"),
        ({"length": 0}, "at least 1"),
        ({"twin_swaps": ("place",)}, "unknown twin swap 'place'"),
        ({"twin_pair_share": 1.5}, "a share, 0 to 1; got 1.5"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(arguments, message):
    with pytest.raises(UserError, match=message):
        SceneConfig(**arguments)


def test_wrong_requests_say_what_is_wrong():
    with pytest.raises(UserError, match="did you mean 'statements'"):
        SceneSource("train", "statement")
    with pytest.raises(UserError, match="unknown split 'valid'"):
        SceneSource("valid", "captions")
    with pytest.raises(UserError, match="needs 3 objects"):
        SceneSource("train", "quadruples", SceneConfig(max_objects=2, quadruple_tags=("Relation",)))[0]
    with pytest.raises(UserError, match="needs 2 values of color"):
        SceneSource("train", "statements", SceneConfig(colors=("red",), statement_kinds=("binding",)))[0]
    with pytest.raises(UserError, match="lies in split 'test'"):
        SceneSource(
            "test", "classes", SceneConfig(shapes=("circle",), colors=("red",), sizes=("small",), textures=("solid",))
        )[0]
