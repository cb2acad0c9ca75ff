"""Rows that decide about rights carry a MAC: whoever can write to the database, and nothing else, gains no right by
it.

Each object has one MAC over all that it consists of: a principal; an account with the groups that it belongs to; a
scope with its whole access control list and a generation that counts its changes; an endpoint with its permissions
and grants; a token; what the first start decided. So an edit shows, and so does a row that was added to a list, taken
out of one or copied from another object. What does not fit its MAC is not used: whatever depends on it is refused.

The rule: what decides is verified where it is read, and changed only from what was verified. A new MAC is made of
that and of the change, never of what happens to be stored, so no later change blesses an edit; `authenticate_all`
alone does, when told to believe, once in the life of a store that is older than these MACs.

The key is known when the keyring is open, so every connection is told (`equip`); functions of store.py find it there.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from secrets_service.errors import RightsDamaged
from secrets_service.model import SecretBytes
from servicekit.storage import Connection

log = logging.getLogger(__name__)

FORMAT = b"\x01"
_VERSION_LENGTH = 4
_HEAD = len(FORMAT) + _VERSION_LENGTH

# Made once: `json.dumps` makes one at each call.
_as_json = json.JSONEncoder(separators=(",", ":"), default=bytes.hex).encode


class Integrity:
    """Makes and verifies MACs; `keys` are the versions of their key, of which the highest is in use.

    The content of an object is columns as they are stored, and lists of them; what names it comes first. A MAC is
    `format (1) | key version (4) | HMAC-SHA256`, and verified under the version that it states.
    """

    def __init__(self, keys: Mapping[int, SecretBytes]) -> None:
        self._keys = dict(keys)
        self._current = max(keys)

    def learn(self, keys: Mapping[int, SecretBytes]) -> None:
        """Verifies under these keys too from now on."""
        self._keys = {**self._keys, **keys}

    def use(self, keys: Mapping[int, SecretBytes]) -> None:
        """Goes over to other keys, the ones before included."""
        self._keys = dict(keys)
        self._current = max(self._keys)

    def mac(self, kind: str, *content: Any) -> bytes:
        """The MAC of an object of a kind."""
        return self._under(self._current, kind, content)

    def is_intact(self, mac: bytes | None, kind: str, *content: Any) -> bool:
        """Whether an object is what its MAC was made of."""
        if mac is None or mac[:1] != FORMAT:
            return False
        version = int.from_bytes(mac[1:_HEAD], "big")
        return version in self._keys and hmac.compare_digest(self._under(version, kind, content), mac)

    def require(self, mac: bytes | None, kind: str, *content: Any) -> None:
        """Raises RightsDamaged unless an object is what its MAC was made of."""
        if not self.is_intact(mac, kind, *content):
            log.error("stored rights are damaged", extra={"kind": kind, "id": str(content[0])})
            raise RightsDamaged(kind, str(content[0]))

    def _under(self, version: int, kind: str, content: Sequence[Any]) -> bytes:
        text = _as_json([kind, content])
        digest = hmac.digest(self._keys[version].reveal(), text.encode(), hashlib.sha256)
        return FORMAT + version.to_bytes(_VERSION_LENGTH, "big") + digest


def equip(connection: Connection, integrity: Integrity) -> None:
    """Tells a connection."""
    connection.equipment = integrity


def of(connection: Connection) -> Integrity:
    """How rights are authenticated on a connection that was told."""
    found: Integrity | None = connection.equipment
    assert found is not None  # nothing is read or written before the keyring is open
    return found
