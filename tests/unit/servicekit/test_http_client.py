"""The data plane's HTTP client, against servers that speak raw bytes; on uvloop and on the default loop.

A server is named for what it does wrong. What a test asserts on the server's side (connections accepted, requests
read, hang-ups seen) is awaited with a deadline, never slept for.
"""

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
import uvloop

from servicekit.http_client import (
    AnswerTooLarge,
    ConnectFailed,
    ConnectionLost,
    HttpError,
    HttpPool,
    HttpResponse,
    HttpTimeout,
    ProtocolError,
)
from servicekit.http_connection import Connection
from tests.support.eventually import eventually
from tests.support.sockets import short_directory

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # The hook that replaces this fixture can only be set for every test below a conftest, not for one module.
    pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture is deprecated"),
]

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
BIG = 8 * 1024 * 1024
Start = Callable[..., Awaitable["Upstream"]]


@pytest.fixture(
    scope="module", params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"]
)
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


class Upstream:
    """Reads requests and answers each with the same bytes; counts connections, requests and hang-ups."""

    answer = OK

    def __init__(self) -> None:
        self.address = ""
        self.connections = 0
        self.hang_ups = 0
        self.requests: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.let_go = asyncio.Event()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            await self.serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.hang_ups += 1
        finally:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await self.request(reader):
            writer.write(self.answer)
            await writer.drain()

    async def request(self, reader: asyncio.StreamReader) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        body = b""
        if length := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
            body = await reader.readexactly(int(length[1]))
        elif b"transfer-encoding: chunked" in head:
            while not body.endswith(b"0\r\n\r\n"):
                body += await reader.readuntil(b"\n")
        self.requests.append(head + body)
        return True

    @property
    def last(self) -> bytes:
        return self.requests[-1]


class Answers(Upstream):
    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self.answer = answer


class AnswersAndCloses(Answers):
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.request(reader)
        writer.write(self.answer)


class ClosesAfterRequest(AnswersAndCloses):
    def __init__(self) -> None:
        super().__init__(b"")


class ClosesAfterFirstAnswer(Upstream):
    """The second request on a connection is read, and then nothing is said."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.request(reader)
        writer.write(self.answer)
        await self.request(reader)


class ResetsInTheMiddle(Upstream):
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")  # its end would be the connection's
        await writer.drain()
        await self.let_go.wait()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


class TricklesBytes(Answers):
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.request(reader)
        for byte in self.answer:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)


class NeverAnswers(Upstream):
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.request(reader)
        await reader.readexactly(1)  # until the client hangs up


class NeverReads(Upstream):
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await self.let_go.wait()


class StopsInTheMiddle(Upstream):
    """Half an answer, and then silence."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
        await reader.readexactly(1)


class AnswersBeforeTheBody(Upstream):
    answer = b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        await reader.readexactly(4 * BIG)


