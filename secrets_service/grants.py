"""What Serving may launch with secrets: granted when an endpoint is created or changed, redeemed at each launch.

The rule: a grant names exactly what runs and what it refers to, and never outlives its configuration. Whose right
counts is known here and not taken from Serving: the creator, who must be active and have READ at the grant and at every
launch, and the author of a change, who must have READ on what a change lets run (security standard, section 4).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from secrets_service import callers, grant_store, names, permissions, store
from secrets_service.errors import EndpointNotFound, ValuesTooLong
from secrets_service.memory import RememberingDatabase
from secrets_service.model import (
    Endpoint,
    FailureKind,
    GrantedReference,
    LaunchGrant,
    Reference,
    ReferenceFailure,
    SealedSecret,
    SecretBytes,
    User,
)
from secrets_service.resolver import Failed, References
from secrets_service.values import SecretValues
from servicekit import audit
from servicekit.context import Level, Principal
from servicekit.errors import InvalidParameter
from servicekit.storage import Connection

log = logging.getLogger(__name__)

LONGEST_VALUES = 1024 * 1024
"""Bytes of all values of one launch together; also keeps an answer within a gRPC message."""

DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one entity of a new configuration is to run, and what it refers to."""

    digest: bytes
    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why nothing was granted; empty when it was."""

    failures: tuple[ReferenceFailure, ...] = ()
    is_creator_inactive: bool = False


@dataclass(frozen=True, slots=True)
class Existing:
    """An endpoint that Serving has, with the versions that may be launched."""

    id: str
    creator_id: str
    versions: tuple[int, ...]


class LaunchGrants:
    """Grants of launches. `authors_need_read`: whether the author of a change needs READ on what the endpoint refers to
    already, when something else is to run with it."""

    def __init__(
        self,
        database: RememberingDatabase,
        values: SecretValues,
        references: References,
        *,
        authors_need_read: bool,
    ) -> None:
        self._database = database
        self._values = values
        self._references = references
        self._authors_need_read = authors_need_read

    async def grant(
        self, *, endpoint_id: str, is_new: bool, version: int, wanted: Sequence[Wanted], author: Principal
    ) -> Outcome:
        """Grants a configuration what it refers to, or nothing and says why."""
        permissions.endpoint_id(endpoint_id)
        for each in wanted:
            _check_digest(each.digest)
            _check_names(each.references)

        def grant(connection: Connection) -> Outcome:
            writer = callers.require_active(connection, author)
            endpoint = _granted_endpoint(connection, endpoint_id, author, is_new=is_new)
            creator = store.find_user(connection, endpoint.creator_id)
            if creator is None or not creator.profile.is_active:
                audit.refused("CREATOR_INACTIVE")
                return Outcome(is_creator_inactive=True)
            before = [each for each in grant_store.launch_grants(connection, endpoint.id) if each.version != version]
            failures = [
                failure
                for each in wanted
                for failure in self._refused(connection, each, before, creator=creator, writer=writer)
            ]
            if failures:
                _refuse(failures)
                return Outcome(tuple(failures))
            if is_new:
                _make_known(connection, endpoint)
            grant_store.end_inheritance(connection, endpoint.id)
            grant_store.drop_launch_grants(connection, endpoint.id, [version])
            for each in wanted:
                granted = _current(connection, each.references)
                grant_store.put_launch_grant(
                    connection, endpoint.id, LaunchGrant(version, each.digest, writer.id, granted)
                )
            return Outcome()

        outcome = await self._database.write(grant)
        log.info(
            "launches granted" if outcome == Outcome() else "launches not granted",
            extra={"endpoint": endpoint_id, "version": version, "failures": len(outcome.failures)},
        )
        return outcome

    async def resolve(
        self, *, endpoint_id: str, version: int, digest: bytes, replica_id: str, references: Sequence[Reference]
    ) -> tuple[list[SecretBytes], list[ReferenceFailure]]:
        """The values for one launch, one per reference, held for its replica from now on; or none, and why."""
        permissions.endpoint_id(endpoint_id)
        _check_digest(digest)
        _check_names(references)
        if not 1 <= len(replica_id) <= names.LONGEST_TEXT:
            raise InvalidParameter(f"replica_id: 1 to {names.LONGEST_TEXT} characters.")

        def resolve(connection: Connection) -> _Resolved:
            endpoint = grant_store.find_endpoint(connection, endpoint_id)
            grant = _redeemed(connection, endpoint, version, digest, references)
            if endpoint is None or grant is None:
                failures = [ReferenceFailure(each, FailureKind.NOT_GRANTED) for each in references]
                _refuse(failures)
                return _Resolved(failures=failures)
            audit.note(on_behalf_of=f"endpoint {endpoint.id}, creator {endpoint.creator_id}")
            found = self._opened(connection, store.find_user(connection, endpoint.creator_id), grant, references)
            if found.failures:
                _refuse(found.failures)
                return found
            for reference, (sealed, value) in zip(references, found.opened, strict=True):
                store.hold(connection, replica_id, sealed)
                audit.value(f"{reference.scope}/{sealed.key}", sealed.version, value.reveal())
            granted = _current(connection, [Reference(each.scope, each.key) for each in grant.references])
            if granted != grant.references:
                grant_store.put_launch_grant(connection, endpoint.id, replace(grant, references=granted))
            replaced = {each.scope for each in set(grant.references) - set(granted) if each.scope_uuid}
            return replace(found, new_scopes=sorted(replaced & {each.folded.scope for each in references}))

        resolved = await self._database.write(resolve)
        facts = {"endpoint": endpoint_id, "replica": replica_id, "version": version}
        for scope in resolved.new_scopes:
            log.warning("a scope was made anew since it was granted", extra={**facts, "scope": scope})
        log.info(
            "secrets resolved" if not resolved.failures else "secrets not resolved",
            extra={**facts, "references": len(references), "failures": len(resolved.failures)},
        )
        return [value for _, value in resolved.opened], list(resolved.failures)

    async def settle(
        self, *, ended: Sequence[str], dropped: Sequence[tuple[str, Sequence[int]]], deleted: Sequence[str]
    ) -> None:
        """Releases what launches held, and takes back what configurations and endpoints were granted that are over."""
        for endpoint_id in (*deleted, *(each for each, _ in dropped)):
            permissions.endpoint_id(endpoint_id)

        def settle(connection: Connection) -> tuple[None, int]:
            for endpoint_id, versions in dropped:
                grant_store.drop_launch_grants(connection, endpoint_id, versions)
            for endpoint_id in deleted:
                grant_store.delete_endpoint(connection, endpoint_id)
            return None, self._values.release(connection, ended)

        await self._database.destroy(settle)

    async def reconcile(self, *, replica_ids: Collection[str], endpoints: Sequence[Existing]) -> None:
        """As `settle`, for everything but what is named."""
        for each in endpoints:
            permissions.endpoint_id(each.id)
        named = {each.id for each in endpoints}

        def reconcile(connection: Connection) -> tuple[tuple[int, int], int]:
            live = grant_store.live_endpoints(connection)
            if not store.knows_older_endpoints(connection):
                for each in endpoints:
                    _inherit(connection, each)
                store.older_endpoints_are_known(connection)
            for each in endpoints:
                grant_store.keep_launch_grants(connection, each.id, each.versions)
            for endpoint_id in live - named:
                grant_store.delete_endpoint(connection, endpoint_id)
            ended = store.holders(connection) - frozenset(replica_ids)
            return (len(ended), len(live - named)), self._values.release(connection, ended)

        ended, deleted = await self._database.destroy(reconcile)
        log.info("launches reconciled", extra={"kept": len(replica_ids), "ended": ended, "endpoints_gone": deleted})

    def _refused(
        self,
        connection: Connection,
        wanted: Wanted,
        before: Sequence[LaunchGrant],
        *,
        creator: User,
        writer: User,
    ) -> list[ReferenceFailure]:
        """Why an entity cannot be granted what it refers to; `before` is what was granted to the endpoint before."""
        needed = {(each.folded.scope, each.folded.key) for each in wanted.references}
        if any(each.digest == wanted.digest and needed <= _names(each) for each in before):
            vouched = frozenset(wanted.references)  # scaled or given another share, but the same runs
        elif self._authors_need_read:
            vouched = frozenset()
        else:
            known = set[tuple[str, str]]().union(*map(_names, before))
            vouched = frozenset(each for each in wanted.references if (each.folded.scope, each.folded.key) in known)
        failures: list[ReferenceFailure] = []
        for reference in wanted.references:
            readers = [creator] if reference in vouched or writer == creator else [creator, writer]
            try:
                self._references.resolved(connection, reference, readers=readers, told=writer)
            except Failed as failed:
                failures.extend(failed.failures)
        return failures

    def _opened(
        self,
        connection: Connection,
        creator: User | None,
        grant: LaunchGrant,
        references: Sequence[Reference],
    ) -> _Resolved:
        granted = _names(grant)
        opened: list[tuple[SealedSecret, SecretBytes]] = []
        failures: list[ReferenceFailure] = []
        for reference in references:
            if (reference.folded.scope, reference.folded.key) not in granted:
                failures.append(ReferenceFailure(reference, FailureKind.NOT_GRANTED))
                continue
            try:
                found = self._references.resolved(connection, reference, readers=[creator], told=creator)
            except Failed as failed:
                failures.extend(failed.failures)
            else:
                assert found is not None  # the creator is told everything about what it may read
                opened.append(found)
        if failures:
            return _Resolved(failures=failures)
        if sum(len(value) for _, value in opened) > LONGEST_VALUES:
            raise ValuesTooLong(LONGEST_VALUES)
        return _Resolved(opened=opened)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resolved:
    """What came of a launch's references."""

    opened: Sequence[tuple[SealedSecret, SecretBytes]] = ()
    failures: Sequence[ReferenceFailure] = ()
    new_scopes: Sequence[str] = ()
    """Names of scopes that are not the ones that had these names at the grant."""


