"""The smallest program that runs in place of a model server: ready a few milliseconds after its start.

`python -I -S tests/support/tiny_runner.py LISTEN_FD REPORT_FD`, as a launch's `command()` runs it. Every request is
answered with `SAYS`, what the environment gave it to say; one whose body asks for a `stream`, in `PIECES` pieces. With
`FAILS` it says that it cannot load, for that reason; with `HANGS` it says nothing; with `FORKS` it has a descendant
that has left its session and ignores TERM. Once there is the file `GATE` it answers queries, and not before; once there
is the file `DOOM` it crashes. Each query that it gets leaves a byte in the file `TALLY`. With `LEDGER`, a folder, it
takes the first place there that nobody has who runs, and leaves a trace of it (`most_at_once`).
"""

import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from itertools import count
from pathlib import Path

PIECES = 4
_PIECE_SECONDS = 0.01


def command() -> tuple[str, ...]:
    """The command of a launch that runs this program."""
    return (sys.executable, "-I", "-S", __file__, "{listen_fd}", "{report_fd}")


def most_at_once(ledger: Path) -> int:
    """How many ran at one moment at most, of all that were given this ledger."""
    return sum(1 for place in ledger.glob("place-*"))


def _take_place(ledger: str) -> None:
    for number in count(1):
        place = os.open(f"{ledger}/place-{number}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(place)
        else:
            return  # kept, and free again when this process is gone


def _fork_away() -> None:
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
        os._exit(0)
    os.waitpid(child, 0)


def _wait_for_gate() -> None:
    while "GATE" in os.environ and not os.path.exists(os.environ["GATE"]):  # noqa: PTH110
        time.sleep(_PIECE_SECONDS)


def _count() -> None:
    if "TALLY" in os.environ:
        tally = os.open(os.environ["TALLY"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(tally, b".")
        os.close(tally)


def _crash_at(doom: str) -> None:
    while not os.path.exists(doom):  # noqa: PTH110
        time.sleep(_PIECE_SECONDS)
    os._exit(3)


def _answer(connection: socket.socket, says: bytes) -> None:
    with connection, connection.makefile("rb") as requests:
        while line := requests.readline():
            length, is_last = 0, False
            while (header := requests.readline()) not in (b"\r\n", b""):
                name, _, value = header.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
                is_last = is_last or header.lower() == b"connection: close\r\n"
            body = requests.read(length)
            if line.startswith(b"POST"):  # else it is asked whether it lives
                _count()
                _wait_for_gate()
            if b"stream" in body:
                connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                for _ in range(PIECES):
                    connection.sendall(b"%x\r\n%b\r\n" % (len(says), says))
                    time.sleep(_PIECE_SECONDS)
                connection.sendall(b"0\r\n\r\n")
            else:
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(says), says))
            if is_last:
                return


def _main(listen_fd: int, report_fd: int) -> None:
    if "LEDGER" in os.environ:
        _take_place(os.environ["LEDGER"])
    if "FORKS" in os.environ:
        _fork_away()
    if "FAILS" in os.environ:
        os.write(report_fd, json.dumps({"event": "failed", "cause": os.environ["FAILS"]}).encode() + b"\n")
        sys.exit(1)
    if "HANGS" not in os.environ:
        os.write(report_fd, json.dumps({"event": "ready", "load_seconds": 0.01}).encode() + b"\n")
        os.close(report_fd)
    if "DOOM" in os.environ:
        threading.Thread(target=_crash_at, args=(os.environ["DOOM"],), daemon=True).start()
    says = os.environ.get("SAYS", "").encode()
    with socket.socket(fileno=listen_fd) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection, says), daemon=True).start()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
