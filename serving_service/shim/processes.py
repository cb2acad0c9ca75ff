"""Telling one process from another that later got the same number, and ending children.

Nothing is signalled by a bare number: a child that was not waited for keeps its number, and a process that is not ours
is recognised by its number together with the moment it started.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def started(pid: int) -> str | None:
    """A mark that no other process ever has: this boot and the tick at which `pid` started; None if there is none."""
    fields = _stat(pid)
    if fields is None:
        return None
    return f"{(_PROC / 'sys/kernel/random/boot_id').read_text().strip()}/{fields[19]}"


def kill_session(pid: int, mark: str) -> None:
    """Kills the session that `pid` leads and that was `started` as `mark`; nothing, if that process is gone."""
    if started(pid) == mark:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def kill_children() -> None:
    """Kills every direct child. Their children come to a subreaper next, so repeating this ends all descendants."""
    for pid in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _children() -> Iterator[int]:
    me = str(os.getpid())
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            fields = _stat(int(entry.name))
            if fields is not None and fields[1] == me:
                yield int(entry.name)


def _stat(pid: int) -> list[str] | None:
    """The fields after the program's name, which may itself hold blanks and brackets."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
