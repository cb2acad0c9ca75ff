"""Nothing can be set that a request has no field for, and nothing is told that no list names.

Every request of the REST API is sent three times about things of its own: plain, and twice with a value for each name
that any answer knows, in every object of its body or in its query. The answers and what is stored must be the same.

`answer_fields.json` lists the type of each RPC's answer and the fields of each type that an answer is made of. A new
field is told to callers only once it stands there: look at who may call its RPCs before you add it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from gateway.app import _OWNED
from gateway.http_rules import ALL, Binding, bindings
from gateway.json_codec import codec_for
from servicekit.policy import rpc_name
from tests.support.eventually import eventually
from tests.support.http import Answer
from tests.support.platform import Platform, running_platform

LISTED = json.loads((Path(__file__).parent / "answer_fields.json").read_text())
SERVICES = [service for files in _OWNED.values() for file in files for service in file.services_by_name.values()]
BINDINGS = {rpc_name(one.method): one for one in bindings(SERVICES)}

SECRETS = "/api/2.0/secrets"
SCIM = "/api/2.0/preview/scim/v2"
ENDPOINTS = "/api/2.0/serving-endpoints"
MANAGED = "/api/2.0/token-management/tokens"
OF_ROBOT = "/api/2.0/accounts/servicePrincipals"

CANARY, NUMBER = "canary-666", 666_123
"""Values that are found nowhere else."""

NOWHERE = ("creator_id", "owner", "owner_id", "grant", "admin", "is_admin", "revision", "workspace_id", "password")
"""Names that no answer has, and that somebody could think of."""

CHANGING = {"id", "token_id", "token_value", "applicationId", "secret", "secret_hash"} | {
    *("create_time", "update_time", "expire_time"),
    *(
        "creation_time",
        "expiry_time",
        "created_timestamp",
        "creation_timestamp",
        "last_updated_timestamp",
        "start_time",
    ),
}
"""Fields that are different in every object; of these only the type is compared, and that the canary is not in them."""


# --- what is told


def types_within(descriptor: Descriptor, found: dict[str, Descriptor] | None = None) -> dict[str, Descriptor]:
    """Every message type that a message is made of, itself included."""
    found = {} if found is None else found
    if descriptor.full_name not in found and not descriptor.full_name.startswith("google."):
        found[descriptor.full_name] = descriptor
        for field in descriptor.fields:
            if field.message_type is not None:
                types_within(field.message_type, found)
    return found


def test_answers_have_exactly_the_fields_that_are_listed() -> None:
    methods = {rpc_name(method): method for service in SERVICES for method in service.methods}
    types: dict[str, Descriptor] = {}
    for method in methods.values():
        types_within(method.output_type, types)
    assert {
        "rpcs": {name: method.output_type.full_name for name, method in methods.items()},
        "types": {name: [field.name for field in descriptor.fields] for name, descriptor in types.items()},
    } == LISTED


def untold(descriptor: Descriptor, document: Any, at: str = "") -> Iterator[str]:
    """Names in an answer that no list has."""
    fields = {field.json_name: field for field in codec_for(descriptor).fields().values()} | codec_for(
        descriptor
    ).fields()
    for name, value in document.items():
        field = fields.get(name)
        if field is None or field.name not in LISTED["types"][descriptor.full_name]:
            yield f"{at}{name}"
        elif field.message_type is not None and not field.message_type.full_name.startswith("google."):
            for each in value if isinstance(value, list) else [value]:
                if not field.message_type.GetOptions().map_entry:
                    yield from untold(field.message_type, each, f"{at}{name}.")


# --- what can be set


@dataclass(frozen=True)
class Case:
    """A request and how its effect is seen; in every text `<n>` is a name of its own, `<id>` what `before` made."""

    body: Any = None
    query: Any = None
    before: tuple[tuple[str, str, Any], ...] = ()
    """Requests that make what this one is about."""

    views: tuple[str, ...] = ()
    """Paths under which the effect is seen; `<made>` is the id in the answer."""

    is_open: bool = True
    """Whether an ordinary user sends it, rather than an admin."""


def post(path: str, **body: Any) -> tuple[str, str, Any]:
    return "POST", path, body


SCOPE = post(f"{SECRETS}/scopes/create", scope="<n>")
SECRET = post(f"{SECRETS}/put", scope="<n>", key="k", string_value="old")
DELETED = post(f"{SECRETS}/delete", scope="<n>", key="k")
NEWER = post(f"{SECRETS}/put", scope="<n>", key="k", string_value="new")
READER = post(f"{SECRETS}/acls/put", scope="<n>", principal="users", permission="READ")
TOKEN = post("/api/2.0/token/create", comment="<n>")
USER = post(f"{SCIM}/Users", userName="<n>", displayName="Old")
GROUP = post(f"{SCIM}/Groups", displayName="<n>")
ROBOT = post(f"{SCIM}/ServicePrincipals", displayName="<n>")
CREDENTIALS = f"{OF_ROBOT}/<id>/credentials/secrets"
CLIENT_SECRET = post(CREDENTIALS)
ENDPOINT = post(ENDPOINTS, name="<n>", config={"served_entities": [{"entity_name": "ready", "entity_version": "1"}]})
SLOW = post(ENDPOINTS, name="<n>", config={"served_entities": [{"entity_name": "slow", "entity_version": "1"}]})
STOPPED = post(f"{ENDPOINTS}/<n>/config:stop")
BARE = post(ENDPOINTS, name="<n>")
GRANT = {"group_name": "users", "permission_level": "CAN_VIEW"}
MINE = {"user_name": "alice", "permission_level": "CAN_MANAGE"}
GRANTED = "/api/2.0/permissions/serving-endpoints/<id>"

OF_SECRET = {"scope": "<n>", "key": "k"}
ACLS, KEYS = f"{SECRETS}/acls/list?scope=<n>", f"{SECRETS}/list?scope=<n>"
VALUE = f"{SECRETS}/get?scope=<n>&key=k"
VERSIONS = "/api/2.0/tessera/secrets/versions/list?scope=<n>&key=k"
TELLING = (ACLS, KEYS, VALUE, VERSIONS)
PATCH = {"Operations": [{"op": "replace", "path": "displayName", "value": "<n> Ada"}]}
PERSON = {
    "userName": "<n>",
    "displayName": "Ada",
    "name": {"givenName": "A"},
    "emails": [{"value": "a@example.com"}],
    "roles": [{"value": "r"}],
    "entitlements": [{"value": "e"}],
}
MACHINE = {"displayName": "<n>", "roles": [{"value": "r"}], "entitlements": [{"value": "e"}]}
TEAM = {"displayName": "<n>", "members": [{"value": "<alice>"}], "roles": [{"value": "r"}]}
CONFIG = {
    "served_entities": [{"entity_name": "ready", "entity_version": "2", "environment_vars": {"A": "b"}}],
    "traffic_config": {"routes": [{"served_entity_name": "ready-2", "traffic_percentage": 100}]},
}

CASES = {
    "tessera.secrets.v1.Secrets": {
        "CreateScope": Case({"scope": "<n>"}, views=(ACLS, KEYS)),
        "ListScopes": Case(query={}),
        "DeleteScope": Case({"scope": "<n>"}, before=(SCOPE,), views=(KEYS,)),
        "PutSecret": Case({**OF_SECRET, "string_value": "v"}, before=(SCOPE,), views=TELLING),
        "DeleteSecret": Case(OF_SECRET, before=(SCOPE, SECRET), views=TELLING),
        "ListSecrets": Case(query={"scope": "<n>"}, before=(SCOPE, SECRET)),
        "GetSecret": Case(query=OF_SECRET, before=(SCOPE, SECRET)),
        "PutAcl": Case({"scope": "<n>", "principal": "users", "permission": "READ"}, before=(SCOPE,), views=(ACLS,)),
        "GetAcl": Case(query={"scope": "<n>", "principal": "users"}, before=(SCOPE, READER)),
        "ListAcls": Case(query={"scope": "<n>"}, before=(SCOPE, READER)),
        "DeleteAcl": Case({"scope": "<n>", "principal": "users"}, before=(SCOPE, READER), views=(ACLS,)),
        "ListSecretVersions": Case(query=OF_SECRET, before=(SCOPE, SECRET)),
        "RestoreSecret": Case({**OF_SECRET, "version": 1}, before=(SCOPE, SECRET, NEWER), views=TELLING),
        "PurgeSecret": Case(OF_SECRET, before=(SCOPE, SECRET, DELETED, NEWER), views=TELLING),
    },
    "tessera.identity.v1.Scim": {
        "CreateUser": Case(PERSON, views=(f"{SCIM}/Users/<made>",), is_open=False),
        "ListUsers": Case(query={"filter": 'userName eq "<n>"'}, before=(USER,)),
        "GetUser": Case(query={}, before=(USER,)),
        "PatchUser": Case(PATCH, before=(USER,), views=(f"{SCIM}/Users/<id>",), is_open=False),
        "ReplaceUser": Case(PERSON, before=(USER,), views=(f"{SCIM}/Users/<id>",), is_open=False),
        "DeleteUser": Case(query={}, before=(USER,), views=(f"{SCIM}/Users/<id>",), is_open=False),
        "CreateGroup": Case(TEAM, views=(f"{SCIM}/Groups/<made>",), is_open=False),
        "ListGroups": Case(query={"filter": 'displayName eq "<n>"'}, before=(GROUP,)),
        "GetGroup": Case(query={}, before=(GROUP,)),
        "PatchGroup": Case(PATCH, before=(GROUP,), views=(f"{SCIM}/Groups/<id>",), is_open=False),
        "ReplaceGroup": Case(TEAM, before=(GROUP,), views=(f"{SCIM}/Groups/<id>",), is_open=False),
        "DeleteGroup": Case(query={}, before=(GROUP,), views=(f"{SCIM}/Groups/<id>",), is_open=False),
        "CreateServicePrincipal": Case(MACHINE, views=(f"{SCIM}/ServicePrincipals/<made>",), is_open=False),
        "ListServicePrincipals": Case(query={"filter": 'displayName eq "<n>"'}, before=(ROBOT,)),
        "GetServicePrincipal": Case(query={}, before=(ROBOT,)),
        "PatchServicePrincipal": Case(PATCH, before=(ROBOT,), views=(f"{SCIM}/ServicePrincipals/<id>",), is_open=False),
        "ReplaceServicePrincipal": Case(
            MACHINE, before=(ROBOT,), views=(f"{SCIM}/ServicePrincipals/<id>",), is_open=False
        ),
        "DeleteServicePrincipal": Case(
            query={}, before=(ROBOT,), views=(f"{SCIM}/ServicePrincipals/<id>",), is_open=False
        ),
        "GetMe": Case(query={}),
    },
    "tessera.identity.v1.Tokens": {
        "CreateToken": Case({"comment": "c"}, views=(f"{MANAGED}/<made>",)),
        "ListTokens": Case(query={}),
        "DeleteToken": Case({"token_id": "<id>"}, before=(TOKEN,), views=(f"{MANAGED}/<id>",)),
        "UpdateToken": Case({"token": {"comment": "c"}}, before=(TOKEN,), views=(f"{MANAGED}/<id>",)),
        "CreateOboToken": Case({"application_id": "alice"}, views=(f"{MANAGED}/<made>",), is_open=False),
        "ListManagedTokens": Case(query={"created_by_username": "alice"}, is_open=False),
        "GetManagedToken": Case(query={}, before=(TOKEN,), is_open=False),
        "UpdateManagedToken": Case(
            {"token": {"comment": "c"}}, before=(TOKEN,), views=(f"{MANAGED}/<id>",), is_open=False
        ),
        "DeleteManagedToken": Case(query={}, before=(TOKEN,), views=(f"{MANAGED}/<id>",), is_open=False),
    },
    "tessera.identity.v1.ServicePrincipalSecrets": {
        "CreateServicePrincipalSecret": Case({"lifetime": "60s"}, before=(ROBOT,), views=(CREDENTIALS,), is_open=False),
        "ListServicePrincipalSecrets": Case(query={}, before=(ROBOT,), is_open=False),
        "DeleteServicePrincipalSecret": Case(
            query={}, before=(ROBOT, CLIENT_SECRET), views=(f"{OF_ROBOT}/<parent>/credentials/secrets",), is_open=False
        ),
    },
    # Each question is recorded, so the answer is the same where there is nothing yet.
    "tessera.identity.v1.AuditLog": {"ListAuditRecords": Case(query={"after": "1000000000"}, is_open=False)},
    "tessera.serving.v1.ServingAuditLog": {
        "ListServingAuditRecords": Case(query={"after": "1000000000"}, is_open=False)
    },
    "tessera.identity.v1.Permissions": {
        "GetPermissions": Case(query={}, before=(BARE,)),
        "SetPermissions": Case({"access_control_list": [GRANT, MINE]}, before=(BARE,), views=(GRANTED,)),
        "UpdatePermissions": Case({"access_control_list": [GRANT]}, before=(BARE,), views=(GRANTED,)),
        "GetPermissionLevels": Case(query={}, before=(BARE,)),
    },
    "tessera.serving.v1.ServingEndpoints": {
        "CreateServingEndpoint": Case(
            {"name": "<n>", "config": CONFIG, "tags": [{"key": "k", "value": "v"}]}, views=(f"{ENDPOINTS}/<n>",)
        ),
        "GetServingEndpoint": Case(query={}, before=(ENDPOINT,)),
        "ListServingEndpoints": Case(query={}),
        "DeleteServingEndpoint": Case(query={}, before=(BARE,), views=(f"{ENDPOINTS}/<n>",)),
        "UpdateServingEndpointConfig": Case(CONFIG, before=(BARE,), views=(f"{ENDPOINTS}/<n>",)),
        "StopServingEndpoint": Case({}, before=(ENDPOINT,), views=(f"{ENDPOINTS}/<n>",)),
        "StartServingEndpoint": Case({}, before=(ENDPOINT, STOPPED), views=(f"{ENDPOINTS}/<n>",)),
        "CancelServingEndpointUpdate": Case({}, before=(SLOW,), views=(f"{ENDPOINTS}/<n>",)),
        "PatchServingEndpointTags": Case(
            {"add_tags": [{"key": "k", "value": "v"}]}, before=(BARE,), views=(f"{ENDPOINTS}/<n>",)
        ),
        "PutServingEndpointRateLimits": Case({"rate_limits": []}, before=(BARE,), views=(f"{ENDPOINTS}/<n>",)),
        "PutServingEndpointAiGateway": Case(
            {"usage_tracking_config": {"enabled": False}}, before=(BARE,), views=(f"{ENDPOINTS}/<n>",)
        ),
        "UpdateServingEndpointNotifications": Case(
            {"email_notifications": {"on_update_failure": ["a@example.com"]}},
            before=(BARE,),
            views=(f"{ENDPOINTS}/<n>",),
        ),
        "PatchServingEndpointTelemetryConfig": Case(
            {"telemetry_config": {}}, before=(ENDPOINT,), views=(f"{ENDPOINTS}/<n>",)
        ),
        "ListServingEndpointEvents": Case(query={}, before=(BARE,)),
        "ListServingEndpointMetricsHistory": Case(query={}, before=(BARE,)),
        "ListServingEndpointUsage": Case(query={}, before=(BARE,)),
        "ExportServingEndpointMetrics": Case(query={}, before=(BARE,)),
        "GetServedModelLogs": Case(query={}, before=(ENDPOINT,)),
        "GetServingEndpointOpenApi": Case(query={}, before=(ENDPOINT,)),
        "GetServedModelBuildLogs": Case(query={}, before=(ENDPOINT,)),
        # Of what is stopped: that ends.
        "FollowServedModelLogs": Case(query={}, before=(ENDPOINT, STOPPED)),
        "FollowServedModelBuildLogs": Case(query={}, before=(ENDPOINT,)),
    },
}
EVERY_CASE = {f"{service}/{name}": case for service, cases in CASES.items() for name, case in cases.items()}


def test_every_rpc_over_rest_has_a_case() -> None:
    assert EVERY_CASE.keys() == BINDINGS.keys()


def hostile(field: FieldDescriptor, is_first: bool, depth: int = 0) -> Any:
    """A value that a field of an answer could have, as an attacker would give it."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {CANARY: CANARY}
    if field.message_type is not None:
        if depth == 3 or field.message_type.full_name.startswith("google."):
            value: Any = {}
        else:
            fields = codec_for(field.message_type).fields()
            value = {name: hostile(each, is_first, depth + 1) for name, each in fields.items()}
    elif field.enum_type is not None:
        value = field.enum_type.values[0 if is_first else -1].name
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        value = is_first
    else:
        value = CANARY if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else NUMBER
    return [value] if field.is_repeated else value


