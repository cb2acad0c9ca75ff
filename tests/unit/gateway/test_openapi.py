"""The description of the API, made from routes, messages and comments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import openapi_spec_validator
import pytest
from google.protobuf.descriptor import Descriptor
from jsonschema import Draft202012Validator

from gateway.app import Gateway
from gateway.http_rules import RouteTable, bindings
from gateway.openapi.document import Document, examples
from gateway.openapi.schemas import Schemas
from tessera.errors.v1 import errors_pb2
from tessera.identity.v1 import identity_pb2, permissions_pb2
from tessera.options.v1 import options_pb2
from tessera.policy import POLICY
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2
from tests.support.descriptors import ProtoFile, service

PROTOS = Path(__file__).parents[3] / "protos"
VARIABLE = re.compile(r"{([a-z_]+)}")


@pytest.fixture(scope="module")
def rules() -> RouteTable:
    modules = (secrets_pb2, identity_pb2, permissions_pb2, serving_pb2)
    return bindings([service for module in modules for service in module.DESCRIPTOR.services_by_name.values()])


@pytest.fixture(scope="module")
def document(rules: RouteTable) -> Any:
    return json.loads(Document(rules, "https://tessera.example.com").text)


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, item in document["paths"].items():
        for verb, operation in item.items():
            yield verb.upper(), path, operation


def schema_of(message: Descriptor, comments: dict[str, str] | None = None) -> Any:
    return Schemas(comments or {}).message(message)


def a_message(*fields: str, **options: dict[str, Any]) -> Descriptor:
    file = ProtoFile()
    file.enum("Color", "COLOR_UNSPECIFIED", "RED", "GREEN")
    file.message("Item", "string name")
    file.message("Thing", *fields, **options)
    return file.build().message_types_by_name["Thing"]


# The whole


def test_document_is_valid(document: Any) -> None:
    openapi_spec_validator.validate(document)
    assert document["openapi"] == "3.1.0"


def test_every_route_that_is_a_message_is_described(rules: RouteTable, document: Any) -> None:
    shown = {(verb, path) for verb, path, _ in operations(document)}
    assert {(binding.verb, binding.template) for binding in rules} <= shown


def test_every_special_route_is_described_and_nothing_else(rules: RouteTable, document: Any) -> None:
    specials = Gateway(
        table=POLICY,
        rules=rules,
        transcoder=Mock(),
        exchange=Mock(),
        invocations=Mock(),
        oauth=Mock(),
        document=Mock(),
        public_url="",
        trusted_proxies=(),
        failed_logins=Mock(),
        room=Mock(),
        calls=Mock(),
    )._special
    by_hand = {(verb, path) for verb, path, _ in operations(document)} - {(one.verb, one.template) for one in rules}
    taken = {
        (verb, path): [one for one in specials if one.method == verb and one.path.fullmatch(VARIABLE.sub("x", path))]
        for verb, path in by_hand
    }
    assert [route for route, found in taken.items() if len(found) != 1] == []
    undescribed = [one.path.pattern for one in specials if [one] not in taken.values()]
    assert undescribed == []


def test_operations_have_names_of_their_own_and_say_what_they_do(document: Any) -> None:
    names = [operation["operationId"] for *_, operation in operations(document)]
    assert len(names) == len(set(names))
    assert [operation["operationId"] for *_, operation in operations(document) if not operation["summary"]] == []


def test_every_type_and_property_is_explained(document: Any) -> None:
    components = document["components"]["schemas"]
    silent = [name for name, schema in components.items() if "." in name and not schema.get("description")]
    silent += [
        f"{name}.{field}"
        for name, schema in components.items()
        for field, property_ in schema.get("properties", {}).items()
        if "." in name and not property_.get("description")
    ]
    assert silent == []


def test_descriptions_are_the_comments_of_the_protos(document: Any) -> None:
    text = re.sub(r"\n *// ?", "\n", (PROTOS / "tessera/secrets/v1/secrets.proto").read_text())
    described = [operation for *_, operation in operations(document) if operation["tags"] == ["Secrets"]]
    assert described
    assert [one["operationId"] for one in described if one["description"] not in text] == []


def test_every_reason_is_an_error_code_with_its_status(document: Any) -> None:
    reasons = [value for value in errors_pb2.ErrorReason.DESCRIPTOR.values if value.number]
    assert document["components"]["schemas"]["ErrorReason"]["enum"] == [reason.name for reason in reasons]
    for reason in reasons:
        status = reason.GetOptions().Extensions[options_pb2.http_status]
        assert f"`{reason.name}`" in document["components"]["responses"][f"Error{status}"]["description"]


def test_every_route_that_needs_a_credential_says_how_it_refuses(document: Any) -> None:
    public = {path for _, path, operation in operations(document) if operation.get("security") == []}
    assert public == {
        "/.well-known/databricks-config",
        "/health",
        "/oidc/.well-known/oauth-authorization-server",
        "/oidc/accounts/{account_id}/.well-known/oauth-authorization-server",
        "/oidc/v1/authorize",
        "/oidc/v1/token",
    }
    silent = [path for _, path, operation in operations(document) if path not in public and not refuses(operation)]
    assert silent == []


def refuses(operation: Any) -> bool:
    return {"400", "401", "403", "404", "503"} <= set(operation["responses"])


def test_only_services_of_that_shape_answer_with_scim_errors(rules: RouteTable, document: Any) -> None:
    for binding in rules:
        responses = document["paths"][binding.template][binding.verb.lower()]["responses"]
        is_scim = binding.service.GetOptions().Extensions[options_pb2.error_shape] == options_pb2.ERROR_SHAPE_SCIM
        name = "ScimError429" if is_scim else "Error429"
        assert responses["429"] == {"$ref": f"#/components/responses/{name}"}
        assert str(binding.success_status) in responses


def test_changes_that_are_made_once_take_a_request_id(document: Any) -> None:
    taking = {
        (operation["tags"][0], verb)
        for verb, _, operation in operations(document)
        for parameter in operation.get("parameters", ())
        if (parameter["name"], parameter["in"]) == ("X-Tessera-Request-Id", "header")
    }
    services = {"Secrets", "Scim", "Tokens", "ServicePrincipalSecrets", "Permissions", "ServingEndpoints"}
    changes = {(operation["tags"][0], verb) for verb, _, operation in operations(document) if verb != "GET"}
    assert taking == {(tag, verb) for tag, verb in changes if tag in services}
    assert {tag for tag, _ in taking} == services


def test_what_stands_in_the_path_is_not_asked_for_in_the_body(document: Any) -> None:
    for _, path, operation in operations(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        resolved = document["components"]["schemas"][body["$ref"].split("/")[-1]] if "$ref" in body else body
        assert not set(VARIABLE.findall(path)) & set(resolved.get("properties", {})), path


def test_examples_fit_the_schemas_of_their_operations(document: Any) -> None:
    by_name = {operation["operationId"]: operation for *_, operation in operations(document)}
    for example in examples():
        operation = by_name[example["operation"]]
        answer = operation["responses"][str(example.get("status", 200))]["content"]["application/json"]
        media = [(answer, example["answer"])]
        if "body" in example:
            media.append((operation["requestBody"]["content"]["application/json"], example["body"]))
        for content, value in media:
            Draft202012Validator({**content["schema"], "components": document["components"]}).validate(value)
            assert {"value": value} == content["examples"][example["name"]]


def test_other_services_are_described_just_so() -> None:
    document = json.loads(Document(bindings([service("Library"), service("People")]), "http://x").text)
    openapi_spec_validator.validate(document)
    get = document["paths"]["/api/things/{name}"]["get"]
    places = {parameter["name"]: (parameter["in"], parameter["required"]) for parameter in get["parameters"]}
    assert places["name"] == ("path", True)
    assert places["flag"] == places["words"] == places["item.title"] == ("query", False)
    assert not [name for name in places if name.startswith(("free", "any", "child"))]
    printed = document["paths"]["/api/things/{name}/print"]["get"]["responses"]["200"]["content"]
    assert printed == {"text/plain": {"schema": {"type": "string"}}}
    put_item = document["paths"]["/api/things/{name}/item"]["put"]
    assert put_item["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(".Item")
    assert "201" in document["paths"]["/scim/People"]["post"]["responses"]


# Types


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("string a", {"type": "string"}),
        ("bool a", {"type": "boolean"}),
        ("int64 a", {"type": "integer", "format": "int64"}),
        ("optional int64 a", {"type": "integer", "format": "int64"}),
        ("double a", {"type": "number", "format": "double"}),
        ("bytes a", {"type": "string", "contentEncoding": "base64"}),
        ("repeated string a", {"type": "array", "items": {"type": "string"}}),
        ("map<string,int64> a", {"type": "object", "additionalProperties": {"type": "integer", "format": "int64"}}),
        ("google.protobuf.Struct a", {"type": "object"}),
        ("google.protobuf.Value a", {}),
    ],
)
def test_fields_are_described_as_the_codec_writes_them(field: str, expected: Any) -> None:
    assert schema_of(a_message(field)) == {"type": "object", "properties": {"a": expected}}


def test_properties_have_the_names_of_the_dialect() -> None:
    message = a_message("string user_name", "string display_name", display_name={"json_name": "displayName"})
    assert set(schema_of(message)["properties"]) == {"user_name", "displayName"}


def test_other_names_of_a_field_are_told() -> None:
    message = a_message("string entity_name", entity_name={"alias": ["model_name"]})
    comments = {f"{message.full_name}.entity_name": "Required. The model."}
    schema = schema_of(message, comments)
    assert schema["properties"]["entity_name"]["description"] == "Required. The model. Also read as `model_name`."
    assert "required" not in schema  # it may come as model_name


def test_fields_that_must_be_given_or_are_always_written_are_required() -> None:
    message = a_message("string a", "string b", "string c", b={"always_emit": True})
    assert schema_of(message, {f"{message.full_name}.a": "Required. A name."})["required"] == ["a", "b"]


def test_fields_of_a_oneof_exclude_each_other() -> None:
    validator = Draft202012Validator(schema_of(a_message("choice: string a", "choice: string b", "string c")))
    assert validator.is_valid({"a": "1", "c": "2"})
    assert not validator.is_valid({"a": "1", "b": "2"})


def test_enums_have_names_and_no_value_for_nothing() -> None:
    schemas = Schemas({})
    message = a_message("Color color", "repeated Item items")
    name = message.file.package.removeprefix("tessera.")
    properties = schemas.message(message)["properties"]
    assert properties["color"] == {"$ref": f"#/components/schemas/{name}.Color"}
    assert properties["items"]["items"] == {"$ref": f"#/components/schemas/{name}.Item"}
    assert schemas.components[f"{name}.Color"]["enum"] == ["RED", "GREEN"]
