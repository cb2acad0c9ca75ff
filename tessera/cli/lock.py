"""One `tessera up` per data directory, and the word by which its replicas know what it is about.

The kernel holds the lock on `DIR/run/up.lock` for exactly as long as the process lives. The file's one word is for the
replicas: `running`, or `stopping` when they are to end. Who holds the lock stands in `up.pid`, for people only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from servicekit.errors import StartError

_PATIENCE_SECONDS = 1.0


class UpLock:
    """The lock of a data directory, while we hold it."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self.path = path

    def say(self, word: str) -> None:
        """Replaces the word in the file."""
        text = word.encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))


@contextlib.asynccontextmanager
async def held(run: Path) -> AsyncIterator[UpLock]:
    """Holds the lock of the data directory whose `run` directory this is.

    Raises StartError when another process holds it.
    """
    path, holder = run / "up.lock", run / "up.pid"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        await _take(fd, run.parent, holder)
        holder.write_text(f"{os.getpid()}\n")
        lock = UpLock(fd, path)
        lock.say("running")
        try:
            yield lock
        finally:
            holder.unlink(missing_ok=True)
    finally:
        os.close(fd)


async def _take(fd: int, data_dir: Path, holder: Path) -> None:
    # A replica looks at the lock by taking it, shared, for an instant; that must not turn a successor away.
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > deadline:
            who = holder.read_text().strip() if holder.exists() else "unknown"
            raise StartError(
                f"{data_dir} is in use by another `tessera up` (process {who}). Stop that one, or choose another "
                "directory with --data-dir."
            )
        await asyncio.sleep(0.02)
