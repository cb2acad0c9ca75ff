"""Secrets and SecretResolver: messages to calls and back. Decisions are made in scopes.py, versions.py, grants.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from secrets_service.errors import ValueNotGiven
from secrets_service.grants import Existing, LaunchGrants, Wanted
from secrets_service.model import Grant, Permission, Reference, ReferenceFailure, SecretBytes, VersionInfo
from secrets_service.scopes import SecretScopes
from secrets_service.versions import SecretVersions
from servicekit import once
from servicekit.context import current_caller
from servicekit.errors import BadRequest, InvalidParameter
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc


class SecretsServicer(rpc.SecretsServicer):
    """The public service."""

    def __init__(self, scopes: SecretScopes, versions: SecretVersions) -> None:
        self._scopes = scopes
        self._versions = versions

    async def CreateScope(self, request: pb.CreateScopeRequest, context: Any) -> pb.CreateScopeResponse:
        if request.scope_backend_type not in (pb.SCOPE_BACKEND_TYPE_UNSPECIFIED, pb.DATABRICKS):
            raise InvalidParameter("scope_backend_type: only DATABRICKS is offered.")
        if request.HasField("backend_azure_keyvault"):
            raise BadRequest("backend_azure_keyvault: belongs to AZURE_KEYVAULT scopes, which are not offered.")
        await self._scopes.create_scope(
            scope=request.scope,
            initial_manage_principal=request.initial_manage_principal,
            caller=current_caller(),
        )
        return pb.CreateScopeResponse()

    async def ListScopes(self, request: pb.ListScopesRequest, context: Any) -> pb.ListScopesResponse:
        scopes = await self._scopes.list_scopes()
        return pb.ListScopesResponse(
            scopes=[pb.SecretScope(name=scope.name, backend_type=pb.DATABRICKS) for scope in scopes]
        )

    async def DeleteScope(self, request: pb.DeleteScopeRequest, context: Any) -> pb.DeleteScopeResponse:
        await self._scopes.delete_scope(scope=request.scope, caller=current_caller())
        return pb.DeleteScopeResponse()

    async def PutSecret(self, request: pb.PutSecretRequest, context: Any) -> pb.PutSecretResponse:
        await self._scopes.put_secret(
            scope=request.scope,
            key=request.key,
            value=_value(request),
            if_version=request.if_version if request.HasField("if_version") else None,
            caller=current_caller(),
        )
        return pb.PutSecretResponse()

    async def DeleteSecret(self, request: pb.DeleteSecretRequest, context: Any) -> pb.DeleteSecretResponse:
        await self._scopes.delete_secret(scope=request.scope, key=request.key, caller=current_caller())
        return pb.DeleteSecretResponse()

    async def ListSecrets(self, request: pb.ListSecretsRequest, context: Any) -> pb.ListSecretsResponse:
        secrets = await self._scopes.list_secrets(scope=request.scope, caller=current_caller())
        return pb.ListSecretsResponse(
            secrets=[pb.SecretMetadata(key=secret.key, last_updated_timestamp=secret.updated_ms) for secret in secrets]
        )

    async def GetSecret(self, request: pb.GetSecretRequest, context: Any) -> pb.GetSecretResponse:
        key, value = await self._scopes.get_secret(scope=request.scope, key=request.key, caller=current_caller())
        return pb.GetSecretResponse(key=key, value=value.reveal())

    async def PutAcl(self, request: pb.PutAclRequest, context: Any) -> pb.PutAclResponse:
        await self._scopes.put_acl(
            scope=request.scope,
            principal=request.principal,
            permission=_permission(request.permission),
            caller=current_caller(),
        )
        return pb.PutAclResponse()

    async def GetAcl(self, request: pb.GetAclRequest, context: Any) -> pb.AclItem:
        grant = await self._scopes.get_acl(scope=request.scope, principal=request.principal, caller=current_caller())
        return _acl_item(grant)

    async def ListAcls(self, request: pb.ListAclsRequest, context: Any) -> pb.ListAclsResponse:
        grants = await self._scopes.list_acls(scope=request.scope, caller=current_caller())
        return pb.ListAclsResponse(items=[_acl_item(grant) for grant in grants])

    async def DeleteAcl(self, request: pb.DeleteAclRequest, context: Any) -> pb.DeleteAclResponse:
        await self._scopes.delete_acl(scope=request.scope, principal=request.principal, caller=current_caller())
        return pb.DeleteAclResponse()

    async def ListSecretVersions(
        self, request: pb.ListSecretVersionsRequest, context: Any
    ) -> pb.ListSecretVersionsResponse:
        key, versions = await self._versions.list_versions(
            scope=request.scope, key=request.key, caller=current_caller()
        )
        return pb.ListSecretVersionsResponse(key=key, versions=map(_version, versions))

    async def RestoreSecret(self, request: pb.RestoreSecretRequest, context: Any) -> pb.RestoreSecretResponse:
        return await once.answer(
            self._versions.restore(
                scope=request.scope, key=request.key, version=request.version, caller=current_caller()
            ),
            lambda version: pb.RestoreSecretResponse(version=version),
        )

    async def PurgeSecret(self, request: pb.PurgeSecretRequest, context: Any) -> pb.PurgeSecretResponse:
        await self._versions.purge(scope=request.scope, key=request.key, caller=current_caller())
        return pb.PurgeSecretResponse()


class SecretResolverServicer(rpc.SecretResolverServicer):
    """The internal service: Serving alone can reach it."""

    def __init__(self, grants: LaunchGrants) -> None:
        self._grants = grants

    async def GrantLaunches(self, request: pb.GrantLaunchesRequest, context: Any) -> pb.GrantLaunchesResponse:
        outcome = await self._grants.grant(
            endpoint_id=request.endpoint_id,
            is_new=request.is_new,
            version=request.version,
            wanted=[Wanted(each.digest, tuple(_references(each.references))) for each in request.entities],
            author=current_caller(),
        )
        return pb.GrantLaunchesResponse(
            failures=[_failure(failure) for failure in outcome.failures],
            creator_is_inactive=outcome.is_creator_inactive,
        )

    async def Resolve(self, request: pb.ResolveRequest, context: Any) -> pb.ResolveResponse:
        values, failures = await self._grants.resolve(
            endpoint_id=request.endpoint_id,
            version=request.version,
            digest=request.digest,
            replica_id=request.replica_id,
            references=_references(request.references),
        )
        return pb.ResolveResponse(
            values=[value.reveal() for value in values], failures=[_failure(failure) for failure in failures]
        )

    async def Settle(self, request: pb.SettleRequest, context: Any) -> pb.SettleResponse:
        await self._grants.settle(
            ended=request.ended_replica_ids,
            dropped=[(each.endpoint_id, each.versions) for each in request.dropped_configs],
            deleted=request.deleted_endpoint_ids,
        )
        return pb.SettleResponse()

    async def Reconcile(self, request: pb.ReconcileRequest, context: Any) -> pb.ReconcileResponse:
        await self._grants.reconcile(
            replica_ids=request.replica_ids,
            endpoints=[Existing(each.endpoint_id, each.creator_id, tuple(each.versions)) for each in request.endpoints],
        )
        return pb.ReconcileResponse()


def _value(request: pb.PutSecretRequest) -> SecretBytes:
    given = request.WhichOneof("value")
    if given is None:
        raise ValueNotGiven
    return SecretBytes(request.string_value.encode() if given == "string_value" else request.bytes_value)


def _permission(number: int) -> Permission:
    try:
        return Permission(number)
    except ValueError:
        raise InvalidParameter("permission: one of READ, WRITE, MANAGE is required.") from None


def _version(version: VersionInfo) -> pb.SecretVersion:
    return pb.SecretVersion(
        version=version.version,
        created_timestamp=version.created_ms,
        current=version.is_current,
        held=version.is_held,
        deleted=version.is_deleted,
    )


def _acl_item(grant: Grant) -> pb.AclItem:
    return pb.AclItem(principal=grant.principal, permission=pb.AclPermission.Value(grant.permission.name))


def _references(messages: Iterable[pb.SecretReference]) -> list[Reference]:
    return [Reference(message.scope, message.key) for message in messages]


def _failure(failure: ReferenceFailure) -> pb.ReferenceFailure:
    return pb.ReferenceFailure(
        reference=pb.SecretReference(scope=failure.reference.scope, key=failure.reference.key),
        kind=pb.ReferenceFailure.Kind.Value(failure.kind.name),
        principal=failure.principal,
    )
