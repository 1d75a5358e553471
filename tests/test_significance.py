"""The tests of differences, against textbook formulas and scipy."""

import math
import statistics

import pytest

from hlora.study.stats import independent, p_text, paired

A, B = [3.1, 2.9, 3.4, 3.0], [3.9, 4.2, 3.7]


def test_independent_samples_are_those_of_the_textbook():
    t = independent(A, B)
    # Student's t with pooled variance, by hand.
    va, vb = statistics.variance(A), statistics.variance(B)
    pooled = math.sqrt((3 * va + 2 * vb) / 5)
    d = (statistics.fmean(A) - statistics.fmean(B)) / pooled
    assert t.g == pytest.approx(d * (1 - 3 / 19))
    assert t.n == (4, 3)
    assert t.student < t.welch < 0.05


def test_equal_samples_differ_in_nothing():
    t = independent(A, A)
    assert t.welch == pytest.approx(1)
    assert t.g == 0


def test_one_run_decides_nothing():
    assert math.isnan(independent(A, [3.0]).welch)
    one = paired({0: 1.0}, {0: 0.5})
    assert one.n == 1
    assert one.mean == 0.5
    assert not one.decided
    assert not paired({0: 1.0}, {1: 1.0}).decided


def test_paired_differences_use_the_seeds_that_both_have():
    # Differences 1, 2, 3: mean 2, se 1/√3, t = 3.46 on two degrees of freedom.
    d = paired({0: 2.0, 1: 4.0, 2: 6.0, 9: 0.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (d.mean, d.n) == (2.0, 3)
    assert d.se == pytest.approx(1 / math.sqrt(3))
    t = 2 / d.se
    assert d.p == pytest.approx(1 - t / math.sqrt(t * t + 2))  # closed form for two
    assert not d.decided


def test_what_does_not_vary_cannot_be_tested():
    """Accuracies move in steps of a question: equal ones over seeds are no proof."""
    same = paired({0: 93.0, 1: 93.0}, {0: 92.0, 1: 92.0})
    assert (same.mean, same.se) == (1.0, 0.0)
    assert not same.decided
    assert math.isnan(independent([93.0, 93.0], [92.0, 92.0]).welch)
    assert independent([93.0, 93.0], [91.0, 92.0, 90.0]).welch < 0.2


def test_p_values_read_well():
    assert p_text(0.0004) == "< 0.001"
    assert p_text(0.0312) == "0.031"
    assert p_text(math.nan) == "–"