def names_of_answers() -> dict[str, FieldDescriptor]:
    """Every name that any answer has, with a field that has it."""
    types: dict[str, Descriptor] = {}
    for service in SERVICES:
        for method in service.methods:
            types_within(method.output_type, types)
    fields = [each for descriptor in types.values() for each in descriptor.fields]
    return {name: field for field in fields for name in (field.name, field.json_name)}


NAMES = names_of_answers()


def injected(descriptor: Descriptor, body: Any, is_first: bool, without_effect: Iterable[str] = ()) -> Any:
    """A body with a value for every name that its messages do not know, or that is `without_effect` there."""
    codec = codec_for(descriptor)
    unknown = {name for name in NAMES if codec.field(name) is None or name in without_effect}
    more: dict[str, Any] = {name: hostile(NAMES[name], is_first) for name in unknown} | dict.fromkeys(NOWHERE, CANARY)
    kept = {}
    for name, value in body.items():
        inner = codec.field(name)
        kind = None if inner is None else inner.message_type
        if kind is None or kind.GetOptions().map_entry or kind.full_name.startswith("google."):
            kept[name] = value
        elif isinstance(value, list):
            kept[name] = [injected(kind, each, is_first) for each in value]
        else:
            kept[name] = injected(kind, value, is_first)
    return more | kept


