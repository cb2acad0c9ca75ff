"""The log of one replica: the last lines it printed, in memory only, bounded whatever the model prints.

A line is kept once it is complete, because half a line may hold half a secret.
"""

import threading
from collections import deque
from itertools import islice
from typing import NamedTuple

from serving_service.shim.masking import Masker

CUT_MARK = b" ...[line cut]"
_LINE_OVERHEAD = 48  # what one kept line costs beside its bytes; counted, or empty lines would be free


class Excerpt(NamedTuple):
    """Some lines of a log, up to its end."""

    text: str
    """Whole lines, the oldest first, each ending in a newline."""
    position: int
    """How many lines there have been in all: from here on is what comes later."""
    missing: int
    """How many lines were asked for and are not among these: too old to be kept, or too many."""


class LineRing:
    """The newest lines that fit into `capacity` bytes of memory."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._count = 0  # of all lines, those included that are not kept any more
        self._lock = threading.Lock()

    def append(self, line: bytes) -> None:
        with self._lock:
            self._lines.append(line)
            self._count += 1
            self._size += len(line) + _LINE_OVERHEAD
            while self._size > self._capacity:
                self._size -= len(self._lines.popleft()) + _LINE_OVERHEAD

    def tail(self, max_bytes: int) -> str:
        """The newest whole lines that fit into `max_bytes`, oldest first, each ending in a newline."""
        return self.since(0, max_bytes).text

    def since(self, position: int, max_bytes: int) -> Excerpt:
        """What came after the first `position` lines: the newest of it that fits into `max_bytes`."""
        chosen: list[bytes] = []
        with self._lock:
            count = self._count
            asked = max(count - position, 0)
            for line in islice(reversed(self._lines), asked):
                max_bytes -= len(line) + 1
                if max_bytes < 0:
                    break
                chosen.append(line)
        text = "".join(line.decode("utf-8", "replace") + "\n" for line in reversed(chosen))
        return Excerpt(text, count, asked - len(chosen))


class LineWriter:
    """Turns the bytes of one pipe, however they were split, into masked lines of a ring."""

    def __init__(self, ring: LineRing, masker: Masker, max_line: int) -> None:
        self._ring, self._masker, self._max_line = ring, masker, max_line
        # A secret that begins before the cut must be seen whole, else its first part would stay.
        self._held = max_line + masker.longest
        self._pending = bytearray()

    def feed(self, data: bytes) -> None:
        *complete, rest = data.split(b"\n")
        for piece in complete:
            self._extend(piece)
            self._emit()
        self._extend(rest)

    def close(self) -> None:
        """Keeps an unfinished last line too: nothing more will come."""
        if self._pending:
            self._emit()

    def _extend(self, piece: bytes) -> None:
        self._pending += piece[: max(0, self._held + 1 - len(self._pending))]

    def _emit(self) -> None:
        line = self._masker.mask(bytes(self._pending), limit=self._max_line)
        self._ring.append(line + CUT_MARK if len(self._pending) > self._max_line else line)
        self._pending.clear()
