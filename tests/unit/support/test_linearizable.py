"""The checker of histories finds what it is there for: on histories made by hand, and against trying every order."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.linearizable import UNKNOWN, Call, flaw

Register = tuple[int, str]
"""How often something was put, and what was put last."""

EMPTY: Register = (0, "")


def step(state: Register, action: tuple[Any, ...]) -> tuple[Register, Hashable]:
    """A value with a counter: `put`, `put` on condition of a count, `get`, `count`."""
    count, value = state
    match action:
        case ("put", new):
            return (count + 1, new), "done"
        case ("put", new, wanted):
            return ((count + 1, new), "done") if wanted == count else (state, "conflict")
        case ("get",):
            return state, value
        case _:
            return state, count


def history(*lines: tuple[int, int, tuple[Any, ...], Any]) -> list[Call]:
    return [
        Call(f"client {number}", action, began, ended, outcome)
        for number, (began, ended, action, outcome) in enumerate(lines)
    ]


A, B = ("put", "a"), ("put", "b")
GET, COUNT = ("get",), ("count",)

EXPLAINED = {
    "nothing": history(),
    "one after the other": history((0, 1, A, "done"), (2, 3, GET, "a"), (4, 5, B, "done"), (6, 7, GET, "b")),
    "a read beside a put sees it or not": history((0, 9, A, "done"), (1, 2, GET, ""), (3, 4, GET, "a")),
    "puts beside each other in either order": history((0, 9, A, "done"), (1, 8, B, "done"), (10, 11, GET, "a")),
    "one of two puts on one condition": history((0, 9, ("put", "a", 0), "done"), (1, 8, ("put", "b", 0), "conflict")),
    "an unknown put that happened": history((0, 9, A, UNKNOWN), (1, 2, GET, ""), (3, 4, GET, "a"), (5, 6, COUNT, 1)),
    "an unknown put that did not": history((0, 9, A, UNKNOWN), (1, 2, GET, ""), (10, 11, GET, "")),
    "an unknown put that happened after all was read": history((0, 3, A, UNKNOWN), (1, 2, GET, ""), (4, 5, GET, "a")),
    "several unknown puts": history(
        (0, 9, A, UNKNOWN), (1, 9, B, UNKNOWN), (2, 9, ("put", "c"), UNKNOWN), (10, 11, COUNT, 2), (12, 13, GET, "a")
    ),
}

UNEXPLAINED = {
    "a stale read": history((0, 1, A, "done"), (2, 3, B, "done"), (4, 5, GET, "a")),
    "a read that goes back": history((0, 9, A, "done"), (1, 2, GET, "a"), (3, 4, GET, "")),
    "a lost put": history((0, 1, A, "done"), (2, 3, GET, "")),
    "an update lost to another": history((0, 9, ("put", "a", 0), "done"), (1, 8, ("put", "b", 0), "done")),
    "a value that nobody put": history((0, 1, A, "done"), (2, 3, GET, "x")),
    "a value before it was put": history((0, 1, GET, "a"), (2, 3, A, "done")),
    "a version that goes back": history((0, 9, A, "done"), (1, 2, COUNT, 1), (3, 4, COUNT, 0)),
    "a put that was done twice": history((0, 1, A, "done"), (2, 3, COUNT, 2)),
    "an unknown put that was done twice": history((0, 9, A, UNKNOWN), (1, 2, COUNT, 1), (3, 4, COUNT, 2)),
    "an unknown put that was undone": history((0, 9, A, UNKNOWN), (1, 2, GET, "a"), (3, 4, GET, "")),
    "an unknown put after its process was dead": history((0, 1, A, UNKNOWN), (2, 3, GET, ""), (4, 5, GET, "a")),
    "a conflict without a cause": history((0, 1, ("put", "a", 0), "conflict")),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_history_that_an_order_explains_is_passed(name: str) -> None:
    assert flaw(EXPLAINED[name], initial=EMPTY, step=step) is None


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_history_that_no_order_explains_is_found(name: str) -> None:
    assert flaw(UNEXPLAINED[name], initial=EMPTY, step=step) is not None


def test_flaw_tells_which_call_has_no_place_and_what_was_before() -> None:
    found = flaw(UNEXPLAINED["a stale read"], initial=EMPTY, step=step)
    assert found is not None
    assert "4 to 5      client 2: ('get',) -> a" in found
    assert "(2, 'b')" in found


@st.composite
def histories(draw: st.DrawFn) -> list[Call]:
    """A few calls at random moments, with answers that may or may not fit."""
    number = draw(st.integers(1, 5))
    moments = draw(st.permutations(range(2 * number)))
    calls = []
    for client in range(number):
        began, ended = sorted(moments[2 * client : 2 * client + 2])
        action: tuple[Any, ...] = draw(st.sampled_from([("put", str(client)), ("put", str(client), 1), GET, COUNT]))
        outcomes: list[Any] = [UNKNOWN, "done", "conflict"][: 1 + len(action)]
        if action in (GET, COUNT):
            outcomes = ["", *map(str, range(number))] if action == GET else [0, 1, 2]
        calls.append(Call(f"client {client}", action, began, ended, draw(st.sampled_from(outcomes))))
    return calls


def has_an_order(calls: Sequence[Call]) -> bool:
    """Tries every order of every choice of the unknown calls."""
    known = [call for call in calls if call.outcome is not UNKNOWN]
    unknown = [call for call in calls if call.outcome is UNKNOWN]
    choices = itertools.chain.from_iterable(itertools.combinations(unknown, count) for count in range(len(unknown) + 1))
    return any(_fits(order) for chosen in choices for order in itertools.permutations([*known, *chosen]))


def _fits(order: Sequence[Call]) -> bool:
    state = EMPTY
    latest_begin = -1
    for call in order:
        latest_begin = max(latest_begin, call.began)
        state, answer = step(state, call.action)
        if call.ended < latest_begin or call.outcome not in (UNKNOWN, answer):
            return False
    return True


@settings(max_examples=400)
@given(histories())
def test_checker_says_what_trying_every_order_says(calls: list[Call]) -> None:
    assert (flaw(calls, initial=EMPTY, step=step) is None) == has_an_order(calls)
