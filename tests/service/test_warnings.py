"""Warnings: what a caller is told although all went well, and what is logged of it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import pytest

from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import Caller, RunningSecrets, running_secrets


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


@pytest.fixture
async def alice(service: RunningSecrets) -> Caller:
    """Owner of the scope `Shop`."""
    alice = await service.user("alice")
    await alice.create_scope("Shop")
    return alice


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message == event]


async def put(caller: Caller, value: bytes) -> list[str]:
    return await caller.warned(
        caller.secrets.PutSecret, pb.PutSecretRequest(scope="shop", key="Key", bytes_value=value)
    )


@pytest.mark.parametrize("value", [b"canary-value\n", b"canary-value ", b"canary-value\r\n", b" "])
async def test_value_that_ends_with_white_space_is_stored_and_warned_of(
    alice: Caller, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    [warning] = await put(alice, value)
    assert "key Key in scope Shop" in warning
    assert "white space" in warning
    assert "canary" not in warning
    [event] = events(caplog, "secret ends with white space")
    assert (vars(event)["scope"], vars(event)["key"]) == ("Shop", "Key")
    assert "canary" not in str(vars(event))
    assert await alice.get("Shop", "Key") == value


@pytest.mark.parametrize("value", [b"", b"value", b"\nvalue", b"\xff"])
async def test_value_that_ends_with_something_else_is_not_warned_of(alice: Caller, value: bytes) -> None:
    assert await put(alice, value) == []


async def granted(caller: Caller, principal: str, permission: pb.AclPermission.ValueType) -> list[str]:
    request = pb.PutAclRequest(scope="shop", principal=principal, permission=permission)
    return await caller.warned(caller.secrets.PutAcl, request)


async def withdrawn(caller: Caller, principal: str) -> list[str]:
    return await caller.warned(caller.secrets.DeleteAcl, pb.DeleteAclRequest(scope="shop", principal=principal))


async def test_lowering_the_last_manage_is_warned_of(alice: Caller, caplog: pytest.LogCaptureFixture) -> None:
    [warning] = await granted(alice, "alice", pb.READ)
    assert "scope Shop" in warning
    assert "admin" in warning
    [event] = events(caplog, "last MANAGE of a scope is gone")
    assert vars(event)["scope"] == "Shop"


async def test_deleting_the_last_manage_is_warned_of(
    service: RunningSecrets, alice: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    assert await granted(alice, "users", pb.MANAGE) == []
    assert await withdrawn(alice, "alice") == []
    assert len(await withdrawn(alice, "users")) == 1
    assert len(events(caplog, "last MANAGE of a scope is gone")) == 1
    # What happens in a scope that nobody manages is no news.
    assert await granted(service.admin, "users", pb.WRITE) == []
    assert await granted(service.admin, "users", pb.READ) == []
    assert await withdrawn(service.admin, "users") == []


async def test_manage_that_is_granted_again_is_not_warned_of(alice: Caller) -> None:
    assert await granted(alice, "alice", pb.MANAGE) == []
