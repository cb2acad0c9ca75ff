"""How long a request waited for a thread, and how long its model took: for whoever passed the request on.

All steps of a request run in one context, so the model's time is kept there, wherever the model is called from.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

HEADER = b"x-tessera-timing"
"""Milliseconds: of waiting, and of the model, with a space between. A stream says only the first, in its head."""

_model_seconds: ContextVar[float] = ContextVar("model_seconds", default=0.0)


@contextmanager
def model_at_work() -> Generator[None, None, None]:
    """Adds what runs within to the model's time."""
    began = time.perf_counter()
    try:
        yield
    finally:
        _model_seconds.set(_model_seconds.get() + time.perf_counter() - began)


class Timing:
    """The times of one request, whose steps run in `context`. Begins to wait when it is made."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._made = time.perf_counter()
        self._waited = 0.0

    def begun(self, step: Callable[..., T], *arguments: Any) -> T:
        """Runs the first step: the waiting is over."""
        self._waited = time.perf_counter() - self._made
        return step(*arguments)

    def header(self, *, is_stream: bool) -> tuple[bytes, bytes]:
        """The header that tells these times."""
        waited = b"%.3f" % (self._waited * 1000)
        if is_stream:
            return HEADER, waited
        return HEADER, b"%b %.3f" % (waited, self._context.get(_model_seconds, 0.0) * 1000)
