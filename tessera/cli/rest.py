"""A small client of the REST API, as any user could write one: JSON over one kept connection."""

from __future__ import annotations

import http.client
import json
from typing import Any, Self

from servicekit.errors import StartError

_TIMEOUT_SECONDS = 60.0


class RefusedError(StartError):
    """The API answered with an error, or not at all."""


class Rest:
    """Calls one platform with one token. For one thread at a time; to be closed, or used as a context."""

    def __init__(self, address: str, token: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_SECONDS)
        self._token = token

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        self._connection.close()

    def call(self, method: str, path: str, body: str | bytes | None = None) -> dict[str, Any]:
        """Sends a JSON text and returns the JSON object that is answered; raises RefusedError for anything else."""
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise RefusedError(f"{method} {path} was not answered: {type(error).__name__}") from None
        try:
            answer = json.loads(text or b"{}")
        except ValueError:
            answer = {}
        if response.status != http.client.OK:
            raise RefusedError(f"{method} {path} was answered with {response.status}: {answer.get('message', '')}")
        return dict(answer)
