"""Text that means something to a database means nothing to us: in every string field and in the credential (S26).

Each public RPC of Secrets, Scim and Tokens is called once with harmless text in a field, and once with each hostile one
in the same place. The hostile one is refused, or does what the harmless one does: as many rows more or fewer in each
table, as many items in the answer. An error of the database would be an INTERNAL one.
"""

from __future__ import annotations

import base64
import itertools
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
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
    "initial_manage_principal": "",
}
"""What brings a call far, by the name of the field."""

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
        known = ids.get(method.name, "") if other[-1] == "id" else GOOD_VALUES.get(other[-1], "")
        if known and len(other) == 1:
            _place(message, other, known)
    _place(message, path, text)
    if method.name == "PutAcl":
        message.permission = secrets_pb2.READ  # type: ignore[attr-defined]
    for operation in getattr(message, "operations", ()):
        operation.op, operation.path = operation.op or "add", operation.path or "displayName"
        if not operation.HasField("value"):
            operation.value.string_value = "text"
    return message


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
            return {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets(tokens_per_minute=0, secret_versions=1_000) as running:
        await running.user("bob")
        await running.admin.create_scope("Shop")
        await running.admin.put("Shop", "key", "value")
        yield running


numbers = itertools.count()


async def effect(service: RunningSecrets, method: MethodDescriptor, message: Message) -> tuple[dict[str, int], int]:
    """What a call changes: rows by table, and items answered, -1 when it is refused."""
    database = Database(service)
    before = database.rows()
    call = service.public_channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        type(message).SerializeToString,
        GetMessageClass(method.output_type).FromString,
    )
    try:
        answer = await call(message, metadata=service.admin.metadata, timeout=TIMEOUT)
        found = max((len(value) for field, value in answer.ListFields() if field.is_repeated), default=0)
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            raise
        found = -1
    after = database.rows()
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}, found


@pytest.mark.parametrize(("method", "path"), CASES, ids=case_name)
async def test_hostile_text_is_text(service: RunningSecrets, method: MethodDescriptor, path: Path) -> None:
    bob = await service.admin(service.admin.scim.ListUsers, identity_pb2.ListRequest(filter='userName eq "bob"'))
    ids = dict.fromkeys(("GetUser", "PatchUser"), bob.resources[0].id)

    async def effect_of(text: str) -> tuple[dict[str, int], int]:
        return await effect(service, method, request(method, path, text, ids))

    forms = ["{}", 'userName eq "{}"', "userName eq '{}'"] if path[-1] in ("filter", "path") else ["{}"]
    for form in forms:
        harmless, answered = await effect_of(form.format(f"harmless{next(numbers)}"))
        for text in CORPUS:
            # Of its own each time, so that nothing is found that was stored before.
            changed, found = await effect_of(form.format(f"{text}{next(numbers)}"))
            assert changed in ({}, harmless), text
            assert found <= max(answered, 0), text


async def test_hostile_credential_is_no_credential(service: RunningSecrets) -> None:
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
