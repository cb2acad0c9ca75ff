"""What is left of a data directory's replicas, and their end when they do not end by themselves.

A replica lives for as long as the lock in its directory is held. Numbers of processes are believed only together with
the moment at which the process started, so that nothing else is ever hit.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from serving_service.shim import cgroups
from serving_service.shim.processes import kill_session
from serving_service.shim.supervisor import is_held


def living(sockets: Path) -> list[Path]:
    """The directories of the replicas that live, below the directory of internal sockets."""
    return [lock.parent for lock in sorted(sockets.glob("replicas/*/lock")) if is_held(lock)]


def kill(directory: Path, *, shim: bool) -> None:
    """Kills the model process of a living replica, or its shim."""
    who = ("pid", "mark") if shim else ("model_pid", "model_mark")
    with contextlib.suppress(OSError, ValueError, KeyError):
        identity = json.loads((directory / "lock").read_bytes())
        pid, mark = (identity[field] for field in who)
        if pid is not None and is_held(directory / "lock"):
            kill_session(pid, mark)
            if not shim:
                cgroups.kill(identity["cgroups"])
