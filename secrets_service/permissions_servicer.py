"""Permissions and AccessFeed: messages to calls and back. Decisions are made in permissions.py and feed.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import Any

from secrets_service import grant_store
from secrets_service.feed import AccessFeed
from secrets_service.memory import RememberingDatabase
from secrets_service.model import EndpointGrant, Kind
from secrets_service.permissions import EndpointPermissions, Entry
from servicekit import once
from servicekit.context import ADMINS, Level, current_caller
from servicekit.errors import InvalidParameter
from tessera.identity.v1 import permissions_pb2 as pb
from tessera.identity.v1 import permissions_pb2_grpc as rpc

_FIELDS = ("user_name", "group_name", "service_principal_name")
_FIELD_OF = {Kind.USER: "user_name", Kind.GROUP: "group_name", Kind.SERVICE_PRINCIPAL: "service_principal_name"}

_DESCRIPTIONS = {
    Level.CAN_VIEW: "Can see the endpoint, its configuration and its state",
    Level.CAN_QUERY: "Can see and query the endpoint",
    Level.CAN_MANAGE: "Can do everything with the endpoint, its permissions included",
}


class PermissionsServicer(rpc.PermissionsServicer):
    """Who may do what with serving endpoints."""

    def __init__(self, permissions: EndpointPermissions) -> None:
        self._permissions = permissions

    async def GetPermissions(self, request: pb.GetPermissionsRequest, context: Any) -> pb.ObjectPermissions:
        granted = await self._permissions.get(request.serving_endpoint_id, caller=current_caller())
        return _permissions(request.serving_endpoint_id, granted)

    async def SetPermissions(self, request: pb.SetPermissionsRequest, context: Any) -> pb.ObjectPermissions:
        return await once.answer(
            self._permissions.set(
                request.serving_endpoint_id, _entries(request.access_control_list), caller=current_caller()
            ),
            partial(_permissions, request.serving_endpoint_id),
        )

    async def UpdatePermissions(self, request: pb.UpdatePermissionsRequest, context: Any) -> pb.ObjectPermissions:
        return await once.answer(
            self._permissions.update(
                request.serving_endpoint_id, _entries(request.access_control_list), caller=current_caller()
            ),
            partial(_permissions, request.serving_endpoint_id),
        )

    async def GetPermissionLevels(
        self, request: pb.GetPermissionLevelsRequest, context: Any
    ) -> pb.GetPermissionLevelsResponse:
        await self._permissions.check_visible(request.serving_endpoint_id, caller=current_caller())
        return pb.GetPermissionLevelsResponse(
            permission_levels=[
                pb.PermissionLevelDescription(permission_level=_level(level), description=_DESCRIPTIONS[level])
                for level in Level
            ]
        )


class AccessFeedServicer(rpc.AccessFeedServicer):
    """The feed for those who enforce permissions."""

    def __init__(self, feed: AccessFeed, database: RememberingDatabase) -> None:
        self._feed = feed
        self._read_table = partial(database.read, grant_store.access_table)

    async def Watch(self, reports: AsyncIterator[pb.AccessReport], context: Any) -> AsyncIterator[pb.AccessChanges]:
        async for changes in self._feed.watch(reports, self._read_table):
            yield changes


def _entries(messages: Iterable[pb.AccessControlRequest]) -> list[Entry]:
    return [_entry(message, f"access_control_list[{place}]") for place, message in enumerate(messages)]


def _entry(message: pb.AccessControlRequest, at: str) -> Entry:
    named = [field for field in _FIELDS if getattr(message, field)]
    if len(named) != 1:
        raise InvalidParameter(f"{at}: exactly one of {', '.join(_FIELDS)} is required.")
    try:
        level = Level(message.permission_level)
    except ValueError:
        levels = ", ".join(level.name for level in Level)
        raise InvalidParameter(f"{at}.permission_level: one of {levels} is required.") from None
    return Entry(at, named[0], getattr(message, named[0]), level)


def _permissions(endpoint_id: str, granted: Sequence[EndpointGrant]) -> pb.ObjectPermissions:
    """What is granted, and what admins hold besides (contract 3.4)."""
    inherited = pb.Permission(
        permission_level=pb.CAN_MANAGE, inherited=True, inherited_from_object=["/serving-endpoints/"]
    )
    entries = [_response(each) for each in granted]
    admins = next((entry for entry in entries if entry.group_name == ADMINS), None)
    if admins is None:
        admins = pb.AccessControlResponse(group_name=ADMINS)
        entries.append(admins)
    admins.all_permissions.append(inherited)
    return pb.ObjectPermissions(
        object_id=f"/serving-endpoints/{endpoint_id}", object_type="serving-endpoint", access_control_list=entries
    )


def _response(granted: EndpointGrant) -> pb.AccessControlResponse:
    return pb.AccessControlResponse(
        **{_FIELD_OF[granted.kind]: granted.principal},
        display_name=granted.display_name,
        all_permissions=[pb.Permission(permission_level=_level(granted.level))],
    )


def _level(level: Level) -> pb.PermissionLevel.ValueType:
    return pb.PermissionLevel.Value(level.name)
