"""Where sealed records belong, one function for each kind: whoever seals and whoever opens must mean the same place."""

from __future__ import annotations

from secrets_service.cipher import Place
from secrets_service.model import Scope


def secret(scope: Scope, folded: str, version: int) -> Place:
    """The value of a version of a secret."""
    return Place(kind="secret", scope=scope.uuid, key=folded, version=version, field="value")


def signing_key(key_id: str) -> Place:
    """A key that assertions are signed with."""
    return Place(kind="signing-key", key=key_id)


def answer(place: str) -> Place:
    """The first answer to a request, of which `place` says whose and which."""
    return Place(kind="answer", key=place)
