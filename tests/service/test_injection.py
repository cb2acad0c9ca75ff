"""Text that means something to a database means nothing to us: in every string field and in the credential (S26).

Each public RPC of Secrets, Scim and Tokens is called once with harmless text in a field, and once with each hostile one
in the same place. The harmless one is answered, or refused for the one reason that its field allows, so that what comes
after it is reached. The hostile one is refused, or does what the harmless one does: as many rows more or fewer in each
table, as many items in the answer. An error of the database would be an INTERNAL one.
"""

from __future__ import annotations

import base64
import itertools
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from servicekit.exposure import exposure
from tessera.identity.v1 import identity_pb2, permissions_pb2
from tessera.secrets.v1 import secrets_pb2
from tests.support.secrets import TIMEOUT, RunningSecrets, running_secrets

CORPUS = (
    "'",
    '"',
    "x' OR '1'='1",
    'x" OR "1"="1',
    "x' OR 1=1 --",
    "'; DROP TABLE principals; --",
    "x'); DELETE FROM versions; --",
    "x' UNION SELECT mac, 1, 1, 1, 1, 1 FROM tokens --",
    "1; ATTACH DATABASE 'x.db' AS x",
    "%' ESCAPE '",
    "?1",
    ":name",
    "x\\' OR 1=1",
    "x' AND (SELECT 1 FROM keys) = 1 OR 'a'='b",
    "\u02bc OR 1=1",
)

GOOD_VALUES = {
    "scope": "Shop",
    "key": "key",
    "principal": "bob",
    "string_value": "value",
    "op": "add",
    "path": "displayName",
    "application_id": "bob",
    "user_name": "user{}",
    "display_name": "name{}",
    "update_mask": "comment",
    "lifetime": "60s",
}
"""What brings a call far, by the name of the field; `{}` is a number of its own each time."""

FORMS = {
    "filter": ("{}", 'displayName eq "{}"', "displayName eq '{}'"),
    "path": ("{}", 'roles[value eq "{}"]', "roles[value eq '{}']"),
}
"""How text stands in a field that has a syntax: in one of these forms the harmless text is good."""

NAMING = {
    "scope",
    "key",
    "principal",
    "id",
    "members.value",
    "token_id",
    "application_id",
    "service_principal_id",
    "secret_id",
    "serving_endpoint_id",
    "access_control_list.user_name",
    "access_control_list.group_name",
    "access_control_list.service_principal_name",
}
"""Fields that name what is there: harmless text names nothing, and is looked for."""

MAKING = {("CreateScope", "scope"), ("PutSecret", "key")}
"""But here they name what is made."""

CHOOSING = {
    "initial_manage_principal",
    "sort_by",
    "sort_order",
    "operations.op",
    "update_mask",
    "lifetime",
    "scopes",
    "page_token",
}
"""Fields that take words of ours only: no other text goes beyond the check."""

SERVICES = [
    secrets_pb2.DESCRIPTOR.services_by_name["Secrets"],
    identity_pb2.DESCRIPTOR.services_by_name["Scim"],
    identity_pb2.DESCRIPTOR.services_by_name["Tokens"],
    identity_pb2.DESCRIPTOR.services_by_name["ServicePrincipalSecrets"],
    permissions_pb2.DESCRIPTOR.services_by_name["Permissions"],
]
METHODS = [method for service in SERVICES for method in service.methods if not exposure(method).callers]

Path = tuple[str, ...]


def string_paths(message: Descriptor, inside: Path = ()) -> Iterator[Path]:
    """Every string field of a message, by the names that lead to it; the text of a free JSON value is one."""
    for field in message.fields:
        path = (*inside, field.name)
        if field.type == FieldDescriptor.TYPE_STRING:
            yield path
        elif field.message_type is not None and field.message_type.full_name == "google.protobuf.Value":
            yield (*path, "string_value")
        elif field.message_type is not None and not field.message_type.full_name.startswith("google."):
            yield from string_paths(field.message_type, path)


