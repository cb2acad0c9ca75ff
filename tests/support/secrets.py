"""The real Secrets service in this process: real gRPC, SQLite and files, on a free port and in a short directory."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from secrets_service import app
from secrets_service.settings import SecretsSettings
from servicekit import channels, sockets
from tessera.identity.v1 import identity_pb2, identity_pb2_grpc, permissions_pb2_grpc
from tessera.secrets.v1 import secrets_pb2, secrets_pb2_grpc

TIMEOUT = 10.0
DRAIN_SECONDS = 5.0
"""Nobody waits longer for a call that a test leaves behind."""

STREAM_TIMEOUT = 60.0
"""A stream that a test reads ends in an error after so many seconds, rather than never."""

INVALID_TOKEN = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED", "Invalid access token.")
"""How every token is refused that lets nobody in: the answer of a Refusal."""

LONGEST_METADATA = 16 * 1024
"""Bytes that the public listener reads of a call's metadata."""

DIGEST = b"what-runs".ljust(32, b".")
"""Stands for what an entity runs, where it does not matter what that is."""

References = Iterable[tuple[str, str]]
"""Scopes and keys."""


class Clock:
    """The time, which a test may move."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


class Caller:
    """Somebody who calls over one channel with one credential: `await caller(caller.secrets.GetSecret, request)`."""

    def __init__(self, channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> None:
        self.channel = channel
        self.metadata = metadata
        self.secrets = secrets_pb2_grpc.SecretsStub(channel)
        self.key_rotation = secrets_pb2_grpc.KeysStub(channel)
        self.resolver = secrets_pb2_grpc.SecretResolverStub(channel)
        self.scim = identity_pb2_grpc.ScimStub(channel)
        self.tokens = identity_pb2_grpc.TokensStub(channel)
        self.client_secrets = identity_pb2_grpc.ServicePrincipalSecretsStub(channel)
        self.authority = identity_pb2_grpc.AuthorityStub(channel)
        self.permissions = permissions_pb2_grpc.PermissionsStub(channel)
        self.feed = permissions_pb2_grpc.AccessFeedStub(channel)

    async def __call__(self, method: Callable[..., Awaitable[Any]], message: Any) -> Any:
        return await method(message, metadata=self.metadata, timeout=TIMEOUT)

    async def create_scope(self, scope: str, manager: str = "") -> None:
        await self(
            self.secrets.CreateScope,
            secrets_pb2.CreateScopeRequest(scope=scope, initial_manage_principal=manager),
        )

    async def warned(self, method: Callable[..., Any], message: Any) -> list[str]:
        """The warnings that come with the answer to a call."""
        answering = method(message, metadata=self.metadata, timeout=TIMEOUT)
        await answering
        return [value for name, value in await answering.trailing_metadata() or () if name == channels.WARNING]

    async def put(self, scope: str, key: str, value: str | bytes, *, if_version: int | None = None) -> None:
        request = secrets_pb2.PutSecretRequest(scope=scope, key=key, if_version=if_version)
        if isinstance(value, str):
            request.string_value = value
        else:
            request.bytes_value = value
        await self(self.secrets.PutSecret, request)

    async def get(self, scope: str, key: str) -> bytes:
        answer = await self(self.secrets.GetSecret, secrets_pb2.GetSecretRequest(scope=scope, key=key))
        return bytes(answer.value)

    async def delete(self, scope: str, key: str) -> None:
        await self(self.secrets.DeleteSecret, secrets_pb2.DeleteSecretRequest(scope=scope, key=key))

    async def versions(self, scope: str, key: str) -> list[secrets_pb2.SecretVersion]:
        request = secrets_pb2.ListSecretVersionsRequest(scope=scope, key=key)
        return list((await self(self.secrets.ListSecretVersions, request)).versions)

    async def restore(self, scope: str, key: str, version: int) -> int:
        request = secrets_pb2.RestoreSecretRequest(scope=scope, key=key, version=version)
        return int((await self(self.secrets.RestoreSecret, request)).version)

    async def purge(self, scope: str, key: str) -> None:
        await self(self.secrets.PurgeSecret, secrets_pb2.PurgeSecretRequest(scope=scope, key=key))

    async def keys(self, scope: str) -> list[str]:
        answer = await self(self.secrets.ListSecrets, secrets_pb2.ListSecretsRequest(scope=scope))
        return [secret.key for secret in answer.secrets]

    async def grant(self, scope: str, principal: str, permission: secrets_pb2.AclPermission.ValueType) -> None:
        await self(
            self.secrets.PutAcl,
            secrets_pb2.PutAclRequest(scope=scope, principal=principal, permission=permission),
        )

    async def acls(self, scope: str) -> list[tuple[str, str]]:
        answer = await self(self.secrets.ListAcls, secrets_pb2.ListAclsRequest(scope=scope))
        return [(item.principal, secrets_pb2.AclPermission.Name(item.permission)) for item in answer.items]

    async def create_user(self, user_name: str, /, **fields: Any) -> identity_pb2.User:
        request = identity_pb2.CreateUserRequest(user_name=user_name, **fields)
        user: identity_pb2.User = await self(self.scim.CreateUser, request)
        return user


@dataclass(frozen=True, kw_only=True)
class RunningSecrets:
    """The service, and ways to call it."""

    settings: SecretsSettings
    address: str
    peer_address: str
    public_channel: grpc.aio.Channel
    peer_channels: dict[str, grpc.aio.Channel]
    clock: Clock
    admin_token: str = field(repr=False)

    def public(self, token: str | None) -> Caller:
        """A caller of the public listener."""
        return Caller(self.public_channel, *(() if token is None else (("authorization", f"Bearer {token}"),)))

    def peer(self, name: str, assertion: str | None = None) -> Caller:
        """A caller of an internal socket, on behalf of whom the assertion speaks of."""
        return Caller(self.peer_channels[name], *(() if assertion is None else ((channels.ASSERTION, assertion),)))

    @property
    def admin(self) -> Caller:
        """The first admin at the public listener."""
        return self.public(self.admin_token)

    async def token_for(self, name: str) -> str:
        """A token of an existing user, made by the admin."""
        answer = await self.admin(
            self.admin.tokens.CreateOboToken, identity_pb2.CreateOboTokenRequest(application_id=name)
        )
        return str(answer.token_value)

    async def user(self, name: str) -> Caller:
        """A new user at the public listener."""
        await self.admin.create_user(name)
        return self.public(await self.token_for(name))

    async def as_serving(self, caller: Caller) -> Caller:
        """Serving, on behalf of a caller of the public listener."""
        return self.peer("serving", await self.assertion(caller.metadata[0][1].removeprefix("Bearer ")))

    async def grant(
        self,
        author: Caller,
        *references: tuple[str, str],
        endpoint_id: str | None = None,
        version: int = 1,
        digest: bytes = DIGEST,
    ) -> tuple[str, secrets_pb2.GrantLaunchesResponse]:
        """Grants an entity's references on behalf of an author: to a new endpoint, or to the one of that id."""
        serving = await self.as_serving(author)
        request = secrets_pb2.GrantLaunchesRequest(
            endpoint_id=endpoint_id or uuid.uuid4().hex,
            is_new=endpoint_id is None,
            version=version,
            entities=[secrets_pb2.GrantedEntity(digest=digest, references=as_messages(references))],
        )
        return request.endpoint_id, await serving(serving.resolver.GrantLaunches, request)

    async def resolve(
        self,
        endpoint_id: str,
        *references: tuple[str, str],
        replica_id: str = "r1",
        version: int = 1,
        digest: bytes = DIGEST,
    ) -> secrets_pb2.ResolveResponse:
        """What a launch gets."""
        serving = self.peer("serving")
        request = secrets_pb2.ResolveRequest(
            endpoint_id=endpoint_id,
            version=version,
            digest=digest,
            replica_id=replica_id,
            references=as_messages(references),
        )
        answer: secrets_pb2.ResolveResponse = await serving(serving.resolver.Resolve, request)
        return answer

    async def settle(self, **over: Any) -> None:
        """Says what is over: the fields of SettleRequest."""
        serving = self.peer("serving")
        await serving(serving.resolver.Settle, secrets_pb2.SettleRequest(**over))

    async def reconcile(self, *replica_ids: str, endpoints: Iterable[secrets_pb2.ExistingEndpoint] = ()) -> None:
        """Says what there is."""
        serving = self.peer("serving")
        request = secrets_pb2.ReconcileRequest(replica_ids=replica_ids, endpoints=endpoints)
        await serving(serving.resolver.Reconcile, request)

    async def assertion(self, token: str) -> str:
        """What a peer gets for a token."""
        peer = self.peer("gateway")
        answer = await peer(peer.authority.ExchangeToken, identity_pb2.ExchangeTokenRequest(token=token))
        return str(answer.assertion)


