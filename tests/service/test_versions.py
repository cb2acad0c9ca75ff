"""Versions of secrets over real gRPC: what is kept, what is read, what a launch holds, and that the rest is gone."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from secrets_service.app import MIGRATIONS
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import Caller, RunningSecrets, data_directory, refusal, running_secrets

MISSING = "RESOURCE_DOES_NOT_EXIST"


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets(secret_versions=3) as running:
        yield running


@pytest.fixture
async def alice(service: RunningSecrets) -> Caller:
    """Owner of the scope `Shop`, which holds version 1 of `Key`."""
    alice = await service.user("alice")
    await alice.create_scope("Shop")
    await alice.put("Shop", "Key", "one")
    return alice


async def numbers(caller: Caller, key: str = "key") -> list[int]:
    """The versions of a key of `Shop` that are listed."""
    return [version.version for version in await caller.versions("shop", key)]


async def launch(service: RunningSecrets, caller: Caller, replica_id: str, key: str = "key") -> list[bytes]:
    """The values that a replica of a new endpoint of the caller's is started with."""
    endpoint_id, _ = await service.grant(caller, ("Shop", key))
    return list((await service.resolve(endpoint_id, ("Shop", key), replica_id=replica_id)).values)


async def end(service: RunningSecrets, *replica_ids: str) -> None:
    await service.settle(ended_replica_ids=replica_ids)


async def keep(service: RunningSecrets, *replica_ids: str) -> None:
    await service.reconcile(*replica_ids)


def records(directory: Path) -> dict[int, bytes]:
    """The sealed values that are stored, by version; there must be one key."""
    with closing(sqlite3.connect(f"file:{directory}/secrets/secrets.db?mode=ro", uri=True)) as connection:
        return dict(connection.execute("SELECT version, record FROM versions"))


def is_on_disk(directory: Path, record: bytes) -> bool:
    return any(record[-40:] in path.read_bytes() for path in (directory / "secrets").iterdir())


# --- putting ---


async def test_every_put_makes_a_version_and_the_newest_is_read(service: RunningSecrets, alice: Caller) -> None:
    service.clock.offset += 5
    await alice.put("Shop", "KEY", "two")
    newest, oldest = await alice.versions("shop", "kEy")
    assert (newest.version, newest.current, newest.held, newest.deleted) == (2, True, False, False)
    assert (oldest.version, oldest.current, oldest.held, oldest.deleted) == (1, False, False, False)
    assert 5_000 <= newest.created_timestamp - oldest.created_timestamp < 65_000
    assert await alice.get("Shop", "Key") == b"two"
    answer = await alice(alice.secrets.ListSecretVersions, pb.ListSecretVersionsRequest(scope="shop", key="KEY"))
    assert answer.key == "Key"


async def test_only_the_last_versions_are_kept(alice: Caller) -> None:
    for value in ("two", "three", "four"):
        await alice.put("Shop", "Key", value)
    assert await numbers(alice) == [4, 3, 2]


async def test_each_key_counts_for_itself(alice: Caller) -> None:
    await alice.put("Shop", "Other", "first")
    await alice.put("Shop", "Key", "two")
    assert (await numbers(alice), await numbers(alice, "other")) == ([2, 1], [1])


async def test_counting_goes_on_when_a_key_is_deleted_and_put_again(alice: Caller) -> None:
    await alice.put("Shop", "Key", "two")
    await alice.delete("Shop", "Key")
    await alice.put("Shop", "Key", "three")
    assert await numbers(alice) == [3]


async def test_versions_begin_anew_in_a_scope_that_is_made_again(alice: Caller) -> None:
    await alice(alice.secrets.DeleteScope, pb.DeleteScopeRequest(scope="Shop"))
    await alice.create_scope("Shop")
    await alice.put("Shop", "Key", "other")
    assert await numbers(alice) == [1]


async def test_put_on_condition_of_a_version(alice: Caller) -> None:
    await alice.put("Shop", "Key", "two", if_version=1)
    for wrong in (0, 1, 3):
        refused = await refusal(alice.put("Shop", "Key", "lost", if_version=wrong))
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "RESOURCE_CONFLICT")
        assert "version 2" in refused.message
    assert await alice.get("Shop", "Key") == b"two"
    assert await numbers(alice) == [2, 1]


async def test_put_on_condition_that_there_is_no_such_key(alice: Caller) -> None:
    await alice.put("Shop", "New", "first", if_version=0)
    assert (await refusal(alice.put("Shop", "New", "again", if_version=0))).reason == "RESOURCE_CONFLICT"
    await alice.delete("Shop", "New")
    refused = await refusal(alice.put("Shop", "New", "second", if_version=1))
    assert "does not exist" in refused.message
    await alice.put("Shop", "New", "second", if_version=0)
    assert await alice.get("Shop", "New") == b"second"
    assert (await refusal(alice.put("Shop", "New", "x", if_version=-1))).reason == "INVALID_PARAMETER_VALUE"