def filled(value: Any, known: dict[str, str]) -> Any:
    """A value in whose texts `<name>` is replaced by what is known under that name."""
    if isinstance(value, dict):
        return {name: filled(each, known) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [filled(each, known) for each in value]
    return re.sub(r"<(\w+)>", lambda found: known[found[1]], value) if isinstance(value, str) else value


def comparable(document: Any, known: dict[str, str]) -> Any:
    """A document without what is different in every object."""
    if isinstance(document, dict):
        return {
            name: type(value).__name__ if name in CHANGING else comparable(value, known)
            for name, value in document.items()
        }
    if isinstance(document, list):
        return [comparable(each, known) for each in document]
    if isinstance(document, str):
        for name, value in known.items():
            document = document.replace(value, f"<{name}>") if name != "alice" else document
    return document


@pytest.fixture(scope="module")
async def platform() -> AsyncIterator[Platform]:
    async with running_platform(tokens_per_minute=10_000) as running:
        await running.introduce("alice")
        yield running


async def send(platform: Platform, who: str, verb: str, path: str, body: Any = None) -> Answer:
    return await platform.fetch(
        verb, path, token=platform.tokens[who], body=b"" if body is None else json.dumps(body).encode()
    )


_numbers = itertools.count(1)


async def effect(platform: Platform, binding: Binding, case: Case, variant: str) -> tuple[Any, list[Any]]:
    """The answer to a case's request and what is seen of its effect; in comparable form."""
    alice = (await send(platform, "alice", "GET", f"{SCIM}/Me")).json()["id"]
    known = {"n": f"zz{next(_numbers)}zz", "alice": alice}
    for index, (verb, path, body) in enumerate(case.before):
        who = "admin" if SCIM in path or OF_ROBOT in path else "alice"
        made = await send(platform, who, verb, filled(path, known), filled(body, known))
        assert made.status in (200, 201), made.body
        if found := id_in(made.json()):
            known["parent"], known["id"] = known.get("id", found), found
        if case.before[index] == ENDPOINT:
            await settled(platform, known["n"])
    made_id = known.get("id", "")
    variables = {"name": known["n"], "service_principal_id": known.get("parent", "")} | dict.fromkeys(
        ("id", "token_id", "secret_id", "serving_endpoint_id"), made_id
    )
    path = binding.template.replace("{served_model_name}", "ready-1").format(**variables)
    request = binding.method.input_type
    in_path = [segment.variable for segment in binding.segments if segment.variable]
    body, query = filled(case.body, known), filled(case.query or {}, known)
    if variant != "plain":
        is_first = variant == "first values"
        if binding.body == ALL:
            body = injected(request, body, is_first, in_path)
        else:
            flat = injected(request, {}, is_first, in_path)
            query = {**{name: value for name, value in flat.items() if not isinstance(value, (dict, list))}, **query}
    target = f"{path}?{urlencode(query)}" if query else path
    answer = await send(platform, "alice" if case.is_open else "admin", binding.verb, target, body)
    is_text = binding.media_type == "text/plain"
    document = {"text": answer.body.decode()} if is_text else answer.json()
    assert answer.status in (200, 201), document
    assert binding.media_type or list(untold(binding.method.output_type, document)) == []
    known["made"] = id_in(document)
    if ENDPOINTS in path and case.views and binding.verb != "DELETE":
        await settled(platform, known["n"])
    seen = [(await send(platform, "admin", "GET", filled(view, known))) for view in case.views]
    for each in (answer, *seen):
        assert CANARY not in each.body.decode()
        assert str(NUMBER) not in each.body.decode()
    known = {name: value for name, value in known.items() if value}
    return comparable(document, known), [(each.status, comparable(each.json(), known)) for each in seen]


def id_in(document: Any) -> str:
    """The id of what an answer is about."""
    info = document.get("token_info", {})
    return str(document.get("id") or info.get("token_id") or "")


async def settled(platform: Platform, name: str) -> None:
    async def is_settled() -> bool:
        state = (await send(platform, "admin", "GET", f"{ENDPOINTS}/{name}")).json()["state"]
        return bool(state["config_update"] != "IN_PROGRESS")

    await eventually(is_settled, what=f"{name} is settled")


@pytest.mark.parametrize("name", EVERY_CASE)
async def test_what_a_request_has_no_field_for_has_no_effect(platform: Platform, name: str) -> None:
    binding, case = BINDINGS[name], EVERY_CASE[name]
    plain = await effect(platform, binding, case, "plain")
    for variant in ("first values", "last values"):
        found = await effect(platform, binding, case, variant)
        assert found == plain, variant


@pytest.mark.parametrize("kind", ["Users", "Groups", "ServicePrincipals"])
async def test_patch_sets_nothing_that_belongs_to_the_server(platform: Platform, kind: str) -> None:
    label = {"userName" if kind == "Users" else "displayName": f"zz{next(_numbers)}zz"}
    made = (await send(platform, "admin", "POST", f"{SCIM}/{kind}", label)).json()
    query = urlencode({"filter": 'displayName eq "admins"'})
    admins = await send(platform, "admin", "GET", f"{SCIM}/Groups?{query}")
    group = admins.json()["Resources"][0]["id"]
    values: dict[str, Any] = {
        "id": "1",
        "schemas": [CANARY],
        "meta": {"resourceType": CANARY},
        "groups": [{"value": group, "display": "admins"}],
        "creator": CANARY,
        **({} if kind == "Users" else {"userName": CANARY}),
        "applicationId": CANARY,
    }
    operations = [{"op": op, "value": {name: value}} for op in ("add", "replace") for name, value in values.items()]
    operations += [
        {"op": op, "path": name, "value": value} for op in ("add", "replace") for name, value in values.items()
    ]
    for operation in operations:
        answer = await send(platform, "admin", "PATCH", f"{SCIM}/{kind}/{made['id']}", {"Operations": [operation]})
        assert answer.status in (200, 400), operation
        assert (await send(platform, "admin", "GET", f"{SCIM}/{kind}/{made['id']}")).json() == made, operation
