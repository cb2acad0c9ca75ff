"""How many durations there were of which length: counts between fixed bounds, which add up over processes and time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

BOUNDS_MS = (
    *(1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 70.0),
    *(100.0, 150.0, 200.0, 300.0, 500.0, 700.0, 1_000.0, 1_500.0, 2_000.0, 3_000.0, 5_000.0, 7_000.0),
    *(10_000.0, 20_000.0, 30_000.0, 60_000.0, 120_000.0, 300_000.0, 600_000.0),
)
"""The longest duration, in milliseconds, that each count but the last holds: from what a model does at best to what it
may take at most. Processes exchange counts without these bounds, so all of a platform change them together."""

PLACES = len(BOUNDS_MS) + 1


class Distribution:
    """Durations in milliseconds. Adding one is a few list operations: it stands in the way of every invocation."""

    __slots__ = ("counts", "sum")

    def __init__(self, counts: Iterable[int] = (), sum: float = 0.0) -> None:
        """Raises ValueError when there are counts, but not one for each place."""
        self.counts = list(counts) or [0] * PLACES
        self.sum = sum
        if len(self.counts) != PLACES:
            raise ValueError(f"expected {PLACES} counts, got {len(self.counts)}")

    def add(self, milliseconds: float) -> None:
        """Counts one more duration."""
        self.counts[bisect_left(BOUNDS_MS, milliseconds)] += 1
        self.sum += milliseconds

    def merge(self, other: Distribution) -> None:
        """Counts all that `other` has counted."""
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    @property
    def count(self) -> int:
        """How many durations were counted."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """The mean duration; None without any."""
        count = self.count
        return self.sum / count if count else None

    def quantile(self, share: float) -> float | None:
        """The duration that `share` of all (0 to 1) do not exceed, estimated between two bounds; None without any.

        What is longer than the last bound counts as that long.
        """
        wanted = share * self.count
        if not self.count:
            return None
        below, lower = 0, 0.0
        for count, bound in zip(self.counts, BOUNDS_MS, strict=False):
            if count and below + count >= wanted:
                return lower + (bound - lower) * max(wanted - below, 0.0) / count
            below, lower = below + count, bound
        return BOUNDS_MS[-1]
