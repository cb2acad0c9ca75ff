"""Which processes belong to a data directory, read from /proc, so that nothing that is left behind stays unseen."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def of_directory(directory: Path) -> dict[int, str]:
    """The living processes that work in `directory` or name it: the number and the arguments of each."""
    return _found(directory, b"")


def of_program(directory: Path, program: str) -> dict[int, str]:
    """Those of them whose arguments name a program; quicker to find, since only theirs are looked at closely."""
    return _found(directory, program.encode())


def _found(directory: Path, program: bytes) -> dict[int, str]:
    needle = os.fsencode(directory)
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        # Others' processes come, go and are not readable; ours are.
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes()
            if program not in arguments:
                continue
            traces = (arguments, (entry / "environ").read_bytes(), os.fsencode((entry / "cwd").readlink()))
            if any(needle in trace for trace in traces):
                found[int(entry.name)] = arguments.replace(b"\0", b" ").decode("utf-8", "replace")
    return found
