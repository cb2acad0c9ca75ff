"""Runs the template: `python -P -u -m serving_service.warm ROOM`, with one end of a socket pair as standard input.

It says there, once, that it is ready and which variables were looked at while it imported, or why it is of no use.
Each message that then comes brings three descriptors: the locked file of a replica, a spec, and a pipe. A shim is
forked that lives by them; it says on the pipe `ok` or what was in the way. When the other end is closed, it all ends.

ROOM is a long word that means nothing: the command lines of forked processes are written over it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from serving_service.shim import life
from serving_service.shim.spec import IncompleteSpecError, read_spec
from serving_service.warm import OK, memory

if TYPE_CHECKING:
    from serving_service.warm.process import Forked

_DESCRIPTORS = 3
_MESSAGE_BYTES = 64


def main() -> int:
    life.limited()
    control = socket.socket(fileno=0)
    try:
        read = memory.fill()
        # Imported here: what is missing or broken is said, and which variables it looks at is recorded.
        from serving_service.warm.process import Forked

        forked = Forked.from_this()
    except Exception as error:
        _say(control, {"event": "failed", "cause": f"{type(error).__name__}: {error}"})
        return 1
    forked.entitle(sys.orig_argv[:-1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what is forked here detaches, and is waited for by nobody
    _say(control, {"event": "ready", "read": sorted(read)})
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, _DESCRIPTORS)
        if not message:
            return 0
        if len(descriptors) == _DESCRIPTORS and os.fork() == 0:
            _live(forked, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _live(forked: Forked, lock: int, document: int, told: int) -> NoReturn:
    """Becomes a shim, in the forked process, as `shim/__main__.py` does."""

    def detached() -> None:
        os.write(told, OK)
        os.close(told)

    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # in the place of the control socket
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            with os.fdopen(document, "rb") as pipe:
                spec = replace(read_spec(pipe), lock_fd=lock)
            sockets = life.bound(spec)
        except (IncompleteSpecError, OSError) as error:
            os.write(told, str(error).encode())
            os._exit(1)
        if os.fork():
            os._exit(0)
        forked.entitle([sys.executable, "-m", "serving_service.shim", spec.replica_id])
        life.live(spec, sockets, become=forked.become, detached=detached)
    finally:
        os._exit(1)  # whatever happens, there is one template


def _say(control: socket.socket, what: dict[str, Any]) -> None:
    control.sendall(json.dumps(what).encode())


if __name__ == "__main__":
    sys.exit(main())
