"""Our own protos through the gateway's transcoding: documented bodies and answers, field for field."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.http_rules import RouteTable, bindings
from gateway.json_codec import CodecError, codec_for
from gateway.transcoding import request_message
from tessera.identity.v1 import identity_pb2, permissions_pb2
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2


@pytest.fixture(scope="module")
def routes() -> RouteTable:
    modules = (secrets_pb2, identity_pb2, permissions_pb2, serving_pb2)
    return bindings([service for module in modules for service in module.DESCRIPTOR.services_by_name.values()])


def request(routes: RouteTable, verb: str, path: str, body: bytes = b"", query: bytes = b"") -> Any:
    match = routes.match(verb, path)
    assert match is not None
    binding, params = match
    return request_message(codec_for(binding.method.input_type), binding, params, query, body)


def test_every_rest_rpc_has_json_for_its_messages(routes: RouteTable) -> None:
    for binding in routes:
        of_bytes = [binding.method.output_type] if binding.media_type else []
        for descriptor in {binding.method.input_type, binding.method.output_type}.difference(of_bytes):
            codec = codec_for(descriptor)
            assert codec.decode(codec.encode(codec.decode({}))) == codec.decode({})


def test_documented_create_body_is_read_with_its_strings_and_older_names(routes: RouteTable) -> None:
    body = b"""{
      "name": "text-model",
      "config": {
        "served_models": [{
          "model_name": "text", "model_version": 1, "workload_size": "Small", "scale_to_zero_enabled": "true",
          "environment_vars": {"OPENAI_API_KEY": "{{secrets/s/k}}", "RETRIES": 3, "DEBUG": true}
        }],
        "traffic_config": {"routes": [{"served_model_name": "text-1", "traffic_percentage": "100"}]}
      }
    }"""
    config = request(routes, "POST", "/api/2.0/serving-endpoints/", body).config
    entity = config.served_entities[0]
    assert (entity.entity_name, entity.entity_version, entity.scale_to_zero_enabled) == ("text", "1", True)
    assert dict(entity.environment_vars) == {
        "OPENAI_API_KEY": "{{secrets/s/k}}",
        "RETRIES": "3",
        "DEBUG": "true",
    }
    assert config.traffic_config.routes[0].served_entity_name == "text-1"
    assert config.traffic_config.routes[0].traffic_percentage == 100


def test_bad_flag_is_refused_by_its_full_path(routes: RouteTable) -> None:
    body = b'{"config": {"served_entities": [{"scale_to_zero_enabled": []}]}}'
    with pytest.raises(CodecError) as caught:
        request(routes, "POST", "/api/2.0/serving-endpoints", body)
    assert str(caught.value) == ("config.served_entities[0].scale_to_zero_enabled: expected true or false, got a list")


def test_secret_with_both_kinds_of_value_is_malformed(routes: RouteTable) -> None:
    body = b'{"scope": "s", "key": "k", "string_value": "a", "bytes_value": "YQ=="}'
    with pytest.raises(CodecError) as caught:
        request(routes, "POST", "/api/2.0/secrets/put", body)
    assert caught.value.malformed


def test_secret_value_is_written_in_base64_even_when_empty() -> None:
    response = secrets_pb2.GetSecretResponse(key="k", value=b"\x00\xff")
    codec = codec_for(secrets_pb2.GetSecretResponse.DESCRIPTOR)
    assert codec.encode(response) == {"key": "k", "value": "AP8="}
    assert codec.encode(secrets_pb2.GetSecretResponse(key="k")) == {"key": "k", "value": ""}


def test_backend_type_is_read_in_lower_case(routes: RouteTable) -> None:
    body = b'{"scope": "s", "scope_backend_type": "databricks"}'
    message = request(routes, "POST", "/api/2.0/secrets/scopes/create", body)
    assert message.scope_backend_type == secrets_pb2.DATABRICKS


def test_scim_names_are_camel_case_both_ways(routes: RouteTable) -> None:
    assert request(routes, "POST", "/api/2.0/preview/scim/v2/Users", b'{"userName": "ada"}').user_name == "ada"
    assert request(routes, "GET", "/api/2.0/preview/scim/v2/Users", query=b"startIndex=2&count=10").start_index == 2
    user = identity_pb2.User(user_name="ada", groups=[identity_pb2.GroupReference(display="users", ref="Groups/1")])
    assert codec_for(identity_pb2.User.DESCRIPTOR).encode(user) == {
        "userName": "ada",
        "groups": [{"display": "users", "$ref": "Groups/1"}],
    }


def test_internal_rpcs_have_no_route(routes: RouteTable) -> None:
    names = {binding.method.containing_service.name for binding in routes}
    assert "Secrets" in names
    assert names.isdisjoint({"Authority", "SecretResolver", "Routes"})
