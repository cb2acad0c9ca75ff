"""Who may do what: every RPC and every route, called by everybody there is, against a table written down once more.

GOLDEN is written after the contract (3.1 to 3.4, 4.1, 5.1), not after `tessera.policy`: where the two differ, one is
wrong. A new RPC or route needs a row in both, and a request in REQUESTS.
"""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from gateway.app import _OWNED
from gateway.http_rules import bindings
from servicekit import channels
from servicekit.policy import Row, rpc_name
from tessera.backups.v1 import backups_pb2 as backups
from tessera.identity.v1 import audit_pb2 as audit
from tessera.identity.v1 import identity_pb2 as identity
from tessera.identity.v1 import permissions_pb2 as permissions
from tessera.identity.v1 import permissions_pb2_grpc as permissions_rpc
from tessera.policy import POLICY
from tessera.secrets.v1 import secrets_pb2 as secrets
from tessera.serving.v1 import serving_pb2 as serving
from tests.support.platform import Platform, running_platform

GOLDEN = {
    "tessera.secrets.v1.Secrets": {
        "CreateScope": "any caller",
        "ListScopes": "any caller",
        "DeleteScope": "scope MANAGE",
        "PutSecret": "scope WRITE",
        "DeleteSecret": "scope WRITE",
        "ListSecrets": "scope READ",
        "GetSecret": "scope READ",
        "PutAcl": "scope MANAGE",
        "GetAcl": "scope MANAGE",
        "ListAcls": "scope MANAGE",
        "DeleteAcl": "scope MANAGE",
        "ListSecretVersions": "scope READ",
        "RestoreSecret": "scope WRITE",
        "PurgeSecret": "scope WRITE",
    },
    "tessera.secrets.v1.SecretResolver": {
        "GrantLaunches": "serving for a caller",
        "Resolve": "serving",
        "Settle": "serving",
        "Reconcile": "serving",
    },
    "tessera.identity.v1.Scim": {
        "CreateUser": "admins",
        "ListUsers": "any caller",
        "GetUser": "any caller",
        "PatchUser": "admins",
        "ReplaceUser": "admins",
        "DeleteUser": "admins",
        "CreateGroup": "admins",
        "ListGroups": "any caller",
        "GetGroup": "any caller",
        "PatchGroup": "admins",
        "ReplaceGroup": "admins",
        "DeleteGroup": "admins",
        "CreateServicePrincipal": "admins",
        "ListServicePrincipals": "any caller",
        "GetServicePrincipal": "any caller",
        "PatchServicePrincipal": "admins",
        "ReplaceServicePrincipal": "admins",
        "DeleteServicePrincipal": "admins",
        "GetMe": "any caller",
    },
    "tessera.identity.v1.Tokens": {
        "CreateToken": "any caller",
        "ListTokens": "any caller",
        "DeleteToken": "owner",
        "UpdateToken": "owner",
        "CreateOboToken": "admins",
        "ListManagedTokens": "admins",
        "GetManagedToken": "admins",
        "UpdateManagedToken": "admins",
        "DeleteManagedToken": "admins",
    },
    "tessera.identity.v1.ServicePrincipalSecrets": {
        "CreateServicePrincipalSecret": "admins",
        "ListServicePrincipalSecrets": "admins",
        "DeleteServicePrincipalSecret": "admins",
    },
    "tessera.identity.v1.Authority": {
        "ExchangeToken": "gateway, serving",
        "IssueToken": "gateway",
        "GetPlatform": "gateway, serving",
        "RenewAdminToken": "operator",
    },
    "tessera.secrets.v1.Keys": {
        "GetKeyStatus": "operator",
        "RotateRootKey": "operator",
        "RotateStoreKey": "operator",
        "RotateScopeKeys": "operator",
        "AuthenticateBackup": "operator",
    },
    "tessera.identity.v1.AuditLog": {"ListAuditRecords": "admins"},
    "tessera.serving.v1.ServingAuditLog": {"ListServingAuditRecords": "admins"},
    "tessera.identity.v1.AuditKeys": {"GetKey": "serving", "ListKeys": "operator"},
    "tessera.backups.v1.Backups": {"Copy": "operator"},
    "tessera.identity.v1.Permissions": {
        "GetPermissions": "endpoint CAN_MANAGE",
        "SetPermissions": "endpoint CAN_MANAGE",
        "UpdatePermissions": "endpoint CAN_MANAGE",
        "GetPermissionLevels": "endpoint CAN_VIEW",
    },
    "tessera.identity.v1.AccessFeed": {"Watch": "gateway, serving"},
    "tessera.serving.v1.ServingEndpoints": {
        "CreateServingEndpoint": "any caller",
        "GetServingEndpoint": "endpoint CAN_VIEW",
        "ListServingEndpoints": "endpoint CAN_VIEW",
        "DeleteServingEndpoint": "endpoint CAN_MANAGE",
        "UpdateServingEndpointConfig": "endpoint CAN_MANAGE",
        "StopServingEndpoint": "endpoint CAN_MANAGE",
        "StartServingEndpoint": "endpoint CAN_MANAGE",
        "CancelServingEndpointUpdate": "endpoint CAN_MANAGE",
        "PatchServingEndpointTags": "endpoint CAN_MANAGE",
        "PutServingEndpointRateLimits": "endpoint CAN_MANAGE",
        "PutServingEndpointAiGateway": "endpoint CAN_MANAGE",
        "UpdateServingEndpointNotifications": "endpoint CAN_MANAGE",
        "PatchServingEndpointTelemetryConfig": "endpoint CAN_MANAGE",
        "ListServingEndpointEvents": "endpoint CAN_VIEW",
        "ExportServingEndpointMetrics": "endpoint CAN_VIEW",
        "GetServingEndpointOpenApi": "endpoint CAN_VIEW",
        "ListServingEndpointUsage": "endpoint CAN_MANAGE",
        "ListServingEndpointMetricsHistory": "endpoint CAN_VIEW",
        "GetServedModelLogs": "endpoint CAN_MANAGE",
        "GetServedModelBuildLogs": "endpoint CAN_MANAGE",
        "FollowServedModelLogs": "endpoint CAN_MANAGE",
        "FollowServedModelBuildLogs": "endpoint CAN_MANAGE",
        "Query": "endpoint CAN_QUERY",
    },
    "tessera.serving.v1.Routes": {"Watch": "gateway"},
    "tessera.serving.v1.Metering": {"Report": "gateway"},
    "grpc.health.v1.Health": {"Check": "anybody", "Watch": "anybody"},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": "any caller"},
}
GOLDEN_ROUTES = {
    "POST /serving-endpoints/{name}/invocations": "endpoint CAN_QUERY",
    "POST /serving-endpoints/{name}/served-models/{served_model_name}/invocations": "endpoint CAN_QUERY",
    "POST /serving-endpoints/chat/completions": "endpoint CAN_QUERY",
    "POST /serving-endpoints/completions": "endpoint CAN_QUERY",
    "POST /serving-endpoints/embeddings": "endpoint CAN_QUERY",
    "POST /serving-endpoints/responses": "endpoint CAN_QUERY",
    "GET /.well-known/databricks-config": "anybody",
    "GET /health": "anybody",
    "GET /api/openapi.json": "any caller",
    "POST /telemetry-ext": "any caller",
    "GET /oidc/.well-known/oauth-authorization-server": "anybody",
    "GET /oidc/accounts/{account_id}/.well-known/oauth-authorization-server": "anybody",
    "GET /oidc/v1/authorize": "anybody",
    "POST /oidc/v1/token": "anybody",
}

