"""How often something may happen, on a clock of the test's own."""

from __future__ import annotations

import pytest

from servicekit import pace
from servicekit.pace import Flood, Pace, Window


class Clock:
    def __init__(self) -> None:
        self.time = 1_000.0

    def __call__(self) -> float:
        return self.time


def test_a_hundred_at_once_and_then_fifty_a_second() -> None:
    clock = Clock()
    changes = Pace(50, 100, now=clock)
    assert [changes.wait("a") for _ in range(100)] == [0.0] * 100
    assert [changes.wait("a") for _ in range(1_000)] == [0.02] * 1_000, "to ask in vain makes no wait longer"
    assert changes.wait("b") == 0.0
    clock.time += 1
    assert [changes.wait("a") for _ in range(51)] == [0.0] * 50 + [0.02]
    clock.time += 1_000
    assert [changes.wait("a") > 0 for _ in range(101)] == [False] * 100 + [True]


def test_what_is_too_much_is_said_once_until_it_is_not_any_more() -> None:
    clock = Clock()
    flood = Flood(10, now=clock)
    for key in ("a", "b"):
        assert [flood.wait(key) for _ in range(20)] == [0.0] * 20
        for is_news in (True, False, False):
            assert flood.wait(key) == 6.0
            assert flood.begins(key) is is_news
    clock.time += 6
    assert flood.wait("a") == 0.0
    assert [flood.begins("a"), flood.begins("b")] == [True, False]


def test_fifty_in_any_five_minutes() -> None:
    clock = Clock()
    window = Window(50, 300, now=clock)
    for _ in range(25):
        assert window.wait("a") == 0.0
    clock.time += 299
    assert [window.wait("a") for _ in range(25)] == [0.0] * 25
    assert [window.wait("a"), window.wait("b")] == [1.0, 0.0]
    clock.time += 1
    assert [window.wait("a") for _ in range(26)] == [0.0] * 25 + [299.0]


def test_to_ask_how_long_lets_nothing_through() -> None:
    clock = Clock()
    window = Window(1, 300, now=clock)
    assert [window.left("a"), window.left("a"), window.wait("a"), window.left("a")] == [0.0, 0.0, 0.0, 300.0]
    clock.time += 299
    assert [window.left("a"), window.left("b")] == [1.0, 0.0]


def test_a_clock_that_is_set_back_locks_nobody_out() -> None:
    clock = Clock()
    window = Window(1, 300, now=clock)
    assert window.wait("a") == 0.0
    clock.time -= 86_400
    assert window.wait("a") == 0.0


@pytest.mark.parametrize("kept", [Pace(0.1, 1, now=Clock()), Window(1, 10, now=Clock())], ids=["pace", "window"])
def test_who_was_let_through_the_longest_ago_is_forgotten_first(
    monkeypatch: pytest.MonkeyPatch, kept: Pace | Window
) -> None:
    monkeypatch.setattr(pace, "MOST_KEPT", 2)
    for key in ("a", "b", "c"):
        assert kept.wait(key) == 0.0
    assert kept.wait("b") == 10.0
    assert kept.wait("a") == 0.0
