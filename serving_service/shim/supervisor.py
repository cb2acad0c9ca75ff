"""Whether somebody still answers for this replica, and its end when nobody does.

`tessera up` holds a lock on a file for as long as it lives; the kernel lets go of it however that process ends. Free
for too long means that nobody came back; the word `stopping` in the file means that the platform is being stopped.
"""

import fcntl
import time
from pathlib import Path

from serving_service.shim.control import Control
from serving_service.shim.spec import Spec

STOPPING = "stopping"
_PERIOD_SECONDS = 0.5
_GRACE_SECONDS = 10.0
_STOPPING_GRACE_SECONDS = 7.0  # the whole platform is to be gone within ten


def supervise(spec: Spec, control: Control) -> None:
    """Looks until the replica is to end, then ends it."""
    lock = Path(spec.supervisor_lock) if spec.supervisor_lock else None
    patience = spec.idle_seconds if lock is None else spec.orphan_seconds
    held_at = time.monotonic()
    while not control.dismissed.wait(_PERIOD_SECONDS):
        if lock is None:
            held_at = control.last_contact
        elif _content(lock) == STOPPING:
            control.end(_STOPPING_GRACE_SECONDS)
        elif is_held(lock):
            held_at = time.monotonic()
        if time.monotonic() - held_at > patience:
            control.end(_GRACE_SECONDS)


def is_held(lock: Path) -> bool:
    """Whether another process holds the lock; looking takes it shared for an instant and lets go at once.

    One that is there and cannot be looked at counts as held: nothing is ended because something could not be read.
    """
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # BlockingIOError when it is held
        return True
    return False


def _content(lock: Path) -> str:
    try:
        return lock.read_text(errors="replace").strip()
    except OSError:
        return ""
