"""Secret references on behalf of an endpoint: checked at create and update, resolved at launch.

The rule: the endpoint's creator must have READ now, and the author of a change on what the change brings in. Whether a
key exists, and whether its value fits an environment, is told only where those concerned may list the scope.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence

from secrets_service import access, names, store
from secrets_service.errors import SecretDamaged, ValuesTooLong
from secrets_service.memory import RememberingDatabase
from secrets_service.model import (
    FailureKind,
    Permission,
    Reference,
    ReferenceFailure,
    Scope,
    SealedSecret,
    SecretBytes,
    User,
)
from secrets_service.values import SecretValues
from servicekit.context import Principal
from servicekit.errors import InvalidParameter

log = logging.getLogger(__name__)

LONGEST_VALUES = 1024 * 1024
"""Bytes of all values of one launch together; also keeps an answer within a gRPC message."""


class _Failed(Exception):
    """A reference does not resolve."""

    def __init__(self, *failures: ReferenceFailure) -> None:
        super().__init__()
        self.failures = failures


class SecretResolution:
    """What Serving may learn about secrets."""

    def __init__(self, database: RememberingDatabase, values: SecretValues) -> None:
        self._database = database
        self._values = values

    async def check_references(
        self, *, creator_id: str, references: Sequence[Reference], introduced: Sequence[Reference], author: Principal
    ) -> list[ReferenceFailure]:
        """Why references could not be resolved; empty when all can. `creator_id` may be empty: the author."""
        brought_in = {_checked(reference).folded for reference in introduced}
        if not brought_in <= {_checked(reference).folded for reference in references}:
            raise InvalidParameter("introduced: holds a reference that is not among references.")

        def check(connection: sqlite3.Connection) -> list[ReferenceFailure]:
            creator = _user(connection, creator_id or author.id)
            writer = _user(connection, author.id)
            failures: list[ReferenceFailure] = []
            for reference in references:
                is_new = reference.folded in brought_in
                readers = [creator, writer] if is_new and writer != creator else [creator]
                try:
                    self._resolved(connection, reference, readers=readers, told=writer)
                except _Failed as failed:
                    failures.extend(failed.failures)
            return failures

        return await self._database.read(check)

    async def resolve(
        self, *, endpoint_id: str, replica_id: str, creator_id: str, references: Sequence[Reference]
    ) -> tuple[list[SecretBytes], list[ReferenceFailure]]:
        """The values for one launch, one per reference, held for its replica from now on; or none, and why."""
        if not 1 <= len(replica_id) <= names.LONGEST_TEXT:
            raise InvalidParameter(f"replica_id: 1 to {names.LONGEST_TEXT} characters.")
        for reference in references:
            _checked(reference)

        def resolve(connection: sqlite3.Connection) -> tuple[list[SecretBytes], list[ReferenceFailure]]:
            creator = _user(connection, creator_id)
            resolved: list[tuple[SealedSecret, SecretBytes]] = []
            failures: list[ReferenceFailure] = []
            for reference in references:
                try:
                    found = self._resolved(connection, reference, readers=[creator], told=creator)
                except _Failed as failed:
                    failures.extend(failed.failures)
                else:
                    assert found is not None  # the creator is told everything about what it may read
                    resolved.append(found)
            if failures:
                return [], failures
            if sum(len(value) for _, value in resolved) > LONGEST_VALUES:
                raise ValuesTooLong(LONGEST_VALUES)
            for sealed, _ in resolved:
                store.hold(connection, replica_id, sealed)
            return [value for _, value in resolved], []

        values, failures = await self._database.write(resolve)
        log.info(
            "secrets resolved" if not failures else "secrets not resolved",
            extra={
                "endpoint": endpoint_id[: names.LONGEST_TEXT],
                "replica": replica_id,
                "references": len(references),
                "failures": len(failures),
            },
        )
        return values, failures

    async def end_launches(self, replica_ids: Sequence[str]) -> None:
        """Releases what the launches of these replicas held."""

        def end(connection: sqlite3.Connection) -> tuple[None, int]:
            return None, self._values.release(connection, replica_ids)

        await self._database.destroy(end)

    async def keep_launches(self, replica_ids: Sequence[str]) -> None:
        """Releases what the launches of all other replicas held."""
        kept = frozenset(replica_ids)

        def end(connection: sqlite3.Connection) -> tuple[set[str], int]:
            ended = store.holders(connection) - kept
            return ended, self._values.release(connection, ended)

        ended = await self._database.destroy(end)
        log.info("launches reconciled", extra={"kept": len(kept), "ended": len(ended)})

    def _resolved(
        self, connection: sqlite3.Connection, reference: Reference, *, readers: Sequence[User | None], told: User | None
    ) -> tuple[SealedSecret, SecretBytes] | None:
        """What a reference stands for, which every reader must be able to read; raises _Failed.

        None when `told`, to whom the answer goes, may not know what is in the scope.
        """
        creator = readers[0]
        if creator is None or not creator.profile.is_active:
            name = creator.profile.name if creator else ""
            raise _Failed(ReferenceFailure(reference, FailureKind.CREATOR_INACTIVE, name))
        scope = store.find_scope(connection, names.folded(reference.scope))
        if scope is None:
            raise _Failed(ReferenceFailure(reference, FailureKind.SCOPE_MISSING))
        denied = [reader for reader in readers if not _may_read(connection, scope, reader)]
        if denied:
            raise _Failed(
                *(
                    ReferenceFailure(reference, FailureKind.NOT_PERMITTED, reader.profile.name if reader else "")
                    for reader in denied
                )
            )
        if told not in readers and not _may_read(connection, scope, told):
            return None
        return self._text(connection, scope, reference)

    def _text(
        self, connection: sqlite3.Connection, scope: Scope, reference: Reference
    ) -> tuple[SealedSecret, SecretBytes]:
        sealed = store.find_secret(connection, scope, names.folded(reference.key))
        if sealed is None:
            raise _Failed(ReferenceFailure(reference, FailureKind.KEY_MISSING))
        try:
            value = self._values.open(scope, sealed)
        except SecretDamaged:
            raise _Failed(ReferenceFailure(reference, FailureKind.DAMAGED)) from None
        if not _fits_environment(value):
            raise _Failed(ReferenceFailure(reference, FailureKind.NOT_TEXT))
        return sealed, value


def _user(connection: sqlite3.Connection, user_id: str) -> User | None:
    return store.find_user(connection, int(user_id)) if names.is_id(user_id) else None


def _may_read(connection: sqlite3.Connection, scope: Scope, user: User | None) -> bool:
    if user is None:
        return False
    row = store.find_scope_and_standing(connection, names.folded(scope.name), user.id)
    return row is not None and access.allows(row[1], Permission.READ)


def _checked(reference: Reference) -> Reference:
    names.scope_name(reference.scope)
    names.key_name(reference.key)
    return reference


def _fits_environment(value: SecretBytes) -> bool:
    """Whether a value can be an environment variable: UTF-8 without NUL."""
    try:
        return "\0" not in value.reveal().decode()
    except UnicodeDecodeError:
        return False
