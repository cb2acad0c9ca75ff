"""A database that was edited while the service was down: what was harmed is refused, and nothing else (S3).

Which edits there are, and that none gains anything: tests/unit/secrets_service/test_integrity.py.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import grpc
import pytest

from servicekit.errors import StartError
from tessera.identity.v1 import identity_pb2
from tests.support.secrets import Caller, RunningSecrets, data_directory, failures_of, refusal, running_secrets


def edit(directory: Path, *statements: str) -> None:
    """As anybody with the file and SQLite's command line."""
    with closing(sqlite3.connect(directory / "secrets" / "secrets.db")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@asynccontextmanager
async def filled() -> AsyncIterator[tuple[Path, str, str]]:
    """A directory with two scopes of alice's and an endpoint that refers to both; tokens of alice and of bob."""
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            alice, bob = await service.user("alice"), await service.user("bob")
            for scope in ("one", "two"):
                await alice.create_scope(scope)
                await alice.put(scope, "key", f"in {scope}")
            endpoint_id, _ = await service.grant(alice, ("one", "key"), ("two", "key"), endpoint_id=None)
            (directory / "endpoint").write_text(endpoint_id)
        yield directory, token_of(alice), token_of(bob)


def token_of(caller: Caller) -> str:
    return caller.metadata[0][1].removeprefix("Bearer ")


async def is_damaged(service: RunningSecrets, token: str, scope: str) -> bool:
    refused = await refusal(service.public(token).get(scope, "key"))
    return (refused.code, refused.reason) == (grpc.StatusCode.DATA_LOSS, "DATA_LOSS")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO acls (scope_id, principal_id, permission) SELECT 1, id, 1 FROM principals WHERE name = 'bob'",
        "UPDATE acls SET principal_id = (SELECT id FROM principals WHERE name = 'bob') WHERE scope_id = 1",
        "UPDATE acls SET permission = 1 WHERE scope_id = 1",
        "DELETE FROM acls WHERE scope_id = 1",
        "UPDATE scopes SET mac = (SELECT mac FROM scopes WHERE id = 2) WHERE id = 1",
        "UPDATE scopes SET mac = NULL WHERE id = 1",
        "UPDATE scopes SET generation = generation + 1 WHERE id = 1",
    ],
)
async def test_scope_whose_acls_were_edited_is_closed_and_the_other_is_not(
    statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with filled() as (directory, alice, bob):
        edit(directory, statement)
        async with running_secrets(directory) as service:
            for token in (alice, bob, service.admin_token):
                assert await is_damaged(service, token, "one")
            assert await service.public(alice).get("two", "key") == b"in two"
            assert (await refusal(service.public(bob).get("two", "key"))).reason == "PERMISSION_DENIED"
            answer = await service.resolve((directory / "endpoint").read_text(), ("one", "key"), ("two", "key"))
            assert (failures_of(answer), list(answer.values)) == ([("one", "key", "DAMAGED", "")], [])
            refused = await refusal(service.public(alice).put("one", "key", "new"))
            assert refused.code is grpc.StatusCode.DATA_LOSS
    told = [record for record in caplog.records if record.message == "stored rights are damaged"]
    assert {(record.levelno, vars(record)["kind"], vars(record)["id"]) for record in told} == {
        (logging.ERROR, "scope", "one")
    }


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO memberships SELECT b.id, a.id FROM principals b, principals a"
        " WHERE b.name = 'bob' AND a.name = 'admins'",
        "UPDATE accounts SET display_name = 'x' WHERE id = (SELECT id FROM principals WHERE name = 'bob')",
        "UPDATE principals SET kind = 'service_principal' WHERE name = 'bob'",
        "UPDATE tokens SET owner_id = (SELECT id FROM principals WHERE name = 'admin') WHERE owner_id ="
        " (SELECT id FROM principals WHERE name = 'bob')",
        "UPDATE tokens SET expires_ms = expires_ms + 1 WHERE owner_id = (SELECT id FROM principals WHERE name = 'bob')",
        "UPDATE principals SET name = CAST(x'ff' AS TEXT) WHERE name = 'bob'",
    ],
)
async def test_principal_or_token_that_was_edited_lets_nobody_in_and_the_others_do(statement: str) -> None:
    async with filled() as (directory, alice, bob):
        edit(directory, statement)
        async with running_secrets(directory) as service:
            caller = service.public(bob)
            refused = await refusal(caller(caller.scim.GetMe, identity_pb2.GetMeRequest()))
            assert (refused.code, refused.reason) == (grpc.StatusCode.DATA_LOSS, "DATA_LOSS")
            assert await service.public(alice).get("one", "key") == b"in one"
            await service.admin.create_user("carol")


async def test_rights_are_made_authentic_once_in_the_life_of_a_store() -> None:
    """Taking the MACs away does not make a store one that is older than they are."""
    tables = ("principals", "accounts", "scopes", "endpoints", "platform")
    async with filled() as (directory, _, _):
        edit(directory, *(f"UPDATE {table} SET mac = NULL" for table in tables), "UPDATE tokens SET row_mac = NULL")
        with pytest.raises(StartError, match="was changed since"):
            async with running_secrets(directory):
                pass


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE platform SET admin_id = (SELECT id FROM principals WHERE name = 'bob')",
        "UPDATE platform SET admin_token_id = 'x'",
        "UPDATE platform SET knows_older_endpoints = 0",
        "UPDATE platform SET workspace_id = '1'",
    ],
)
async def test_service_does_not_start_on_another_beginning(statement: str) -> None:
    async with filled() as (directory, _, _):
        edit(directory, statement)
        with pytest.raises(StartError, match="was changed since"):
            async with running_secrets(directory):
                pass


async def test_service_does_not_start_with_a_trigger_that_is_not_its_own() -> None:
    async with filled() as (directory, _, _):
        edit(directory, "CREATE TRIGGER mine AFTER INSERT ON versions BEGIN DELETE FROM acls; END")
        with pytest.raises(StartError, match=r"other triggers or views than this program \(mine\)"):
            async with running_secrets(directory):
                pass
