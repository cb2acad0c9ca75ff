"""The use cases of scopes, secrets and ACLs.

The rule of every one: names first, then whether the scope exists (everybody may know), then the permission, and only
then what is in the scope; so who lacks the permission never learns which keys exist. Which permission that is, the
policy says. Check and act are one transaction.
"""

from __future__ import annotations

import uuid

from secrets_service import access, callers, names, store
from secrets_service.errors import (
    AclNotFound,
    ScopeExists,
    ScopeNotFound,
    ScopePermissionDenied,
    SecretNotFound,
    TooManyAcls,
    TooManyScopes,
    TooManySecrets,
    UnknownPrincipal,
    ValueTooLong,
    VersionConflict,
)
from secrets_service.memory import RememberingDatabase
from secrets_service.model import USERS, Grant, Permission, Scope, SealedSecret, SecretBytes, SecretInfo, Standing
from secrets_service.values import SecretValues
from servicekit import audit
from servicekit.context import ADMINS, Principal, current_decision
from servicekit.errors import InvalidParameter
from servicekit.storage import Connection
from servicekit.warnings import warn
from tessera import policy

MOST_SCOPES = 1_000
MOST_SECRETS = 1_000
MOST_ACLS = 1_000
LONGEST_VALUE = 131_072
"""Bytes of one secret value."""

LONGEST_REMEMBERED = 4_096
"""Bytes of the longest sealed value that is kept in memory between two writes."""


