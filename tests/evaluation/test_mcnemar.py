from __future__ import annotations

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation import statistics
from vla_jax.evaluation.mcnemar import mcnemar


def test_a_case_counted_by_hand():
    """Of 5 that differ, 1 falls to a: 2 * (1 + 5) / 32."""
    a = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    b = np.array([1, 1, 1, 0, 1, 1, 1, 1, 0, 0], bool)
    found = mcnemar(a, b)
    assert (found.both, found.only_a, found.only_b, found.neither) == (3, 1, 4, 2)
    assert found.p_value == pytest.approx(12 / 32)
    assert mcnemar(b, a).p_value == found.p_value


def test_it_is_the_p_value_of_the_paired_difference_of_one_seed():
    generator = np.random.default_rng(0)
    a, b = generator.random(150) < 0.7, generator.random(150) < 0.6
    assert mcnemar(a, b).p_value == pytest.approx(statistics.paired_difference(a, b).p_value, rel=1e-9)


def test_models_that_never_differ_give_no_evidence():
    a = np.arange(6) < 3
    assert mcnemar(a, a).p_value == 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones(3, bool), np.ones(4, bool), r"given \[3\] and \[4\]"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), "for several seeds use paired_difference"),
        (np.ones(3), np.ones(3), "True or False, given float64"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, message):
    with pytest.raises(UserError, match=message):
        mcnemar(a, b)
