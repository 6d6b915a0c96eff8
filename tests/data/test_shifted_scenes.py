"""Shifted scenes: the same scenes and annotations in other pictures, and what those look like."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from vla_jax.data.scenes import KINDS, Scene, SceneConfig, SceneObject, SceneSource, Shift, render
from vla_jax.data.scenes.render import object_box
from vla_jax.data.scenes.shift import DULL
from vla_jax.data.scenes.shifted import render_shifted
from vla_jax.data.scenes.vocabulary import COLORS, SHAPES, TEXTURES
from vla_jax.errors import UserError

PLAIN = SceneConfig(seed=4)
SHIFTED = dataclasses.replace(PLAIN, shift=Shift())
QUIET = Shift(background=(200, 200), strokes=0, noise=0.0, textures=False)


def alone(shape="square", color="black", texture="solid") -> Scene:
    thing = SceneObject(SHAPES.index(shape), COLORS.index(color), 1, TEXTURES.index(texture), 4, 0.5, 0.5, 0.3)
    return Scene((thing,))


@pytest.mark.parametrize("kind", KINDS)
def test_the_scenes_and_what_is_said_of_them_stay_and_every_picture_changes(kind):
    plain, shifted = (SceneSource("test", kind, config, length=12) for config in (PLAIN, SHIFTED))
    for index in range(12):
        before, after = plain[index], shifted[index]
        assert before.keys() == after.keys()
        for name, value in before.items():
            if "image" in name:
                assert after[name].shape == value.shape
                assert after[name].dtype == np.uint8
                assert (after[name] != value).mean() > 0.9
            else:
                assert after[name] == value, name


def test_a_shifted_picture_is_a_function_of_its_scene():
    source = SceneSource("train", "classes", SHIFTED, length=6)
    again = pickle.loads(pickle.dumps(source))
    for index in (5, 0):
        np.testing.assert_array_equal(source[index]["image"], again[index]["image"])
    moved = dataclasses.replace(alone().objects[0], x=0.501)
    assert not np.array_equal(render_shifted(alone(), Shift()), render_shifted(Scene((moved,)), Shift()))


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_keep_their_outlines(shape):
    scene = alone(shape)
    seen = render_shifted(scene, QUIET, 72).astype(int)
    # What the plain picture has of black on its ground of 245: 0 where there is none, 1 where there is nothing else.
    covered = 1 - render(scene, 72).max(-1) / 245
    assert (seen[covered > 0.9].max(-1) < 60).all()
    assert (covered > 0.9).sum() > 100
    # The ground is near its one level, with a tint.
    assert np.abs(seen[covered < 0.01] - 200).max() <= 14


@pytest.mark.parametrize("color", COLORS)
def test_colours_keep_their_names_and_lie_elsewhere(color):
    seen = render_shifted(alone(color=color), QUIET, 72)[36, 36].astype(int)
    distances = np.abs(np.array(DULL) - seen).sum(-1)
    assert COLORS[int(distances.argmin())] == color
    assert distances.min() <= 3
    assert np.abs(render(alone(color=color), 72)[36, 36].astype(int) - seen).max() >= 20


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_are_drawn_otherwise_inside_the_same_outline(texture):
    scene = alone(texture=texture)
    same, other = (render_shifted(scene, dataclasses.replace(QUIET, textures=t), 72).astype(int) for t in (False, True))
    x0, y0, x1, y1 = object_box(scene.objects[0], 72)
    inside = np.zeros((72, 72), bool)
    inside[y0:y1, x0:x1] = True
    differs = np.abs(same - other).max(-1) > 20
    assert differs[inside].mean() > 0.15
    assert not differs[~inside].any()


def test_noise_and_strokes_are_as_strong_as_they_are_said_to_be():
    empty = Scene(())
    still = render_shifted(empty, QUIET, 72).astype(float)
    noisy = render_shifted(empty, dataclasses.replace(QUIET, noise=10.0), 72) - still
    assert noisy.std() == pytest.approx(10, rel=0.03)
    crossed = render_shifted(empty, dataclasses.replace(QUIET, strokes=5), 72) - still
    assert 0.02 < (np.abs(crossed).max(-1) > 15).mean() < 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"palette": DULL[:3]}, "a shifted palette has 8 colours"),
        ({"palette": (*DULL[:7], (0, 0, 256))}, "levels from 0 to 255"),
        ({"background": (200, 100)}, "the darker one first; given"),
        ({"strokes": -1}, "cannot be negative"),
        ({"noise": -0.5}, "cannot be negative"),
    ],
)
def test_settings_without_meaning_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Shift(**fields)
