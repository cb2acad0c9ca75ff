"""Scim, Tokens and Authority: messages to calls and back. Decisions are made in principals.py and authority.py."""

from __future__ import annotations

from typing import Any

from secrets_service.admin import AdminToken
from secrets_service.authority import Authority
from secrets_service.model import Email, NewToken, Profile, TokenInfo, User
from secrets_service.principals import Tokens, Users
from servicekit.context import current_caller
from tessera.identity.v1 import identity_pb2 as pb
from tessera.identity.v1 import identity_pb2_grpc as rpc

_USER_SCHEMAS = (
    "urn:ietf:params:scim:schemas:core:2.0:User",
    "urn:ietf:params:scim:schemas:extension:workspace:2.0:User",
)
_LIST_SCHEMA = "urn:ietf:params:scim:api:messages:2.0:ListResponse"
_ENTITLEMENT = "workspace-access"


class ScimServicer(rpc.ScimServicer):
    """Users."""

    def __init__(self, users: Users) -> None:
        self._users = users

    async def CreateUser(self, request: pb.CreateUserRequest, context: Any) -> pb.User:
        return _user(await self._users.create_user(_profile(request), caller=current_caller()))

    async def ListUsers(self, request: pb.ListUsersRequest, context: Any) -> pb.ListUsersResponse:
        page = await self._users.list_users(
            filter=request.filter,
            start=request.start_index if request.HasField("start_index") else None,
            count=request.count if request.HasField("count") else None,
        )
        return pb.ListUsersResponse(
            schemas=[_LIST_SCHEMA],
            total_results=page.total,
            start_index=page.start,
            items_per_page=len(page.users),
            resources=[_user(user) for user in page.users],
        )

    async def GetUser(self, request: pb.GetUserRequest, context: Any) -> pb.User:
        return _user(await self._users.get_user(request.id))

    async def GetMe(self, request: pb.GetMeRequest, context: Any) -> pb.User:
        return _user(await self._users.get_user(current_caller().id))


class TokensServicer(rpc.TokensServicer):
    """Personal access tokens."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Any) -> pb.CreateTokenResponse:
        return _new_token(
            await self._tokens.create_token(
                comment=request.comment,
                lifetime=request.lifetime_seconds if request.HasField("lifetime_seconds") else None,
                caller=current_caller(),
            )
        )

    async def ListTokens(self, request: pb.ListTokensRequest, context: Any) -> pb.ListTokensResponse:
        tokens = await self._tokens.list_tokens(caller=current_caller())
        return pb.ListTokensResponse(token_infos=[_token_info(token) for token in tokens])

    async def DeleteToken(self, request: pb.DeleteTokenRequest, context: Any) -> pb.DeleteTokenResponse:
        await self._tokens.delete_token(token_id=request.token_id, caller=current_caller())
        return pb.DeleteTokenResponse()

    async def CreateOboToken(self, request: pb.CreateOboTokenRequest, context: Any) -> pb.CreateTokenResponse:
        return _new_token(
            await self._tokens.create_obo_token(
                application_id=request.application_id,
                comment=request.comment,
                lifetime=request.lifetime_seconds if request.HasField("lifetime_seconds") else None,
                caller=current_caller(),
            )
        )


class AuthorityServicer(rpc.AuthorityServicer):
    """What the other services, and the operator, need of us."""

    def __init__(self, authority: Authority, admin_token: AdminToken) -> None:
        self._authority = authority
        self._admin_token = admin_token

    async def ExchangeToken(self, request: pb.ExchangeTokenRequest, context: Any) -> pb.ExchangeTokenResponse:
        return pb.ExchangeTokenResponse(assertion=await self._authority.exchange(request.token))

    async def GetPlatform(self, request: pb.GetPlatformRequest, context: Any) -> pb.GetPlatformResponse:
        keys = await self._authority.public_keys()
        return pb.GetPlatformResponse(
            workspace_id=self._authority.workspace_id,
            keys=[pb.VerificationKey(key_id=key_id, public_key=key.public_bytes_raw()) for key_id, key in keys.items()],
        )

    async def RenewAdminToken(self, request: pb.RenewAdminTokenRequest, context: Any) -> pb.RenewAdminTokenResponse:
        path, expires_ms = await self._admin_token.renew()
        return pb.RenewAdminTokenResponse(path=str(path), expiry_time=expires_ms)


def _profile(request: pb.CreateUserRequest) -> Profile:
    return Profile(
        name=request.user_name,
        display_name=request.display_name,
        given_name=request.name.given_name,
        family_name=request.name.family_name,
        emails=tuple(Email(email.type, email.value, email.primary) for email in request.emails),
        is_active=request.active if request.HasField("active") else True,
        external_id=request.external_id,
    )


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
        groups=[
            pb.GroupReference(display=group.name, type="direct", value=str(group.id), ref=f"Groups/{group.id}")
            for group in user.groups
        ],
        entitlements=[pb.Entitlement(value=_ENTITLEMENT)],
        external_id=profile.external_id,
    )


def _new_token(token: NewToken) -> pb.CreateTokenResponse:
    return pb.CreateTokenResponse(token_value=token.value, token_info=_token_info(token.info))


def _token_info(token: TokenInfo) -> pb.TokenInfo:
    return pb.TokenInfo(
        token_id=token.id, creation_time=token.created_ms, expiry_time=token.expires_ms, comment=token.comment
    )
