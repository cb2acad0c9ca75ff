"""How many tokens an answer took, as it says itself in the OpenAI style; read while it passes by (contract 5.11).

A JSON answer says it in `usage`; a stream of events in the last event that has one, there or in `response.usage`. A
stream that says nothing, or is given up before it does, counts one token for each of its events, so that not asking for
the usage is no way around a limit. Any other answer without `usage` counts nothing: there is nothing to be counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import orjson

LONGEST = 1 << 20
"""Bytes of an answer, or of one event, that are kept to be read. Of a longer answer only the end is."""

TAIL = 1 << 16
"""Bytes of the end of a longer answer."""

MOST = 1 << 31
"""Tokens that one answer may have taken, of each kind: what says more is counted as that many."""

MOST_SUMMED = (1 << 62) - 1
"""Beyond that a sum of tokens stays as it is, so that messages and databases, which have 63 bits, hold it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request and its answer."""

    input_tokens: int
    output_tokens: int
    total: int


class Reader(Protocol):
    """Sees the pieces of one answer, in order."""

    def feed(self, piece: bytes) -> None:
        """Sees the next piece."""

    def usage(self) -> Usage | None:
        """What the answer took, as far as it was seen; None when it does not say so."""

    def total(self) -> int:
        """All tokens that it took, 0 when it does not say so."""
        usage = self.usage()
        return usage.total if usage is not None else 0


def reader(content_type: bytes) -> Reader:
    """What reads an answer of that content type."""
    return _Events() if content_type.lower().startswith(b"text/event-stream") else _Document()


class _Document(Reader):
    """One JSON document."""

    def __init__(self) -> None:
        self._seen = bytearray()
        self._is_cut = False

    def feed(self, piece: bytes) -> None:
        self._seen += piece
        if len(self._seen) > LONGEST:
            self._is_cut = True
            del self._seen[:-TAIL]

    def usage(self) -> Usage | None:
        if self._is_cut:
            return _read(_last_object(bytes(self._seen)))
        document = _parsed(bytes(self._seen)) if b'"usage"' in self._seen else None
        return _read(document.get("usage")) if isinstance(document, dict) else None


class _Events(Reader):
    """A stream of events, of which only the `data:` lines matter."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._events = 0
        self._said: Usage | None = None

    def feed(self, piece: bytes) -> None:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            self._line += part
            self._end_line()
        self._line += rest
        if len(self._line) > LONGEST:
            # Too long to be read. Its beginning stays, by which it is known as an event.
            del self._line[TAIL:]

    def usage(self) -> Usage | None:
        return self._said or (Usage(0, self._events, self._events) if self._events else None)

    def _end_line(self) -> None:
        line = bytes(self._line)
        self._line.clear()
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            return
        self._events += 1
        document = _parsed(line[5:]) if b'"usage"' in line else None
        if isinstance(document, dict):
            response = document.get("response")
            nested = response.get("usage") if isinstance(response, dict) else None
            self._said = _read(document.get("usage")) or _read(nested) or self._said


def _read(said: Any) -> Usage | None:
    if not isinstance(said, dict):
        return None
    # Chat and completions; Responses.
    read = _count(said, "prompt_tokens") or _count(said, "input_tokens")
    written = _count(said, "completion_tokens") or _count(said, "output_tokens")
    total = _count(said, "total_tokens") or read + written
    return Usage(read, written, total) if total else None


def _count(said: dict[str, Any], field: str) -> int:
    value = said.get(field)
    return min(max(value, 0), MOST) if isinstance(value, int) and not isinstance(value, bool) else 0


def _parsed(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def _last_object(text: bytes) -> Any:
    """The value of the last `usage` in a text of which the beginning is missing.

    A quotation mark within a JSON string is escaped, so these bytes are a name wherever they stand.
    """
    start = text.rfind(b'"usage"')
    opened = text.find(b"{", start)
    if start < 0 or text[start + 7 : opened].strip() != b":":
        return None
    depth = 0
    for place in range(opened, len(text)):
        depth += {ord("{"): 1, ord("}"): -1}.get(text[place], 0)
        if not depth:
            return _parsed(text[opened : place + 1])
    return None
