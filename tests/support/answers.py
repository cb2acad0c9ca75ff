"""First answers in clear, for tests that look at what is recorded or do not care."""

from __future__ import annotations

import time
from collections.abc import Callable

from servicekit.errors import DataLoss
from servicekit.once import Answers


class PlainSeal:
    """Writes the place before the text, and opens it there only."""

    def seal(self, text: bytes, *, place: str) -> bytes:
        return place.encode() + b"|" + text

    def open(self, record: bytes, *, place: str) -> bytes:
        before, _, text = record.partition(b"|")
        if before != place.encode():
            raise DataLoss("damaged")
        return text


def plain_answers(now: Callable[[], float] = time.time) -> Answers:
    """Answers that are not sealed."""
    return Answers(PlainSeal(), now)
