"""Requests that have begun and are not whole yet: how many of each sender are waited for, and how much of them is kept.

The rule: what has not arrived takes no place that others wait for (`servicekit.shedding`), so it has bounds of its own,
and of those a part for each sender. So who is slow, or pretends to be, costs little and keeps nobody else out.
"""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from servicekit.shedding import Overloaded

PARTS = 4
"""Of the bytes that are kept in all, one sender has at the most this part."""


class Arrivals:
    """At most `most` requests of each sender at a time, and `most_bytes` of all senders together; 0: any number."""

    def __init__(self, most: int = 0, *, most_bytes: int = 0) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._awaited: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self._kept_in_all = 0

    def of(self, sender: str) -> Arriving:
        """One request of a sender, for as long as the context lasts."""
        return Arriving(self, sender)

    def begin(self, sender: str) -> None:
        """One more is waited for; raises Overloaded."""
        if not self._most:
            return
        if self._awaited[sender] >= self._most:
            raise Overloaded
        self._awaited[sender] += 1

    def keep(self, sender: str, size: int) -> None:
        """So many bytes more are kept; raises Overloaded."""
        kept = self._kept[sender] + size
        if self._most_bytes and (kept > self._most_bytes // PARTS or self._kept_in_all + size > self._most_bytes):
            raise Overloaded
        if size:
            self._kept[sender] = kept
            self._kept_in_all += size

    def end(self, sender: str, size: int) -> None:
        """One of which so much is kept came, or is not waited for any more."""
        if self._most:
            _less(self._awaited, sender, 1)
        if size:  # mostly nothing is
            _less(self._kept, sender, size)
            self._kept_in_all -= size


def _less(counts: Counter[str], sender: str, less: int) -> None:
    counts[sender] -= less
    if not counts[sender]:
        del counts[sender]


class Arriving:
    """One request that arrives. Raises Overloaded when entered, if there are too many."""

    __slots__ = ("_all", "_sender", "_size")

    def __init__(self, all: Arrivals, sender: str) -> None:
        self._all = all
        self._sender = sender
        self._size = 0

    def keep(self, size: int) -> None:
        """So many bytes more of it are kept, to the end of the context. Raises Overloaded."""
        self._all.keep(self._sender, size)
        self._size += size

    def __enter__(self) -> Arriving:
        self._all.begin(self._sender)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._all.end(self._sender, self._size)
