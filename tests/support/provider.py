"""Somebody who offers models over OpenAI's protocol, on loopback: answers who brings the right key, and nobody else."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

WORDS = ("You", " asked", " well")


@dataclass
class Provider:
    """What it was asked: the Authorization header and the body of each request."""

    key: str = field(repr=False)
    url: str = ""
    """The base URL, as OPENAI_BASE_URL names it."""
    asked: list[tuple[str, Any]] = field(default_factory=list)


def _handler(provider: Provider) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            provider.asked.append((self.headers["authorization"], body))
            if self.headers["authorization"] != f"Bearer {provider.key}":
                self.answer(401, "application/json", json.dumps({"error": {"message": "wrong key"}}))
            elif self.path != "/v1/chat/completions":
                self.answer(404, "application/json", "{}")
            elif body.get("stream"):
                events = [_completion("chat.completion.chunk", delta={"content": word}) for word in WORDS]
                self.answer(200, "text/event-stream", "".join(f"data: {each}\n\n" for each in [*events, "[DONE]"]))
            else:
                message = {"role": "assistant", "content": "".join(WORDS)}
                self.answer(200, "application/json", _completion("chat.completion", message=message))

        def answer(self, status: int, content_type: str, text: str) -> None:
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _completion(kind: str, **said: Any) -> str:
    choice = {"index": 0, "finish_reason": "stop" if "message" in said else None, **said}
    return json.dumps({"id": "1", "object": kind, "created": 1, "model": "asked", "choices": [choice]})


@contextmanager
def running_provider(key: str) -> Iterator[Provider]:
    """A provider whose customers have this key."""
    provider = Provider(key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(provider))
    provider.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
