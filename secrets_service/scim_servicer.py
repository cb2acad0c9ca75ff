"""Scim: messages to calls and back. Decisions are made in directory.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from secrets_service.directory import Accounts, Groups, Query
from secrets_service.model import DetailedGroup, Email, Group, GroupProfile, Kind, Profile, User
from secrets_service.scim_patch import Operation
from servicekit import once
from servicekit.context import current_caller
from servicekit.errors import InvalidParameter
from tessera.identity.v1 import identity_pb2 as pb
from tessera.identity.v1 import identity_pb2_grpc as rpc

_CORE = "urn:ietf:params:scim:schemas:core:2.0:"
_USER_SCHEMAS = (f"{_CORE}User", "urn:ietf:params:scim:schemas:extension:workspace:2.0:User")
_GROUP_SCHEMAS = (f"{_CORE}Group",)
_SERVICE_PRINCIPAL_SCHEMAS = (f"{_CORE}ServicePrincipal",)
_LIST_SCHEMAS = ("urn:ietf:params:scim:api:messages:2.0:ListResponse",)
_FOLDERS = {Kind.USER: "Users", Kind.SERVICE_PRINCIPAL: "ServicePrincipals"}

M = TypeVar("M", bound=Message)
_AccountRequest = (
    pb.CreateUserRequest | pb.ReplaceUserRequest | pb.CreateServicePrincipalRequest | pb.ReplaceServicePrincipalRequest
)


class ScimServicer(rpc.ScimServicer):
    """Users, groups, service principals, and who is calling."""

    def __init__(self, users: Accounts, groups: Groups, service_principals: Accounts) -> None:
        self._users = users
        self._groups = groups
        self._service_principals = service_principals

    async def CreateUser(self, request: pb.CreateUserRequest, context: Any) -> pb.User:
        return await once.answer(self._users.create(_user_profile(request), caller=current_caller()), _user)

    async def ListUsers(self, request: pb.ListRequest, context: Any) -> pb.ListUsersResponse:
        page = await self._users.list_page(_query(request))
        return pb.ListUsersResponse(
            schemas=_LIST_SCHEMAS,
            total_results=page.total,
            start_index=page.start,
            items_per_page=len(page.items),
            resources=_shown(map(_user, page.items), request),
        )

    async def GetUser(self, request: pb.GetRequest, context: Any) -> pb.User:
        return _shown_one(_user(await self._users.get(request.id)), request)

    async def PatchUser(self, request: pb.PatchRequest, context: Any) -> pb.User:
        return await once.answer(self._users.patch(request.id, _operations(request), caller=current_caller()), _user)

    async def ReplaceUser(self, request: pb.ReplaceUserRequest, context: Any) -> pb.User:
        replacing = self._users.replace(
            request.id, _user_profile(request), is_active=_is_active(request), caller=current_caller()
        )
        return await once.answer(replacing, _user)

    async def DeleteUser(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteResponse:
        await self._users.delete(request.id, caller=current_caller())
        return pb.DeleteResponse()

    async def CreateGroup(self, request: pb.CreateGroupRequest, context: Any) -> pb.Group:
        return await once.answer(self._groups.create(_group_profile(request), caller=current_caller()), _group)

    async def ListGroups(self, request: pb.ListRequest, context: Any) -> pb.ListGroupsResponse:
        page = await self._groups.list_page(_query(request), with_members=_is_shown("members", request))
        return pb.ListGroupsResponse(
            schemas=_LIST_SCHEMAS,
            total_results=page.total,
            start_index=page.start,
            items_per_page=len(page.items),
            resources=_shown(map(_group, page.items), request),
        )

    async def GetGroup(self, request: pb.GetRequest, context: Any) -> pb.Group:
        group = await self._groups.get(request.id, with_members=_is_shown("members", request))
        return _shown_one(_group(group), request)

    async def PatchGroup(self, request: pb.PatchRequest, context: Any) -> pb.Group:
        return await once.answer(self._groups.patch(request.id, _operations(request), caller=current_caller()), _group)

    async def ReplaceGroup(self, request: pb.ReplaceGroupRequest, context: Any) -> pb.Group:
        replacing = self._groups.replace(request.id, _group_profile(request), caller=current_caller())
        return await once.answer(replacing, _group)

    async def DeleteGroup(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteResponse:
        await self._groups.delete(request.id, caller=current_caller())
        return pb.DeleteResponse()

    async def CreateServicePrincipal(
        self, request: pb.CreateServicePrincipalRequest, context: Any
    ) -> pb.ServicePrincipal:
        creating = self._service_principals.create(_profile(request), caller=current_caller())
        return await once.answer(creating, _service_principal)

    async def ListServicePrincipals(self, request: pb.ListRequest, context: Any) -> pb.ListServicePrincipalsResponse:
        page = await self._service_principals.list_page(_query(request))
        return pb.ListServicePrincipalsResponse(
            schemas=_LIST_SCHEMAS,
            total_results=page.total,
            start_index=page.start,
            items_per_page=len(page.items),
            resources=_shown(map(_service_principal, page.items), request),
        )

    async def GetServicePrincipal(self, request: pb.GetRequest, context: Any) -> pb.ServicePrincipal:
        return _shown_one(_service_principal(await self._service_principals.get(request.id)), request)

    async def PatchServicePrincipal(self, request: pb.PatchRequest, context: Any) -> pb.ServicePrincipal:
        patching = self._service_principals.patch(request.id, _operations(request), caller=current_caller())
        return await once.answer(patching, _service_principal)

    async def ReplaceServicePrincipal(
        self, request: pb.ReplaceServicePrincipalRequest, context: Any
    ) -> pb.ServicePrincipal:
        replacing = self._service_principals.replace(
            request.id, _profile(request), is_active=_is_active(request), caller=current_caller()
        )
        return await once.answer(replacing, _service_principal)

    async def DeleteServicePrincipal(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteResponse:
        await self._service_principals.delete(request.id, caller=current_caller())
        return pb.DeleteResponse()

    async def GetMe(self, request: pb.GetMeRequest, context: Any) -> pb.User:
        caller = current_caller()
        accounts = self._service_principals if caller.kind == Kind.SERVICE_PRINCIPAL else self._users
        return _shown_one(_user(await accounts.get(caller.id)), request)


# --- requests ---


def _query(request: pb.ListRequest) -> Query:
    return Query(
        filter=request.filter,
        sort_by=request.sort_by,
        sort_order=request.sort_order,
        start=request.start_index if request.HasField("start_index") else None,
        count=request.count if request.HasField("count") else None,
    )


def _operations(request: pb.PatchRequest) -> list[Operation]:
    try:
        return [
            Operation(each.op, each.path, json_format.MessageToDict(each.value) if each.HasField("value") else None)
            for each in request.operations
        ]
    except json_format.Error:  # NaN and infinities
        raise InvalidParameter("Operations.value: holds a number that JSON cannot spell.") from None


def _is_active(request: _AccountRequest) -> bool | None:
    return request.active if request.HasField("active") else None


def _profile(request: _AccountRequest) -> Profile:
    """What users and service principals have in common."""
    return Profile(
        name="",
        display_name=request.display_name,
        is_active=request.active if request.HasField("active") else True,
        roles=tuple(each.value for each in request.roles),
        entitlements=tuple(each.value for each in request.entitlements),
        external_id=request.external_id,
    )


def _user_profile(request: pb.CreateUserRequest | pb.ReplaceUserRequest) -> Profile:
    return replace(
        _profile(request),
        name=request.user_name,
        given_name=request.name.given_name,
        family_name=request.name.family_name,
        emails=tuple(Email(email.type, email.value, email.primary) for email in request.emails),
    )


def _group_profile(request: pb.CreateGroupRequest | pb.ReplaceGroupRequest) -> GroupProfile:
    return GroupProfile(
        name=request.display_name,
        members=tuple(each.value for each in request.members),
        roles=tuple(each.value for each in request.roles),
        entitlements=tuple(each.value for each in request.entitlements),
        external_id=request.external_id,
    )


# --- answers ---


def _user(user: User) -> pb.User:
    profile = user.profile
    name = pb.UserName(given_name=profile.given_name, family_name=profile.family_name)
    return pb.User(
        schemas=_USER_SCHEMAS,
        id=str(user.id),
        user_name=profile.name,
        display_name=profile.display_name,
        active=profile.is_active,
        name=name if profile.given_name or profile.family_name else None,
        emails=[pb.Email(type=email.type, value=email.value, primary=email.is_primary) for email in profile.emails],
        groups=_groups(user.groups),
        entitlements=_entitlements(profile.entitlements),
        external_id=profile.external_id,
        roles=_roles(profile.roles),
    )


def _service_principal(user: User) -> pb.ServicePrincipal:
    profile = user.profile
    return pb.ServicePrincipal(
        schemas=_SERVICE_PRINCIPAL_SCHEMAS,
        id=str(user.id),
        application_id=profile.name,
        display_name=profile.display_name,
        active=profile.is_active,
        groups=_groups(user.groups),
        entitlements=_entitlements(profile.entitlements),
        roles=_roles(profile.roles),
        external_id=profile.external_id,
    )


def _group(group: DetailedGroup) -> pb.Group:
    return pb.Group(
        schemas=_GROUP_SCHEMAS,
        id=str(group.id),
        display_name=group.name,
        members=[
            pb.Member(value=str(each.id), display=each.display_name, ref=f"{_FOLDERS[each.kind]}/{each.id}")
            for each in group.members
        ],
        roles=_roles(group.roles),
        entitlements=_entitlements(group.entitlements),
        external_id=group.external_id,
        meta=pb.Meta(resource_type="WorkspaceGroup"),
    )


def _groups(groups: Iterable[Group]) -> list[pb.GroupReference]:
    return [
        pb.GroupReference(display=group.name, type="direct", value=str(group.id), ref=f"Groups/{group.id}")
        for group in groups
    ]


def _entitlements(values: Iterable[str]) -> list[pb.Entitlement]:
    return [pb.Entitlement(value=value) for value in values]


def _roles(values: Iterable[str]) -> list[pb.Role]:
    return [pb.Role(value=value) for value in values]


# --- which attributes are shown ---

_Selective = pb.GetRequest | pb.ListRequest | pb.GetMeRequest
_ALWAYS = ("id", "schemas")


def _named(text: str) -> set[str]:
    """The attributes that a list names, in lower case; a part of one stands for all of it."""
    return {name.strip().partition(".")[0].lower() for name in text.split(",") if name.strip()}


def _is_shown(attribute: str, request: _Selective) -> bool:
    wanted, excluded = _named(request.attributes), _named(request.excluded_attributes)
    return attribute in _ALWAYS or ((not wanted or attribute.lower() in wanted) and attribute.lower() not in excluded)


def _shown(messages: Iterable[M], request: _Selective) -> list[M]:
    """The messages with what the request wants of them."""
    found = list(messages)
    if found and (request.attributes or request.excluded_attributes):
        hidden = [each.name for each in found[0].DESCRIPTOR.fields if not _is_shown(each.json_name, request)]
        for message in found:
            for name in hidden:
                message.ClearField(name)
    return found


def _shown_one(message: M, request: _Selective) -> M:
    return _shown([message], request)[0]
