"""One JSON line per event on standard error, with the id of the current request.

An event is a fixed text and fields: `log.info("replica ready", extra={"endpoint": name})`. Fields are chosen by hand;
requests, messages, metadata and the texts of foreign exceptions are never logged, since any of them may hold a secret.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from types import TracebackType

from servicekit import context

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

CHATTY = ("aiosqlite", "asyncio", "uvicorn", "grpc")
"""Libraries that at DEBUG write out statements with their parameters, or whole frames."""


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        event = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        event |= {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "event": record.getMessage(),
        }
        request = context.current()
        if request is not None:
            event["request_id"] = request.request_id
            if request.caller is not None:
                event["caller"] = request.caller.name
        if record.exc_info and record.exc_info[0] is not None:
            event["exception"] = described(*record.exc_info)
        # Not orjson: it writes out the fields of dataclasses, those without repr too, and gives up on a lone surrogate.
        return json.dumps(event, default=str)


def described(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> str:
    """An exception's type and where it was raised, without its text, which may repeat a request.

    Of a group also its members.
    """
    frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(trace)]
    said = " < ".join([kind.__qualname__, *reversed(frames)])
    if not isinstance(error, BaseExceptionGroup):
        return said
    members = [described(type(member), member, member.__traceback__) for member in error.exceptions]
    return f"{said} [{'; '.join(members)}]"


def configure(service: str, level: str) -> None:
    """Sends every log record of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(max(root.level, logging.INFO))
