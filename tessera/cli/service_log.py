"""A service's standard error as a file of bounded size.

The service writes the file itself, so that its last words are kept even when `up` is killed. When the file is full,
its content moves to a second file; a line that is written at that very moment may be lost.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

FULL_BYTES = 5 * 2**20
"""A file and its predecessor stay at about twice this."""

_LAST_WORDS_BYTES = 2**14
_LAST_WORDS_LENGTH = 2_000
"""Room for every cause of ours, whose end says what to do, with several long paths in it."""


class ServiceLog:
    """The log file of one service."""

    def __init__(self, path: Path, full_bytes: int = FULL_BYTES) -> None:
        self.path = path
        self._full_bytes = full_bytes
        self._began_at = 0

    def open(self) -> int:
        """A descriptor that appends, to be given to the service and closed by the caller."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o600)
        self._began_at = os.fstat(descriptor).st_size
        return descriptor

    def rotate(self) -> None:
        """Moves the content to `<name>.1` when the file is full."""
        if self.path.exists() and self.path.stat().st_size > self._full_bytes:
            shutil.copy(self.path, self.path.with_name(f"{self.path.name}.1"))
            os.truncate(self.path, 0)
            self._began_at = 0

    def last_words(self) -> str:
        """Why the service ended, as far as its last line tells; empty when it tells nothing."""
        last = self._last_line()
        cause = _cause(last)
        return _shortened(last if cause is None else cause)

    def waits_for(self) -> str:
        """What a service that runs waits for, as far as its last event tells; empty when it tells nothing."""
        return _shortened(_cause(self._last_line()) or "")

    def _last_line(self) -> str:
        """What the service wrote last since it was started last; what one before it wrote is no cause of anything."""
        with self.path.open("rb") as file:
            file.seek(max(self._began_at, self.path.stat().st_size - _LAST_WORDS_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return lines[-1] if lines else ""


def _cause(line: str) -> str | None:
    """The cause that an event tells; None for a line that is no event."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return str(event.get("cause", "")) if isinstance(event, dict) else ""


def _shortened(text: str) -> str:
    if len(text) <= _LAST_WORDS_LENGTH:
        return text
    begin = text[:_LAST_WORDS_LENGTH]
    return f"{begin.rpartition(' ')[0] or begin} ..."
