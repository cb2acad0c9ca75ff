"""The life of a shim: what it owns before its starter is let go, then its model, until it is dismissed.

However the process came to be, it does the same: `shim/__main__.py` is a program of its own, `serving_service/warm` is
forked from a process that has the model server in memory already.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from serving_service.shim import processes
from serving_service.shim.control import Control
from serving_service.shim.replica import Become, Replica, execute
from serving_service.shim.spec import Spec
from serving_service.shim.supervisor import supervise

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Sockets:
    """What makes a replica reachable before anybody answers."""

    model: socket.socket
    control: socket.socket


def bound(spec: Spec) -> Sockets:
    """Both sockets of a replica; raises OSError."""
    return Sockets(model=_listener(spec, "http.sock"), control=_listener(spec, "control.sock"))


def limited() -> None:
    """What every shim does first: its files are its user's alone, and it leaves no core."""
    os.umask(0o077)
    # One, not zero: with a core pattern that is a pipe the kernel dumps in spite of a limit of zero.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def live(
    spec: Spec, sockets: Sockets, *, become: Become = execute, detached: Callable[[], None] = lambda: None
) -> None:
    """Lives until the replica is dismissed, in a process that nobody waits for; does not return.

    `detached` is called when nothing of the starter's reaches this process any more, `become` in the model's process.
    """
    _detach(spec)
    detached()
    replica = Replica(spec)
    control = Control(spec, replica)

    def on_terminate(_number: int, _frame: FrameType | None) -> None:
        threading.Thread(target=control.end, args=(_GRACE_SECONDS,), daemon=True).start()

    signal.signal(signal.SIGTERM, on_terminate)
    replica.start(sockets.model, become)
    identity = {"pid": os.getpid(), "mark": processes.started(os.getpid()), **replica.identity()}
    os.pwrite(spec.lock_fd, json.dumps(identity).encode(), 0)  # over what its starter wrote, which is shorter
    threading.Thread(target=control.serve, args=(sockets.control,), daemon=True).start()
    threading.Thread(target=supervise, args=(spec, control), daemon=True).start()
    replica.reap()
    control.dismissed.wait()
    os._exit(0)


def _listener(spec: Spec, name: str) -> socket.socket:
    path = Path(spec.directory) / name
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(512)
    return listener


def _detach(spec: Spec) -> None:
    """Nothing of the starter's reaches this process any more, and orphaned descendants of the model come to it."""
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.set_inheritable(spec.lock_fd, False)
    os.chdir(spec.working_directory)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.dup2(nothing, stream)