# --- restoring and purging ---


async def test_restored_value_is_a_new_version(alice: Caller) -> None:
    await alice.put("Shop", "Key", "two")
    assert await alice.restore("Shop", "KEY", 1) == 3
    assert await alice.get("Shop", "Key") == b"one"
    assert await numbers(alice) == [3, 2, 1]
    assert await alice.keys("Shop") == ["Key"]


async def test_version_that_is_not_kept_cannot_be_restored(alice: Caller) -> None:
    for version in (0, 2, -1, 2**62):
        refused = await refusal(alice.restore("Shop", "Key", version))
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, MISSING)
    for value in ("two", "three", "four"):
        await alice.put("Shop", "Key", value)
    assert "Version 1 " in (await refusal(alice.restore("Shop", "Key", 1))).message
    assert await alice.get("Shop", "Key") == b"four"


async def test_what_was_deleted_cannot_be_restored_even_while_it_is_held(
    service: RunningSecrets, alice: Caller
) -> None:
    await launch(service, alice, "r1")
    await alice.delete("Shop", "Key")
    assert (await refusal(alice.restore("Shop", "Key", 1))).reason == MISSING
    await alice.put("Shop", "Key", "two")
    assert (await refusal(alice.restore("Shop", "Key", 1))).reason == MISSING


async def test_purge_destroys_all_versions_at_once_and_leaves_the_counter(
    service: RunningSecrets, alice: Caller
) -> None:
    directory = service.settings.data_dir
    await launch(service, alice, "r1")
    await alice.put("Shop", "Key", "two")
    stored = records(directory)
    assert all(is_on_disk(directory, record) for record in stored.values())
    await alice.purge("Shop", "KEY")
    assert not any(is_on_disk(directory, record) for record in stored.values())
    for call in (alice.get("Shop", "Key"), alice.versions("Shop", "Key"), alice.purge("Shop", "Key")):
        assert (await refusal(call)).reason == MISSING
    await alice.put("Shop", "Key", "three")
    assert await numbers(alice) == [3]


async def test_purge_reaches_what_replicas_hold_of_a_deleted_key(service: RunningSecrets, alice: Caller) -> None:
    await launch(service, alice, "r1")
    [record] = records(service.settings.data_dir).values()
    await alice.delete("Shop", "Key")
    assert [(version.held, version.deleted) for version in await alice.versions("Shop", "Key")] == [(True, True)]
    await alice.purge("Shop", "Key")
    assert not is_on_disk(service.settings.data_dir, record)
    await end(service, "r1")  # it holds nothing any more, and nobody minds


@pytest.mark.parametrize(("needed", "too_little"), [("list", None), ("restore", pb.READ), ("purge", pb.READ)])
async def test_versions_are_listed_by_readers_and_changed_by_writers(
    service: RunningSecrets, alice: Caller, needed: str, too_little: pb.AclPermission.ValueType | None
) -> None:
    bob = await service.user("bob")
    calls: dict[str, Callable[[str], Awaitable[Any]]] = {
        "list": lambda key: bob.versions("Shop", key),
        "restore": lambda key: bob.restore("Shop", key, 1),
        "purge": lambda key: bob.purge("Shop", key),
    }
    if too_little is not None:
        await alice.grant("Shop", "bob", too_little)
    refused = await refusal(calls[needed]("Key"))
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    assert refused == await refusal(calls[needed]("nokey"))
    await alice.grant("Shop", "bob", pb.READ if too_little is None else pb.WRITE)
    await calls[needed]("Key")


# --- holding ---


async def test_version_that_a_replica_holds_outlives_newer_ones(service: RunningSecrets, alice: Caller) -> None:
    assert await launch(service, alice, "r1") == [b"one"]
    for value in ("two", "three", "four", "five"):
        await alice.put("Shop", "Key", value)
    assert await numbers(alice) == [5, 4, 3, 1]
    assert [version.held for version in await alice.versions("Shop", "Key")] == [False, False, False, True]
    assert await alice.restore("Shop", "Key", 1) == 6
    await end(service, "r1")
    assert await numbers(alice) == [6, 5, 4]


async def test_deleted_value_goes_with_its_last_holder(service: RunningSecrets, alice: Caller) -> None:
    directory = service.settings.data_dir
    await launch(service, alice, "r1")
    await launch(service, alice, "r2")
    await alice.put("Shop", "Key", "two")
    stored = records(directory)
    await alice.delete("Shop", "Key")
    assert is_on_disk(directory, stored[1])
    assert not is_on_disk(directory, stored[2])
    await alice.put("Shop", "Key", "three")  # also when the key is put again
    await end(service, "r1", "never-seen")
    await end(service, "r1")
    assert is_on_disk(directory, stored[1])
    await end(service, "r2")
    assert not is_on_disk(directory, stored[1])
    assert await numbers(alice) == [3]