CASES = [(method, path) for method in METHODS for path in string_paths(method.input_type)]


def case_name(case: object) -> str | None:
    return case.name if isinstance(case, MethodDescriptor) else ".".join(case) if isinstance(case, tuple) else None


def request(method: MethodDescriptor, path: Path, text: str, ids: dict[str, str]) -> Message:
    """A request that is good but for the text in one place."""
    message: Message = GetMessageClass(method.input_type)()
    for other in string_paths(method.input_type):
        if len(other) == 1 and (known := _good_value(method, other[0], ids)):
            _place(message, other, known)
    _place(message, path, text)
    _complete(message, ids)
    return message


def _good_value(method: MethodDescriptor, field: str, ids: dict[str, str]) -> str:
    if field == "id":
        kinds = ("ServicePrincipal", "Group", "User")
        return next((ids[kind] for kind in kinds if method.name.endswith(kind)), "")
    return ids.get(field) or GOOD_VALUES.get(field, "").format(next(numbers))


def _complete(message: Any, ids: dict[str, str]) -> None:
    """What the fields of a request cannot do without, besides texts at its top."""
    if isinstance(message, secrets_pb2.PutAclRequest):
        message.permission = secrets_pb2.READ
    for operation in getattr(message, "operations", ()):
        operation.path = operation.path or "displayName"
        operation.op = operation.op or ("remove" if "[" in operation.path else "add")
        if not operation.HasField("value"):
            operation.value.string_value = "text"
    for member in getattr(message, "members", ()):
        member.value = member.value or ids["User"]
    for entry in getattr(message, "access_control_list", ()):
        entry.permission_level = permissions_pb2.CAN_VIEW


def _place(message: Any, path: Path, text: str) -> None:
    for name in path[:-1]:
        found = getattr(message, name)
        message = found if isinstance(found, Message) else found[0] if len(found) else found.add()
    if message.DESCRIPTOR.fields_by_name[path[-1]].is_repeated:
        getattr(message, path[-1]).append(text)
    else:
        setattr(message, path[-1], text)


class Database:
    """The service's files, looked at from outside."""

    def __init__(self, service: RunningSecrets) -> None:
        self._uri = f"{service.settings.database.as_uri()}?mode=ro"

    def rows(self) -> dict[str, int]:
        """How many rows each table has; raises when one is gone."""
        with closing(sqlite3.connect(self._uri, uri=True)) as connection:
            names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            # The audit log tells of every call; what it holds is looked at elsewhere.
            kept = [name for name in names if not name.startswith("audit_")]
            return {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in kept}


@dataclass(frozen=True)
class World:
    """The service, and what there is in it."""

    service: RunningSecrets
    ids: dict[str, str]
    """By the kind of what the field `id` names, or by the field that names it."""


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    async with running_secrets(tokens_per_minute=0, secret_versions=1_000) as service:
        admin = service.admin
        await service.user("bob")
        await admin.create_scope("Shop")
        await admin.put("Shop", "key", "value")
        await admin.grant("Shop", "bob", secrets_pb2.READ)
        user = await admin.create_user("carol")
        group = await admin(admin.scim.CreateGroup, identity_pb2.CreateGroupRequest(display_name="team"))
        robot = await admin(
            admin.scim.CreateServicePrincipal, identity_pb2.CreateServicePrincipalRequest(display_name="robot")
        )
        secret = await admin(
            admin.client_secrets.CreateServicePrincipalSecret,
            identity_pb2.CreateServicePrincipalSecretRequest(service_principal_id=robot.id),
        )
        token = await admin(admin.tokens.CreateToken, identity_pb2.CreateTokenRequest(comment="kept"))
        endpoint, _ = await service.grant(admin)
        ids = {
            "User": user.id,
            "Group": group.id,
            "ServicePrincipal": robot.id,
            "service_principal_id": robot.id,
            "secret_id": secret.id,
            "token_id": token.token_info.token_id,
            "serving_endpoint_id": endpoint,
        }
        yield World(service, ids)


