"""What a model process gives up before it becomes the model: done in the child, before it reads a byte of the model.

All of it or no model: whatever cannot be given up raises OSError, and nothing is executed. What an ordinary user has no
right to change (the bounding set, the groups) cannot be used by its model either, because `no_new_privs` holds.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
from dataclasses import dataclass, field
from pathlib import Path

from serving_service.shim import cgroups, view
from serving_service.shim.libc import LIBC, checked

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITIES_OF_64_BITS = 0x20080522
_LAST_CAPABILITY = Path("/proc/sys/kernel/cap_last_cap")
_SETTABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """How one model process is held in."""

    open_files: int
    """How many files it may have open; fewer, where the service itself may not have so many."""
    cgroups: list[str] = field(default_factory=list)
    """The control groups that it belongs to from its first moment on: directories."""
    user: int | None = None
    """The user and the group that it runs as, with a view of the files of its own; None: those of the service."""
    user_processes: int = 0
    """How many processes and threads that user may have, in all its replicas together."""
    readable: list[str] = field(default_factory=list)
    """What it must be able to read though that may lie behind closed directories: absolute paths."""
    writable: list[str] = field(default_factory=list)
    """The only directories that it may write to and that outlive it; they belong to its user."""


def enter(confinement: Confinement) -> None:
    """Gives up, for good, what the model is not to have; raises OSError where that cannot be."""
    cgroups.join(confinement.cgroups)
    # What the shim or its starter ignores must not be ignored by the model.
    for number in _SETTABLE:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _limit(resource.RLIMIT_NOFILE, confinement.open_files)
    if confinement.user is not None:
        _limit(resource.RLIMIT_NPROC, confinement.user_processes)
        view.enter(readable=confinement.readable, writable=confinement.writable)
    _drop_privileges(confinement.user)


def _drop_privileges(user: int | None) -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    with contextlib.suppress(PermissionError):
        for capability in range(int(_LAST_CAPABILITY.read_text()) + 1):
            _prctl(_PR_CAPBSET_DROP, capability)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    else:
        with contextlib.suppress(PermissionError):
            os.setgroups([])
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header, none = struct.pack("Ii", _CAPABILITIES_OF_64_BITS, 0), bytes(24)
    checked(LIBC.capset(header, none), "giving up capabilities")


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _prctl(option: int, value: int) -> None:
    unsigned = [ctypes.c_ulong(number) for number in (value, 0, 0, 0)]
    checked(LIBC.prctl(option, *unsigned), f"prctl {option}")
