"""Who gets audit records besides: nothing is lost, whatever happens to the other side."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from servicekit.audit_forward import FileForwarder, SyslogForwarder
from servicekit.audit_records import AuditKey, Head, line, verify

KEY = AuditKey(bytes(32))
PATIENCE = 30.0


def records(count: int, *, after: Head | None = None) -> tuple[list[tuple[int, str]], Head]:
    head, made = after or Head(), []
    for _ in range(count):
        text, head = line(KEY, head, {"service": "secrets", "object": "ö\n"}, at=1_800_000_000)
        made.append((head.seq, text))
    return made, head


class Receiver:
    """A syslog server for TCP."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listening.getsockname()[:2]

    @contextmanager
    def connected(self) -> Iterator[Callable[[], bytes]]:
        """The next connection: what reads its next message."""
        connection, _ = self.listening.accept()
        connection.settimeout(PATIENCE)
        with connection, connection.makefile("rb") as stream:

            def message() -> bytes:
                size = b"".join(iter(lambda: stream.read(1), b" "))
                return stream.read(int(size))

            yield message


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    with closing(made.listening):
        yield made


class Taking(threading.Thread):
    """Hands records over beside the test, which receives them."""

    def __init__(self, forwarder: SyslogForwarder, batch: list[tuple[int, str]]) -> None:
        super().__init__(daemon=True)
        self.forwarder, self.batch = forwarder, batch
        self.is_taken = False
        self.start()

    def run(self) -> None:
        self.forwarder.take(self.batch)
        self.is_taken = True

    def ended(self) -> bool:
        """Whether all was taken."""
        self.join(PATIENCE)
        return self.is_taken


def text_of(message: bytes) -> bytes:
    """The record of a message of RFC 5424."""
    pattern = rb"<110>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [!-~]+ tessera-secrets \d+ audit - (\{.*\})"
    found = re.fullmatch(pattern, message)
    assert found, message
    return found.group(1)


def test_records_are_messages_of_syslog_and_stay_a_whole_log(receiver: Receiver) -> None:
    batch, head = records(200)
    with closing(SyslogForwarder("secrets", receiver.address)) as forwarder:
        taking = Taking(forwarder, batch)
        with receiver.connected() as message:
            messages = [message() for _ in batch]
            assert taking.ended()
    assert verify(map(text_of, messages), {"secrets": [KEY]}, [head]).is_whole


def test_a_server_that_was_started_anew_is_connected_to_again(receiver: Receiver) -> None:
    first, head = records(3)
    second, _ = records(2, after=head)
    with closing(SyslogForwarder("secrets", receiver.address)) as forwarder:
        for batch in (first, second):  # the first connection is closed in between
            taking = Taking(forwarder, batch)
            with receiver.connected() as message:
                assert [text_of(message()).decode() for _ in batch] == [text for _, text in batch]
                assert taking.ended()


def test_a_server_that_is_not_there_takes_nothing() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        address = listening.getsockname()[:2]
    with pytest.raises(OSError, match="refused"):
        SyslogForwarder("secrets", address).take(records(1)[0])


def test_what_the_other_side_does_not_acknowledge_is_not_taken(receiver: Receiver) -> None:
    # It neither accepts nor reads: what it has no room for stays here.
    batch = [(1, f'{{"time":"x","pad":"{"x" * 60_000}"}}')] * 400
    with pytest.raises(TimeoutError):
        SyslogForwarder("secrets", receiver.address, timeout=0.3).take(batch)


def test_datagrams_go_to_a_unix_socket_once_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    forwarder = SyslogForwarder("secrets", str(path))
    batch, _ = records(3)
    with pytest.raises(FileNotFoundError):
        forwarder.take(batch)
    for _ in range(2):  # the second one takes the place of the first
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as server:
            server.bind(str(path))
            server.settimeout(PATIENCE)
            forwarder.take(batch)
            assert [text_of(server.recv(65_536)).decode() for _ in batch] == [text for _, text in batch]
        path.unlink()
        with pytest.raises((FileNotFoundError, ConnectionError)):
            forwarder.take(batch)


def test_a_file_is_continued_and_may_be_rotated(tmp_path: Path) -> None:
    path = tmp_path / "secrets.jsonl"
    forwarder = FileForwarder(path)
    first, head = records(3)
    second, head = records(3, after=head)
    forwarder.take(first)
    with path.open("ab") as torn:
        torn.write(b'{"seq":4,"ha')
    forwarder.take(second)
    assert verify(path.read_bytes().splitlines(), {"secrets": [KEY]}, [head]).is_whole
    assert path.stat().st_mode & 0o777 == 0o600
    path.rename(tmp_path / "rotated")
    third, head = records(3, after=head)
    forwarder.take(third)
    whole = (tmp_path / "rotated").read_bytes() + path.read_bytes()
    assert verify(whole.splitlines(), {"secrets": [KEY]}, [head]).is_whole


@pytest.mark.parametrize("length", [1, 65_535, 65_536, 65_537, 200_000])
def test_half_a_line_of_any_length_is_taken_back(tmp_path: Path, length: int) -> None:
    path = tmp_path / "secrets.jsonl"
    path.write_bytes(b"x" * 70_000 + b"\n" + b"y" * length)
    FileForwarder(path).take([(1, "z")])
    assert path.read_bytes() == b"x" * 70_000 + b"\nz\n"
