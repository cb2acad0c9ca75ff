"""Of requests that are not whole there are as many, and as much of them is kept, as may be."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.arrivals import PARTS, Arrivals
from servicekit.shedding import Overloaded


def test_of_each_sender_so_many_are_waited_for() -> None:
    arrivals = Arrivals(2)
    with arrivals.of("ada"), arrivals.of("grace"):
        with arrivals.of("ada"):
            with pytest.raises(Overloaded):
                arrivals.of("ada").__enter__()
            with arrivals.of("grace"):
                pass
        with arrivals.of("ada"):
            pass


def test_no_sender_has_more_than_its_part_of_the_bytes() -> None:
    arrivals = Arrivals(most_bytes=PARTS * 10)
    with arrivals.of("ada") as first, arrivals.of("ada") as second:
        first.keep(7)
        second.keep(3)
        with pytest.raises(Overloaded):
            second.keep(1)
    with arrivals.of("ada") as again:
        again.keep(10)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 12), st.booleans()), max_size=60))
def test_what_is_kept_never_exceeds_the_bounds_and_all_of_it_is_given_back(
    steps: list[tuple[str, int, bool]],
) -> None:
    most = PARTS * 10
    arrivals = Arrivals(3, most_bytes=most)
    kept: dict[str, int] = defaultdict(int)
    awaited: dict[str, int] = defaultdict(int)
    with ExitStack() as stack:
        for sender, size, is_over in steps:
            try:
                arriving = stack.enter_context(arrivals.of(sender))
            except Overloaded:
                assert awaited[sender] == 3
                continue
            awaited[sender] += 1
            try:
                arriving.keep(size)
                kept[sender] += size
            except Overloaded:
                assert kept[sender] + size > most // PARTS or sum(kept.values()) + size > most
            assert max(kept.values()) <= most // PARTS
            assert sum(kept.values()) <= most
            if is_over:
                stack.close()
                kept.clear()
                awaited.clear()
                kept[sender] = 0
    for sender in "abcdefgh":
        with arrivals.of(sender) as arriving:
            if sender in "abcd":
                arriving.keep(most // PARTS)
