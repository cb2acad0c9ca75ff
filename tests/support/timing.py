"""Whether two kinds of requests can be told apart by how long their answers take.

Both are asked in turn, in an order drawn for each pair, so whatever the machine does meanwhile happens to both. What
took longest of each is left out, the same share of both and each by its own order: there the machine speaks, not the
service, and Welch's t, which compares means, would hear nothing else. A difference that shows only in that share is
therefore not found. The first answers, which warm things up, are not counted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

WARM_UP = 500
TRIMMED = 0.1
"""The share of the longest times that is left out of each kind."""

MOST_T = 4.5
"""Beyond this |t| the kinds differ: chance alone gets there once in a hundred thousand comparisons."""

Ask = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two kinds of answers compare; times are in microseconds."""

    t: float
    medians: tuple[float, float]

    def __str__(self) -> str:
        first, second = self.medians
        return f"t = {self.t:+.2f}, medians {first:.1f} and {second:.1f} us"


async def compared(first: Ask, second: Ask, *, times: int, random: random.Random) -> Comparison:
    """Asks for each kind of answer so many times."""
    kinds = (first, second)
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + times):
        for kind in random.sample((0, 1), 2):
            started = time.perf_counter_ns()
            await kinds[kind]()
            if number >= WARM_UP:
                taken[kind].append((time.perf_counter_ns() - started) / 1000)
    return comparison(*taken)


def comparison(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Welch's t of two samples without their upper tails."""
    kept = [sorted(each)[: round(len(each) * (1 - TRIMMED))] for each in (first, second)]
    means = [statistics.fmean(each) for each in kept]
    errors = [statistics.variance(each) / len(each) for each in kept]
    return Comparison(
        t=(means[0] - means[1]) / sum(errors) ** 0.5, medians=(statistics.median(first), statistics.median(second))
    )
