"""The ASGI application: which paths there are, the threads that models run in, and callers that go away.

The event loop moves bytes; everything that takes time with a body runs in one of a few threads. Calls wait for a
thread in the order in which they came.
"""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from serving_service.model_server import failures
from serving_service.model_server.answers import Answer, Stream, error_event
from serving_service.model_server.asgi import Message, Receive, Send
from serving_service.model_server.timing import Timing

T = TypeVar("T")
AnswerTo = Callable[[bytes, str], Answer | Stream]

_JSON = "application/json"
_EVENTS = b"text/event-stream; charset=utf-8"
_TOO_LATE = failures.envelope("DEADLINE_EXCEEDED", failures.TOO_LATE)


class Application:
    """Answers for one model, with at most `threads` calls of it at a time, and none waited for beyond `seconds`.

    `answer` makes an answer of a body and its content type; it raises nothing that these can cause.
    """

    def __init__(self, answer: AnswerTo, *, threads: int, seconds: float, version: str) -> None:
        self._answer, self._seconds = answer, seconds
        self._gets = {"/ping": b"\n", "/health": b"\n", "/version": version.encode()}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="model")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if (method, path) == ("POST", "/invocations"):
            await self._invocation(scope, receive, send)
        elif method == "GET" and path in self._gets:
            await _send(send, 200, self._gets[path])
        elif path == "/invocations" or path in self._gets:
            await _send(send, 405, failures.envelope("BAD_REQUEST", "Method Not Allowed"))
        else:
            await _send(send, 404, failures.envelope("BAD_REQUEST", "Not Found"))

    async def _invocation(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:
            return None
        work = _Work(self._pool)
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: work.drop())
        answer: Answer | Stream | None = None
        try:
            async with asyncio.timeout(self._seconds):
                answer = await work.run(work.timing.begun, self._answer, body, _content_type(scope))
                if isinstance(answer, Stream):
                    await _stream(answer, work, gone, send)
        except TimeoutError:
            if answer is not None:  # a stream, which has begun
                return await _end(send, error_event(_TOO_LATE))
            work.then(_close)
            answer = Answer(504, _TOO_LATE)
        except asyncio.CancelledError:
            if not gone.done():
                raise
            return None  # nobody waits for it any more, and it had not begun
        finally:
            gone.cancel()
        if isinstance(answer, Answer):
            await _send(send, answer.status, answer.body, work.timing.header(is_stream=False))
        return None


class _Work:
    """What one request does in the threads: step after step, all in one context.

    The generator of a model keeps context variables, which can only be reset in the context that they were set in.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._context = contextvars.copy_context()
        self.timing = Timing(self._context)
        self._step: Future[Any] = Future()

    async def run(self, step: Callable[..., T], *arguments: Any) -> T:
        """Waits for a thread and for the step; a step that has not begun when the caller is cancelled never does."""
        future = self._pool.submit(self._context.run, step, *arguments)
        self._step = future
        return await asyncio.wrap_future(future)

    def drop(self) -> None:
        """Takes a step back that has not begun. One that has goes on: nothing ends a thread."""
        self._step.cancel()

    def then(self, last: Callable[[Future[Any]], None]) -> None:
        """Has `last` run in the threads when the step under way is over; nobody waits for that."""
        self._step.add_done_callback(lambda step: self._pool.submit(self._context.run, last, step) and None)


async def _stream(stream: Stream, work: _Work, gone: asyncio.Future[None], send: Send) -> None:
    """Sends events as they come, until the last or until the caller has gone, and closes the model's generator."""
    timing = work.timing.header(is_stream=True)
    headers = [(b"content-type", _EVENTS), (b"cache-control", b"no-cache"), timing]
    event: bytes | None = stream.first
    try:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while event is not None and not gone.done():
            await send({"type": "http.response.body", "body": event, "more_body": True})
            event = await work.run(next, stream.rest, None)
    finally:
        work.then(lambda _: stream.rest.close())
    await _end(send, b"")


def _close(step: "Future[Answer | Stream]") -> None:
    if not step.cancelled() and isinstance(answer := step.result(), Stream):
        answer.rest.close()


async def _send(send: Send, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", _JSON.encode()), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _end(send: Send, last: bytes) -> None:
    await send({"type": "http.response.body", "body": last})


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None when the caller went away before its end."""
    pieces = []
    while (message := await receive())["type"] == "http.request":
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    return None


def _content_type(scope: Message) -> str:
    """JSON, when the caller does not say; MLflow's server fails over it."""
    for name, value in scope["headers"]:
        if name == b"content-type":
            return str(value, "latin-1")
    return _JSON


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
