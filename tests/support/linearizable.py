"""Whether a recorded history of concurrent calls could have come from an object that does one thing at a time.

A history is linearizable when each call can be given one moment between its begin and its end, so that a model which
does the calls in the order of those moments answers each as it was answered. The checker goes through begins and ends
in the order in which they happened and keeps every *possibility*: a state of the model, and which of the calls under
way have had their moment. At an end, calls under way are given their moments in every order until the one that ends has
had its own with the answer that its caller got; possibilities in which it cannot are dropped. When none is left, no
order explains the history; as long as one is left, some order does. Nothing is guessed or sampled.

A call whose outcome is unknown (its caller gave up, or lost the connection) has had its moment or not, so it stays a
possibility until it cannot happen any more, and is then forgotten. That end is the recorder's to know: here the moment
when the process that got the call was dead.

This grows with the number of calls under way at a time, not with the length of the history. Three things keep the
possibilities few: values are unique and versions are counted, so an answer fits few states; a call that changes nothing
has its moment as soon as its answer fits, which is never worse than later; and calls about different keys are checked
apart, which decides the same (linearizability is local: Herlihy and Wing, 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Outcome(Enum):
    """What is no answer."""

    UNKNOWN = "unknown"


UNKNOWN = Outcome.UNKNOWN


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call as its caller saw it; `began` and `ended` count begins and ends of all calls."""

    client: str
    action: tuple[Any, ...]
    began: int
    ended: int
    """For an unknown outcome: when it cannot happen any more."""
    outcome: Any

    def __str__(self) -> str:
        return f"{self.began:>6} to {self.ended:<6} {self.client}: {self.action} -> {self.outcome}"


Step = Callable[[Any, tuple[Any, ...]], tuple[Hashable, Any]]
"""The model: from a state and an action to the state after it and the answer."""

_Possibility = tuple[Any, frozenset[Call]]
_SHOWN_CALLS = 30
_SHOWN_STATES = 8


def flaw(calls: Sequence[Call], *, initial: Hashable, step: Step) -> str | None:
    """What cannot be explained about a history; None when all can."""
    events = sorted(
        [(call.began, True, call) for call in calls] + [(call.ended, False, call) for call in calls], key=_when
    )
    possible: set[_Possibility] = {(initial, frozenset())}
    under_way: set[Call] = set()
    for _, is_begin, call in events:
        if is_begin:
            under_way.add(call)
            continue
        before, possible = possible, set(_with(call, possible, under_way, step))
        if call.outcome is UNKNOWN:
            possible |= before
        possible = {(state, had - {call}) for state, had in possible}
        under_way.discard(call)
        if not possible:
            return _story(call, calls, {state for state, _ in before})
    return None


def _when(event: tuple[int, bool, Call]) -> tuple[int, bool]:
    return event[0], event[1]


def _with(call: Call, before: Iterable[_Possibility], under_way: set[Call], step: Step) -> Iterable[_Possibility]:
    """The possibilities in which the call has had its moment, reached from those before it ended."""
    seen: set[_Possibility] = set()
    todo = list(before)
    while todo:
        state, had = todo.pop()
        answers = {each: step(state, each.action) for each in under_way - had}
        # Whoever gets its answer without changing anything may as well get it now: that leaves no choice out.
        had |= {each for each, (after, answer) in answers.items() if after == state and answer == each.outcome}
        if (state, had) in seen:
            continue
        seen.add((state, had))
        if call in had:
            yield state, had
            continue
        todo += [
            (after, had | {each})
            for each, (after, answer) in answers.items()
            if after != state and each.outcome in (UNKNOWN, answer)
        ]


def _story(call: Call, calls: Sequence[Call], states: set[Any]) -> str:
    earlier = sorted((each for each in calls if each.began < call.ended), key=lambda each: each.ended)
    lines = ["No order of the calls explains this one:", f"  {call}", "The calls before and beside it:"]
    lines += [f"  {each}" for each in earlier[-_SHOWN_CALLS:] if each is not call]
    return "\n".join(
        [*lines, "What could have been before it:", *(f"  {state}" for state in list(states)[:_SHOWN_STATES])]
    )