class SecretScopes:
    """Scopes, the secrets in them, and who may do what there."""

    def __init__(self, database: RememberingDatabase, values: SecretValues) -> None:
        self._database = database
        self._values = values
        self._spare: dict[int, int] = {}
        """How many more secrets a scope takes for sure, by its id; used where puts are written, and nowhere else."""

    async def create_scope(self, *, scope: str, initial_manage_principal: str, caller: Principal) -> None:
        """Creates a scope that the caller, or the group `users`, may MANAGE."""
        names.scope_name(scope)
        if initial_manage_principal not in ("", USERS):
            raise InvalidParameter("initial_manage_principal: only users is possible, or leave it out.")

        def create(connection: Connection) -> None:
            callers.require_active(connection, caller)
            folded = names.folded(scope)
            if found := store.find_scope(connection, folded):
                raise ScopeExists(found.name)
            if store.count_scopes(connection) >= MOST_SCOPES:
                raise TooManyScopes(MOST_SCOPES)
            made = store.insert_scope(connection, scope, folded=folded, uuid=uuid.uuid4().bytes)
            self._values.prepare(connection, made)
            manager = store.find_principal(connection, USERS) if initial_manage_principal else int(caller.id)
            assert manager is not None  # the first start made the group
            store.put_grant(connection, made, manager, Permission.MANAGE)

        await self._database.write(create)

    async def list_scopes(self) -> list[Scope]:
        """All scopes, by name."""
        return await self._database.read(store.scopes)

    async def delete_scope(self, *, scope: str, caller: Principal) -> None:
        """Deletes a scope with all that is in it, values that replicas hold included."""
        names.scope_name(scope)

        def delete(connection: Connection) -> tuple[None, int]:
            return None, store.delete_scope(connection, permitted(connection, scope, caller))

        await self._database.destroy(delete)

    async def put_secret(
        self, *, scope: str, key: str, value: SecretBytes, if_version: int | None, caller: Principal
    ) -> None:
        """Stores a value under a key, as a new version.

        Only if `if_version`, when it is given, is the version that is read now, or 0 and there is no such key.
        """
        names.scope_name(scope)
        names.key_name(key)
        if len(value) > LONGEST_VALUE:
            raise ValueTooLong(LONGEST_VALUE)
        if if_version is not None and if_version < 0:
            raise InvalidParameter("if_version: a version, or 0 for a key that must not exist.")

        rights = _Rights(self._database, scope, caller)

        def put(connection: Connection) -> tuple[None, int]:
            found = rights.permitted(connection)
            known = store.find_key(connection, found, names.folded(key))
            current = known.current if known else 0
            if if_version is not None and if_version != current:
                raise VersionConflict(found.name, key, current)
            if not current:
                self._take_room(connection, found)
            version, destroyed = self._values.add(connection, found, key, value)
            audit.value(f"{found.name}/{key}", version, value.reveal())
            if value.reveal()[-1:].isspace():
                warn(
                    "secret ends with white space",
                    f"The value of key {key} in scope {found.name} ends with white space, which is kept as part of it."
                    " If that was not meant, put it again without.",
                    scope=found.name,
                    key=key,
                )
            return None, destroyed

        await self._database.destroy(put, leaves_rights=True)
        rights.keep()

    def _take_room(self, connection: Connection, scope: Scope) -> None:
        """Raises TooManySecrets when a scope takes no further one."""
        # Nobody else makes secrets, so what was counted once is good for as many.
        spare = self._spare.get(scope.id) or store.spare_secrets(connection, scope, MOST_SECRETS)
        if not spare:
            raise TooManySecrets(scope.name, MOST_SECRETS)
        if len(self._spare) >= MOST_SCOPES:
            self._spare.clear()
        self._spare[scope.id] = spare - 1

    async def delete_secret(self, *, scope: str, key: str, caller: Principal) -> None:
        """Deletes a secret; values that replicas hold go with them."""
        names.scope_name(scope)
        names.key_name(key)

        def delete(connection: Connection) -> tuple[None, int]:
            found = permitted(connection, scope, caller)
            known = store.find_key(connection, found, names.folded(key))
            if known is None or not known.current:
                raise SecretNotFound(found.name, key)
            return None, self._values.delete(connection, known)

        await self._database.destroy(delete, leaves_rights=True)

    async def list_secrets(self, *, scope: str, caller: Principal) -> list[SecretInfo]:
        """The keys of a scope."""
        names.scope_name(scope)

        def find(connection: Connection) -> list[SecretInfo]:
            return store.secrets(connection, permitted(connection, scope, caller))

        return await self._database.read(find)

    async def get_secret(self, *, scope: str, key: str, caller: Principal) -> tuple[str, SecretBytes]:
        """A key as it is shown, and its value."""
        names.scope_name(scope)
        folded = names.folded(names.key_name(key))
        row = await self._readable(names.folded(scope), folded, int(caller.id))
        if row is None:
            raise ScopeNotFound(scope)
        found, standing, sealed = row
        _require(standing, found, caller)
        if sealed is None:
            raise SecretNotFound(found.name, key)
        value = self._values.open(found, sealed)
        audit.value(f"{found.name}/{sealed.key}", sealed.version, value.reveal())
        if ADMINS in standing.groups:
            audit.note(is_admin_read=True)
        return sealed.key, value

    async def _readable(
        self, scope: str, key: str, principal_id: int
    ) -> tuple[Scope, Standing, SealedSecret | None] | None:
        """As `_find_readable`, with as much of it from memory as there is.

        How a principal stands in a scope is remembered by itself: there are fewer scopes than secrets, and it takes
        longer to find out, since all of it is verified.
        """
        since = self._database.mark()
        known = self._database.recalled(store.find_scope_and_standing, scope, principal_id)
        if known is not None and access.allows(known[1], Permission.READ):
            found, standing = known
            sealed = await self._database.remembered(store.find_secret, found, key, if_kept=_is_short)
            if self._database.is_unchanged(since):
                return found, standing, sealed
            since = self._database.mark()
        row = await self._database.read_together(_find_readable, scope, key, principal_id)
        if row is not None:
            found, standing, sealed = row
            self._database.remember((found, standing), since, store.find_scope_and_standing, scope, principal_id)
            if _is_short(sealed):
                self._database.remember(sealed, since, store.find_secret, found, key)
        return row

    async def put_acl(self, *, scope: str, principal: str, permission: Permission, caller: Principal) -> None:
        """Grants a permission, in place of the principal's older one."""
        names.scope_name(scope)
        folded = names.folded_principal(names.principal_name("principal", principal))

        def put(connection: Connection) -> None:
            found = permitted(connection, scope, caller)
            principal_id = store.find_principal(connection, folded)
            if principal_id is None:
                raise UnknownPrincipal("principal", principal)
            before = store.find_grant(connection, found, folded)
            if before is None and len(store.grants(connection, found)) >= MOST_ACLS:
                raise TooManyAcls(found.name, MOST_ACLS)
            store.put_grant(connection, found, principal_id, permission)
            _warn_if_abandoned(connection, found, before)

        await self._database.write(put)

    async def get_acl(self, *, scope: str, principal: str, caller: Principal) -> Grant:
        """What is granted to one principal itself."""
        names.scope_name(scope)
        folded = names.folded_principal(names.principal_name("principal", principal))

        def find(connection: Connection) -> Grant:
            found = permitted(connection, scope, caller)
            grant = store.find_grant(connection, found, folded)
            if grant is None:
                raise AclNotFound(found.name, principal)
            return grant

        return await self._database.read(find)

    async def list_acls(self, *, scope: str, caller: Principal) -> list[Grant]:
        """All that is granted on a scope."""
        names.scope_name(scope)

        def find(connection: Connection) -> list[Grant]:
            return store.grants(connection, permitted(connection, scope, caller))

        return await self._database.read(find)

    async def delete_acl(self, *, scope: str, principal: str, caller: Principal) -> None:
        """Takes a principal's permission away; also the last MANAGE, which admins can give again."""
        names.scope_name(scope)
        folded = names.folded_principal(names.principal_name("principal", principal))

        def delete(connection: Connection) -> None:
            found = permitted(connection, scope, caller)
            before = store.find_grant(connection, found, folded)
            if before is None:
                raise AclNotFound(found.name, principal)
            store.delete_grant(connection, found, folded)
            _warn_if_abandoned(connection, found, before)

        await self._database.write(delete)


