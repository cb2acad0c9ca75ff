"""A small client of the REST API, as any user could write one: JSON over one kept connection."""

from __future__ import annotations

import codecs
import http.client
import json
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from servicekit.errors import StartError

_TIMEOUT_SECONDS = 60.0
_PIECE_BYTES = 65_536
_MEANT = {
    "DATABRICKS_HOST": "the platform's address, such as http://127.0.0.1:8080",
    "DATABRICKS_TOKEN": "a token for the platform",
}
"""The variables that name a platform, and what each is to be."""

_ADDRESS = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")


class RefusedError(StartError):
    """The API answered with an error, or not at all."""


class CutOffError(RefusedError):
    """An answer ended before its end."""


class Rest:
    """Calls one platform with one token. For one thread at a time; to be closed, or used as a context."""

    def __init__(
        self, address: str, token: str, *, authorities: str | None = None, request_id: str | None = None
    ) -> None:
        """`address` is a URL, or `host:port`. `authorities`: a file of certificates to believe, not the system's.

        All requests have the one `request_id`, where one is given.
        """
        self._url = address if "://" in address else f"http://{address}"
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        if request_id is not None:
            self._headers["X-Tessera-Request-Id"] = request_id
        parts = urlsplit(self._url)
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=_TIMEOUT_SECONDS)
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=authorities)
            self._connection = http.client.HTTPSConnection(parts.netloc, timeout=_TIMEOUT_SECONDS, context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        self._connection.close()

    def call(self, method: str, path: str, body: str | bytes | None = None) -> dict[str, Any]:
        """Sends a JSON text and returns the JSON object that is answered; raises RefusedError for anything else."""
        try:
            response = self._sent(method, path, body)
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._unanswered(method, path, error) from None
        if response.status != http.client.OK:
            raise _refused(method, path, response.status, text)
        return _object(text)

    def follow(self, path: str) -> Iterator[str]:
        """The text that is answered, piece by piece as it comes; raises RefusedError, and CutOffError later on."""
        try:
            response = self._sent("GET", path, None)
            if response.status != http.client.OK:
                raise _refused("GET", path, response.status, response.read())
            self._wait_for_ever()
        except (OSError, http.client.HTTPException) as error:
            raise self._unanswered("GET", path, error) from None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            while piece := response.read1(_PIECE_BYTES):
                yield decoder.decode(piece)
        except (OSError, http.client.HTTPException):
            raise CutOffError(f"{self._url} has cut its answer off. Ask again.") from None
        finally:
            self.close()

    def _sent(self, method: str, path: str, body: str | bytes | None) -> http.client.HTTPResponse:
        self._connection.request(method, path, body, self._headers)
        return self._connection.getresponse()

    def _wait_for_ever(self) -> None:
        """Lets whatever is followed be silent; the kernel finds out whether anybody is there."""
        connected: socket.socket = self._connection.sock
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _unanswered(self, method: str, path: str, error: Exception) -> RefusedError:
        self._connection.close()
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return RefusedError(f"{method} {path} was not answered by {self._url}: {why}")


def connected(environment: Mapping[str, str] = os.environ, *, request_id: str | None = None) -> Rest:
    """The platform that `DATABRICKS_HOST` and `DATABRICKS_TOKEN` name, as they do for the official clients.

    Raises StartError when they do not.
    """
    if missing := [name for name in _MEANT if not environment.get(name)]:
        meant = ", and ".join(_MEANT[name] for name in missing)
        raise StartError(f"Set {' and '.join(missing)}: {meant}.")
    host = environment["DATABRICKS_HOST"].strip().rstrip("/")
    url = host if "://" in host else f"https://{host}"
    token = environment["DATABRICKS_TOKEN"].strip()
    if _ADDRESS.fullmatch(url) is None:
        raise StartError(f"DATABRICKS_HOST is {host}, which is no address such as http://127.0.0.1:8080.")
    if not (token.isascii() and token.isprintable()):
        raise StartError("DATABRICKS_TOKEN holds characters that no token has.")
    return Rest(url, token, authorities=environment.get("REQUESTS_CA_BUNDLE"), request_id=request_id)


def _refused(method: str, path: str, status: int, text: bytes) -> RefusedError:
    message = _object(text).get("message") or "what answers there is no platform of this kind."
    return RefusedError(f"{method} {path} was answered with {status}: {message}")


def _object(text: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(text or b"{}")
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
