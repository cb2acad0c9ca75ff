"""A model server that is ready, and that tries what a model must not be able to do when it is asked to.

`GET /NAME` makes the attempt of that name; the answer says `denied: ...` or what was achieved. What it attacks stands
in the variable TARGETS, as JSON.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TARGETS: dict[str, Any] = json.loads(os.environ.get("TARGETS", "{}"))
LIBC = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, CLONE_NEWNS, AF_PACKET = 16, 0x20000, 17

SHARED = ("/tmp", "/var/tmp", "/dev/shm")
FORKS = 700
BOMB_MIB = 512


def command() -> tuple[str, ...]:
    """The command of a launch that runs this program."""
    return (sys.executable, "-I", __file__, "{listen_fd}", "{report_fd}")


def _checked(result: int) -> str:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return "done"


def _connected(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
    return "connected"


def _read(path: str) -> str:
    return repr(Path(path).read_bytes()[:100])


def _listed(path: str) -> str:
    return str(list(Path(path).iterdir()))


def _written(path: str) -> str:
    Path(path).write_text("hostile")
    return "written"


def _signalled(pid: int, number: int = signal.SIGKILL) -> str:
    os.kill(pid, number)
    return "signalled"


def _lowered_limit() -> str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (2_000, 2_000))
    return "raised"


def _raw_socket() -> str:
    socket.socket(AF_PACKET, socket.SOCK_RAW).close()
    return "opened"


def _through_setuid_program() -> str:
    user = subprocess.check_output([TARGETS["setuid_program"], "-u"], text=True).strip()
    return f"denied: it ran as {user}" if int(user) == os.getuid() else f"it ran as {user}"


def _every_file() -> str:
    opened: list[int] = []
    with contextlib.suppress(OSError):
        while len(opened) < 5_000:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    for fd in opened:
        os.close(fd)
    return str(len(opened))


def _forks() -> str:
    """As many children as there may be; how many that were."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        while len(children) < FORKS:
            if (child := os.fork()) == 0:
                signal.pause()
            children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return str(len(children))


def _take_memory() -> str:
    taken = bytearray(BOMB_MIB << 20)
    for index in range(0, len(taken), 4096):
        taken[index] = 1
    return f"it took {BOMB_MIB} MiB"


def _memory() -> str:
    """How a child ends that takes a lot of it."""
    child = os.fork()
    if child == 0:
        _take_memory()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "denied: killed" if status == -signal.SIGKILL else f"it took {BOMB_MIB} MiB"


def _shared_files() -> str:
    """Leaves files where the next owner of this user could find them; in how many places that was possible."""
    left = 0
    for place in SHARED:
        with contextlib.suppress(OSError):
            Path(place, f"left-by-{os.getuid()}").write_text("left")
            left += 1
    return str(left)


def _links() -> str:
    """Names in the work directory that lead to what is not ours."""
    for name in ("log", "output.log", "lock"):
        Path(name).symlink_to(TARGETS["key_file"])
    Path("directory").symlink_to(TARGETS["data_directory"])
    return "done"


