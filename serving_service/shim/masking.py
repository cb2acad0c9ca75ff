"""Hides a launch's own secret values in what its model prints, before anything is kept.

Best effort, not a boundary: a model that wants to leak can always spell a value in a way that nobody looks for. Looked
for are the value itself, each line of it, and their base64, URL-quoted, JSON and Python forms. Values below eight bytes
are left alone, because hiding every `1` or `true` would make the log unreadable.
"""

import base64
import json
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

MASK = b"[secret]"
MINIMUM_BYTES = 8


class Masker:
    """Knows every spelling of the values; safe to share between threads."""

    def __init__(self, values: Iterable[str]) -> None:
        self._spellings = sorted({spelling for value in values for part in _parts(value) for spelling in _forms(part)})
        self.longest = max(map(len, self._spellings), default=0)
        """Bytes of the longest spelling: whoever cuts text must look this far behind the cut."""

    def mask(self, text: bytes, *, limit: int | None = None) -> bytes:
        """`text` with each secret replaced; only what stood in its first `limit` bytes is kept."""
        end = len(text) if limit is None else min(limit, len(text))
        kept: list[bytes] = []
        position = 0
        for start, stop in self._spans(text):
            if start >= end:
                break
            kept += [text[position:start], MASK]
            position = stop
        kept.append(text[position:end])
        return b"".join(kept)

    def _spans(self, text: bytes) -> list[tuple[int, int]]:
        """Where secrets stand, in order; overlapping ones are joined, so that no rest of one stays."""
        found: list[tuple[int, int]] = []
        for spelling in self._spellings:
            start = text.find(spelling)
            while start >= 0:
                found.append((start, start + len(spelling)))
                start = text.find(spelling, start + 1)
        joined: list[tuple[int, int]] = []
        for start, stop in sorted(found):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
            else:
                joined.append((start, stop))
        return joined


def _parts(value: str) -> Iterable[str]:
    """The value and, since a log is kept line by line, each of its lines."""
    return (part for part in {value, *value.splitlines()} if len(part.encode()) >= MINIMUM_BYTES)


def _forms(part: str) -> Iterable[bytes]:
    raw = part.encode()
    yield raw
    yield json.dumps(part)[1:-1].encode()
    yield json.dumps(part, ensure_ascii=False)[1:-1].encode()
    # As Python shows it, in a printed `os.environ` above all. Which quotes it escapes depends on the text around.
    shown = repr('"' + part)[2:-1]
    yield shown.encode()
    yield shown.replace("\\'", "'").encode()
    yield quote(part).encode()
    yield quote(part, safe="").encode()
    yield quote_plus(part).encode()
    for offset in range(3):
        # Inside a longer text a value may begin at any of three places of a base64 group. Only the characters that
        # hold nothing but bits of the value are the same wherever it stands.
        bits = 8 * (offset + len(raw))
        exact = slice(-(-8 * offset // 6), bits // 6)
        padded = bytes(offset) + raw
        yield base64.b64encode(padded)[exact]
        yield base64.urlsafe_b64encode(padded)[exact]
