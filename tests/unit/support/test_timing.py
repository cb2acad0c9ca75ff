"""When two samples of times are told apart, and when not."""

from __future__ import annotations

import pytest

from tests.support.timing import MOST_T, comparison

QUICK = [100.0 + number % 10 for number in range(100)]
SLOWER = [time + 4.0 for time in QUICK]


def test_samples_that_differ_are_told_apart_whichever_comes_first() -> None:
    assert comparison(SLOWER, QUICK).t > MOST_T
    assert comparison(QUICK, SLOWER).t < -MOST_T


def test_samples_that_are_alike_are_not_whatever_their_order() -> None:
    assert comparison(QUICK, QUICK[::-1]).t == pytest.approx(0.0)
    assert abs(comparison(QUICK, [time + 0.5 for time in QUICK]).t) < MOST_T


def test_difference_in_what_took_longest_is_the_machines() -> None:
    disturbed = sorted(QUICK)[:90] + [100_000.0] * 10
    assert comparison(disturbed, QUICK).t == pytest.approx(0.0)


def test_medians_are_those_of_everything_that_was_measured() -> None:
    assert comparison(SLOWER, QUICK).medians == pytest.approx((108.5, 104.5))