def _refuse(failures: Sequence[ReferenceFailure]) -> None:
    """Has the audit log say what was refused: the answer of these calls is no error."""
    audit.refused(", ".join(f"{each.reference.scope}/{each.reference.key} {each.kind}" for each in failures))


def _granted_endpoint(connection: Connection, endpoint_id: str, author: Principal, *, is_new: bool) -> Endpoint:
    """The endpoint that a grant is for; raises as any change of it, and EndpointNotFound for an id of the past."""
    if not is_new:
        return permissions.permitted(connection, endpoint_id, author, Level.CAN_MANAGE)
    mine = Endpoint(endpoint_id, int(author.id))
    if grant_store.find_endpoint(connection, endpoint_id) not in (None, mine):
        raise EndpointNotFound(endpoint_id)
    return mine


def _make_known(connection: Connection, endpoint: Endpoint) -> None:
    """Records a new endpoint with its creator's permission; does nothing when that was done before."""
    if grant_store.find_endpoint(connection, endpoint.id) is None:
        grant_store.insert_endpoint(connection, endpoint)
        grant_store.put_level(connection, endpoint.id, endpoint.creator_id, Level.CAN_MANAGE)


def _inherit(connection: Connection, existing: Existing) -> None:
    """Makes known an endpoint of the time before grants."""
    if not names.is_id(existing.creator_id) or grant_store.find_endpoint(connection, existing.id) is not None:
        return
    creator_id = int(existing.creator_id)
    grant_store.insert_endpoint(connection, Endpoint(existing.id, creator_id, is_inherited=True))
    if store.find_user(connection, creator_id) is not None:
        grant_store.put_level(connection, existing.id, creator_id, Level.CAN_MANAGE)


