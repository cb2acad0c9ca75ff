"""Starts a shim: `python -I -S <this file>`, with its spec on standard input.

Before it lets its starter go it owns both sockets; so whoever started it can talk to it, and to the model's queue, as
soon as the starter has seen this program's first process end.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

# An isolated interpreter knows the standard library alone; that stays first, our own package comes behind it.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from serving_service.shim import processes
from serving_service.shim.control import Control
from serving_service.shim.replica import Replica
from serving_service.shim.spec import IncompleteSpecError, Spec, read_spec
from serving_service.shim.supervisor import supervise

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 10.0


def main() -> int:
    os.umask(0o077)
    # One, not zero: with a core pattern that is a pipe the kernel dumps in spite of a limit of zero.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    try:
        spec = read_spec(sys.stdin.buffer)
        model_listener = _listener(spec, "http.sock")
        control_listener = _listener(spec, "control.sock")
    except (IncompleteSpecError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if os.fork():
        os._exit(0)
    _detach(spec)
    replica = Replica(spec)
    control = Control(spec, replica)

    def on_terminate(_number: int, _frame: FrameType | None) -> None:
        threading.Thread(target=control.end, args=(_GRACE_SECONDS,), daemon=True).start()

    signal.signal(signal.SIGTERM, on_terminate)
    replica.start(model_listener)
    identity = {"pid": os.getpid(), "mark": processes.started(os.getpid()), **replica.identity()}
    os.pwrite(spec.lock_fd, json.dumps(identity).encode(), 0)  # over what its starter wrote, which is shorter
    threading.Thread(target=control.serve, args=(control_listener,), daemon=True).start()
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


if __name__ == "__main__":
    sys.exit(main())