USERS = ("stranger", "reader", "writer", "manager", "creator")
EVERYBODY = {*USERS, "admin"}
MAY = {
    "any caller": EVERYBODY,
    "admins": {"admin"},
    "owner": {"creator"},
    "scope READ": {"reader", "writer", "manager", "creator", "admin"},
    "scope WRITE": {"writer", "manager", "creator", "admin"},
    "scope MANAGE": {"manager", "creator", "admin"},
    "endpoint CAN_VIEW": {"reader", "writer", "manager", "creator", "admin"},
    "endpoint CAN_QUERY": {"writer", "manager", "creator", "admin"},
    "endpoint CAN_MANAGE": {"manager", "creator", "admin"},
}
"""Who of the people is let in. The reader may READ scopes and CAN_VIEW endpoints, and so on; the stranger nothing."""

Code = grpc.StatusCode
PEERS = {"secrets": ("gateway", "serving", "operator"), "serving": ("gateway", "operator")}
NO_ID = "999999999"


def words(row: Row) -> str:
    """A row as GOLDEN says it."""
    if row.peers:
        return ", ".join(sorted(row.peers)) + (" for a caller" if row.needs_caller else "")
    if row.subject:
        return f"{row.subject} {row.level}".strip()
    return "any caller" if row.needs_caller else "anybody"