numbers = itertools.count()


@dataclass(frozen=True)
class Effect:
    """What a call did."""

    changed: dict[str, int]
    """Rows more or fewer, by table."""
    items: int = 0
    """How many were answered."""
    refusal: str | None = None
    """What it was refused with, if it was."""


async def effect(service: RunningSecrets, method: MethodDescriptor, message: Message) -> Effect:
    """What a call does."""
    database = Database(service)
    before = database.rows()
    call = service.public_channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        type(message).SerializeToString,
        GetMessageClass(method.output_type).FromString,
    )
    items, refusal = 0, None
    try:
        answer = await call(message, metadata=service.admin.metadata, timeout=TIMEOUT)
        items = max((len(value) for field, value in answer.ListFields() if field.is_repeated), default=0)
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            raise
        refusal = error.details()
    after = database.rows()
    assert before.keys() == after.keys()
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    return Effect(changed, items, refusal)


def is_as_it_should_be(harmless: Effect, text: str, method: MethodDescriptor, path: Path) -> bool:
    """Whether harmless text did what this field allows."""
    field = ".".join(path)
    if field in NAMING and (method.name, field) not in MAKING:
        return harmless.refusal is not None and text in harmless.refusal
    if field in CHOOSING:
        return harmless.refusal is not None and _folded(harmless.refusal).startswith(_folded(field))
    return harmless.refusal is None


def _folded(name: str) -> str:
    return name.replace("_", "").lower()


@pytest.mark.parametrize(("method", "path"), CASES, ids=case_name)
async def test_hostile_text_is_text(world: World, method: MethodDescriptor, path: Path) -> None:
    async def effect_of(text: str) -> Effect:
        return await effect(world.service, method, request(method, path, text, world.ids))

    outcomes = []
    for form in FORMS.get(path[-1], ("{}",)):
        text = f"harmless{next(numbers)}"
        harmless = await effect_of(form.format(text))
        outcomes.append((is_as_it_should_be(harmless, text, method, path), harmless))
        for hostile in CORPUS:
            # Of its own each time, so that nothing is found that was stored before.
            found = await effect_of(form.format(f"{hostile}{next(numbers)}"))
            assert found.changed in ({}, harmless.changed), hostile
            assert found.items <= harmless.items, hostile
    assert any(is_good for is_good, _ in outcomes), outcomes


async def test_hostile_credential_is_no_credential(world: World) -> None:
    service = world.service
    database = Database(service)
    before = database.rows()
    genuine = service.admin_token
    ascii_corpus = [text for text in CORPUS if text.isascii()]
    forms = [f"Bearer {text}" for text in ascii_corpus]
    forms += [f"Bearer {genuine}{text}" for text in ascii_corpus]
    forms += [f"Bearer {genuine[: -len(text)]}{text}" for text in ascii_corpus]
    forms += ascii_corpus
    forms += [f"Basic {base64.b64encode(f'token:{text}'.encode()).decode()}" for text in CORPUS]
    forms += [f"Basic {base64.b64encode(f'{text}:{genuine}'.encode()).decode()}" for text in CORPUS]
    for form in forms:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.admin.scim.GetMe(
                identity_pb2.GetMeRequest(), metadata=(("authorization", form),), timeout=TIMEOUT
            )
        assert refused.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED), form
    assert database.rows() == before


def test_every_string_field_of_every_public_request_is_among_the_cases() -> None:
    named = {(method.name, ".".join(path)) for method, path in CASES}
    assert {
        ("PutSecret", "string_value"),
        ("ListUsers", "filter"),
        ("PatchGroup", "operations.value.string_value"),
    } <= named
    assert {("CreateUser", "emails.value"), ("UpdateToken", "token.comment"), ("GetMe", "attributes")} <= named
    silent = {method.name for method in METHODS} - {name for name, _ in named}
    assert silent == {"ListScopes", "ListTokens"}