def _second_life() -> str:
    """Leaves a process that has left session and group, and has been forked twice."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.write(writing, str(os.getpid()).encode())
            os.closerange(3, 1_024)  # the connection above all, whose end somebody waits for
            while True:
                time.sleep(1)
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(reading, 20).decode()


ATTEMPTS: dict[str, Callable[[], str]] = {
    "read another model's environment": lambda: _read(f"/proc/{TARGETS['other_model']}/environ"),
    "read the service's environment": lambda: _read(f"/proc/{TARGETS['service']}/environ"),
    "read the shim's environment": lambda: _read(f"/proc/{os.getppid()}/environ"),
    "read another model's memory": lambda: _read(f"/proc/{TARGETS['other_model']}/mem"),
    "read another model's files through its process": lambda: _listed(f"/proc/{TARGETS['other_model']}/cwd/"),
    "list the service's descriptors": lambda: _listed(f"/proc/{TARGETS['service']}/fd"),
    "trace another model": lambda: _checked(LIBC.ptrace(PTRACE_ATTACH, TARGETS["other_model"], 0, 0)),
    "trace the shim": lambda: _checked(LIBC.ptrace(PTRACE_ATTACH, os.getppid(), 0, 0)),
    "kill another model": lambda: _signalled(TARGETS["other_model"]),
    "kill the service": lambda: _signalled(TARGETS["service"]),
    "kill the shim": lambda: _signalled(os.getppid()),
    "trace the template": lambda: _checked(LIBC.ptrace(PTRACE_ATTACH, TARGETS["template"], 0, 0)),
    "read the template's memory": lambda: _read(f"/proc/{TARGETS['template']}/mem"),
    "kill the template": lambda: _signalled(TARGETS["template"]),
    "read the database": lambda: _read(TARGETS["database"]),
    "read the key file": lambda: _read(TARGETS["key_file"]),
    "list the data directory": lambda: _read(os.path.join(TARGETS["data_directory"], "visible-to-root")),  # noqa: PTH118
    "connect to a service": lambda: _connected(TARGETS["service_socket"]),
    "connect to another model": lambda: _connected(f"{TARGETS['other_directory']}/http.sock"),
    "connect to another model's shim": lambda: _connected(f"{TARGETS['other_directory']}/control.sock"),
    "connect to the own shim": lambda: _connected(f"{TARGETS['own_directory']}/control.sock"),
    "list another model's work": lambda: _listed(f"{TARGETS['other_directory']}/work"),
    "write to the interpreter": lambda: _written(f"{sys.prefix}/hostile.pth"),
    "write to the model": lambda: _written(f"{TARGETS['model']}/hostile"),
    "write where everybody may": lambda: _written(f"{TARGETS['model']}/open/hostile"),
    "write to its limits": lambda: _written(f"{TARGETS['own_group']}/pids.max"),
    "write beside the work directory": lambda: _written("../hostile"),
    "write to the system": lambda: _written("/etc/hostile"),
    "write to the kernel": lambda: _written("/proc/sys/kernel/core_pattern"),
    "become root": lambda: os.setuid(0) or "root",  # type: ignore[func-returns-value]
    "join groups": lambda: os.setgroups([0]) or "joined",  # type: ignore[func-returns-value]
    "run a program of root's": _through_setuid_program,
    "mount": lambda: _checked(LIBC.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None)),
    "leave its view": lambda: _checked(LIBC.unshare(CLONE_NEWNS)),
    "change the root": lambda: os.chroot("/") or "changed",  # type: ignore[func-returns-value]
    "make a device": lambda: os.mknod("device", 0o20600, os.makedev(1, 1)) or "made",  # type: ignore[func-returns-value]
    "raise a limit": _lowered_limit,
    "listen to the network": _raw_socket,
    "be more important": lambda: str(os.nice(-5)),
}
"""What must be denied, by name."""

MEASURED: dict[str, Callable[[], str]] = {
    "files": _every_file,
    "forks": _forks,
    "memory": _memory,
    "own memory": _take_memory,
    "shared": _shared_files,
    "links": _links,
    "second life": _second_life,
    "kill everybody": lambda: _signalled(-1),  # the kernel says that this was done, whoever it could not reach
}
"""What is bounded or contained, by name."""


def attempted(name: str) -> str:
    """What came of an attempt."""
    try:
        return {**ATTEMPTS, **MEASURED}[name]()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"denied: {error}"


def _requests(listener: socket.socket) -> Iterator[socket.socket]:
    while True:
        connection, _ = listener.accept()
        with connection:
            yield connection


def main(listen_fd: int, report_fd: int) -> None:
    with os.fdopen(report_fd, "wb") as pipe:
        pipe.write(b'{"event":"ready","load_seconds":0}\n')
    for connection in _requests(socket.socket(fileno=listen_fd)):
        path = connection.recv(65_536).split()[1].decode()
        answer = attempted(path.lstrip("/").replace("_", " ")).encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + answer)


def _load_pyfunc(_path: str) -> None:
    """For our own model server, when this is the model."""
    main(3, 4)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
