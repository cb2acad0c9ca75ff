"""The model server's paths, threads and streams, and callers that go away; around an answer that tests script."""

import asyncio
import contextvars
import json
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from serving_service.model_server.answers import Answer, Stream
from serving_service.model_server.application import AnswerTo, Application
from serving_service.model_server.timing import model_at_work
from tests.support.eventually import eventually


class Caller:
    """One request, whose connection the test may cut at any time."""

    def __init__(
        self, app: Application, body: bytes = b"", *, path: str = "/invocations", method: str = "POST"
    ) -> None:
        self.sent: list[Any] = []
        self._cut = asyncio.Event()
        self._pending = [{"type": "http.request", "body": body}]
        scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", b"text/x")]}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    def hang_up(self) -> None:
        self._cut.set()

    @property
    def events(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:] if message["body"]]

    async def answer(self) -> tuple[int, bytes]:
        async with asyncio.timeout(30):
            await self.task
        return self.sent[0]["status"], b"".join(message["body"] for message in self.sent[1:])

    async def _receive(self) -> Any:
        if self._pending:
            return self._pending.pop()
        await self._cut.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


class HalfSent(Caller):
    """Goes away in the middle of its body."""

    async def _receive(self) -> Any:
        if self._pending:
            return {**self._pending.pop(), "more_body": True}
        return {"type": "http.disconnect"}


def timing(caller: Caller) -> list[float]:
    """What an answer says of its times."""
    (said,) = [value for name, value in caller.sent[0]["headers"] if name == b"x-tessera-timing"]
    return [float(part) for part in said.split()]


class Gate:
    """A model that notes which bodies it was called with, and answers each when the gate is opened."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.is_open = threading.Event()

    def __call__(self, body: bytes, content_type: str) -> Answer:
        self.calls.append(body)
        assert self.is_open.wait(30)
        return Answer(200, body)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.is_open.set()


def an_application(answer: AnswerTo, *, threads: int = 1, seconds: float = 30) -> Application:
    return Application(answer, threads=threads, seconds=seconds, version="9.9")


async def test_an_invocation_is_answered_with_body_and_content_type_in_view() -> None:
    caller = Caller(an_application(lambda body, content_type: Answer(418, body + content_type.encode())), b"body ")
    assert await caller.answer() == (418, b"body text/x")
    headers = dict(caller.sent[0]["headers"])
    assert len(headers.pop(b"x-tessera-timing").split()) == 2
    assert headers == {b"content-type": b"application/json", b"content-length": b"11"}


async def test_an_answer_tells_its_waiting_and_its_models_time_apart() -> None:
    moment = 0.03

    def slow(body: bytes, content_type: str) -> Answer:
        for _ in range(2):  # MLflow may be asked in between
            with model_at_work():
                time.sleep(moment)
        time.sleep(moment)
        return Answer(200, body)

    app = an_application(slow)
    first, second = Caller(app), Caller(app)
    await asyncio.gather(first.answer(), second.answer())
    for waited, worked, least in ((*timing(first), 0), (*timing(second), 3000 * moment)):
        assert 2000 * moment <= worked
        assert least <= waited
    assert timing(first)[0] < timing(second)[0]


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/ping", 200, b"\n"),
        ("GET", "/health", 200, b"\n"),
        ("GET", "/version", 200, b"9.9"),
        ("POST", "/ping", 405, None),
        ("GET", "/invocations", 405, None),
        ("GET", "/docs", 404, None),
    ],
)
async def test_other_paths(method: str, path: str, status: int, body: bytes | None, gate: Gate) -> None:
    found, content = await Caller(an_application(gate), path=path, method=method).answer()
    assert found == status
    assert content == body if body else set(json.loads(content)) == {"error_code", "message"}


async def test_health_is_answered_while_all_threads_are_busy(gate: Gate) -> None:
    app = an_application(gate)
    busy = [Caller(app, b"%d" % number) for number in range(3)]
    await eventually(lambda: bool(gate.calls))
    assert (await Caller(app, path="/ping", method="GET").answer())[0] == 200
    gate.is_open.set()
    assert [(await each.answer())[1] for each in busy] == [b"0", b"1", b"2"]


async def test_no_more_calls_run_at_a_time_than_there_are_threads(gate: Gate) -> None:
    app = an_application(gate, threads=2)
    callers = [Caller(app, b"%d" % number) for number in range(5)]
    await eventually(lambda: len(gate.calls) == 2)
    await Caller(app, path="/ping", method="GET").answer()
    assert gate.calls == [b"0", b"1"]
    gate.is_open.set()
    assert [await each.answer() for each in callers] == [(200, b"%d" % number) for number in range(5)]


async def test_a_call_that_waits_is_dropped_when_its_caller_hangs_up(gate: Gate) -> None:
    app = an_application(gate)
    first = Caller(app, b"first")
    await eventually(lambda: gate.calls == [b"first"])
    dropped, last = Caller(app, b"dropped"), Caller(app, b"last")
    await asyncio.sleep(0)
    dropped.hang_up()
    async with asyncio.timeout(30):
        await dropped.task
    assert dropped.sent == []
    gate.is_open.set()
    assert [await each.answer() for each in (first, last)] == [(200, b"first"), (200, b"last")]
    assert gate.calls == [b"first", b"last"]


async def test_a_body_that_never_comes_whole_calls_nothing(gate: Gate) -> None:
    caller = HalfSent(an_application(gate), b"half")
    async with asyncio.timeout(30):
        await caller.task
    assert (caller.sent, gate.calls) == ([], [])


async def test_a_call_that_takes_too_long_is_answered_without_it(gate: Gate) -> None:
    status, body = await Caller(an_application(gate, seconds=0.05), b"slow").answer()
    assert (status, json.loads(body)["error_code"]) == (504, "DEADLINE_EXCEEDED")


# --- streams --------------------------------------------------------------------------------------------------------

_step = contextvars.ContextVar("step", default=0)


class Streaming:
    """A model that streams numbers; before each but the first it waits for the gate. Keeps a context variable."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.is_open = threading.Event()
        self.is_closed = threading.Event()
        self.begun = threading.Event()

    def __call__(self, body: bytes, content_type: str) -> Stream:
        events = self._events()
        return Stream(next(events), events)

    def _events(self) -> Generator[bytes, None, None]:
        token = _step.set(1)
        try:
            for number in range(self.count):
                yield b"%d" % number
                self.begun.set()
                assert self.is_open.wait(30)
        finally:
            _step.reset(token)  # raises in another context
            self.is_closed.set()


