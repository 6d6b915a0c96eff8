import numpy as np

from vla_jax.data.quadruple_pairs import QuadruplePairs, as_scores
from vla_jax.evaluation import winoground

QUADRUPLES = [
    {f"{part}_{n}": f"{part} {n} of {q}" for part in ("caption", "image") for n in (0, 1)} | {"tag": "Object"}
    for q in range(3)
]


def test_positions_count_quadruples_then_captions_then_pictures():
    pairs = QuadruplePairs(QUADRUPLES)
    assert len(pairs) == 12
    position = 0
    for quadruple in QUADRUPLES:
        for caption in (0, 1):
            for image in (0, 1):
                assert pairs[np.int64(position)] == {
                    "image": quadruple[f"image_{image}"],
                    "text": quadruple[f"caption_{caption}"],
                    "label": int(caption == image),
                }
                position += 1


def test_scores_in_order_become_winogrounds():
    flat = np.random.default_rng(0).normal(size=(2, 12))
    found = as_scores(flat)
    assert found.shape == (2, 3, 2, 2)
    for seed in range(2):
        for quadruple in range(3):
            for caption in (0, 1):
                for image in (0, 1):
                    assert found[seed, quadruple, caption, image] == flat[seed, 4 * quadruple + 2 * caption + image]


def test_a_judge_that_reads_the_captions_only_gets_no_picture_right_and_a_perfect_one_gets_all():
    pairs = QuadruplePairs(QUADRUPLES)
    perfect = np.array([float(pairs[i]["label"]) for i in range(len(pairs))])
    assert winoground.evaluate(as_scores(perfect)).group.value == 1
    # One score a caption: each caption's two pictures tie.
    of_captions = np.array([float("caption 0" in pairs[i]["text"]) for i in range(len(pairs))])
    found = winoground.evaluate(as_scores(of_captions))
    assert (found.text.value, found.image.value, found.image_ties) == (0, 0, 1)
