"""The use cases of permissions on serving endpoints.

The rule: whoever has no permission is answered as if the endpoint did not exist. Check and change are one transaction,
and principals are named by id in it, so a principal that is made anew under an old name holds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secrets_service import access, callers, grant_store, names, store
from secrets_service.errors import (
    EndpointNotFound,
    TooManyPermissions,
    UnknownPrincipal,
)
from secrets_service.memory import RememberingDatabase
from secrets_service.model import Endpoint, EndpointGrant, Kind
from servicekit import audit
from servicekit.access import EndpointPermissionDenied
from servicekit.context import Level, Principal, current_decision
from servicekit.errors import InvalidParameter
from servicekit.storage import Connection
from servicekit.warnings import warn
from tessera import policy

MOST_PERMISSIONS = 500
"""Principals that something is granted to on one endpoint."""

_ID = re.compile(r"[0-9a-f]{32}")

_KINDS = {
    # Terraform names every caller by `user_name`, service principals included (contract 3.4).
    "user_name": frozenset({Kind.USER, Kind.SERVICE_PRINCIPAL}),
    "group_name": frozenset({Kind.GROUP}),
    "service_principal_name": frozenset({Kind.SERVICE_PRINCIPAL}),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A level for the principal that a caller names in one of three fields; `at` is where it does."""

    at: str
    field: str
    name: str
    level: Level


class EndpointPermissions:
    """Who may do what with which endpoint."""

    def __init__(self, database: RememberingDatabase) -> None:
        self._database = database

    async def get(self, endpoint_id: str, *, caller: Principal) -> list[EndpointGrant]:
        """All that is granted on an endpoint directly."""

        def find(connection: Connection) -> list[EndpointGrant]:
            endpoint = _permitted(connection, endpoint_id, caller)
            return grant_store.endpoint_grants(connection, endpoint.id)

        return await self._database.read(find)

    async def set(self, endpoint_id: str, entries: Sequence[Entry], *, caller: Principal) -> list[EndpointGrant]:
        """Grants exactly these levels; what is granted now."""
        return await self._change(endpoint_id, entries, caller, keeps_others=False)

    async def update(self, endpoint_id: str, entries: Sequence[Entry], *, caller: Principal) -> list[EndpointGrant]:
        """Grants these levels besides, or instead of what these principals had; what is granted now."""
        return await self._change(endpoint_id, entries, caller, keeps_others=True)

    async def check_visible(self, endpoint_id: str, *, caller: Principal) -> None:
        """Raises EndpointNotFound when the caller may not know of an endpoint."""
        await self._database.read(_permitted, endpoint_id, caller)

    async def _change(
        self, endpoint_id: str, entries: Sequence[Entry], caller: Principal, *, keeps_others: bool
    ) -> list[EndpointGrant]:
        folded = [
            names.folded_principal(names.principal_name(f"{each.at}.{each.field}", each.name)) for each in entries
        ]

        def change(connection: Connection) -> list[EndpointGrant]:
            endpoint = _permitted(connection, endpoint_id, caller)
            levels: dict[int, Level] = {}
            for entry, name in zip(entries, folded, strict=True):
                principal_id = _principal(connection, entry, name)
                if principal_id in levels:
                    raise InvalidParameter(f"{entry.at}: {entry.name} is named twice. Give each principal one level.")
                levels[principal_id] = entry.level
            before = _by_principal(grant_store.endpoint_grants(connection, endpoint.id))
            if not keeps_others:
                grant_store.keep_levels(connection, endpoint.id, levels)
            for principal_id, level in levels.items():
                grant_store.put_level(connection, endpoint.id, principal_id, level)
            if grant_store.count_levels(connection, endpoint.id) > MOST_PERMISSIONS:
                raise TooManyPermissions(endpoint.id, MOST_PERMISSIONS)
            granted = grant_store.endpoint_grants(connection, endpoint.id)
            _tell(before, _by_principal(granted))
            _warn_if_abandoned(endpoint, granted)
            return granted

        return await self._database.write(change)


def permitted(connection: Connection, endpoint_id: str, caller: Principal, needed: Level) -> Endpoint:
    """The endpoint of that id, on which the caller has the level; raises EndpointNotFound, EndpointPermissionDenied."""
    user = callers.require_active(connection, caller)
    endpoint = grant_store.find_endpoint(connection, endpoint_id) if _ID.fullmatch(endpoint_id) else None
    if endpoint is None or endpoint.is_deleted:
        raise EndpointNotFound(endpoint_id)
    held = access.endpoint_level(user, grant_store.levels_of(connection, endpoint.id, user))
    if held is None:
        raise EndpointNotFound(endpoint_id)
    if held < needed:
        raise EndpointPermissionDenied(caller.name, needed, endpoint_id)
    return endpoint


def _permitted(connection: Connection, endpoint_id: str, caller: Principal) -> Endpoint:
    """As `permitted`, with the level that the policy asks for."""
    decision = current_decision(policy.ENDPOINT)
    endpoint = permitted(connection, endpoint_id, caller, Level[decision.row.level])
    decision.allow()
    return endpoint


def endpoint_id(text: str) -> str:
    """The id of an endpoint, as Serving makes them; raises InvalidParameter."""
    if not _ID.fullmatch(text):
        raise InvalidParameter("endpoint_id: 32 hexadecimal digits.")
    return text


def _by_principal(granted: Sequence[EndpointGrant]) -> dict[tuple[Kind, str], Level]:
    return {(each.kind, each.principal): each.level for each in granted}


def _tell(before: Mapping[tuple[Kind, str], Level], after: Mapping[tuple[Kind, str], Level]) -> None:
    """Has the audit log know which levels are others now."""
    for kind, principal in {**before, **after}:
        level = after.get((kind, principal))
        if level != before.get((kind, principal)):
            audit.changed(**{kind.value: principal}, now="no permission" if level is None else level.name)


def _warn_if_abandoned(endpoint: Endpoint, granted: Sequence[EndpointGrant]) -> None:
    if not any(each.level is Level.CAN_MANAGE for each in granted):
        warn(
            "last CAN_MANAGE of an endpoint is gone",
            f"Nobody but admins can manage endpoint {endpoint.id} any more: no CAN_MANAGE permission is left on it."
            " Ask an admin to grant it again if that was not meant.",
            endpoint=endpoint.id,
        )


def _principal(connection: Connection, entry: Entry, folded: str) -> int:
    found = store.find_principal(connection, folded)
    if found is None or store.kind_of(connection, found) not in _KINDS[entry.field]:
        raise UnknownPrincipal(f"{entry.at}.{entry.field}", entry.name)
    return found