def as_messages(references: References) -> list[secrets_pb2.SecretReference]:
    """References as they are sent."""
    return [secrets_pb2.SecretReference(scope=scope, key=key) for scope, key in references]


def failures_of(
    answer: secrets_pb2.GrantLaunchesResponse | secrets_pb2.ResolveResponse,
) -> list[tuple[str, str, str, str]]:
    """Scope, key, kind and principal of each failure."""
    return [
        (
            failure.reference.scope,
            failure.reference.key,
            secrets_pb2.ReferenceFailure.Kind.Name(failure.kind),
            failure.principal,
        )
        for failure in answer.failures
    ]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An error as a caller sees it."""

    code: grpc.StatusCode
    reason: str
    message: str
    facts: dict[str, str]

    @property
    def answer(self) -> tuple[grpc.StatusCode, str, str]:
        """All but the facts."""
        return self.code, self.reason, self.message


async def refusal(call: Awaitable[Any]) -> Refusal:
    """The error that a call is answered with; fails when it succeeds."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        info = ErrorInfo()
        status = rpc_status.from_call(error)
        if status is not None:
            assert status.details[0].Unpack(info)
        return Refusal(code=error.code(), reason=info.reason, message=error.details() or "", facts=dict(info.metadata))
    raise AssertionError("the call succeeded")


