"""The few-shot protocol: draws, what a method gets to see, means, and base to novel by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation import few_shot
from vla_jax.evaluation.few_shot import draw_shots
from vla_jax.tasks.classification import prototypes

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [20, 20, 20, 20, 3]))


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_every_class_gives_as_many_and_a_small_one_all(shots):
    chosen = draw_shots(LABELS, shots, seed=3)
    np.testing.assert_array_equal(np.bincount(LABELS[chosen]), [shots] * 4 + [min(shots, 3)])
    assert len(set(chosen.tolist())) == len(chosen)


def test_draws_nest_and_follow_the_seed():
    assert set(draw_shots(LABELS, 2, 1)) < set(draw_shots(LABELS, 8, 1))
    np.testing.assert_array_equal(draw_shots(LABELS, 4, 1), draw_shots(LABELS, 4, 1))
    assert not np.array_equal(draw_shots(LABELS, 4, 1), draw_shots(LABELS, 4, 2))


def test_a_class_is_drawn_alike_whatever_the_others_are():
    alone = np.where(LABELS == 2, 2, 0)
    of_class = lambda chosen: [place for place in chosen if LABELS[place] == 2]  # noqa: E731
    assert of_class(draw_shots(alone, 4, 7)) == of_class(draw_shots(LABELS, 4, 7))


def test_methods_see_shots_alone_and_are_judged_on_the_test_split():
    train, validation, test = LABELS, LABELS[:60], LABELS[::-1]
    rare, calls = int((validation == 4).sum()), []

    def learn(chosen, validated, seed):
        calls.append((len(chosen), len(validated), seed))
        return lambda places: np.where(np.arange(len(places)) < 10 * seed, test[places], -1)

    found = few_shot.few_shot(learn, train, validation, test, shots=(1, 8), seeds=(1, 2, 3))
    assert calls == [(5, 5, 1), (5, 5, 2), (5, 5, 3), *[(35, 4 * 4 + rare, seed) for seed in (1, 2, 3)]]
    assert found[1].values == pytest.approx([10 / 83, 20 / 83, 30 / 83])
    assert found[1].mean == pytest.approx(20 / 83)
    assert found[1].deviation == pytest.approx(10 / 83)
    assert found[8].interval.low < found[8].mean < found[8].interval.high


def test_more_shots_make_better_prototypes():
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((5, 16))
    splits = {name: np.repeat(np.arange(5), 40) for name in ("train", "validation", "test")}
    features = {name: centres[y] + 1.5 * generator.standard_normal((len(y), 16)) for name, y in splits.items()}

    def learn(chosen, validated, seed):
        del validated, seed
        means = prototypes(features["train"][chosen], splits["train"][chosen], 5)
        return lambda places: (features["test"][places] @ means.T).argmax(1)

    found = few_shot.few_shot(learn, *splits.values(), shots=(1, 16))
    assert found[16].mean > found[1].mean + 0.05


def test_the_first_half_of_the_classes_is_the_base():
    base, novel = few_shot.split_classes(5)
    np.testing.assert_array_equal(base, [0, 1, 2])
    np.testing.assert_array_equal(novel, [3, 4])
    base, novel = few_shot.split_classes(10)
    assert (len(base), len(novel)) == (5, 5)


@pytest.mark.parametrize(
    ("base", "novel", "expected"), [(82.69, 63.22, 71.66), (69.34, 74.22, 71.70), (0.0, 0.5, 0.0), (0.0, 0.0, 0.0)]
)
def test_harmonic_means_are_the_published_ones(base, novel, expected):
    assert few_shot.harmonic_mean(base, novel) == pytest.approx(expected, abs=0.005)


def test_base_to_novel_trains_on_the_base_and_chooses_within_a_half():
    asked = []

    def learn(chosen, validated, seed):
        assert set(LABELS[chosen]) == set(LABELS[validated]) == {0, 1, 2}

        def classify(places, candidates):
            asked.append((sorted(set(LABELS[places])), candidates.tolist()))
            # Right on all base classes but the last, and on the first novel class.
            return np.where(np.isin(LABELS[places], [0, 1, 3]), LABELS[places], -1)

        return classify

    found = few_shot.base_to_novel(learn, LABELS, LABELS, LABELS, 5, shots=4, seeds=(1, 2))
    assert asked == [([0, 1, 2], [0, 1, 2]), ([3, 4], [3, 4])] * 2
    assert found.base.values == pytest.approx([40 / 60] * 2)
    assert found.novel.values == pytest.approx([20 / 23] * 2)
    assert found.harmonic.mean == pytest.approx(2 / (60 / 40 + 23 / 20))


def test_mistakes_are_named():
    never = lambda *given: None  # noqa: E731
    with pytest.raises(UserError, match="training split has no example of 1 tested classes, such as 4"):
        few_shot.few_shot(never, LABELS[LABELS < 4], LABELS, LABELS)
    with pytest.raises(UserError, match="at least one number of shots"):
        few_shot.few_shot(never, LABELS, LABELS, LABELS, shots=())
    with pytest.raises(UserError, match="shots must be at least 1"):
        draw_shots(LABELS, 0, 1)
    with pytest.raises(UserError, match="at least 4 classes"):
        few_shot.split_classes(3)
    with pytest.raises(UserError, match="labels for 83 test examples"):
        few_shot.few_shot(lambda *_: lambda places: places[:2], LABELS, LABELS, LABELS)
    with pytest.raises(UserError, match="no example of a novel class"):
        few_shot.base_to_novel(never, LABELS, LABELS, LABELS[LABELS < 3], 5)
