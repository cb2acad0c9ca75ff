"""The HTTP server of the gateway around small applications: framing, order, pace, and the end of connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from gateway import http_protocol, http_server
from gateway.http import Answer, ClientGone, Request, WhileWanted
from gateway.http_protocol import Application, Connection, Connections
from tests.support.eventually import eventually

PIECE = 256 * 1024


@dataclass
class Caller:
    """One connection to a server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def says(self, *data: bytes) -> None:
        for each in data:
            self.writer.write(each)
            await self.writer.drain()

    async def hears(self, end: bytes) -> bytes:
        """All up to and with `end`."""
        async with asyncio.timeout(30):
            return await self.reader.readuntil(end)

    async def hears_all(self) -> bytes:
        """All until the server closes the connection."""
        said = bytearray()
        async with asyncio.timeout(30):
            with suppress(ConnectionError):
                while piece := await self.reader.read(PIECE):
                    said += piece
        return bytes(said)


@asynccontextmanager
async def calling(application: Application, *, drain_seconds: float = 5.0) -> AsyncIterator[Caller]:
    """A connection to a server that answers with `application`."""
    listening = http_server.bound("127.0.0.1:0")
    async with http_server.serving(application, listening, None, drain_seconds=drain_seconds):
        reader, writer = await asyncio.open_connection(*listening.getsockname()[:2])
        try:
            yield Caller(reader, writer)
        finally:
            writer.close()


async def echo(request: Request, answer: Answer) -> None:
    """Says which path was asked, and how much came with it."""
    size = 0
    while piece := await request.more():
        size += len(piece)
    answer.whole(200, [], f"{request.method} {request.path} {size}".encode())


async def stream(request: Request, answer: Answer) -> None:
    answer.begin(200, [])
    for piece in (b"one", b"", b"two"):
        await answer.piece(piece)
    answer.end()


def get(path: str, *headers: bytes, method: str = "GET", version: str = "1.1") -> bytes:
    return f"{method} {path} HTTP/{version}\r\n".encode() + b"".join(one + b"\r\n" for one in headers) + b"\r\n"


async def test_of_too_many_connections_the_one_that_is_idle_for_longest_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "most_connections", lambda: 3)
    may_end = asyncio.Event()
    slow = 0

    async def application(request: Request, answer: Answer) -> None:
        nonlocal slow
        if request.path == "/slow":
            slow += 1
            await may_end.wait()
        answer.whole(200, [], b"done")

    listening = http_server.bound("127.0.0.1:0")
    callers: list[Caller] = []

    async def call() -> Caller:
        callers.append(Caller(*await asyncio.open_connection(*listening.getsockname()[:2])))
        return callers[-1]

    async with http_server.serving(application, listening, None, drain_seconds=5.0):
        busy = await call()
        await busy.says(get("/slow"))
        await eventually(lambda: slow == 1)
        silent = await call()
        kept = await call()
        await silent.says(b"GET / HT")
        await kept.says(get("/"))
        await kept.hears(b"done")
        fresh = await call()
        assert await silent.hears_all() == b"", "it has been without a request for longest"
        for caller in (kept, fresh):
            await caller.says(get("/"))
            await caller.hears(b"done")
        for caller in (kept, fresh):
            await caller.says(get("/slow"))
        await eventually(lambda: slow == 3)
        one_more = await call()
        assert await one_more.hears_all() == b"", "all others are busy"
        may_end.set()
        for caller in (busy, kept, fresh):
            await caller.hears(b"done")
    for caller in callers:
        caller.writer.close()


async def test_a_connection_that_was_accepted_before_a_stop_and_comes_after_it_is_closed() -> None:
    """As one does whose TLS handshake ends then."""
    loop = asyncio.get_running_loop()
    connections = Connections(10)
    connections.stop()
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    await loop.connect_accepted_socket(lambda: Connection(echo, connections, loop), ours)
    assert await Caller(reader, writer).hears_all() == b""
    writer.close()
    await eventually(lambda: not connections.all)


async def test_requests_that_come_together_are_answered_in_their_order() -> None:
    first_may_end = asyncio.Event()

    async def application(request: Request, answer: Answer) -> None:
        if request.path == "/1":
            await first_may_end.wait()
        answer.whole(200, [], request.path.encode())

    async with calling(application) as caller:
        await caller.says(get("/1") + get("/2"), get("/3", b"connection: close"))
        first_may_end.set()
        said = await caller.hears_all()
    assert [part[-2:] for part in said.split(b"HTTP/1.1 ")[1:]] == [b"/1", b"/2", b"/3"]


async def test_a_stream_has_chunks_and_the_connection_goes_on() -> None:
    async with calling(stream) as caller:
        await caller.says(get("/"))
        assert (await caller.hears(b"0\r\n\r\n")).endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        await caller.says(get("/"))
        assert b"chunked" in await caller.hears(b"0\r\n\r\n")


