"""A gRPC client that has no stubs: it learns the public API from reflection, and nothing internal is there to learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from servicekit.exposure import exposure
from tessera.identity.v1 import identity_pb2, permissions_pb2
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2
from tests.support.stack import Stack, running_stack

STANDARD = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
PUBLIC = {
    "secrets": {
        "tessera.secrets.v1.Secrets",
        "tessera.identity.v1.Scim",
        "tessera.identity.v1.Tokens",
        "tessera.identity.v1.ServicePrincipalSecrets",
        "tessera.identity.v1.Permissions",
        "tessera.identity.v1.AuditLog",
    },
    "serving": {"tessera.serving.v1.ServingEndpoints", "tessera.serving.v1.ServingAuditLog"},
}
FILES = {
    "secrets": (secrets_pb2.DESCRIPTOR, identity_pb2.DESCRIPTOR, permissions_pb2.DESCRIPTOR),
    "serving": (serving_pb2.DESCRIPTOR,),
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        yield running


class _Metadata(NamedTuple):
    method: str
    timeout: float | None
    metadata: list[tuple[str, str]]
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Authorized(grpc.StreamStreamClientInterceptor, grpc.UnaryUnaryClientInterceptor):
    """Adds a token, as a user's client would be configured to."""

    def __init__(self, token: str) -> None:
        self._token = token

    def _call(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = [("authorization", f"Bearer {self._token}")]
        return continuation(_Metadata(details.method, 20, metadata, None, None, None), request)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._call(continuation, client_call_details, request_iterator)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._call(continuation, client_call_details, request)


class Reflected:
    """What a client can do that knows an address and a token."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = DescriptorPool(self.database)

    def call(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """One unary call of `package.Service/Method`."""
        service, _, method_name = name.partition("/")
        method = self.pool.FindServiceByName(service).methods_by_name[method_name]
        invoke: Any = self._channel.unary_unary(
            f"/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = invoke(ParseDict(request, GetMessageClass(method.input_type)()), timeout=20)
        return MessageToDict(answer, preserving_proto_field_name=True)


def raw_call(channel: grpc.Channel, name: str) -> Any:
    """One call of `package.Service/Method` with an empty message, as bytes both ways."""
    invoke: Any = channel.unary_unary(f"/{name}")
    return invoke(b"", timeout=20)


def code_of(refused: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    error: Any = refused.value
    code: grpc.StatusCode = error.code()
    return code


@pytest.fixture(params=["secrets", "serving"])
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def channel(stack: Stack, service: str) -> Iterator[grpc.Channel]:
    address = {"secrets": stack.secrets_address, "serving": stack.serving_address}[service]
    with grpc.insecure_channel(address) as plain:
        yield plain


@pytest.fixture
def reflected(stack: Stack, channel: grpc.Channel) -> Reflected:
    return Reflected(grpc.intercept_channel(channel, _Authorized(stack.token)))


def test_public_services_are_listed_and_nothing_else(reflected: Reflected, service: str) -> None:
    assert set(reflected.database.get_services()) == PUBLIC[service] | STANDARD


@pytest.mark.parametrize("authorized", [[], ["dapi0000000000000000"]], ids=["no token", "wrong token"])
def test_reflection_is_refused_without_a_good_token(channel: grpc.Channel, authorized: list[str]) -> None:
    chosen = grpc.intercept_channel(channel, *map(_Authorized, authorized))
    with pytest.raises(grpc.RpcError) as refused:
        ProtoReflectionDescriptorDatabase(chosen).get_services()
    expected = grpc.StatusCode.PERMISSION_DENIED if authorized else grpc.StatusCode.UNAUTHENTICATED
    assert code_of(refused) == expected


def test_call_made_of_reflected_descriptors_works(reflected: Reflected, service: str) -> None:
    if service == "secrets":
        scope = {"scope": "reflected"}
        assert reflected.call("tessera.secrets.v1.Secrets/CreateScope", scope) == {}
        put = {**scope, "key": "key", "bytes_value": "AP8="}
        assert reflected.call("tessera.secrets.v1.Secrets/PutSecret", put) == {}
        got = reflected.call("tessera.secrets.v1.Secrets/GetSecret", {**scope, "key": "KEY"})
        assert got == {"key": "key", "value": "AP8="}
        assert reflected.call("tessera.identity.v1.Scim/GetMe", {})["user_name"] == "admin"
        return
    created = reflected.call("tessera.serving.v1.ServingEndpoints/CreateServingEndpoint", {"name": "reflected"})
    assert created["state"]["ready"] == "NOT_READY"
    listed = reflected.call("tessera.serving.v1.ServingEndpoints/ListServingEndpoints", {})
    assert [endpoint["name"] for endpoint in listed["endpoints"]] == ["reflected"]


def test_public_rpc_is_refused_without_a_token(channel: grpc.Channel, service: str) -> None:
    name = {
        "secrets": "tessera.secrets.v1.Secrets/ListScopes",
        "serving": "tessera.serving.v1.ServingEndpoints/ListServingEndpoints",
    }
    with pytest.raises(grpc.RpcError) as refused:
        raw_call(channel, name[service])
    assert code_of(refused) == grpc.StatusCode.UNAUTHENTICATED


def test_internal_rpcs_do_not_exist_on_a_public_listener(stack: Stack, channel: grpc.Channel, service: str) -> None:
    authorized = grpc.intercept_channel(channel, _Authorized(stack.token))
    known = [known for file in FILES[service] for known in file.services_by_name.values()]
    methods = [method for one in known for method in one.methods if exposure(method).callers]
    assert methods
    for method in methods:
        with pytest.raises(grpc.RpcError) as refused:
            raw_call(authorized, f"{method.containing_service.full_name}/{method.name}")
        assert code_of(refused) == grpc.StatusCode.UNIMPLEMENTED, method.full_name


def test_health_is_open_to_everybody(channel: grpc.Channel) -> None:
    # SERVING, in the wire form of a message of one enum.
    assert raw_call(channel, "grpc.health.v1.Health/Check") == b"\x08\x01"
