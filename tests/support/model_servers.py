"""Tiny real programs to launch in place of the model server, each with one manner: ready, dying, stubborn, ...

`python -I tests/support/model_servers.py MANNER LISTEN_FD REPORT_FD`; tests name them by `command(manner)` and speak to
them with `answer(address)`. Every one that is ready answers any request with what it found itself started with.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import signal
import site
import socket
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any


def command(manner: str) -> tuple[str, ...]:
    """The command of a launch that runs one of these programs."""
    return (sys.executable, "-I", __file__, manner, "{listen_fd}", "{report_fd}")


async def answer(address: str, *, path: str = "/", body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    """One HTTP request to a `unix:` address: status, headers with lower-case names, body."""
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    try:
        async with asyncio.timeout(30):
            lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: replica", "connection: close"]
            if body is not None:
                lines += ["content-type: application/json", f"content-length: {len(body)}"]
            writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
            head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    status, *fields = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    return int(status.split()[1]), headers, content


async def found_by(address: str) -> dict[str, Any]:
    """What the program behind `address` found itself started with."""
    found: dict[str, Any] = json.loads((await answer(address))[2])
    return found


def _surroundings() -> dict[str, Any]:
    umask = os.umask(0)
    os.umask(umask)
    fds = [fd for fd in range(1_000) if _is_open(fd)]
    return {
        "environment": dict(os.environ),
        "fds": fds,
        "standard_input": os.readlink("/proc/self/fd/0"),  # noqa: PTH115
        "directory": str(Path.cwd()),
        "user_base": site.USER_BASE,
        "umask": umask,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": os.getgroups(),
        "privileges": privileges(),
        "pid": os.getpid(),
        "leads_session": os.getsid(0) == os.getpid(),
        "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "ignored_signals": [s.name for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN],
    }


def privileges() -> dict[str, str]:
    """What the kernel says of this process's capabilities, and whether it can ever gain any."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {name: value for name, value in fields.items() if name.startswith("Cap") or name == "NoNewPrivs"}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _say(report_fd: int, report: dict[str, Any]) -> None:
    with os.fdopen(report_fd, "wb") as pipe:
        pipe.write(json.dumps(report).encode() + b"\n")


def _write_taken(fd: int, data: bytes) -> None:
    """Writes, and returns when the other side has read it all: the next write comes in another read."""
    os.write(fd, data)
    while struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]:
        os.sched_yield()


def _flood(mebibytes: int) -> None:
    """Prints so much, all of it secret."""
    line = os.environ["KEY"].encode().ljust(1_023, b"x") + b"\n"
    for _ in range(mebibytes):
        sys.stdout.buffer.write(line * 1_024)
    sys.stdout.flush()


def _daemon() -> int:
    """Starts a process that has left our session and group, and that TERM does not end; returns its number."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.write(writing, struct.pack("i", os.getpid()))
            while True:
                signal.pause()
        os._exit(0)
    os.waitpid(child, 0)
    number: int = struct.unpack("i", os.read(reading, 4))[0]
    return number


def _drawn() -> dict[str, Any]:
    """What nobody else is to draw as well."""
    import random
    import ssl
    import tempfile
    import uuid

    import numpy as np

    return {
        "random": random.random(),
        "numpy": np.random.random_sample(),
        "ssl": ssl.RAND_bytes(16).hex(),
        "uuid1": str(uuid.uuid1()),
        "uuid4": str(uuid.uuid4()),
        "file": Path(tempfile.mktemp()).name,
    }


def _wait_for(variable: str) -> None:
    """Returns when the file that the variable names is there; at once when there is no such variable."""
    while variable in os.environ and not os.path.exists(os.environ[variable]):  # noqa: PTH110
        time.sleep(0.01)


def _answer_gated(listener: socket.socket) -> None:
    """Answers any number of requests at a time, once the file of GATE is there, with how many there were at most.

    Leaves a file of its process's number in the folder of SEEN when there is one.
    """
    now = most = 0
    lock = threading.Lock()

    def answer(connection: socket.socket) -> None:
        nonlocal now, most
        with connection:
            if connection.recv(65_536).startswith(b"POST"):  # else it is asked whether it lives
                if "SEEN" in os.environ:
                    Path(os.environ["SEEN"], str(os.getpid())).touch()
                with lock:
                    now += 1
                    most = max(most, now)
                _wait_for("GATE")
                with lock:
                    now -= 1
            body = json.dumps({"pid": os.getpid(), "most": most}).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def _answer_talking(listener: socket.socket) -> None:
    """Prints what it is asked to `say`, so many `times`, and ends where that is asked for."""
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            length = 0
            while (line := stream.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            if length:  # else it is asked whether it lives
                asked = json.loads(stream.read(length))
                sys.stdout.write(f"{asked['say']}\n" * asked.get("times", 1))
                sys.stdout.flush()
                if asked.get("dies"):
                    os._exit(7)
            connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")


def _answer_endlessly(listener: socket.socket) -> None:
    """Answers any number of requests at a time, without an end for as long as it is read."""

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            is_query = connection.recv(65_536).startswith(b"POST")  # else it is asked whether it lives
            connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
            while is_query:
                connection.sendall(b"x" * 65_536)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def main(manner: str, listen_fd: int, report_fd: int) -> None:
    surroundings = _surroundings()
    if manner == "dying":
        sys.stdout.write("about to die\n")
        sys.exit(3)
    if manner == "failing":
        _say(report_fd, {"event": "failed", "cause": f"KeyError: {os.environ['SAID']}"})
        sys.exit(1)
    if manner == "crashing":
        os.abort()
    if manner == "silent":
        os.close(report_fd)
    if manner == "flooding":
        _flood(int(os.environ["MEBIBYTES"]))
        os._exit(4)
    if manner == "babbling":
        os.write(report_fd, b'nothing\n[]\n{"event":1}\n' + b"[" * 30_000 + b'\n{"event":"failed","cause":1}\n')
    if manner == "speaking":
        for piece in json.loads(os.environ["PIECES"]):
            _write_taken(1, piece.encode())
    if manner == "gated":
        if os.path.exists(os.environ.get("BROKEN", "")):  # noqa: PTH110
            _say(report_fd, {"event": "failed", "cause": "the weights are gone"})
            sys.exit(1)
        _wait_for("START_GATE")
    if manner == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if manner == "forking":
        surroundings["daemon"] = _daemon()
    if manner == "drawing":
        surroundings["drawn"] = _drawn()
    if manner not in ("slow", "silent"):
        _say(report_fd, {"event": "ready", "load_seconds": 0.25})
    if manner == "mute":
        signal.pause()
    with socket.socket(fileno=listen_fd) as listener:
        if manner == "gated":
            _answer_gated(listener)
        if manner == "talking":
            _answer_talking(listener)
        if manner == "endless":
            _answer_endlessly(listener)
        while True:
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(65_536)
                if os.path.basename(request.split()[1]) == b"die":  # noqa: PTH119
                    os._exit(7)
                surroundings["headers"] = request.decode("latin-1").partition("\r\n\r\n")[0].splitlines()[1:]
                body = json.dumps(surroundings).encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)


def _load_pyfunc(_path: str) -> None:
    """For our own model server, when one of these programs is the model: MANNER is a variable then."""
    main(os.environ["MANNER"], 3, 4)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
