"""What the Secrets service promises, in a few lines and without a database: the model that the real one is held to.

Callers are `admin`, a member of `admins`, and plain users; everybody is in `users`. Names are compared in lower case.
Every method is an operation by a caller: it returns what is answered, with the number of warnings, or raises Refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

READ, WRITE, MANAGE = 1, 2, 3

MISSING = "RESOURCE_DOES_NOT_EXIST"


class Refused(Exception):
    """The operation is not done, for this reason."""


@dataclass
class Secret:
    """Everything that was ever put under one key."""

    name: str
    first: int = 1
    last: int = 0
    values: dict[int, bytes] = field(default_factory=dict)
    holders: dict[int, set[str]] = field(default_factory=dict)

    @property
    def current(self) -> int:
        return self.last if self.last >= self.first else 0

    def prune(self, keep: int) -> None:
        self.holders = {version: who for version, who in self.holders.items() if who and version in self.values}
        self.values = {
            version: value
            for version, value in self.values.items()
            if version in self.holders or (version >= self.first and version > self.last - keep)
        }


@dataclass
class Scope:
    """A scope with its secrets and what is granted on it."""

    name: str
    granted: dict[str, int]
    secrets: dict[str, Secret] = field(default_factory=dict)

    def live(self) -> dict[str, Secret]:
        return {folded: secret for folded, secret in self.secrets.items() if secret.current}


class Model:
    """The service; `keep` is how many versions of each secret are kept."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._scopes: dict[str, Scope] = {}

    def create_scope(self, caller: str, scope: str, manager: str) -> Any:
        if scope.lower() in self._scopes:
            raise Refused("RESOURCE_ALREADY_EXISTS")
        self._scopes[scope.lower()] = Scope(scope, {manager or caller: MANAGE})
        return None, 0

    def delete_scope(self, caller: str, scope: str) -> Any:
        self._permitted(caller, scope, MANAGE)
        del self._scopes[scope.lower()]
        return None, 0

    def list_scopes(self, caller: str) -> Any:
        return [self._scopes[folded].name for folded in sorted(self._scopes)], 0

    def put(self, caller: str, scope: str, key: str, value: bytes, if_version: int | None) -> Any:
        found = self._permitted(caller, scope, WRITE)
        secret = found.secrets.get(key.lower())
        if if_version is not None and if_version != (secret.current if secret else 0):
            raise Refused("RESOURCE_CONFLICT")
        self._add(found, key, value)
        return None, int(value.endswith(b"\n"))

    def delete(self, caller: str, scope: str, key: str) -> Any:
        secret = self._secret(self._permitted(caller, scope, WRITE), key)
        secret.first = secret.last + 1
        secret.prune(self._keep)
        return None, 0

    def get(self, caller: str, scope: str, key: str) -> Any:
        secret = self._secret(self._permitted(caller, scope, READ), key)
        return (secret.name, secret.values[secret.current]), 0

    def list_secrets(self, caller: str, scope: str) -> Any:
        live = self._permitted(caller, scope, READ).live()
        return [live[folded].name for folded in sorted(live)], 0

    def list_versions(self, caller: str, scope: str, key: str) -> Any:
        secret = self._permitted(caller, scope, READ).secrets.get(key.lower())
        if secret is None or not secret.values:
            raise Refused(MISSING)
        versions = [
            (version, version == secret.current, version in secret.holders, version < secret.first)
            for version in sorted(secret.values, reverse=True)
        ]
        return (secret.name, versions), 0

    def restore(self, caller: str, scope: str, key: str, version: int) -> Any:
        found = self._permitted(caller, scope, WRITE)
        secret = self._secret(found, key)
        if version < secret.first or version not in secret.values:
            raise Refused(MISSING)
        return self._add(found, key, secret.values[version]), 0

    def purge(self, caller: str, scope: str, key: str) -> Any:
        secret = self._permitted(caller, scope, WRITE).secrets.get(key.lower())
        if secret is None or not secret.values:
            raise Refused(MISSING)
        secret.first, secret.values, secret.holders = secret.last + 1, {}, {}
        return None, 0

    def put_acl(self, caller: str, scope: str, principal: str, permission: int) -> Any:
        found = self._permitted(caller, scope, MANAGE)
        before = found.granted.get(principal)
        found.granted[principal] = permission
        return None, self._abandoned(found, before)

    def delete_acl(self, caller: str, scope: str, principal: str) -> Any:
        found = self._permitted(caller, scope, MANAGE)
        if principal not in found.granted:
            raise Refused(MISSING)
        return None, self._abandoned(found, found.granted.pop(principal))

    def list_acls(self, caller: str, scope: str) -> Any:
        return list(self._permitted(caller, scope, MANAGE).granted.items()), 0

    def launch(self, caller: str, scope: str, key: str, replica: str) -> Any:
        """What a replica of the caller's endpoint is started with; empty when it cannot be started."""
        try:
            found = self._permitted(caller, scope, READ)
            secret = self._secret(found, key)
        except Refused:
            return [], 0
        secret.holders.setdefault(secret.current, set()).add(replica)
        return [secret.values[secret.current]], 0

    def end_launch(self, caller: str, replica: str) -> Any:
        for scope in self._scopes.values():
            for secret in scope.secrets.values():
                for who in secret.holders.values():
                    who.discard(replica)
                secret.prune(self._keep)
        return None, 0

    def _permitted(self, caller: str, scope: str, needed: int) -> Scope:
        found = self._scopes.get(scope.lower())
        if found is None:
            raise Refused(MISSING)
        held = max(found.granted.get(caller, 0), found.granted.get("users", 0))
        if caller != "admin" and held < needed:
            raise Refused("PERMISSION_DENIED")
        return found

    def _secret(self, scope: Scope, key: str) -> Secret:
        secret = scope.live().get(key.lower())
        if secret is None:
            raise Refused(MISSING)
        return secret

    def _add(self, scope: Scope, key: str, value: bytes) -> int:
        secret = scope.secrets.setdefault(key.lower(), Secret(key))
        if not secret.current:
            secret.name = key
        secret.last += 1
        secret.values[secret.last] = value
        secret.prune(self._keep)
        return secret.last

    def _abandoned(self, scope: Scope, before: int | None) -> int:
        return int(before == MANAGE and MANAGE not in scope.granted.values())
