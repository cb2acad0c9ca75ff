"""The control groups of one replica: joined by its model before anything else, ended whole, removed when empty.

Whatever a model starts is in them and cannot get out, however often it forks; so they are what ends it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

_MEMBERS = "cgroup.procs"
_ROUNDS = 200
_PAUSE_SECONDS = 0.01


def join(groups: Iterable[str]) -> None:
    """Puts this process into the groups; raises OSError."""
    for group in groups:
        Path(group, _MEMBERS).write_text("0")


def kill(groups: Iterable[str]) -> None:
    """Kills everything in the groups."""
    for group in map(Path, groups):
        with contextlib.suppress(FileNotFoundError):
            if (group / "cgroup.kill").exists():
                (group / "cgroup.kill").write_text("1")
            else:
                _kill_each(group)


def remove(groups: Iterable[str]) -> None:
    """Removes the groups; what was killed may take a moment to be gone."""
    for group in map(Path, groups):
        for _ in range(_ROUNDS):
            try:
                group.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(_PAUSE_SECONDS)
            else:
                break


def has_run_out_of_memory(groups: Iterable[str]) -> bool:
    """Whether a process of the groups was killed because they had used all the memory that they may."""
    for group in groups:
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                for line in Path(group, name).read_text().splitlines():
                    if line.startswith("oom_kill ") and line != "oom_kill 0":
                        return True
    return False


def _kill_each(group: Path) -> None:
    with contextlib.suppress(OSError):
        (group / "pids.max").write_text("0")  # nothing is started any more while the rest is killed
    for _ in range(_ROUNDS):
        members = (group / _MEMBERS).read_text().split()
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)
