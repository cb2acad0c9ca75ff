"""Counts of durations between bounds."""

from __future__ import annotations

import pytest

from servicekit.distribution import BOUNDS_MS, PLACES, Distribution


def of(*milliseconds: float) -> Distribution:
    distribution = Distribution()
    for each in milliseconds:
        distribution.add(each)
    return distribution


def test_duration_counts_below_the_bound_that_it_does_not_exceed() -> None:
    distribution = of(0.2, 1.0, 1.01, 1e9)
    assert distribution.counts[:2] == [2, 1]
    assert distribution.counts[-1] == 1
    assert distribution.count == 4
    assert distribution.sum == pytest.approx(1e9 + 2.21)


def test_counts_of_two_processes_add_up() -> None:
    one, other = of(1, 100), of(100, 5000)
    one.merge(other)
    assert (one.counts, one.sum) == (of(1, 100, 100, 5000).counts, 5201)
    assert other.count == 2


def test_counts_between_other_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match=f"expected {PLACES} counts"):
        Distribution([1, 2, 3])


@pytest.mark.parametrize(
    ("durations", "share", "expected"),
    [
        ([], 0.5, None),
        ([60] * 100, 0.5, 60),
        ([4] * 90 + [90] * 10, 0.5, 4.1),
        ([4] * 90 + [90] * 10, 0.9, 5),
        ([4] * 90 + [90] * 10, 0.99, 97),
        ([1e9], 0.5, BOUNDS_MS[-1]),
        ([4], 0.0, 3),
    ],
)
def test_quantiles_lie_between_the_right_bounds(durations: list[float], share: float, expected: float | None) -> None:
    found = of(*durations).quantile(share)
    assert found == (None if expected is None else pytest.approx(expected, rel=0.01))
