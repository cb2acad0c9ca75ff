"""The one line that the model server says about its start, to the shim that reads the other end of the pipe."""

import json
import os
from typing import Any


class Report:
    """Says one thing and closes the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ready(self, *, load_seconds: float) -> None:
        self._say({"event": "ready", "load_seconds": round(load_seconds, 3)})

    def failed(self, error: BaseException) -> None:
        """Type and first line of the error; the whole of it stands in the log."""
        message = str(error).strip().partition("\n")[0]
        name = type(error).__name__
        self._say({"event": "failed", "cause": f"{name}: {message}" if message else name})

    def _say(self, report: dict[str, Any]) -> None:
        with os.fdopen(self._fd, "wb") as pipe:
            pipe.write(json.dumps(report).encode() + b"\n")
