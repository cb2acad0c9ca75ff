"""A model server that is ready, answers well, and misbehaves in the way that the body of a request asks for.

`{"inputs": ["NAME", ARGUMENT]}` has it do one of the deeds below; whatever else it is asked is answered with the number
of its process. It is a model (`mlflow_models.model_of`): our model server loads its file, and never goes on after that.
With GATE it is not ready before it is let through there; with STUBBORN it does not end when it is asked to.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

GARBAGE = b"\x16\x03\x01\x00\xa5 this is no HTTP\r\n\r\n"

BOMB = """
import os, time
while True:
    try:
        os.fork()
    except OSError:  # whoever else ends makes room for one more
        time.sleep(0.2)
"""

_LISTEN_FD, _REPORT_FD = 3, 4
_LINE = b"x" * 1_023 + b"\n"


class BadModel:
    """Answers every connection once."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._babbles = False

    def serve(self) -> None:
        """Serves until it is ended."""
        with contextlib.suppress(OSError):  # it does not listen any more
            while True:
                connection, _ = self._listener.accept()
                try:
                    threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
                except RuntimeError:  # there can be no further thread
                    self._serve(connection)
        while True:
            signal.pause()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            match _asked(connection):
                case [str() as name, argument]:
                    getattr(self, f"do_{name}")(connection, argument)
                case _:
                    self._answer(connection, str(os.getpid()))

    def _answer(self, connection: socket.socket, text: str) -> None:
        body = json.dumps({"predictions": [text]}).encode()
        fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        whole = f"HTTP/1.1 200 OK\r\n{fields}\r\n".encode() + body
        connection.sendall(GARBAGE if self._babbles else whole)

    def do_print(self, connection: socket.socket, mebibytes: int) -> None:
        """Prints so much, after its answer."""
        self._answer(connection, "going to print")
        connection.close()
        for _ in range(mebibytes):
            sys.stdout.buffer.write(_LINE * 1_024)
        _say(f"that were {mebibytes} MiB")

    def do_fork(self, connection: socket.socket, _: object) -> None:
        """Has a program fork for as long as that goes, and all its children too, of which none ends by itself."""
        self._answer(connection, "going to fork")
        connection.close()
        subprocess.Popen([sys.executable, "-I", "-S", "-c", BOMB])
        with contextlib.suppress(OSError):
            while True:
                if (child := os.fork()) == 0:
                    os._exit(0)
                os.waitpid(child, 0)
        _say("there can be no further process")

    def do_close(self, connection: socket.socket, _: object) -> None:
        """Hangs up without a word."""

    def do_garbage(self, connection: socket.socket, _: object) -> None:
        """Says something that makes no sense."""
        connection.sendall(GARBAGE)

    def do_babble(self, connection: socket.socket, _: object) -> None:
        """Says nothing else from now on."""
        self._answer(connection, "going to babble")
        self._babbles = True

    def do_cut(self, connection: socket.socket, _: object) -> None:
        """Hangs up in the middle of an answer."""
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")

    def do_wait(self, connection: socket.socket, seconds: float) -> None:
        """Answers late."""
        time.sleep(seconds)
        self._answer(connection, "late")

    def do_deafen(self, connection: socket.socket, _: object) -> None:
        """Accepts no connection any more, and goes on living."""
        self._answer(connection, "going to be deaf")
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _asked(connection: socket.socket) -> Any:
    """What a request asks for; None where that is nothing of ours."""
    with connection.makefile("rb") as lines:
        lines.readline()
        length = 0
        while (header := lines.readline()) not in (b"\r\n", b""):
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        body = lines.read(length)
    return json.loads(body).get("inputs") if body else None


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _pass(gate: str) -> None:
    """Returns when whoever listens there says something."""
    host, _, port = gate.partition(":")
    with socket.create_connection((host, int(port))) as visitor:
        visitor.recv(1)


def _load_pyfunc(_path: str) -> None:
    if "STUBBORN" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "GATE" in os.environ:
        _pass(os.environ["GATE"])
    with os.fdopen(_REPORT_FD, "wb") as report:
        report.write(b'{"event":"ready","load_seconds":0}\n')
    BadModel(socket.socket(fileno=_LISTEN_FD)).serve()