def _redeemed(
    connection: Connection,
    endpoint: Endpoint | None,
    version: int,
    digest: bytes,
    references: Sequence[Reference],
) -> LaunchGrant | None:
    """The grant for a launch; an older endpoint that never had one is granted what it asks for, if its creator may."""
    if endpoint is None or endpoint.is_deleted:
        return None
    for grant in grant_store.launch_grants(connection, endpoint.id):
        if (grant.version, grant.digest) == (version, digest):
            return grant
    if not endpoint.is_inherited:
        return None
    folded = (reference.folded for reference in references)
    return LaunchGrant(
        version, digest, endpoint.creator_id, tuple(GrantedReference(each.scope, each.key, b"") for each in folded)
    )


def _current(connection: Connection, references: Sequence[Reference]) -> tuple[GrantedReference, ...]:
    """References with the scopes that have these names now."""
    found = []
    for folded in sorted({(each.folded.scope, each.folded.key) for each in references}):
        scope = store.find_scope(connection, folded[0])
        found.append(GrantedReference(*folded, scope.uuid if scope else b""))
    return tuple(found)


def _names(grant: LaunchGrant) -> set[tuple[str, str]]:
    return {(each.scope, each.key) for each in grant.references}


def _check_digest(digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise InvalidParameter(f"digest: {DIGEST_BYTES} bytes.")


def _check_names(references: Sequence[Reference]) -> None:
    for reference in references:
        names.scope_name(reference.scope)
        names.key_name(reference.key)