async def lets_nobody_in(service: RunningSecrets, token: str) -> bool:
    """Whether a token is refused at the public listener: in the usual words, or by gRPC when no call may carry it."""
    caller = service.public(token)
    refused = await refusal(caller(caller.scim.GetMe, identity_pb2.GetMeRequest()))
    if len(token) > LONGEST_METADATA:
        return refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    return refused.answer == INVALID_TOKEN


async def failing(error: grpc.aio.AioRpcError) -> None:
    """A call that was answered with an error."""
    raise error


@contextmanager
def data_directory() -> Iterator[Path]:
    """An empty directory whose path is short enough for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def settings_for(directory: Path, **changes: Any) -> SecretsSettings:
    """Settings for a data directory, with a port that the system chooses."""
    return SecretsSettings(
        **{
            "data_dir": directory,
            "listen": "127.0.0.1:0",
            "failed_logins": 0,
            "changes": 0,
            "drain_seconds": DRAIN_SECONDS,
            **changes,
        }
    )


@asynccontextmanager
async def running_secrets(
    directory: Path | None = None, *, clock: Clock | None = None, **changes: Any
) -> AsyncIterator[RunningSecrets]:
    """Runs the service on a data directory, which is kept; or on one of its own, which is removed."""
    clock = clock or Clock()
    async with AsyncExitStack() as stack:
        if directory is None:
            directory = stack.enter_context(data_directory())
        settings = settings_for(directory, **changes)
        service = await stack.enter_async_context(app.running(settings, now=clock))
        yield RunningSecrets(
            settings=settings,
            address=service.address,
            peer_address=service.peer_address,
            public_channel=await stack.enter_async_context(channels.opened(service.address)),
            peer_channels={
                peer: await stack.enter_async_context(
                    channels.opened(sockets.socket_address(settings.sockets, callee="secrets", caller=peer))
                )
                for peer in app.PEERS
            },
            clock=clock,
            admin_token=settings.admin_token.read_text().strip() if settings.admin_token.exists() else "",
        )