def every_method() -> dict[str, MethodDescriptor]:
    """All RPCs that are served anywhere, by the names of their rows."""
    files = (audit, backups, identity, permissions, secrets, serving, health_pb2, reflection_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return {rpc_name(method): method for service in services for method in service.methods}


METHODS = every_method()
GOLDEN_RPCS = {f"{service}/{name}": row for service, rows in GOLDEN.items() for name, row in rows.items()}


def test_the_table_is_the_one_that_was_agreed_on() -> None:
    assert {name: words(row) for name, row in POLICY.items()} == GOLDEN_RPCS | GOLDEN_ROUTES


def test_each_row_is_for_an_rpc_or_a_route() -> None:
    assert {name for name in POLICY if " " not in name} == METHODS.keys() - {"grpc.health.v1.Health/List"}


# --- every RPC, called by everybody


@dataclass(frozen=True)
class World:
    """A platform with six people, a deployed endpoint of the creator's, and new things for each call."""

    platform: Platform
    steady_id: str
    numbers: itertools.count[int]

    async def things(self, name: str) -> Things:
        """What a request may be about; made anew, as far as the RPC needs it."""
        thing = f"t{next(self.numbers)}"
        token_id = NO_ID
        if "Secrets/" in name:
            creator = self.platform.secrets.public(self.platform.tokens["creator"])
            await creator.create_scope(thing)
            await creator.put(thing, "key", "value")
            await creator.grant(thing, "reader", secrets.READ)
            await creator.grant(thing, "writer", secrets.WRITE)
            await creator.grant(thing, "manager", secrets.MANAGE)
        if name.endswith(("DeleteToken", "UpdateToken")):
            creator = self.platform.secrets.public(self.platform.tokens["creator"])
            made = await creator(creator.tokens.CreateToken, identity.CreateTokenRequest())
            token_id = made.token_info.token_id
        endpoint_id = self.steady_id
        if name.endswith(
            (
                *("DeleteServingEndpoint", "UpdateServingEndpointConfig", "SetPermissions", "UpdatePermissions"),
                *("StopServingEndpoint", "StartServingEndpoint", "CancelServingEndpointUpdate"),
            )
        ):
            endpoint_id = (await self.platform.endpoints_of("creator").create(thing, None)).id
            await share(self.platform, endpoint_id)
        return Things(thing, endpoint_id, token_id, self.platform.tokens["stranger"])


@dataclass(frozen=True)
class Things:
    """Names of what there is."""

    new: str
    """Of the scope and the endpoint that were made for this call, or else of nothing yet."""

    endpoint_id: str
    """Of that endpoint, else of the deployed one."""

    token_id: str
    token: str


async def share(platform: Platform, endpoint_id: str) -> None:
    """Gives the reader, the writer and the manager their levels on an endpoint of the creator's."""
    creator = platform.secrets.public(platform.tokens["creator"])
    levels = {"reader": permissions.CAN_VIEW, "writer": permissions.CAN_QUERY, "manager": permissions.CAN_MANAGE}
    granted = [
        permissions.AccessControlRequest(user_name=name, permission_level=level) for name, level in levels.items()
    ]
    request = permissions.UpdatePermissionsRequest(serving_endpoint_id=endpoint_id, access_control_list=granted)
    await creator(permissions_rpc.PermissionsStub(creator.channel).UpdatePermissions, request)


def a_token_change(things: Things) -> Any:
    return identity.UpdateTokenRequest(token_id=things.token_id, token=identity.TokenChange(comment="x"))


REQUESTS: dict[str, Callable[[Things], Any]] = {
    "CreateScope": lambda it: secrets.CreateScopeRequest(scope=f"{it.new}-made"),
    "DeleteScope": lambda it: secrets.DeleteScopeRequest(scope=it.new),
    "PutSecret": lambda it: secrets.PutSecretRequest(scope=it.new, key="new", string_value="x"),
    "DeleteSecret": lambda it: secrets.DeleteSecretRequest(scope=it.new, key="key"),
    "ListSecrets": lambda it: secrets.ListSecretsRequest(scope=it.new),
    "GetSecret": lambda it: secrets.GetSecretRequest(scope=it.new, key="key"),
    "PutAcl": lambda it: secrets.PutAclRequest(scope=it.new, principal="users", permission=secrets.READ),
    "GetAcl": lambda it: secrets.GetAclRequest(scope=it.new, principal="reader"),
    "ListAcls": lambda it: secrets.ListAclsRequest(scope=it.new),
    "DeleteAcl": lambda it: secrets.DeleteAclRequest(scope=it.new, principal="reader"),
    "ListSecretVersions": lambda it: secrets.ListSecretVersionsRequest(scope=it.new, key="key"),
    "RestoreSecret": lambda it: secrets.RestoreSecretRequest(scope=it.new, key="key", version=1),
    "PurgeSecret": lambda it: secrets.PurgeSecretRequest(scope=it.new, key="key"),
    "GrantLaunches": lambda it: secrets.GrantLaunchesRequest(endpoint_id=uuid.uuid4().hex, is_new=True),
    "Resolve": lambda it: secrets.ResolveRequest(
        endpoint_id=it.endpoint_id, version=9, digest=bytes(32), replica_id=it.new
    ),
    "Reconcile": lambda it: secrets.ReconcileRequest(endpoints=[secrets.ExistingEndpoint(endpoint_id="x")]),
    "GetPermissions": lambda it: permissions.GetPermissionsRequest(serving_endpoint_id=it.endpoint_id),
    "SetPermissions": lambda it: permissions.SetPermissionsRequest(serving_endpoint_id=it.endpoint_id),
    "UpdatePermissions": lambda it: permissions.UpdatePermissionsRequest(serving_endpoint_id=it.endpoint_id),
    "GetPermissionLevels": lambda it: permissions.GetPermissionLevelsRequest(serving_endpoint_id=it.endpoint_id),
    "CreateUser": lambda it: identity.CreateUserRequest(user_name=it.new),
    "CreateGroup": lambda it: identity.CreateGroupRequest(display_name=it.new),
    "CreateServicePrincipal": lambda it: identity.CreateServicePrincipalRequest(display_name=it.new),
    "UpdateToken": a_token_change,
    "DeleteToken": lambda it: identity.DeleteTokenRequest(token_id=it.token_id),
    "CreateOboToken": lambda it: identity.CreateOboTokenRequest(application_id="reader"),
    "CreateServicePrincipalSecret": lambda it: identity.CreateServicePrincipalSecretRequest(service_principal_id=NO_ID),
    "ListServicePrincipalSecrets": lambda it: identity.ListServicePrincipalSecretsRequest(service_principal_id=NO_ID),
    "DeleteServicePrincipalSecret": lambda it: identity.DeleteServicePrincipalSecretRequest(
        service_principal_id=NO_ID, secret_id="x"
    ),
    "IssueToken": lambda it: identity.IssueTokenRequest(assertion=it.token),
    "ExchangeToken": lambda it: identity.ExchangeTokenRequest(token=it.token),
    "CreateServingEndpoint": lambda it: serving.CreateServingEndpointRequest(name=it.new),
    "GetServingEndpoint": lambda it: serving.GetServingEndpointRequest(name="steady"),
    "DeleteServingEndpoint": lambda it: serving.DeleteServingEndpointRequest(name=it.new),
    "UpdateServingEndpointConfig": lambda it: serving.UpdateServingEndpointConfigRequest(name=it.new),
    "StopServingEndpoint": lambda it: serving.StopServingEndpointRequest(name=it.new),
    "StartServingEndpoint": lambda it: serving.StartServingEndpointRequest(name=it.new),
    "CancelServingEndpointUpdate": lambda it: serving.CancelServingEndpointUpdateRequest(name=it.new),
    "PatchServingEndpointTags": lambda it: serving.PatchServingEndpointTagsRequest(name="steady"),
    "PutServingEndpointRateLimits": lambda it: serving.PutServingEndpointRateLimitsRequest(name="steady"),
    "PutServingEndpointAiGateway": lambda it: serving.PutServingEndpointAiGatewayRequest(name="steady"),
    "UpdateServingEndpointNotifications": lambda it: serving.UpdateServingEndpointNotificationsRequest(name="steady"),
    "PatchServingEndpointTelemetryConfig": lambda it: serving.PatchServingEndpointTelemetryConfigRequest(name="steady"),
    "ListServingEndpointEvents": lambda it: serving.ListServingEndpointEventsRequest(name="steady"),
    "ListServingEndpointMetricsHistory": lambda it: serving.ListServingEndpointMetricsHistoryRequest(name="steady"),
    "ListServingEndpointUsage": lambda it: serving.ListServingEndpointUsageRequest(name="steady"),
    "ExportServingEndpointMetrics": lambda it: serving.ExportServingEndpointMetricsRequest(name="steady"),
    "GetServingEndpointOpenApi": lambda it: serving.GetServingEndpointOpenApiRequest(name="steady"),
    "GetServedModelLogs": lambda it: serving.GetServedModelLogsRequest(name="steady", served_model_name="ready-1"),
    "GetServedModelBuildLogs": lambda it: serving.GetServedModelBuildLogsRequest(
        name="steady", served_model_name="ready-1"
    ),
    "FollowServedModelLogs": lambda it: serving.FollowServedModelLogsRequest(
        name="steady", served_model_name="ready-1"
    ),
    "FollowServedModelBuildLogs": lambda it: serving.FollowServedModelBuildLogsRequest(
        name="steady", served_model_name="ready-1"
    ),
    "Query": lambda it: serving.QueryRequest(name="steady"),
    "AuthenticateBackup": lambda it: secrets.AuthenticateBackupRequest(store_key_version=1),
    "Report": lambda it: serving.MeasuresReport(gateway_id="g"),
}
"""A request that is let in goes well, but for those below; RPCs that are not named are sent an empty message."""

LET_IN = {
    # About principals and tokens that do not exist: the permission comes before that.
    **dict.fromkeys(("GetUser", "PatchUser", "ReplaceUser", "DeleteUser"), Code.NOT_FOUND),
    **dict.fromkeys(("GetGroup", "PatchGroup", "ReplaceGroup", "DeleteGroup"), Code.NOT_FOUND),
    **dict.fromkeys(("GetServicePrincipal", "PatchServicePrincipal"), Code.NOT_FOUND),
    **dict.fromkeys(("ReplaceServicePrincipal", "DeleteServicePrincipal"), Code.NOT_FOUND),
    **dict.fromkeys(("CreateServicePrincipalSecret", "ListServicePrincipalSecrets"), Code.NOT_FOUND),
    "DeleteServicePrincipalSecret": Code.NOT_FOUND,
    **dict.fromkeys(("GetManagedToken", "UpdateManagedToken", "DeleteManagedToken"), Code.NOT_FOUND),
    # Without entities there is no configuration, and who may not manage does not learn that.
    "UpdateServingEndpointConfig": Code.INVALID_ARGUMENT,
    # Nothing of theirs has ever run.
    "StopServingEndpoint": Code.FAILED_PRECONDITION,
    "StartServingEndpoint": Code.FAILED_PRECONDITION,
    "CancelServingEndpointUpdate": Code.FAILED_PRECONDITION,
    # A good one would end whatever it does not name.
    "Reconcile": Code.INVALID_ARGUMENT,
}


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    async with running_platform(tokens_per_minute=10_000) as platform:
        await platform.introduce(*USERS)
        creator = platform.endpoints_of("creator")
        steady = await creator.create("steady")
        await share(platform, steady.id)
        await creator.settled("steady")
        yield World(platform, steady.id, itertools.count())


async def code_of(channel: grpc.aio.Channel, name: str, request: Message, metadata: Any) -> Any:
    """How a call begins: OK once the first answer is there."""
    method = METHODS[name]
    # A stream of requests has one, which goes out with the call: what is written to a call that is refused at once may
    # fail as a write, and hide the refusal.
    open_call: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    write = type(request).SerializeToString
    read = GetMessageClass(method.output_type).FromString
    stub = open_call(f"/{name}", request_serializer=write, response_deserializer=read)
    call = stub(request, metadata=metadata, timeout=10)
    try:
        await (call.read() if method.server_streaming else call)
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        call.cancel()
    return Code.OK


async def outcome(world: World, name: str, service: str, where: str, metadata: Any) -> Any:
    """How a call about new things is answered at one listener of a service."""
    things = await world.things(name)
    request_of = REQUESTS.get(name.rpartition("/")[2])
    request: Message = GetMessageClass(METHODS[name].input_type)() if request_of is None else request_of(things)
    return await code_of(channel_to(world, service, where), name, request, metadata)


def channel_to(world: World, service: str, where: str) -> grpc.aio.Channel:
    running = world.platform.serving if service == "serving" else world.platform.secrets
    return running.public_channel if where == "public" else running.peer_channels[where]


def services_of(name: str) -> tuple[str, ...]:
    """Who serves an RPC; gRPC's own services are looked at where there are the most peers."""
    if name.startswith("tessera.backups."):
        return ("secrets", "serving")
    return ("serving",) if name.startswith("tessera.serving.") else ("secrets",)


def expected(name: str, where: str, who: str | None) -> grpc.StatusCode:
    """What GOLDEN says about a call by `who`; None is nobody."""
    row, rpc = GOLDEN_RPCS[name], name.rpartition("/")[2]
    let_in = LET_IN.get(rpc, Code.OK)
    peers, _, for_a_caller = row.partition(" for a ")
    if row == "anybody":
        return let_in
    if row not in MAY:
        if where in peers.split(", "):
            return let_in if who is not None or not for_a_caller else Code.UNAUTHENTICATED
        return Code.UNAUTHENTICATED if who is None else Code.UNIMPLEMENTED
    if who is None:
        return Code.UNAUTHENTICATED
    if rpc == "ServerReflectionInfo" and where != "public":
        return Code.UNIMPLEMENTED
    # Everybody may ask for the list; it shows what each may view.
    if who in MAY[row] or rpc == "ListServingEndpoints":
        return let_in
    is_hidden = row == "owner" or (row.startswith("endpoint ") and who not in MAY["endpoint CAN_VIEW"])
    return Code.NOT_FOUND if is_hidden else Code.PERMISSION_DENIED


@pytest.mark.parametrize("name", GOLDEN_RPCS)
async def test_each_rpc_lets_in_whom_the_table_names_and_nobody_else(world: World, name: str) -> None:
    tokens = world.platform.tokens
    assertions = {who: await world.platform.secrets.assertion(tokens[who]) for who in ("stranger", "admin")}
    spoofed = (
        (channels.ASSERTION, assertions["admin"]),
        ("x-tessera-user", "admin"),
        ("x-forwarded-user", "admin"),
        ("x-forwarded-for", "127.0.0.1"),
        ("forwarded", "for=127.0.0.1"),
    )
    found: dict[tuple[str, str], Any] = {}
    wanted: dict[tuple[str, str], Any] = {}

    async def called(where: str, who: str | None, metadata: Any, said: str) -> None:
        found[service, said] = await outcome(world, name, service, where, metadata)
        wanted[service, said] = expected(name, where, who)

    for service in services_of(name):
        await called("public", None, (), "nobody")
        await called("public", None, spoofed, "nobody who pretends to be admin")
        await called("public", "stranger", (*bearer(tokens["stranger"]), *spoofed), "stranger who pretends to be admin")
        for who in (*USERS, "admin"):
            await called("public", who, bearer(tokens[who]), who)
        for peer in PEERS[service]:
            await called(peer, None, (), f"{peer} on nobody's behalf")
            await called(peer, None, bearer(tokens["admin"]), f"{peer} with a token")
            for who, assertion in assertions.items():
                await called(peer, who, ((channels.ASSERTION, assertion),), f"{peer} for {who}")
    assert found == wanted


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_list_of_endpoints_shows_what_each_may_view(world: World) -> None:
    seen = {who: "steady" in await world.platform.endpoints_of(who).names() for who in (*USERS, "admin")}
    assert {who for who, sees in seen.items() if sees} == MAY["endpoint CAN_VIEW"]


@pytest.mark.parametrize("method", ["/tessera.secrets.v1.Secrets/NoSuch", "/no.such.Service/Do", "/", "/x"])
async def test_method_that_is_not_there_is_only_told_to_known_callers(world: World, method: str) -> None:
    for channel in (world.platform.secrets.public_channel, world.platform.serving.public_channel):
        for metadata, code in (
            ((), Code.UNAUTHENTICATED),
            (bearer(world.platform.tokens["admin"]), Code.UNIMPLEMENTED),
        ):
            call: Any = channel.unary_unary(method)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", metadata=metadata, timeout=10)
            assert caught.value.code() is code


# --- every route of the gateway


BINDINGS = bindings(
    [service for files in _OWNED.values() for file in files for service in file.services_by_name.values()]
)
ROUTES = sorted({f"{one.verb} {one.template}" for one in BINDINGS} | GOLDEN_ROUTES.keys())
OPEN_ROUTES = {name for name, row in GOLDEN_ROUTES.items() if row == "anybody"}
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND")
ADDRESS = "http://127.0.0.1"
WEBSOCKET = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def canonical(name: str) -> tuple[str, str]:
    verb, _, template = name.partition(" ")
    return verb, re.sub(r"\{[a-z_]+\}", "x", template)


AS_GOOD = ("slash at the end", "encoded letter", "whole address")
"""Spellings that mean the path itself."""

WITHIN = ("semicolon", "encoded zero", "encoded question mark")
"""What a value at the end of a path may hold; it is another value then."""


def variants(path: str) -> dict[str, str]:
    """Other spellings of a path, some of which a careless server takes for the same."""
    first, _, rest = path[1:].partition("/")
    return {
        "slash at the end": f"{path}/",
        "two slashes at the end": f"{path}//",
        "double slash": f"//{path[1:]}",
        "double slash within": f"/{first}//{rest}",
        "dot": f"/.{path}",
        "dot within": f"/{first}/./{rest}",
        "dots": f"/y/..{path}",
        "encoded dot": f"/%2e{path}",
        "encoded dots": f"/y/%2e%2e{path}",
        "encoded slash": f"/{first}%2f{rest}",
        "encoded slash at the end": f"{path}%2F",
        "encoded letter": f"/%{ord(first[0]):02x}{path[2:]}",
        "encoded twice": f"/%25{ord(first[0]):02x}{path[2:]}",
        "upper case": path.upper(),
        "semicolon": f"{path};x=1",
        "encoded zero": f"{path}%00",
        "encoded question mark": f"{path}%3Fx",
        "backslash": path.replace("/", "/\\", 1),
        "whole address": f"{ADDRESS}{path}",
    }


ELSEWHERE = ("/", "/nowhere", "/ui", "/oidc", "/api", "/api/2.0", "/health/x", "/tessera.secrets.v1.Secrets/GetSecret")


async def test_without_a_credential_nothing_is_answered_but_what_is_open(world: World) -> None:
    answered = set()

    async def send(verb: str, path: str, headers: Any = None) -> None:
        if (await world.platform.fetch(verb, path, headers=headers)).status != 401:
            # A target that is a whole address stands for its path (RFC 9112, 3.2.2).
            answered.add(f"{verb} {path.removeprefix(ADDRESS)}")

    for verb, path in map(canonical, ROUTES):
        for spelling in variants(path).values():
            await send(verb, spelling)
        await send(verb, path, headers=WEBSOCKET)
    for path in {path for _, path in map(canonical, ROUTES)} | {*ELSEWHERE}:
        for verb in VERBS:
            await send(verb, path)
    assert answered == {" ".join(canonical(name)) for name in OPEN_ROUTES}


async def test_another_spelling_of_a_path_never_gives_more_than_the_path(world: World) -> None:
    token = world.platform.tokens["stranger"]
    fetch = world.platform.fetch
    more = []
    for name in ROUTES:
        verb, path = canonical(name)
        status = (await fetch(verb, path, token=token)).status
        for what, spelling in variants(path).items():
            answer = await fetch(verb, spelling, token=token)
            is_no_route = answer.status == 404 and answer.json().get("message", "").startswith("No API found")
            if what in AS_GOOD or (what in WITHIN and name.endswith("}")):
                is_no_route |= answer.status in (404, status)
            if not is_no_route:
                more.append(f"{what}: {verb} {spelling} is answered {answer.status}")
        upgraded = await fetch(verb, path, token=token, headers=WEBSOCKET)
        if upgraded.status not in (404, status):
            more.append(f"websocket: {verb} {path} is answered {upgraded.status}, not {status}")
        for other in VERBS:
            if f"{other} {name.partition(' ')[2]}" not in ROUTES:
                answer = await fetch(other, path, token=token)
                if answer.status != 404:
                    more.append(f"{other} {path} is answered {answer.status}")
    assert more == []


REFUSING = ("GET /oidc/v1/authorize", "POST /oidc/v1/token")
"""What is open to anybody, and does not like what is sent here: no form, and there is no login through a browser."""


@pytest.mark.parametrize("name", GOLDEN_ROUTES)
async def test_each_route_lets_in_whom_the_table_names_and_nobody_else(world: World, name: str) -> None:
    verb, _, template = name.partition(" ")
    path = template.replace("{name}", "steady").replace("{served_model_name}", "ready-1")
    found, wanted = {}, {}
    for who in (None, *USERS, "admin"):
        token = None if who is None else world.platform.tokens[who]
        answer = await world.platform.fetch(
            verb, path, token=token, body=b'{"model": "steady"}' if verb == "POST" else b""
        )
        found[who] = answer.status
        row = GOLDEN_ROUTES[name]
        is_let_in = row == "anybody" or (who is not None and who in MAY[row])
        is_hidden = who is not None and who not in MAY["endpoint CAN_VIEW"]
        wanted[who] = (
            (400 if name in REFUSING else 200) if is_let_in else 401 if who is None else 404 if is_hidden else 403
        )
    assert found == wanted


async def test_headers_that_name_a_caller_are_without_effect_at_the_gateway(world: World) -> None:
    platform = world.platform
    spoofed = {
        "x-tessera-assertion": await platform.secrets.assertion(platform.tokens["admin"]),
        "x-tessera-user": "admin",
        "x-forwarded-user": "admin",
        "x-forwarded-for": "127.0.0.1",
        "x-original-url": "/health",
        "x-http-method-override": "DELETE",
    }
    path = "/api/2.0/serving-endpoints/steady"
    assert (await platform.fetch("GET", path, headers=spoofed)).status == 401
    assert (await platform.fetch("GET", path, token=platform.tokens["stranger"], headers=spoofed)).status == 404
    assert (await platform.fetch("GET", path, token=platform.tokens["creator"], headers=spoofed)).status == 200