async def test_for_an_older_client_a_stream_ends_with_the_connection() -> None:
    async with calling(stream) as caller:
        await caller.says(get("/", version="1.0"))
        head, _, body = (await caller.hears_all()).partition(b"\r\n\r\n")
    assert body == b"onetwo"
    assert b"transfer-encoding" not in head


@pytest.mark.parametrize("application", [echo, stream])
async def test_head_is_answered_without_a_body(application: Application) -> None:
    async with calling(application) as caller:
        await caller.says(get("/a", method="HEAD"))
        await caller.hears(b"\r\n\r\n")
        await caller.says(get("/b"))
        assert (await caller.hears(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_whoever_asks_before_sending_is_told_to_go_on_when_the_body_is_wanted() -> None:
    async with calling(echo) as caller:
        await caller.says(get("/", b"expect: 100-continue", b"content-length: 5", method="POST"))
        assert await caller.hears(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await caller.says(b"hello")
        assert b"200 OK" in await caller.hears(b"POST / 5")


async def test_whoever_was_not_told_to_go_on_cannot_pass_a_body_off_as_a_request() -> None:
    async def application(request: Request, answer: Answer) -> None:
        answer.whole(401, [], b"no")

    async with calling(application) as caller:
        await caller.says(get("/", b"expect: 100-continue", b"content-length: 20", method="POST"))
        said = await caller.hears_all()
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"100 Continue" not in said


async def test_an_offer_to_speak_something_else_is_passed_over_and_is_the_last_request() -> None:
    async with calling(echo) as caller:
        await caller.says(get("/a", b"connection: upgrade", b"upgrade: websocket") + get("/b"))
        said = await caller.hears_all()
    assert said.endswith(b"GET /a 0")
    assert b"connection: close" in said


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("http://elsewhere:1/a?b", "/a"),
        ("/a?b#c", "/a"),
        ("/a%2fb?c", "/a%2fb"),
        ("//a", "//a"),
        ("/a/../b", "/a/../b"),
    ],
)
async def test_a_path_is_passed_on_as_it_is(target: str, path: str) -> None:
    async with calling(echo) as caller:
        await caller.says(get(target, b"connection: close"))
        assert (await caller.hears_all()).endswith(f"GET {path} 0".encode())


@pytest.mark.parametrize("body", [b"short", b"longer than it was said to be"])
async def test_an_answer_of_another_length_than_was_said_is_cut(body: bytes) -> None:
    async def application(request: Request, answer: Answer) -> None:
        answer.begin(200, [(b"content-length", b"10")])
        await answer.piece(body)
        answer.end()

    async with calling(application) as caller:
        await caller.says(get("/") + get("/"))
        assert (await caller.hears_all()).count(b"HTTP/1.1 ") <= 1


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\0b"])
async def test_no_header_ends_its_line_early(value: bytes) -> None:
    async def application(request: Request, answer: Answer) -> None:
        answer.whole(200, [(b"x", value)], b"")

    async with calling(application) as caller:
        await caller.says(get("/"))
        assert await caller.hears_all() == b""


@pytest.mark.parametrize("has_begun", [False, True])
async def test_what_is_not_answered_to_its_end_costs_the_connection(has_begun: bool) -> None:
    async def application(request: Request, answer: Answer) -> None:
        if has_begun:
            answer.begin(200, [])
            await answer.piece(b"half")
            raise RuntimeError("a bug")

    async with calling(application) as caller:
        await caller.says(get("/"))
        assert b"0\r\n\r\n" not in await caller.hears_all()


async def test_nobody_sends_faster_than_the_body_is_read() -> None:
    may_read, sizes = asyncio.Event(), []

    async def application(request: Request, answer: Answer) -> None:
        await may_read.wait()
        while piece := await request.more():
            sizes.append(len(piece))
        answer.whole(200, [], b"done")

    pieces = 256
    async with calling(application) as caller:
        head = get("/", b"content-length: %d" % (pieces * PIECE), method="POST")
        sending = asyncio.create_task(caller.says(head, *[b"x" * PIECE] * pieces))
        assert (await asyncio.wait({sending}, timeout=0.5))[1], "all of it was taken before any was read"
        may_read.set()
        assert (await caller.hears(b"done")).startswith(b"HTTP/1.1 200 ")
        await sending
    assert sum(sizes) == pieces * PIECE
    assert max(sizes) < 4 * PIECE


async def test_nobody_is_answered_faster_than_he_reads() -> None:
    sent = 0

    async def application(request: Request, answer: Answer) -> None:
        nonlocal sent
        answer.begin(200, [])
        for _ in range(256):
            await answer.piece(b"x" * PIECE)
            sent += 1
        answer.end()

    async with calling(application) as caller:
        await caller.says(get("/", b"connection: close"))
        await caller.reader.readexactly(1)
        before = -1
        while before != sent:  # until it goes on no more
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 256
        assert len(await caller.hears_all()) > 256 * PIECE


async def test_answers_that_nobody_reads_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "UNREAD_SECONDS", 0.5)
    answered = 0

    async def application(request: Request, answer: Answer) -> None:
        nonlocal answered
        answered += 1
        answer.whole(200, [], b"x" * PIECE)

    requests = 2_000
    async with calling(application) as caller, asyncio.timeout(30):
        await caller.says(*[get("/")] * requests)
        with suppress(ConnectionError):  # which is how it is told in the end
            while True:
                await caller.says(get("/"))
                await asyncio.sleep(0.05)
    assert answered < requests // 10


