"""Requests that arrive at a use case without a listener."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from servicekit import context
from servicekit.policy import Decision, Row


@contextmanager
def serving(row: Row) -> Iterator[Decision]:
    """Within, a request is being served that this row is for."""
    before = context.current()
    decision = Decision(row)
    context.enter(context.RequestContext("r1", decision=decision))
    try:
        yield decision
    finally:
        context._current.set(before)
