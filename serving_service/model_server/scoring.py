"""MLflow's scoring application with documented errors and, which it lacks, streamed answers.

Answers pass through untouched; only an error is held back and rewritten. Nothing of a body is ever logged.
"""

import asyncio
import contextvars
import importlib
import json
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

from mlflow.exceptions import MlflowException

from serving_service.model_server import failures
from serving_service.model_server.asgi import App, Message, Receive, Send

scoring_server: Any = importlib.import_module("mlflow.pyfunc.scoring_server")  # partly annotated, partly wrongly

_JSON = "application/json"
_END = object()


class Scoring:
    """An ASGI application around MLflow's."""

    def __init__(self, app: App, predict_stream: Callable[[bytes], Iterator[Any]]) -> None:
        self._app, self._predict_stream = app, predict_stream

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or scope["path"] != "/invocations":
            return await self._pass_on(scope, receive, send)
        content_type = dict(scope["headers"]).get(b"content-type")
        if content_type is None:  # MLflow's server fails over it
            content_type = _JSON.encode()
            scope = {**scope, "headers": [*scope["headers"], (b"content-type", content_type)]}
        body = await _body(receive)
        if body is None:
            return None
        if content_type.startswith(_JSON.encode()) and _asks_for_stream(body):
            return await self._stream(body, receive, send)
        return await self._pass_on(scope, _replayed(body, receive), send)

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        answer = _ErrorsRewritten(send)
        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            failures.log(error)  # told to the caller already; the web server would print its text

    async def _stream(self, body: bytes, receive: Receive, send: Send) -> None:
        """Server-sent events. An error before the first is a plain answer, a later one the last event."""
        # The generator of a model keeps context variables, so each of its steps has to run in the same context.
        context = contextvars.copy_context()

        async def run(step: Callable[..., Any], *arguments: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(None, lambda: context.run(step, *arguments))

        try:
            chunks = await run(self._predict_stream, body)
            chunk = await run(next, chunks, _END)
        except Exception as error:
            return await _answer(send, 400, failures.envelope("BAD_REQUEST", _told(error)))
        gone = asyncio.ensure_future(_disconnected(receive))
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while chunk is not _END and not gone.done():
                await send({"type": "http.response.body", "body": _event(_json(chunk)), "more_body": True})
                chunk = await run(next, chunks, _END)
            last = _event(b"[DONE]")
        except Exception as error:
            last = _event(b'{"error": ' + failures.envelope("BAD_REQUEST", _told(error)) + b"}")
        finally:
            gone.cancel()
            if hasattr(chunks, "close"):
                await run(chunks.close)
        return await send({"type": "http.response.body", "body": last})


class _ErrorsRewritten:
    """A `send` that holds an error back until it is whole, and sends the documented one instead."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status: int | None = None
        self._held = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._status = message["status"]
        elif self._status is None:
            await self._send(message)
        else:
            self._held += message.get("body", b"")
            if not message.get("more_body"):
                await _answer(self._send, *failures.documented(self._status, self._held))


def _asks_for_stream(body: bytes) -> bool:
    if b'"stream"' not in body:  # a large body is not parsed twice for nothing
        return False
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("stream") is True


def _told(error: Exception) -> str:
    if isinstance(error, MlflowException):
        return str(error.message)
    failures.log(error)
    return failures.MODEL_FAILED


def _json(chunk: Any) -> bytes:
    text = StringIO()
    scoring_server.unwrapped_predictions_to_json(chunk, text)
    return text.getvalue().encode()


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", _JSON.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None when the caller went away before its end."""
    pieces = []
    while (message := await receive())["type"] == "http.request":
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)
    return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    pending = [{"type": "http.request", "body": body}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
