"""Tokens, client secrets and Authority: messages to calls and back. Decisions are made in personal_tokens.py,
client_secrets.py and authority.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from secrets_service.admin import AdminToken
from secrets_service.authority import Authority
from secrets_service.client_secrets import ClientSecrets
from secrets_service.model import ClientSecret, ManagedToken, NewClientSecret, NewToken, TokenInfo
from secrets_service.personal_tokens import Tokens
from servicekit import audit, once
from servicekit.context import current_caller
from servicekit.errors import InvalidParameter, MalformedRequest
from tessera.identity.v1 import identity_pb2 as pb
from tessera.identity.v1 import identity_pb2_grpc as rpc


class TokensServicer(rpc.TokensServicer):
    """Personal access tokens."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Any) -> pb.CreateTokenResponse:
        return await once.answer(
            self._tokens.create_token(
                comment=request.comment,
                lifetime=request.lifetime_seconds if request.HasField("lifetime_seconds") else None,
                caller=current_caller(),
            ),
            _new_token,
        )

    async def ListTokens(self, request: pb.ListTokensRequest, context: Any) -> pb.ListTokensResponse:
        tokens = await self._tokens.list_tokens(caller=current_caller())
        return pb.ListTokensResponse(token_infos=[_token_info(token) for token in tokens])

    async def DeleteToken(self, request: pb.DeleteTokenRequest, context: Any) -> pb.DeleteTokenResponse:
        await self._tokens.delete_token(token_id=request.token_id, caller=current_caller())
        return pb.DeleteTokenResponse()

    async def UpdateToken(self, request: pb.UpdateTokenRequest, context: Any) -> pb.TokenInfo:
        return await once.answer(
            self._tokens.update_token(token_id=request.token_id, comment=_comment(request), caller=current_caller()),
            _token_info,
        )

    async def CreateOboToken(self, request: pb.CreateOboTokenRequest, context: Any) -> pb.CreateTokenResponse:
        return await once.answer(
            self._tokens.create_obo_token(
                application_id=request.application_id,
                comment=request.comment,
                lifetime=request.lifetime_seconds if request.HasField("lifetime_seconds") else None,
                caller=current_caller(),
            ),
            _new_token,
        )

    async def ListManagedTokens(
        self, request: pb.ListManagedTokensRequest, context: Any
    ) -> pb.ListManagedTokensResponse:
        tokens = await self._tokens.list_managed_tokens(
            creator_id=request.created_by_id if request.HasField("created_by_id") else None,
            creator_name=request.created_by_username,
            caller=current_caller(),
        )
        return pb.ListManagedTokensResponse(token_infos=[_managed_token(token) for token in tokens])

    async def GetManagedToken(self, request: pb.GetManagedTokenRequest, context: Any) -> pb.GetManagedTokenResponse:
        token = await self._tokens.get_managed_token(token_id=request.token_id, caller=current_caller())
        return pb.GetManagedTokenResponse(token_info=_managed_token(token))

    async def UpdateManagedToken(self, request: pb.UpdateTokenRequest, context: Any) -> pb.ManagedToken:
        changing = self._tokens.update_managed_token(
            token_id=request.token_id, comment=_comment(request), caller=current_caller()
        )
        return await once.answer(changing, _managed_token)

    async def DeleteManagedToken(self, request: pb.DeleteManagedTokenRequest, context: Any) -> pb.DeleteTokenResponse:
        await self._tokens.delete_managed_token(token_id=request.token_id, caller=current_caller())
        return pb.DeleteTokenResponse()


class ClientSecretsServicer(rpc.ServicePrincipalSecretsServicer):
    """Client secrets of service principals."""

    def __init__(self, secrets: ClientSecrets) -> None:
        self._secrets = secrets

    async def CreateServicePrincipalSecret(
        self, request: pb.CreateServicePrincipalSecretRequest, context: Any
    ) -> pb.CreateServicePrincipalSecretResponse:
        if not set(request.scopes) <= {"all-apis"}:
            raise InvalidParameter("scopes: only all-apis can be asked for.")
        return await once.answer(
            self._secrets.create_secret(
                principal_id=request.service_principal_id, lifetime=request.lifetime, caller=current_caller()
            ),
            _new_client_secret,
        )

    async def ListServicePrincipalSecrets(
        self, request: pb.ListServicePrincipalSecretsRequest, context: Any
    ) -> pb.ListServicePrincipalSecretsResponse:
        page, next_page_token = await self._secrets.list_secrets(
            principal_id=request.service_principal_id,
            page_size=request.page_size if request.HasField("page_size") else None,
            page_token=request.page_token,
            caller=current_caller(),
        )
        return pb.ListServicePrincipalSecretsResponse(
            secrets=map(_client_secret, page), next_page_token=next_page_token
        )

    async def DeleteServicePrincipalSecret(
        self, request: pb.DeleteServicePrincipalSecretRequest, context: Any
    ) -> pb.DeleteServicePrincipalSecretResponse:
        await self._secrets.delete_secret(
            principal_id=request.service_principal_id, secret_id=request.secret_id, caller=current_caller()
        )
        return pb.DeleteServicePrincipalSecretResponse()


