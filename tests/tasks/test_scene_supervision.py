import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.data.scenes import SceneConfig, SceneSource
from vla_jax.data.scenes.vocabulary import COLORS, SHAPES, SIZES, TEXTURES
from vla_jax.tasks import scene_supervision


@pytest.fixture(scope="module")
def scenes():
    source = SceneSource("train", "captions", SceneConfig(seed=3), length=12)
    return [source[index]["scene"] for index in range(12)]


def test_cells_hold_the_objects_of_the_annotations(scenes):
    for scene in scenes:
        labels = scene_supervision.cell_labels(scene)
        assert labels.shape == (9, 4)
        assert (labels > 0).all(-1).sum() == len(scene["objects"])
        for thing in scene["objects"]:
            shape, color, size, texture = labels[thing["cell"]] - 1
            assert (SHAPES[shape], COLORS[color], SIZES[size], TEXTURES[texture]) == (
                thing["shape"],
                thing["color"],
                thing["size"],
                thing["texture"],
            )


def test_patches_of_an_aligned_grid_divide_into_cells_of_equal_size():
    cells = scene_supervision.cell_of_patch(6).reshape(6, 6)
    expected = np.arange(9).reshape(3, 3).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(cells, expected)
    np.testing.assert_array_equal(scene_supervision.cell_of_patch(3), np.arange(9))


def test_pairings_say_which_values_one_object_has_together(scenes):
    labels = np.stack([scene_supervision.cell_labels(scene) for scene in scenes])
    found = np.asarray(scene_supervision.pairing_labels(jnp.asarray(labels)))
    for scene, row in zip(scenes, found, strict=True):
        expected = []
        for name, values in (("color", COLORS), ("size", SIZES), ("texture", TEXTURES)):
            together = {(thing["shape"], thing[name]) for thing in scene["objects"]}
            expected += [(shape, value) in together for shape in SHAPES for value in values]
        np.testing.assert_array_equal(row, expected)


def test_attribute_loss_of_certain_and_of_uninformed_logits(scenes):
    labels = jnp.asarray(np.stack([scene_supervision.cell_labels(scene) for scene in scenes]))
    counts = [len(SHAPES) + 1, len(COLORS) + 1, len(SIZES) + 1, len(TEXTURES) + 1]
    right = jnp.concatenate([jax.nn.one_hot(labels[..., i], count) for i, count in enumerate(counts)], -1)
    loss, accuracy = scene_supervision.attribute_loss(100 * right, labels)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    np.testing.assert_array_equal(accuracy, 1)
    loss, accuracy = scene_supervision.attribute_loss(jnp.zeros_like(right), labels)
    np.testing.assert_allclose(loss, np.mean(np.log(counts)), rtol=1e-6)
    np.testing.assert_array_equal(accuracy, 0)  # a tie goes to "no object", which never counts as right


def _labels(*things: tuple[int, str, str]) -> jnp.ndarray:
    """One scene of (cell, shape, colour)."""
    labels = np.zeros((1, 9, 4), np.int32)
    for cell, shape, color in things:
        labels[0, cell] = [SHAPES.index(shape) + 1, COLORS.index(color) + 1, 1, 1]
    return jnp.asarray(labels)


def test_orders_hold_where_all_objects_of_two_values_lie_one_way_round():
    # circle  .       square      row 0
    # .       circle  .           row 1
    labels = _labels((0, "circle", "red"), (2, "square", "blue"), (4, "circle", "green"))
    across, down = np.asarray(scene_supervision.order_labels(labels))[0]
    value = [*SHAPES, *COLORS].index
    assert {(i, j) for i, j in zip(*np.nonzero(across), strict=True)} == {
        (value("circle"), value("square")),
        (value("red"), value("green")),
        (value("red"), value("blue")),
        (value("green"), value("blue")),
    }
    # The circles lie beside the square and below it: no circle lies above it.
    assert {(i, j) for i, j in zip(*np.nonzero(down), strict=True)} == {
        (value("square"), value("circle")),
        (value("red"), value("green")),
        (value("blue"), value("green")),
    }


def test_values_that_lie_both_ways_round_have_no_order():
    labels = _labels((0, "circle", "red"), (1, "square", "blue"), (2, "circle", "red"))
    across, down = np.asarray(scene_supervision.order_labels(labels))[0]
    assert not across.any()
    assert not down.any()
    assert scene_supervision.order_loss(jnp.ones((1, 2, 16)), labels) == (0, 0)


def test_order_loss_of_right_wrong_and_absent_coordinates():
    labels = _labels((3, "circle", "red"), (5, "square", "blue"))
    coordinates = np.zeros((1, 2, 16), np.float32)
    loss, accuracy = scene_supervision.order_loss(jnp.asarray(coordinates), labels)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert accuracy == 0  # a tie is not an order
    for name in ("square", "blue"):
        coordinates[0, 0, [*SHAPES, *COLORS].index(name)] = 3
    loss, accuracy = scene_supervision.order_loss(jnp.asarray(coordinates), labels)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-3)), rtol=1e-5)
    assert accuracy == 1
    loss, accuracy = scene_supervision.order_loss(jnp.asarray(-coordinates), labels)
    np.testing.assert_allclose(loss, np.log1p(np.exp(3)), rtol=1e-6)
    assert accuracy == 0


def test_numbers_count_shapes_and_colours(scenes):
    labels = jnp.asarray(np.stack([scene_supervision.cell_labels(scene) for scene in scenes]))
    found = np.asarray(scene_supervision.number_labels(labels))
    for scene, row in zip(scenes, found, strict=True):
        things = scene["objects"]
        expected = [sum(thing["shape"] == shape for thing in things) for shape in SHAPES]
        expected += [sum(thing["color"] == color for thing in things) for color in COLORS]
        np.testing.assert_array_equal(row, expected)
    certain = 100 * jax.nn.one_hot(found, 6)
    # Zero has no relative error; certain logits of 100 leave e^-100.
    np.testing.assert_allclose(scene_supervision.number_loss(certain, labels), 0, atol=1e-6)
    uninformed = scene_supervision.number_loss(jnp.zeros_like(certain), labels)
    np.testing.assert_allclose(uninformed, np.log(6), rtol=1e-6)


def test_images_and_texts_are_read_by_the_same_heads_whatever_the_features_length():
    heads = scene_supervision.SceneHeads()
    features = jax.random.normal(jax.random.key(0), (2, 16))
    params = heads.init(jax.random.key(1), jnp.zeros((2, 36, 8)), features)
    once = heads.apply(params, features, method="of_features")
    longer = heads.apply(params, 7 * features, method="of_features")
    assert [a.shape for a in once] == [(2, 9, 26), (2, 112), (2, 2, 16), (2, 16, 6)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), once, longer)
