"""Where audit records go besides the files of the log: a syslog server, or a file on another disk.

So there is a copy that whoever takes over this machine cannot cut short. Records are handed over in their order and as
they stand, and a batch counts as taken when it is out of our hands: by a datagram socket when it is in the other side's
queue, over TCP when the other side's kernel has acknowledged it, in a file when that was synced. What was not taken is
handed over again, so a record may be there twice after a crash, and a verifier knows that.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from servicekit.audit_files import SyncFailed, whole_lines

TIMEOUT = 5.0
"""Seconds that one step of handing over may take."""

PRIORITY = 13 * 8 + 6
"""Of syslog: facility `log audit`, severity informational."""

_UNSENT = 0x5411
"""SIOCOUTQ of Linux: how many bytes of a TCP connection the other side has not acknowledged."""

_POLL_SECONDS = 0.002

Records = Sequence[tuple[int, str]]
"""Numbers and lines."""


class Forwarder(Protocol):
    """Takes records over."""

    def take(self, records: Records) -> None:
        """Returns when these are out of our hands; raises OSError when some may not be. Blocks."""

    def close(self) -> None:
        """Ends what is open."""


class FileForwarder:
    """Appends to one file, which somebody else may rotate: it is opened anew for every batch."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self, records: Records) -> None:
        """As Forwarder. Raises SyncFailed, too."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            size, _ = whole_lines(descriptor)
            content = "".join(f"{text}\n" for _, text in records).encode("ascii")
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                os.ftruncate(descriptor, size)
                raise
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise SyncFailed(f"the file for audit records cannot be synced: {error.strerror}") from None

    def close(self) -> None:
        """Nothing is open."""


class SyslogForwarder:
    """Sends records as messages of RFC 5424, over a Unix datagram socket or TCP (RFC 6587, octets counted)."""

    def __init__(self, service: str, address: str | tuple[str, int], *, timeout: float = TIMEOUT) -> None:
        """`address` is the path of a Unix socket, or host and port."""
        self._service = service
        self._address = address
        self._timeout = timeout
        self._host = socket.gethostname()
        self._socket: socket.socket | None = None

    def take(self, records: Records) -> None:
        """As Forwarder."""
        if self._socket is not None and self._is_gone():
            self.close()
        try:
            for _, text in records:
                self._send(self._message(text))
            self._wait_until_acknowledged()
        except OSError:
            self.close()  # what was sent by halves is begun anew
            raise

    def close(self) -> None:
        """Closes the connection; the next batch opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _message(self, text: str) -> bytes:
        moment = json.loads(text)["time"]
        header = f"<{PRIORITY}>1 {moment} {self._host} tessera-{self._service} {os.getpid()} audit - "
        return f"{header}{text}".encode("ascii", "replace")

    def _send(self, message: bytes) -> None:
        if isinstance(self._address, str):
            self._connected().send(message)
        else:
            self._connected().sendall(b"%d %b" % (len(message), message))

    def _connected(self) -> socket.socket:
        if self._socket is None:
            if isinstance(self._address, str):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                self._socket.settimeout(self._timeout)
                self._socket.connect(self._address)
            else:
                self._socket = socket.create_connection(self._address, self._timeout)
        return self._socket

    def _wait_until_acknowledged(self) -> None:
        if isinstance(self._address, str):
            return
        connection = self._connected()
        until = time.monotonic() + self._timeout
        while _unsent(connection):
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            time.sleep(_POLL_SECONDS)
        if self._is_gone():
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def _is_gone(self) -> bool:
        """Whether the other side has closed the connection; a server of syslog says nothing otherwise."""
        if isinstance(self._address, str) or self._socket is None:
            return False
        looking = select.poll()
        looking.register(self._socket, select.POLLIN)
        if not looking.poll(0):
            return False
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


def _unsent(connection: socket.socket) -> int:
    answer = fcntl.ioctl(connection.fileno(), _UNSENT, struct.pack("i", 0))
    return int(struct.unpack("i", answer)[0])