class AuthorityServicer(rpc.AuthorityServicer):
    """What the other services, and the operator, need of us."""

    def __init__(self, authority: Authority, admin_token: AdminToken, serving_audit_key: Callable[[], str]) -> None:
        """`serving_audit_key` tells the id of the key in use."""
        self._authority = authority
        self._admin_token = admin_token
        self._serving_audit_key = serving_audit_key

    async def ExchangeToken(self, request: pb.ExchangeTokenRequest, context: Any) -> pb.ExchangeTokenResponse:
        return pb.ExchangeTokenResponse(assertion=await self._authority.exchange(request.token))

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Any) -> pb.IssueTokenResponse:
        audit.sensitive()
        endpoint_id = request.endpoint_id or None
        match request.WhichOneof("credential"):
            case "client":
                client = request.client
                issued = await self._authority.token_for_client(client.client_id, client.client_secret, endpoint_id)
            case "assertion":
                issued = await self._authority.token_for_assertion(request.assertion, endpoint_id)
            case _:
                raise MalformedRequest("Exactly one of client and assertion is required; neither was given.")
        return pb.IssueTokenResponse(access_token=issued.value, expires_in=issued.seconds)

    async def GetPlatform(self, request: pb.GetPlatformRequest, context: Any) -> pb.GetPlatformResponse:
        keys = await self._authority.public_keys()
        return pb.GetPlatformResponse(
            workspace_id=self._authority.workspace_id,
            keys=[pb.VerificationKey(key_id=key_id, public_key=key.public_bytes_raw()) for key_id, key in keys.items()],
            serving_audit_key_id=self._serving_audit_key(),
        )

    async def RenewAdminToken(self, request: pb.RenewAdminTokenRequest, context: Any) -> pb.RenewAdminTokenResponse:
        path, expires_ms = await self._admin_token.renew()
        return pb.RenewAdminTokenResponse(path=str(path), expiry_time=expires_ms)


def _comment(request: pb.UpdateTokenRequest) -> str:
    if request.update_mask not in ("", "comment"):
        raise InvalidParameter("update_mask: only comment can be changed.")
    return request.token.comment


def _new_token(token: NewToken) -> pb.CreateTokenResponse:
    return pb.CreateTokenResponse(token_value=token.value, token_info=_token_info(token.info))


def _token_info(token: TokenInfo) -> pb.TokenInfo:
    return pb.TokenInfo(
        token_id=token.id, creation_time=token.created_ms, expiry_time=token.expires_ms, comment=token.comment
    )


def _new_client_secret(made: NewClientSecret) -> pb.CreateServicePrincipalSecretResponse:
    shown = _client_secret(made.secret)
    return pb.CreateServicePrincipalSecretResponse(
        id=shown.id,
        secret=made.value,
        secret_hash=shown.secret_hash,
        create_time=shown.create_time,
        update_time=shown.update_time,
        expire_time=shown.expire_time,
        status=shown.status,
    )


def _client_secret(secret: ClientSecret) -> pb.ServicePrincipalSecret:
    created = _rfc_3339(secret.info.created_ms)
    return pb.ServicePrincipalSecret(
        id=secret.info.id,
        # A hash of a MAC whose key never leaves this service: the same for the same secret, and no help to a guess.
        secret_hash=hashlib.sha256(secret.mac.mac).hexdigest(),
        create_time=created,
        update_time=created,
        expire_time=_rfc_3339(secret.info.expires_ms),
        status="ACTIVE",
    )


def _rfc_3339(milliseconds: int) -> str:
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _managed_token(token: ManagedToken) -> pb.ManagedToken:
    return pb.ManagedToken(
        token_id=token.info.id,
        creation_time=token.info.created_ms,
        expiry_time=token.info.expires_ms,
        comment=token.info.comment,
        created_by_id=token.creator_id,
        created_by_username=token.creator_name,
        owner_id=token.owner_id,
    )