@pytest.fixture
def streaming() -> Iterator[Streaming]:
    streaming = Streaming(50)
    yield streaming
    streaming.is_open.set()


async def test_a_stream_is_sent_event_by_event_to_its_end(streaming: Streaming) -> None:
    caller = Caller(an_application(streaming, threads=3))
    await eventually(lambda: caller.events == [b"0"])
    streaming.is_open.set()
    await caller.answer()
    assert caller.events == [b"%d" % number for number in range(50)]
    assert dict(caller.sent[0]["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert not caller.sent[-1].get("more_body")
    assert streaming.is_closed.is_set()


async def test_a_stream_is_closed_when_its_caller_hangs_up(streaming: Streaming) -> None:
    caller = Caller(an_application(streaming, threads=3))
    await eventually(streaming.begun.is_set)
    caller.hang_up()
    await asyncio.sleep(0)
    assert not streaming.is_closed.is_set()  # a step is under way
    streaming.is_open.set()
    await eventually(streaming.is_closed.is_set)
    async with asyncio.timeout(30):
        await caller.task
    assert len(caller.events) < 50


async def test_a_stream_that_takes_too_long_ends_with_an_error_and_is_closed(streaming: Streaming) -> None:
    caller = Caller(an_application(streaming, seconds=0.1))
    await caller.answer()
    error = json.loads(caller.events[-1].removeprefix(b"data: "))["error"]
    assert (caller.events[0], error["error_code"]) == (b"0", "DEADLINE_EXCEEDED")
    streaming.is_open.set()
    await eventually(streaming.is_closed.is_set)


async def test_a_stream_that_begins_too_late_is_closed(streaming: Streaming) -> None:
    begins = threading.Event()

    def late(body: bytes, content_type: str) -> Stream:
        assert begins.wait(30)
        return streaming(body, content_type)

    assert (await Caller(an_application(late, seconds=0.05)).answer())[0] == 504
    begins.set()
    await eventually(streaming.is_closed.is_set)