async def test_answers_that_are_read_late_are_all_there() -> None:
    async def application(request: Request, answer: Answer) -> None:
        answer.whole(200, [], b"x" * PIECE)

    async with calling(application) as caller:
        requests = http_protocol.MOST_QUEUED
        sending = asyncio.create_task(caller.says(*[get("/")] * (requests - 1), get("/", b"connection: close")))
        await asyncio.wait({sending}, timeout=0.2)
        assert (await caller.hears_all()).count(b"HTTP/1.1 200 ") == requests
        await sending


@pytest.mark.parametrize("why", ["it is refused", "no more is wanted", "it is no HTTP"])
async def test_whoever_is_in_the_middle_of_sending_still_hears_the_answer(why: str) -> None:
    async def application(request: Request, answer: Answer) -> None:
        answer.whole(401, [], b"no")

    begin = {
        "it is refused": get("/", b"content-length: 99999999", b"connection: close", method="POST"),
        "no more is wanted": get("/", b"content-length: 99999999", method="POST", version="1.0"),
        "it is no HTTP": b"nonsense\r\n\r\n",
    }
    async with calling(application) as caller:
        await caller.says(begin[why], *[b"x" * PIECE] * 40)
        assert (await caller.hears_all()).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("reads", ["the body", "nothing"])
async def test_work_for_a_caller_who_hangs_up_is_given_up(reads: str) -> None:
    began, gone = asyncio.Event(), asyncio.Event()

    async def application(request: Request, answer: Answer) -> None:
        began.set()
        try:
            if reads == "the body":
                await request.more()
            else:
                with WhileWanted(request):
                    await asyncio.Event().wait()
        except ClientGone:
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling()
            gone.set()

    async with calling(application) as caller:
        await caller.says(get("/", b"content-length: 5", method="POST"))
        await began.wait()
        caller.writer.close()
        async with asyncio.timeout(30):
            await gone.wait()


async def test_nonsense_in_the_middle_of_an_answer_that_nobody_reads_ends_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_protocol, "UNREAD_SECONDS", 0.3)
    began, over = asyncio.Event(), asyncio.Event()

    async def application(request: Request, answer: Answer) -> None:
        answer.begin(200, [])
        began.set()
        try:
            for _ in range(1_000):
                await answer.piece(b"x" * PIECE)
        finally:
            over.set()

    async with calling(application) as caller:
        await caller.says(get("/"))
        await began.wait()
        await caller.says(b"nonsense\r\n\r\n")
        async with asyncio.timeout(30):
            await over.wait()


async def test_an_idle_connection_is_closed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "IDLE_SECONDS", 0.2)
    async with calling(echo) as caller:
        await caller.says(get("/"))
        assert (await caller.hears_all()).endswith(b"GET / 0")


async def test_a_server_that_stops_lets_answers_finish_and_tells_that_they_are_the_last() -> None:
    began, may_end = asyncio.Event(), asyncio.Event()

    async def application(request: Request, answer: Answer) -> None:
        began.set()
        await may_end.wait()
        answer.whole(200, [], b"finished")

    listening = http_server.bound("127.0.0.1:0")
    async with http_server.serving(application, listening, None, drain_seconds=5.0):
        idle, idle_writer = await asyncio.open_connection(*listening.getsockname()[:2])
        busy, writer = await asyncio.open_connection(*listening.getsockname()[:2])
        writer.write(get("/"))
        await began.wait()
        asyncio.get_running_loop().call_later(0.1, may_end.set)
    said = await busy.read()
    assert said.endswith(b"finished")
    assert b"connection: close" in said
    assert await idle.read() == b""
    writer.close()
    idle_writer.close()


async def test_a_server_that_stops_gives_up_what_does_not_finish() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def application(request: Request, answer: Answer) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with calling(application, drain_seconds=0.1) as caller:
        await caller.says(get("/"))
        await began.wait()
    assert ended.is_set()