class PushesWithoutEnd(Upstream):
    """A body as fast as the client takes it; `pushed` is what the transport accepted."""

    pushed = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(BIG // 65536):
            writer.write(b"x" * 65536)
            await writer.drain()
            self.pushed += 65536


class Speaks(Upstream):
    """Answers, and when told to, goes on speaking without having been asked."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.request(reader)
        writer.write(self.answer)
        await self.let_go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nstranger")
        await reader.readexactly(1)


@pytest_asyncio.fixture(loop_scope="module")
async def pool() -> AsyncIterator[HttpPool]:
    tasks = asyncio.all_tasks()
    pool = HttpPool()
    yield pool
    await pool.close()
    assert not pool._open
    assert not [task for task in asyncio.all_tasks() - tasks if "send_body" in repr(task.get_coro())]


@pytest_asyncio.fixture(loop_scope="module")
async def start() -> AsyncIterator[Start]:
    servers: list[asyncio.Server] = []
    upstreams: list[Upstream] = []

    with short_directory() as folder:

        async def start(upstream: Upstream, tcp: bool = False) -> Upstream:
            if tcp:
                server = await asyncio.start_server(upstream.accept, "127.0.0.1", 0)
                upstream.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            else:
                path = folder / f"{len(servers)}.sock"
                server = await asyncio.start_unix_server(upstream.accept, path)
                upstream.address = f"unix:{path}"
            servers.append(server)
            upstreams.append(upstream)
            return upstream

        yield start
        for upstream in upstreams:
            upstream.let_go.set()
            for writer in upstream.writers:
                writer.transport.abort()
        for server in servers:
            server.close()
            await server.wait_closed()


async def ask(
    pool: HttpPool,
    upstream: Upstream,
    body: bytes | AsyncIterable[bytes] = b"{}",
    *headers: tuple[bytes, bytes],
    method: str = "POST",
    timeout: float = 20,
) -> HttpResponse:
    return await pool.send(upstream.address, method, "/invocations", headers, body, timeout=timeout)


async def pieces(*values: bytes) -> AsyncIterator[bytes]:
    for value in values:
        yield value


# Connections


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_hundred_requests_use_one_connection(pool: HttpPool, start: Start, tcp: bool) -> None:
    upstream = await start(Upstream(), tcp)
    for _ in range(100):
        async with await ask(pool, upstream) as response:
            assert await response.read() == b"ok"
    assert upstream.connections == 1
    assert len(upstream.requests) == 100


async def test_an_empty_chunked_and_a_bodiless_answer_keep_the_connection(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream())
    for answer, body in [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"ok"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", b""),
        (OK, b"ok"),
    ]:
        upstream.answer = answer
        assert await (await ask(pool, upstream)).read() == body
    assert upstream.connections == 1


async def test_requests_at_the_same_time_have_their_own_connections(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream())
    responses = await asyncio.gather(*(ask(pool, upstream) for _ in range(8)))
    assert [await response.read() for response in responses] == [b"ok"] * 8
    assert upstream.connections == 8
    await asyncio.gather(*(ask(pool, upstream) for _ in range(8)))
    assert upstream.connections == 8


async def test_no_more_idle_connections_are_kept_than_allowed(start: Start) -> None:
    upstream, pool = await start(Upstream()), HttpPool(max_idle_per_address=2)
    await asyncio.gather(*(ask(pool, upstream) for _ in range(5)))
    await eventually(lambda: upstream.hang_ups == 3)
    await pool.close()


async def test_an_idle_connection_is_closed_after_its_time(start: Start) -> None:
    upstream, pool = await start(Upstream()), HttpPool(idle_timeout=0.05)
    await ask(pool, upstream)
    await eventually(lambda: upstream.hang_ups == 1)
    await pool.close()


async def test_forgetting_an_address_closes_its_idle_connections(pool: HttpPool, start: Start) -> None:
    upstream, other = await start(Upstream()), await start(Upstream())
    await ask(pool, upstream)
    await ask(pool, other)
    pool.forget(upstream.address)
    await eventually(lambda: upstream.hang_ups == 1)
    assert other.hang_ups == 0


async def test_a_connection_that_the_peer_closed_while_idle_is_dropped(pool: HttpPool, start: Start) -> None:
    upstream = await start(AnswersAndCloses(OK))
    for _ in range(3):
        assert await (await ask(pool, upstream)).read() == b"ok"
        await eventually(lambda: not pool._open)
        assert not pool._idle
    assert upstream.connections == 3


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
async def test_a_close_that_the_loop_has_not_seen_yet_costs_no_request(pool: HttpPool, family: int) -> None:
    closed = threading.Event()
    with short_directory() as folder, socket.socket(family) as listener:
        listener.bind(f"{folder}/s" if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen()
        port = None if family == socket.AF_UNIX else listener.getsockname()[1]
        address = f"unix:{folder}/s" if port is None else f"127.0.0.1:{port}"

        def serve_two_connections() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                connection.recv(65536)
                connection.sendall(OK)
                connection.close()
                closed.set()

        server = threading.Thread(target=serve_two_connections)
        server.start()
        await pool.send(address, "POST", "/", [], b"", timeout=20)
        assert closed.wait(5)  # the loop stands still here: it cannot have heard of the close
        response = await pool.send(address, "POST", "/", [], b"", timeout=20)
        assert await response.read() == b"ok"
        server.join()


async def test_a_request_on_a_reused_connection_is_never_sent_twice(pool: HttpPool, start: Start) -> None:
    upstream = await start(ClosesAfterFirstAnswer())
    await ask(pool, upstream)
    with pytest.raises(ConnectionLost) as lost:
        await ask(pool, upstream)
    assert lost.value.sent
    assert not lost.value.answered
    assert len(upstream.requests) == 2
    assert upstream.connections == 1


async def test_an_answer_that_nobody_asked_for_is_given_to_nobody(pool: HttpPool, start: Start) -> None:
    upstream = await start(Speaks())
    assert await (await ask(pool, upstream)).read() == b"ok"
    upstream.let_go.set()
    await eventually(lambda: upstream.hang_ups == 1)
    assert await (await ask(pool, upstream)).read() == b"ok"
    assert upstream.connections == 2


@pytest.mark.parametrize("extra", [OK, b"junk"])
async def test_bytes_behind_an_answer_end_the_connection(pool: HttpPool, start: Start, extra: bytes) -> None:
    upstream = await start(Answers(OK + extra))
    for number in (1, 2):
        assert await (await ask(pool, upstream)).read() == b"ok"
        assert upstream.connections == number


async def test_an_answer_that_says_close_ends_the_connection(pool: HttpPool, start: Start) -> None:
    upstream = await start(Answers(OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")))
    for number in (1, 2):
        assert await (await ask(pool, upstream)).read() == b"ok"
        await eventually(lambda number=number: upstream.hang_ups == number)


async def test_connect_failures_say_that_nothing_was_sent(pool: HttpPool) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for address in ("unix:/tmp/t-no-such-socket", f"127.0.0.1:{unused.getsockname()[1]}"):
            with pytest.raises(ConnectFailed, match=address):
                await pool.send(address, "GET", "/", [], b"", timeout=20)


async def test_a_connection_that_is_not_accepted_in_time_is_a_failed_connect() -> None:
    pool = HttpPool(connect_timeout=0.05)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in (first, second):  # fill the backlog: the next SYN is not answered
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectFailed, match="within"):
            await pool.send(address, "GET", "/", [], b"", timeout=20)
        with pytest.raises(HttpTimeout, match="connecting"):
            await pool.send(address, "GET", "/", [], b"", timeout=0.01)
    await pool.close()


async def test_a_peer_that_closes_before_we_write_is_a_failed_connect() -> None:
    closed = threading.Event()

    class SlowPool(HttpPool):
        def _opened(self, connection: Connection) -> None:
            super()._opened(connection)
            assert closed.wait(5)  # the loop stands still here, until the peer is gone

    with short_directory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()

        def accept_and_close() -> None:
            listener.accept()[0].close()
            closed.set()

        server = threading.Thread(target=accept_and_close)
        server.start()
        pool = SlowPool()
        with pytest.raises(ConnectFailed, match="at once"):
            await pool.send(f"unix:{folder}/s", "POST", "/", [], b"", timeout=20)
        server.join()
        await pool.close()


async def test_closing_the_pool_fails_what_is_in_flight(start: Start) -> None:
    upstream, pool = await start(NeverAnswers()), HttpPool()
    asking = asyncio.create_task(ask(pool, upstream))
    await eventually(lambda: bool(upstream.requests))
    await pool.close()
    with pytest.raises(ConnectionLost, match="being closed"):
        await asking
    await eventually(lambda: upstream.hang_ups == 1)
    with pytest.raises(ConnectFailed, match="closed"):
        await ask(pool, upstream)


# Requests


async def test_bytes_go_out_with_their_length_and_a_host(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream())
    await ask(pool, upstream, b"body", (b"X-Trace", b"7"))
    assert upstream.last == (
        b"POST /invocations HTTP/1.1\r\nhost: localhost\r\nX-Trace: 7\r\ncontent-length: 4\r\n\r\nbody"
    )


async def test_host_and_length_of_the_caller_are_not_doubled(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream(), tcp=True)
    await ask(pool, upstream, b"body", (b"Host", b"a"), (b"Content-Length", b"4"))
    assert upstream.last == b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"


async def test_an_iterable_goes_out_in_chunks_and_empty_pieces_do_not_end_it(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream())
    for _ in range(2):
        response = await ask(pool, upstream, pieces(b"one", b"", b"three, long enough for hex"))
        assert await response.read() == b"ok"
        assert b"\r\ntransfer-encoding: chunked\r\n\r\n" in upstream.last
        assert upstream.last.endswith(b"\r\n\r\n3\r\none\r\n1a\r\nthree, long enough for hex\r\n0\r\n\r\n")
    assert upstream.connections == 1


async def test_an_iterable_of_known_length_goes_out_plainly(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream())
    for _ in range(2):
        await ask(pool, upstream, pieces(b"ab", b"cd"), (b"content-length", b"4"))
        assert upstream.last.endswith(b"content-length: 4\r\n\r\nabcd")
    assert upstream.connections == 1


@pytest.mark.parametrize(("length", "match"), [(b"3", "longer"), (b"5", "ended after 4")])
async def test_a_body_that_is_not_as_long_as_declared_ends_the_connection(
    pool: HttpPool, start: Start, length: bytes, match: str
) -> None:
    upstream = await start(Upstream())
    with pytest.raises(ValueError, match=match):
        await ask(pool, upstream, pieces(b"ab", b"cd"), (b"content-length", length))
    await eventually(lambda: upstream.hang_ups == 1)
    assert not upstream.requests


async def test_a_body_that_fails_ends_the_connection_with_its_own_error(pool: HttpPool, start: Start) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"half"
        raise KeyError("the client went away")

    upstream = await start(Upstream())
    with pytest.raises(KeyError, match="went away"):
        await ask(pool, upstream, body())
    await eventually(lambda: upstream.hang_ups == 1)
    assert not upstream.requests


async def test_a_body_is_not_read_faster_than_the_peer_takes_it(pool: HttpPool, start: Start) -> None:
    upstream = await start(NeverReads())
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        while read < BIG:
            read += 65536
            yield b"x" * 65536

    with pytest.raises(HttpTimeout):
        async with asyncio.timeout(30):
            await ask(pool, upstream, body(), timeout=0.3)
    assert 0 < read < BIG / 2


@pytest.mark.parametrize(
    ("target", "header"),
    [
        ("/a b", (b"x", b"y")),
        ("/a\r\nx: y", (b"x", b"y")),
        ("/\xe9", (b"x", b"y")),
        ("/", (b"x", b"y\r\nz: 1")),
        ("/", (b"x", b"y\n")),
        ("/", (b"x", b"y\0")),
        ("/", (b"x\r\nz", b"y")),
        ("/", (b"x ", b"y")),
        ("/", (b"", b"y")),
        ("/", (b"transfer-encoding", b"chunked")),
        ("/", (b"content-length", b"3")),
        ("/", (b"content-length", b"+2")),
    ],
)
async def test_a_request_that_would_read_as_two_is_refused(
    pool: HttpPool, start: Start, target: str, header: tuple[bytes, bytes]
) -> None:
    upstream = await start(Upstream())
    with pytest.raises(ValueError, match=r"characters|length|leave it out"):
        await pool.send(upstream.address, "POST", target, [header], b"{}", timeout=20)
    assert upstream.connections == 0


async def test_two_content_lengths_are_refused_even_when_they_agree(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream())
    with pytest.raises(ValueError, match="only once"):
        await ask(pool, upstream, b"{}", (b"content-length", b"2"), (b"Content-Length", b"2"))


async def test_the_value_of_a_refused_header_is_not_shown(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream())
    with pytest.raises(ValueError, match="authorization") as refused:
        await ask(pool, upstream, b"", (b"authorization", b"Bearer canary\n"))
    assert "canary" not in str(refused.value)


async def test_an_early_answer_stops_the_sending_and_is_delivered(pool: HttpPool, start: Start) -> None:
    upstream = await start(AnswersBeforeTheBody())
    stopped = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal stopped
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            stopped = True

    async with await ask(pool, upstream, body()) as response:
        assert response.status == 413
        assert stopped
        assert await response.read() == b"big"
    await eventually(lambda: upstream.hang_ups == 1)


async def test_an_early_answer_to_a_big_body_is_delivered(pool: HttpPool, start: Start) -> None:
    upstream = await start(AnswersBeforeTheBody())
    response = await ask(pool, upstream, b"x" * (2 * BIG))
    assert (response.status, await response.read()) == (413, b"big")
    await eventually(lambda: upstream.hang_ups == 1)


async def test_an_answer_is_not_lost_when_its_sender_is_gone_before_we_write_again(pool: HttpPool) -> None:
    closed = threading.Event()
    with short_directory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()

        def answer_and_close() -> None:
            connection, _ = listener.accept()
            while b"first" not in connection.recv(65536):
                pass
            connection.sendall(OK)
            connection.close()
            closed.set()

        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await asyncio.sleep(0)  # uvloop writes at the end of a round
            assert closed.wait(5)  # the loop stands still here: the answer is there and has not been read
            yield b"second"

        server = threading.Thread(target=answer_and_close)
        server.start()
        response = await pool.send(f"unix:{folder}/s", "POST", "/", [], body(), timeout=20)
        assert await response.read() == b"ok"
        server.join()


# Answers


async def test_header_names_are_lowered_and_repeated_ones_kept(pool: HttpPool, start: Start) -> None:
    upstream = await start(Answers(b"HTTP/1.1 201 X\r\nSet-Cookie: a\r\nSet-Cookie: B\r\nContent-Length: 0\r\n\r\n"))
    response = await ask(pool, upstream)
    assert response.status == 201
    assert response.headers == [(b"set-cookie", b"a"), (b"set-cookie", b"B"), (b"content-length", b"0")]


async def test_an_answer_may_come_byte_by_byte_with_interim_answers_and_trailers(pool: HttpPool, start: Start) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\r\n"
    upstream = await start(TricklesBytes(interim + head + b"3\r\nabc\r\n2;e=1\r\nde\r\n0\r\nx-trailer: 1\r\n\r\n"))
    response = await ask(pool, upstream)
    assert await response.read() == b"abcde"
    assert response.headers == [(b"x-a", b"1"), (b"transfer-encoding", b"chunked")]


async def test_a_body_without_framing_ends_with_the_connection(pool: HttpPool, start: Start) -> None:
    upstream = await start(AnswersAndCloses(b"HTTP/1.1 200 OK\r\n\r\nuntil the end"))
    assert await (await ask(pool, upstream)).read() == b"until the end"
    await eventually(lambda: not pool._open)


async def test_a_reset_is_not_taken_for_the_end_of_a_body(pool: HttpPool, start: Start) -> None:
    upstream = await start(ResetsInTheMiddle(), tcp=True)
    response = await ask(pool, upstream)
    assert await anext(response) == b"half"
    upstream.let_go.set()
    with pytest.raises(ConnectionLost) as lost:
        await response.read()
    assert lost.value.answered


async def test_head_has_no_body_whatever_its_length_says(pool: HttpPool, start: Start) -> None:
    upstream = await start(Answers(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"))
    for _ in range(2):
        response = await ask(pool, upstream, b"", method="HEAD")
        assert await response.read() == b""


@pytest.mark.parametrize(
    ("answer", "answered"),
    [(b"", False), (b"HTTP/1.1 200", True), (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", True)],
)
async def test_a_close_in_the_middle_is_a_lost_connection(
    pool: HttpPool, start: Start, answer: bytes, answered: bool
) -> None:
    upstream = await start(AnswersAndCloses(answer))
    with pytest.raises(ConnectionLost) as lost:
        await (await ask(pool, upstream)).read()
    assert (lost.value.answered, lost.value.sent) == (answered, True)


async def test_a_peer_that_goes_while_we_send_has_not_seen_the_request(pool: HttpPool, start: Start) -> None:
    upstream = await start(NeverReads())

    async def body() -> AsyncIterator[bytes]:
        yield b"half"
        await eventually(lambda: bool(upstream.writers))
        upstream.writers[0].transport.abort()
        while True:  # until we are told to stop; a write to a peer that is gone must not blow up
            yield b"more"
            await asyncio.sleep(0)

    with pytest.raises(ConnectionLost) as lost:
        await ask(pool, upstream, body())
    assert (lost.value.answered, lost.value.sent) == (False, False)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 600 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 4000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + b"y" * 400_000,
    ],
    ids=lambda answer: repr(answer[:60]),
)
async def test_an_answer_that_is_not_plain_http_is_refused(pool: HttpPool, start: Start, answer: bytes) -> None:
    upstream = await start(Answers(answer))
    with pytest.raises(ProtocolError, match=re.escape(upstream.address)):
        await (await ask(pool, upstream)).read()
    await eventually(lambda: not pool._open)
    assert not pool._idle


async def test_a_reader_may_limit_the_body(pool: HttpPool, start: Start) -> None:
    upstream = await start(Upstream())
    assert await (await ask(pool, upstream)).read(limit=2) == b"ok"
    endless = await start(PushesWithoutEnd())
    with pytest.raises(AnswerTooLarge):
        await (await ask(pool, endless)).read(limit=100_000)
    await eventually(lambda: endless.hang_ups == 1)


async def test_a_slow_reader_slows_the_peer_and_still_gets_everything(pool: HttpPool, start: Start) -> None:
    upstream = PushesWithoutEnd()
    await start(upstream)
    response = await ask(pool, upstream)
    before = -1
    while upstream.pushed != before:  # until the peer stands still
        before = upstream.pushed
        for _ in range(20):
            await asyncio.sleep(0.005)
    assert upstream.pushed < BIG / 2
    assert sum([len(piece) async for piece in response]) == BIG


async def test_the_pause_of_one_answer_does_not_stay_with_the_connection(pool: HttpPool, start: Start) -> None:
    size = 256 * 1024 + 10  # its last bytes are too many to go on reading, and end it
    upstream = await start(Answers(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size))
    first = await ask(pool, upstream)
    await eventually(lambda: bool(pool._idle))
    second = await ask(pool, upstream)
    assert len(await second.read()) == len(await first.read()) == size
    assert upstream.connections == 1


# Deadlines and callers that go away


@pytest.mark.parametrize("server", [NeverAnswers, StopsInTheMiddle])
async def test_the_deadline_covers_everything_up_to_the_last_byte(
    pool: HttpPool, start: Start, server: type[Upstream]
) -> None:
    upstream = await start(server())
    with pytest.raises(HttpTimeout):
        async with asyncio.timeout(30):
            await (await ask(pool, upstream, timeout=0.1)).read()
    await eventually(lambda: upstream.hang_ups == 1)


async def test_the_deadline_interrupts_a_body_that_does_not_come(pool: HttpPool, start: Start) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"half"
        await asyncio.Event().wait()

    upstream = await start(Upstream())
    with pytest.raises(HttpTimeout):
        async with asyncio.timeout(30):
            await ask(pool, upstream, body(), timeout=0.1)
    await eventually(lambda: upstream.hang_ups == 1)


async def test_cancelling_a_request_hangs_up(pool: HttpPool, start: Start) -> None:
    upstream = await start(NeverAnswers())
    asking = asyncio.create_task(ask(pool, upstream))
    await eventually(lambda: bool(upstream.requests))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await eventually(lambda: upstream.hang_ups == 1)


async def test_cancelling_a_reader_hangs_up(pool: HttpPool, start: Start) -> None:
    upstream = await start(StopsInTheMiddle())
    response = await ask(pool, upstream)
    reading = asyncio.create_task(response.read())
    await eventually(lambda: response._exchange._waiter is not None and not response._exchange.pieces)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await eventually(lambda: upstream.hang_ups == 1)


async def test_leaving_an_answer_before_its_end_hangs_up(pool: HttpPool, start: Start) -> None:
    upstream = await start(StopsInTheMiddle())
    async with await ask(pool, upstream) as response:
        assert await anext(response) == b"half"
    await eventually(lambda: upstream.hang_ups == 1)
    with pytest.raises(HttpError, match="closed before its end"):
        await response.read()
