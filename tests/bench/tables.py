"""Rounds, medians and tables.

Every figure is the median of the rounds with the smallest and the largest behind it. A ratio is taken within a round,
between two things measured seconds apart, because from one minute to the next this kind of machine is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from tests.bench.load import Result

Figure = TypeVar("Figure")
Cells = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table, with the limits of its figures beside them."""

    title: str
    note: str
    columns: Cells
    rows: Sequence[Cells]

    def __str__(self) -> str:
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]

        def line(cells: Cells) -> str:
            return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

        rule = line(["-" * width for width in widths])
        return "\n".join([f"### {self.title}", "", self.note, "", line(self.columns), rule, *map(line, self.rows)])


def interleaved(subjects: Mapping[str, Callable[[], Figure]], rounds: int) -> dict[str, list[Figure]]:
    """Measures every subject once in each round."""
    figures: dict[str, list[Figure]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, measure in subjects.items():
            figures[name].append(measure())
    return figures


def spread(figures: Sequence[float], digits: int = 2) -> str:
    """The median and, when there are several, the smallest and the largest."""
    middle = f"{median(figures):.{digits}f}"
    return middle if len(figures) == 1 else f"{middle} ({min(figures):.{digits}f}-{max(figures):.{digits}f})"


def ratios(figures: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Round by round, how many times the baseline."""
    return [one / other for one, other in zip(figures, baseline, strict=True)]


LOAD_COLUMNS = (
    "load",
    "measured",
    "req/s",
    "ratio",
    "p50 ms",
    "p99 ms",
    "added p50 ms",
    "µs/req",
    "fails",
    "others",
    "limit",
)
"""For `load_rows`. `µs/req` is processor time of the process under measurement alone, `others` the most
that processes which take no part used of the machine: many of them make a row worthless."""


def load_rows(load: str, results: Mapping[str, Sequence[Result]], limits: Mapping[str, str]) -> list[Cells]:
    """A row for each subject of one load; the first subject is the baseline of the others."""
    baseline = next(iter(results.values()))
    rows: list[Cells] = []
    for name, rounds in results.items():
        added = [one.p50_ms - other.p50_ms for one, other in zip(rounds, baseline, strict=True)]
        is_baseline = rounds is baseline
        rows.append(
            [
                load,
                name,
                spread([each.rps for each in rounds], 0),
                "1" if is_baseline else spread(ratios([each.rps for each in rounds], [each.rps for each in baseline])),
                f"{median(each.p50_ms for each in rounds):.2f}",
                f"{median(each.p99_ms for each in rounds):.2f}",
                "" if is_baseline else spread(added),
                f"{median(each.front_us for each in rounds):.0f}",
                str(sum(each.fails for each in rounds)),
                f"{max(each.foreign_percent for each in rounds):.0f} %",
                limits.get(name, ""),
            ]
        )
    return rows
