"""Pairs of requests whose answers must not tell which of two names exists (S8).

Both requests are the same but for the name. Two answers are alike when status, headers and body are, once the name is
taken out and what belongs to a single answer alone: its request id and the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor import ServiceDescriptor

from tests.support.http import Answer, fetch

_OF_ONE_ANSWER = ("x-tessera-request-id", "date")
NAME = "{name}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request with NAME in its path or its body."""

    method: str
    path: str
    body: Any = None

    def naming(self, name: str) -> tuple[str, Any]:
        """Path and body with a name in place."""
        return self.path.replace(NAME, name), _naming(self.body, name)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


async def answers(url: str, asked: Asked, names: Iterable[str], *, token: str) -> list[Answer]:
    """What a caller is answered for each name."""
    found = []
    for name in names:
        path, body = asked.naming(name)
        found.append(await fetch(url, asked.method, path, token=token, json=body))
    return found


async def assert_alike(url: str, asked: Asked, present: str, missing: str, *, token: str, status: int) -> None:
    """A caller is refused in the same way whether the name exists or not. Both names have the same length."""
    assert len(present) == len(missing), "the length of an answer would differ by the names'"
    first, second = await answers(url, asked, (present, missing), token=token)
    assert first.status == status, f"{asked}: {first}"
    assert shown(first, present) == shown(second, missing), str(asked)


def shown(answer: Answer, name: str) -> tuple[int, dict[str, str], bytes]:
    """What an answer about a name shows, whatever the name: what two answers that are alike have in common."""
    headers = {key: value for key, value in answer.headers.items() if key not in _OF_ONE_ANSWER}
    own = answer.headers.get("x-tessera-request-id", "").encode()
    body = answer.body.replace(own, b"(request id)") if own else answer.body
    return answer.status, headers, body.replace(name.encode(), NAME.encode())


def _naming(body: Any, name: str) -> Any:
    match body:
        case str():
            return body.replace(NAME, name)
        case dict():
            return {key: _naming(value, name) for key, value in body.items()}
        case list():
            return [_naming(value, name) for value in body]
    return body


def requests_about(service: ServiceDescriptor, variable: str, **others: str) -> dict[str, Asked]:
    """Every REST request of a service whose path holds `{variable}`, by RPC; `others` fills the other variables.

    The bodies are empty objects.
    """
    found = {}
    for method in service.methods:
        rule = method.GetOptions().Extensions[annotations_pb2.http]
        verb = rule.WhichOneof("pattern")
        if verb is None or f"{{{variable}}}" not in (path := getattr(rule, verb)):
            continue
        for name, value in others.items():
            path = path.replace(f"{{{name}}}", value)
        found[method.name] = Asked(
            verb.upper(), path.replace(f"{{{variable}}}", NAME), {} if verb in ("post", "put", "patch") else None
        )
    return found