async def test_reconciliation_releases_all_but_the_live_replicas(service: RunningSecrets, alice: Caller) -> None:
    await launch(service, alice, "r1")
    await alice.put("Shop", "Key", "two")
    await launch(service, alice, "r2")
    await alice.delete("Shop", "Key")
    assert await numbers(alice) == [2, 1]
    await keep(service, "r2", "r3")
    assert await numbers(alice) == [2]
    await keep(service)
    assert (await refusal(alice.versions("Shop", "Key"))).reason == MISSING


async def test_launch_that_fails_holds_nothing(service: RunningSecrets, alice: Caller) -> None:
    await alice.put("Shop", "Binary", b"\xff")
    assert await launch(service, alice, "r1", "binary") == []
    assert [version.held for version in await alice.versions("Shop", "Binary")] == [False]
    refused = await refusal(launch(service, alice, ""))
    assert (refused.reason, refused.message[:11]) == ("INVALID_PARAMETER_VALUE", "replica_id:")


async def test_holds_outlive_a_restart() -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as first:
            await first.admin.create_scope("Shop")
            await first.admin.put("Shop", "Key", "one")
            await launch(first, first.admin, "r1")
            await first.admin.delete("Shop", "Key")
        async with running_secrets(directory) as second:
            assert [version.held for version in await second.admin.versions("Shop", "Key")] == [True]
            await end(second, "r1")
            assert (await refusal(second.admin.versions("Shop", "Key"))).reason == MISSING


# --- at rest ---


@pytest.mark.parametrize("way", ["delete", "put often", "delete the scope"])
async def test_destroyed_value_is_not_on_disk_any_more(service: RunningSecrets, alice: Caller, way: str) -> None:
    directory = service.settings.data_dir
    [record] = records(directory).values()
    assert is_on_disk(directory, record)
    if way == "delete":
        await alice.delete("Shop", "Key")
    elif way == "put often":
        for value in ("two", "three", "four"):
            await alice.put("Shop", "Key", value)
    else:
        await alice(alice.secrets.DeleteScope, pb.DeleteScopeRequest(scope="Shop"))
    assert not is_on_disk(directory, record)


async def test_deleted_value_that_a_killed_process_left_in_the_log_is_erased_at_the_next_start() -> None:
    with data_directory() as directory, data_directory() as killed:
        async with running_secrets(directory) as service:
            await service.admin.create_scope("Shop")
            await service.admin.put("Shop", "Key", "one")
            [record] = records(directory).values()
            # What is on disk between deletion and erasure: the deletion is in the log, the value still in the file.
            shutil.copytree(directory, killed, dirs_exist_ok=True, ignore=lambda *_: ["run"])
        with closing(sqlite3.connect(killed / "secrets" / "secrets.db")) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("UPDATE keys SET first_version = 2")
            connection.execute("DELETE FROM versions")
            connection.commit()
            other = killed / "left"
            shutil.copytree(killed / "secrets", other / "secrets")
        shutil.copy(killed / "root.key", other / "root.key")
        assert is_on_disk(other, record)
        async with running_secrets(other):
            assert not is_on_disk(other, record)


async def test_values_of_older_versions_open_only_at_their_own_place() -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            await service.admin.create_scope("Shop")
            for value in ("one", "two"):
                await service.admin.put("Shop", "Key", value)
        with closing(sqlite3.connect(directory / "secrets" / "secrets.db")) as connection:
            connection.execute("UPDATE versions SET record = (SELECT record FROM versions WHERE version = 1)")
            connection.commit()
        async with running_secrets(directory) as service:
            assert (await refusal(service.admin.get("Shop", "Key"))).reason == "DATA_LOSS"
            # What cannot be opened is not made a new version either; what can be cures the key.
            assert (await refusal(service.admin.restore("Shop", "Key", 2))).reason == "DATA_LOSS"
            assert await service.admin.restore("Shop", "Key", 1) == 3
            assert await service.admin.get("Shop", "Key") == b"one"


def test_secrets_of_a_store_without_versions_keep_value_version_and_time() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        scripts = sorted(MIGRATIONS.iterdir(), key=lambda entry: entry.name)
        migration = next(script for script in scripts if script.name.endswith("_versions.sql"))
        for script in scripts[: scripts.index(migration)]:
            connection.executescript(script.read_text())
        connection.execute("INSERT INTO scopes (id, uuid, name, folded, last_version) VALUES (7, x'01', 'S', 's', 9)")
        connection.execute(
            "INSERT INTO secrets (id, scope_id, key, folded, version, record, updated_ms)"
            " VALUES (5, 7, 'Key', 'key', 4, x'ab', 1234)"
        )
        connection.commit()
        connection.executescript(migration.read_text())
        assert list(connection.execute("SELECT * FROM keys")) == [(5, 7, "Key", "key", 4, 4)]
        assert list(connection.execute("SELECT * FROM versions")) == [(5, 4, 1234, b"\xab")]