def permitted(connection: Connection, scope: str, caller: Principal) -> Scope:
    """The scope of that name, in which the caller has the permission that the policy asks for.

    Raises ScopeNotFound and ScopePermissionDenied. Groups are read from the database, not from the caller's assertion,
    which may be some seconds old.
    """
    return _permitted(store.find_scope_and_standing(connection, names.folded(scope), int(caller.id)), scope, caller)


class _Rights:
    """How a caller stands in a scope within a transaction: from memory while that is still true, or as stored."""

    def __init__(self, database: RememberingDatabase, scope: str, caller: Principal) -> None:
        self._database = database
        self._scope = scope
        self._caller = caller
        self._asked = (names.folded(scope), int(caller.id))
        self._since = database.mark()
        self._known = database.recalled(store.find_scope_and_standing, *self._asked)

    def permitted(self, connection: Connection) -> Scope:
        """As the function of that name."""
        if self._known is None or not self._database.has_same_rights(self._since):
            self._known = store.find_scope_and_standing(connection, *self._asked)
        return _permitted(self._known, self._scope, self._caller)

    def keep(self) -> None:
        """Has memory know it, after the transaction."""
        if self._known is not None:
            self._database.remember(self._known, self._since, store.find_scope_and_standing, *self._asked)


def _permitted(known: tuple[Scope, Standing] | None, scope: str, caller: Principal) -> Scope:
    if known is None:
        raise ScopeNotFound(scope)
    found, standing = known
    _require(standing, found, caller)
    return found


def _require(standing: Standing, scope: Scope, caller: Principal) -> None:
    decision = current_decision(policy.SCOPE)
    needed = Permission[decision.row.level]
    if not access.allows(standing, needed):
        raise ScopePermissionDenied(caller.name, needed, scope.name)
    decision.allow()


def _warn_if_abandoned(connection: Connection, scope: Scope, before: Grant | None) -> None:
    """Warns when the permission that was `before` was the scope's last MANAGE."""
    if before is None or before.permission is not Permission.MANAGE:
        return
    if not any(grant.permission is Permission.MANAGE for grant in store.grants(connection, scope)):
        warn(
            "last MANAGE of a scope is gone",
            f"Nobody but admins can manage scope {scope.name} any more: its last MANAGE permission is gone."
            " Ask an admin to grant it again if that was not meant.",
            scope=scope.name,
        )


def _find_readable(
    connection: Connection, scope: str, key: str, principal_id: int
) -> tuple[Scope, Standing, SealedSecret | None] | None:
    """The scope of that name, how a principal stands in it and, for those who may read there, the secret under a key.

    For others it is not even looked for: how long they wait, now and the next time, would say whether it exists.
    """
    row = store.find_scope_and_standing(connection, scope, principal_id)
    if row is None:
        return None
    found, standing = row
    may_read = access.allows(standing, Permission.READ)
    return found, standing, store.find_secret(connection, found, key) if may_read else None


def _is_short(sealed: SealedSecret | None) -> bool:
    """Whether a value is worth its room in memory, sealed as it is. Names that do not exist are endless."""
    return sealed is not None and len(sealed.record) <= LONGEST_REMEMBERED
