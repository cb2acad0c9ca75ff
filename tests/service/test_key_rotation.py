"""Keys of every level are rotated while the service runs, and nobody notices (S5)."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from secrets_service import files, foundation, rootkey, rootsource, rotation, rotation_store, store
from secrets_service.app import MIGRATIONS
from secrets_service.memory import RememberingDatabase
from secrets_service.values import SecretValues
from servicekit import database
from servicekit.audit import AuditUnavailable
from servicekit.errors import StartError
from servicekit.storage import Connection, StorageError, StorageFailed
from tessera.cli.__main__ import main
from tessera.identity.v1 import identity_pb2 as identity
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.eventually import eventually
from tests.support.secrets import Caller, Clock, RunningSecrets, data_directory, refusal, running_secrets, settings_for

ROTATIONS = ("root", "store", "scopes")
CALLS_IN_A_ROTATION = 20
LEVELS = 3
"""How often each kind is rotated under load."""


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets(tokens_per_minute=0) as running:
        yield running


async def rotate(service: RunningSecrets, kind: str) -> pb.KeyStatus:
    operator = service.peer("operator")
    calls: dict[str, tuple[Callable[..., Any], Any]] = {
        "root": (operator.key_rotation.RotateRootKey, pb.RotateRootKeyRequest()),
        "store": (operator.key_rotation.RotateStoreKey, pb.RotateStoreKeyRequest()),
        "scopes": (operator.key_rotation.RotateScopeKeys, pb.RotateScopeKeysRequest()),
    }
    answer: pb.KeyStatus = await operator(*calls[kind])
    return answer


async def status(service: RunningSecrets) -> pb.KeyStatus:
    operator = service.peer("operator")
    answer: pb.KeyStatus = await operator(operator.key_rotation.GetKeyStatus, pb.GetKeyStatusRequest())
    return answer


async def settled(service: RunningSecrets) -> None:
    """Waits until everything is under the newest key that there is for it."""

    async def is_settled() -> bool:
        keys = rows(service.settings.data_dir, "SELECT count(*) - count(DISTINCT scope_id) FROM scope_keys")
        found = await status(service)
        older = sum(key.scope_keys + key.rights for key in found.store_keys[:-1])
        return found.values_behind == 0 and older == 0 and keys == [(0,)]

    await eventually(is_settled)


def rows(directory: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(f"file:{directory}/secrets/secrets.db?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def token_of(caller: Caller) -> str:
    return caller.metadata[0][1].removeprefix("Bearer ")


@asynccontextmanager
async def filled(directory: Path) -> AsyncIterator[tuple[RunningSecrets, Caller]]:
    """The service with alice, two scopes of hers with three versions of four keys each, and a launch."""
    async with running_secrets(directory, tokens_per_minute=0) as service:
        alice = await service.user("alice")
        for scope in ("one", "two"):
            await alice.create_scope(scope)
            for key, version in itertools.product("abcd", (1, 2, 3)):
                await alice.put(scope, key, f"{scope}/{key}/{version}")
        (directory / "alice").write_text(token_of(alice))
        (directory / "endpoint").write_text((await service.grant(alice, ("one", "a"), ("two", "b")))[0])
        yield service, alice


async def has_everything(service: RunningSecrets) -> None:
    alice = service.public((service.settings.data_dir / "alice").read_text())
    for scope, key in itertools.product(("one", "two"), "abcd"):
        assert await alice.get(scope, key) == f"{scope}/{key}/3".encode()
    assert await alice.restore("one", "a", 1) == 4
    assert await alice.get("one", "a") == b"one/a/1"
    endpoint_id = (service.settings.data_dir / "endpoint").read_text()
    assert list((await service.resolve(endpoint_id, ("two", "b"))).values) == [b"two/b/3"]
    assert await service.admin.acls("one") == [("alice", "MANAGE")]


# --- under load ---


class Load:
    """Requests of every kind, without a pause, of which none may fail."""

    def __init__(self, service: RunningSecrets, alice: Caller) -> None:
        self._service = service
        self._alice = alice
        self.answered = 0

    async def run(self, number: int) -> None:
        for turn in itertools.count():
            key = f"k{number}"
            await self._alice.put("one", key, f"{turn}")
            assert await self._alice.get("one", key) == f"{turn}".encode()
            assert await self._alice.get("two", "a") == b"two/a/3"
            token = await self._service.token_for("alice")
            fresh = self._service.public(token)
            assert key in await fresh.keys("one")
            await fresh(fresh.tokens.DeleteToken, identity.DeleteTokenRequest(token_id=token[4:16]))
            await self._alice.grant("two", "users", pb.READ)
            endpoint_id = (self._service.settings.data_dir / "endpoint").read_text()
            assert (await self._service.resolve(endpoint_id, ("two", "b"), replica_id=f"r{number}")).values
            self.answered += 9


async def under_load(service: RunningSecrets, alice: Caller, *, rotations: int, workers: int, calls: int) -> None:
    load = Load(service, alice)
    running = [asyncio.create_task(load.run(number)) for number in range(workers)]
    try:
        for kind in ROTATIONS * rotations:
            await rotate(service, kind)
            until = load.answered + calls
            while load.answered < until:
                await asyncio.sleep(0)
                for failed in (task for task in running if task.done()):
                    failed.result()
    finally:
        for task in running:
            task.cancel()
        ended = await asyncio.gather(*running, return_exceptions=True)
    assert [each for each in ended if not isinstance(each, asyncio.CancelledError)] == []


async def rotated_under_load(*, rotations: int, workers: int, calls: int) -> None:
    with data_directory() as directory:
        async with filled(directory) as (service, alice):
            await under_load(service, alice, rotations=rotations, workers=workers, calls=calls)
            await settled(service)
            assert [key.version for key in (await status(service)).store_keys] == list(range(1, rotations + 2))
        (directory / "root.key.previous").unlink()  # withdrawn
        async with running_secrets(directory) as service:
            await has_everything(service)
            assert (await status(service)).store_keys[-1].scope_keys == 2


async def test_no_request_fails_while_keys_of_every_kind_are_rotated() -> None:
    await rotated_under_load(rotations=LEVELS, workers=4, calls=CALLS_IN_A_ROTATION)


@pytest.mark.long
async def test_no_request_of_many_fails_while_keys_of_every_kind_are_rotated() -> None:
    await rotated_under_load(rotations=10, workers=16, calls=1_000)


# --- killed on the way ---

STEPS: tuple[tuple[Any, str], ...] = (
    (store, "insert_scope_key"),
    (store, "replace_record"),
    (store, "replace_keyring"),
    (store, "replace_signing_key"),
    (rotation_store, "rewrap_scope_keys"),
    (rotation_store, "renew_macs"),
    (rotation_store, "drop_scope_keys"),
    (files, "write_private"),
    (files, "rename"),
)
"""What rotations write."""


@pytest.mark.parametrize("kind", ROTATIONS)
async def test_rotation_that_is_killed_at_any_step_loses_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the files before and after each step is what a kill there leaves."""
    with data_directory() as directory, data_directory() as images:
        taken: list[Path] = []

        def take(name: str) -> None:
            image = images / f"{len(taken):03}-{name}"
            shutil.copytree(directory, image, ignore=shutil.ignore_patterns("*-shm", "run", ".*"))
            taken.append(image)

        def watched(module: Any, name: str) -> Callable[..., Any]:
            step = getattr(module, name)

            def taking(*args: Any, **kwargs: Any) -> Any:
                take(f"before-{name}")
                result = step(*args, **kwargs)
                take(f"after-{name}")
                return result

            return taking

        async with filled(directory) as (service, _):
            for module, name in STEPS:
                monkeypatch.setattr(module, name, watched(module, name))
            await rotate(service, kind)
            await settled(service)
            take("end")
            monkeypatch.undo()
        assert len(taken) > 4
        chosen = taken if len(taken) < 20 else [*taken[:6], *taken[6:-6:4], *taken[-6:]]
        for image in chosen:
            await opens(image)
        async with running_secrets(chosen[len(chosen) // 2]) as service:
            await settled(service)
            await has_everything(service)
            await rotate(service, kind)
            await settled(service)


async def opens(directory: Path) -> None:
    """Whether everything in a directory opens, at a start of the service and without one."""
    settings = settings_for(directory)
    async with database.opened(settings.database, MIGRATIONS) as opened:
        base = await foundation.opened(settings, rootsource.chosen(settings), opened, Clock())
        values = SecretValues(base.keyring, keep=5, now=Clock())

        def read(connection: Connection) -> None:
            for name, key, version in itertools.product(("one", "two"), "abcd", (1, 2, 3)):
                scope = store.find_scope(connection, name)
                assert scope is not None
                known = store.find_key(connection, scope, key)
                assert known is not None
                sealed = store.find_version(connection, known, version)
                assert sealed is not None
                assert values.open(scope, sealed).reveal() == f"{name}/{key}/{version}".encode()

        await opened.read(read)


# --- each kind ---


async def test_older_key_of_a_scope_is_destroyed_when_nothing_is_under_it() -> None:
    with data_directory() as directory:
        async with filled(directory) as (service, _):
            [(old,)] = rows(directory, "SELECT record FROM scope_keys WHERE scope_id = 1")
            operator = service.peer("operator")
            request = pb.RotateScopeKeysRequest(scopes=["ONE"])
            await operator(operator.key_rotation.RotateScopeKeys, request)
            await settled(service)
            assert rows(directory, "SELECT scope_id, version FROM scope_keys ORDER BY 1") == [(1, 2), (2, 1)]
            of_scope = "SELECT DISTINCT v.key_version FROM versions v JOIN keys k ON k.id = v.key_id WHERE k.scope_id ="
            assert rows(directory, f"{of_scope} 1") == [(2,)]
            assert rows(directory, f"{of_scope} 2") == [(1,)]

            def is_gone() -> bool:  # from the files, which is after the transaction
                return not any(old[-40:] in path.read_bytes() for path in (directory / "secrets").iterdir())

            await eventually(is_gone)
            await has_everything(service)


async def test_unknown_scope_is_named_and_no_key_is_made(service: RunningSecrets) -> None:
    await service.admin.create_scope("one")
    operator = service.peer("operator")
    request = pb.RotateScopeKeysRequest(scopes=["one", "other"])
    refused = await refusal(operator(operator.key_rotation.RotateScopeKeys, request))
    assert (refused.code, "other" in refused.message) == (grpc.StatusCode.NOT_FOUND, True)
    assert rows(service.settings.data_dir, "SELECT version FROM scope_keys") == [(1,)]


async def test_damaged_value_stays_and_keeps_nobody_else_back() -> None:
    with data_directory() as directory:
        async with filled(directory):
            pass
        with closing(sqlite3.connect(directory / "secrets" / "secrets.db")) as connection:
            connection.execute("UPDATE versions SET record = zeroblob(200) WHERE key_id = 1 AND version = 3")
            connection.commit()
        async with running_secrets(directory) as service:
            await rotate(service, "scopes")

            async def is_the_only_one_left() -> bool:
                return (await status(service)).values_behind == 1

            await eventually(is_the_only_one_left)
            alice = service.public((directory / "alice").read_text())
            assert (await refusal(alice.get("one", "a"))).reason == "DATA_LOSS"
            assert await alice.get("one", "b") == b"one/b/3"
            await alice.put("one", "a", "cured")
            assert await alice.get("one", "a") == b"cured"


async def test_tokens_come_under_a_new_store_key_when_they_are_used(service: RunningSecrets) -> None:
    alice, bob = await service.user("alice"), await service.user("bob")
    assert [key.tokens for key in (await status(service)).store_keys] == [3]
    assert [key.tokens for key in (await rotate(service, "store")).store_keys] == [3, 0]
    for caller in (alice, alice, service.admin):
        await caller(caller.scim.GetMe, identity.GetMeRequest())
    assert [key.tokens for key in (await status(service)).store_keys] == [1, 2]
    await bob(bob.scim.GetMe, identity.GetMeRequest())
    assert [key.tokens for key in (await status(service)).store_keys] == [0, 3]


async def test_new_store_key_blesses_nothing_that_was_edited() -> None:
    with data_directory() as directory:
        async with filled(directory):
            pass
        with closing(sqlite3.connect(directory / "secrets" / "secrets.db")) as connection:
            connection.execute("UPDATE acls SET permission = 1 WHERE scope_id = 1")
            connection.commit()
        async with running_secrets(directory) as service:
            await rotate(service, "store")

            async def is_the_only_one_left() -> bool:
                return [key.rights for key in (await status(service)).store_keys[:-1]] == [1]

            await eventually(is_the_only_one_left)
            alice = service.public((directory / "alice").read_text())
            assert (await refusal(alice.get("one", "a"))).reason == "DATA_LOSS"
            assert await alice.get("two", "a") == b"two/a/3"


async def test_store_key_that_cannot_be_recorded_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with data_directory() as directory:
        async with filled(directory) as (service, alice):

            def full(*_: Any) -> None:
                raise StorageError("database or disk is full")

            with monkeypatch.context() as patch:
                patch.setattr(store, "replace_keyring", full)
                assert (await refusal(rotate(service, "store"))).code is grpc.StatusCode.INTERNAL
            await alice.put("one", "new", "after the failure")
            assert await alice.get("one", "new") == b"after the failure"
            assert len((await status(service)).store_keys) == 1
        async with running_secrets(directory) as service:
            await has_everything(service)
            assert await service.public((directory / "alice").read_text()).get("one", "new") == b"after the failure"


async def test_root_key_of_before_opens_nothing_any_more() -> None:
    with data_directory() as directory:
        async with filled(directory) as (service, _):
            first = (directory / "root.key").read_bytes()
            before, after = await status(service), await rotate(service, "root")
            assert before.root_key_id != after.root_key_id
            assert (directory / "root.key.previous").read_bytes() == first
            assert (directory / "root.key").stat().st_mode & 0o777 == 0o600
        fresh = (directory / "root.key").read_bytes()
        (directory / "root.key").write_bytes(first)
        with pytest.raises(StartError, match=f"is {before.root_key_id}.* sealed under {after.root_key_id}"):
            async with running_secrets(directory):
                pass
        (directory / "root.key").write_bytes(fresh)
        async with running_secrets(directory) as service:
            await has_everything(service)


async def test_root_key_is_rotated_from_the_one_that_is_in_use_only(service: RunningSecrets) -> None:
    key = service.settings.root_key
    kept = key.read_bytes()
    for content in (bytes(32), b"", None):
        key.unlink()
        if content is not None:
            key.write_bytes(content)
            key.chmod(0o600)
        for kind in ("root", "store"):
            refused = await refusal(rotate(service, kind))
            assert (refused.reason, "root key" in refused.message) == ("BAD_REQUEST", True)
        if content is None:
            key.write_bytes(b"x")
            key.chmod(0o600)
    key.write_bytes(kept)
    await rotate(service, "root")
    await service.admin.create_scope("one")


@pytest.mark.parametrize(
    ("place", "step", "number", "cause"),
    [
        (files, "write_private", errno.EROFS, os.strerror(errno.EROFS)),
        (Path, "hardlink_to", errno.EXDEV, "it is mounted by itself"),
    ],
)
async def test_root_key_that_could_not_be_replaced_is_not_rotated(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch, place: Any, step: str, number: int, cause: str
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = await status(service)
    with monkeypatch.context() as patch:
        patch.setattr(place, step, failing)
        refused = await refusal(rotate(service, "root"))
    assert (refused.reason, cause in refused.message) == ("BAD_REQUEST", True)
    assert "TESSERA_PREVIOUS_ROOT_KEY_FILE" in refused.message
    assert await status(service) == before
    assert not service.settings.root_key.with_name("root.key.next").exists()
    await rotate(service, "root")


async def test_root_key_that_cannot_be_moved_into_its_place_is_used_where_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def causes() -> list[str]:
        found = [record.__dict__["cause"] for record in caplog.records if "keep the file" in record.message]
        caplog.clear()
        return found

    with data_directory() as directory:
        key, staged = directory / "root.key", directory / "root.key.next"
        async with filled(directory) as (service, _):
            first = key.read_bytes()
            with monkeypatch.context() as patch:
                patch.setattr(files, "rename", busy)
                before, after = await status(service), await rotate(service, "root")
                assert before.root_key_id != after.root_key_id
                assert after.root_key_source == f"file {staged} (keep it: it could not be moved to {key})"
                assert causes() == [os.strerror(errno.EBUSY)]
                fresh = staged.read_bytes()
                assert str(staged) in (await refusal(rotate(service, "root"))).message
        with monkeypatch.context() as patch:
            patch.setattr(files, "rename", busy)
            caplog.clear()
            async with running_secrets(directory) as service:
                assert causes() == [os.strerror(errno.EBUSY)]
                await has_everything(service)
                assert (await refusal(rotate(service, "root"))).reason == "BAD_REQUEST"
        assert (key.read_bytes(), staged.read_bytes()) == (first, fresh)
        async with running_secrets(directory) as service:
            assert (await status(service)).root_key_source == f"file {key}"
            assert (key.read_bytes(), staged.exists()) == (fresh, False)
            await rotate(service, "root")


async def test_new_root_key_is_dropped_when_it_is_certain_that_nothing_is_sealed_under_it(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, is_kept in ((AuditUnavailable("for a test"), False), (StorageFailed("for a test"), True)):

        def failing(*_: Any, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(store, "replace_keyring", failing)
            assert (await refusal(rotate(service, "root"))).code is grpc.StatusCode.UNAVAILABLE
        assert service.settings.root_key.with_name("root.key.next").exists() == is_kept
    await rotate(service, "root")


async def test_new_root_key_stays_when_it_was_refused_after_it_was_in_use(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RememberingDatabase.write

    async def refused_late(*args: Any, **kwargs: Any) -> None:
        await write(*args, **kwargs)
        raise AuditUnavailable("for a test")

    with monkeypatch.context() as patch:
        patch.setattr(RememberingDatabase, "write", refused_late)
        await refusal(rotate(service, "root"))
    staged = service.settings.root_key.with_name("root.key.next")
    assert (await status(service)).root_key_id == rootkey.load(staged).id


async def test_store_is_sealed_under_another_root_key_when_both_are_at_hand(caplog: pytest.LogCaptureFixture) -> None:
    with data_directory() as directory, data_directory() as keys:
        for name in ("new", "other"):
            files.write_private(keys / name, name[:1].encode() * 32, replace=False)
        async with filled(directory):
            pass
        old = directory / "root.key"
        for before in (None, keys / "other"):
            with pytest.raises(StartError, match="TESSERA_PREVIOUS_ROOT_KEY_FILE"):
                async with running_secrets(directory, root_key_file=keys / "new", previous_root_key_file=before):
                    pass
        async with running_secrets(directory, root_key_file=keys / "new", previous_root_key_file=old) as service:
            await has_everything(service)
        assert "store sealed under another root key" in [record.message for record in caplog.records]
        old.unlink()  # withdrawn
        for before in (old, None):
            async with running_secrets(directory, root_key_file=keys / "new", previous_root_key_file=before) as service:
                assert await service.public((directory / "alice").read_text()).get("two", "a") == b"two/a/3"


# --- by themselves ---


DAY = 24 * 3600


async def keys_of(service: RunningSecrets) -> tuple[list[int], list[int]]:
    """The newest versions of all scopes' keys, and the versions of the store key."""
    found = rows(service.settings.data_dir, "SELECT max(version) FROM scope_keys GROUP BY scope_id ORDER BY scope_id")
    return [row[0] for row in found], [key.version for key in (await status(service)).store_keys]


async def test_keys_are_renewed_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "CHECK_SECONDS", 0.02)
    clock = Clock()
    looked = 0
    due_scopes = rotation_store.due_scopes

    def looking(*args: Any, **kwargs: Any) -> Any:
        nonlocal looked
        looked += 1
        return due_scopes(*args, **kwargs)

    monkeypatch.setattr(rotation_store, "due_scopes", looking)

    async def looked_twice() -> None:
        since = looked
        await eventually(lambda: looked > since + 1)

    with data_directory() as directory:
        async with filled(directory):
            pass
        async with running_secrets(directory, clock=clock) as service:
            clock.offset = 89 * DAY
            await looked_twice()
            assert await keys_of(service) == ([1, 1], [1])
            for days, expected in ((91, ([2, 2], [1])), (366, ([3, 3], [1, 2]))):
                clock.offset = days * DAY

                async def are_renewed(expected: object = expected) -> bool:
                    return bool(await keys_of(service) == expected)

                await eventually(are_renewed)
                await settled(service)
            await looked_twice()
            assert await keys_of(service) == ([3, 3], [1, 2])
        async with running_secrets(directory, clock=clock, scope_key_days=0, store_key_days=0) as service:
            clock.offset = 9_999 * DAY
            await looked_twice()
            assert await keys_of(service) == ([3, 3], [1, 2])
        await opens(directory)


async def test_keys_are_renewed_when_they_were_used_very_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(rotation, "MOST_USES", 20)
    async with running_secrets() as service:
        for scope in ("busy", "idle"):
            await service.admin.create_scope(scope)
        for turn in range(20):
            await service.admin.put("busy", f"{turn % 3}", f"{turn}")

        async def is_renewed() -> bool:
            return await keys_of(service) == ([2, 1], [1])

        await eventually(is_renewed)
        for turn in range(20):
            await service.admin.create_scope(f"{turn}")

        async def has_another() -> bool:
            return (await keys_of(service))[1][-1] > 1

        await eventually(has_another)
        assert await service.admin.get("busy", "1") == b"19"


async def test_uses_of_a_store_key_are_counted_over_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "MOST_USES", 30)
    with data_directory() as directory:
        for life in range(2):
            async with running_secrets(directory) as service:
                for number in range(20):
                    await service.admin.create_scope(f"{life}-{number}")
                assert await keys_of(service) == ([1] * 20 * (life + 1), [1])
        async with running_secrets(directory) as service:  # which looks at its start, and every hour

            async def is_renewed() -> bool:
                return (await keys_of(service))[1][-1] == 2

            await eventually(is_renewed)


class Workless(rotation.KeyRotation):
    """Keys of which none is ever due, and nothing behind."""

    async def _renew_due(self) -> None:
        pass

    async def _follow(self) -> None:
        pass


async def test_a_stop_is_heard_also_when_work_comes_in_the_same_moment() -> None:
    nothing: Any = None
    keys = Workless(nothing, nothing, rotation.KeyAges(store=0, scope=0), time.time, renewed=lambda: None)
    job = asyncio.create_task(keys.run())
    for _ in range(10):
        await asyncio.sleep(0)
    keys._has_work.set()
    await asyncio.sleep(0)  # the event is seen, and `run` has not gone on yet
    job.cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(job, return_exceptions=True)
    assert job.cancelled()


# --- as an operator does it ---


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: capsys.readouterr().out


async def test_operator_rotates_every_level_from_the_command_line(
    service: RunningSecrets, said: Callable[[], str]
) -> None:
    await service.admin.create_scope("Shop")
    await service.admin.put("Shop", "key", "value")
    before = (await status(service)).root_key_id
    directory = ["--data-dir", str(service.settings.data_dir)]

    async def command(*words: str) -> str:
        assert await asyncio.to_thread(main, ["keys", *words, *directory]) == 0
        return said()

    assert f"root key    {before}, from file {service.settings.root_key}\nstore key   1, made 2" in await command(
        "status"
    )
    assert before not in await command("rotate", "root")
    assert "store key   2, made" in await command("rotate", "store")
    assert "scope keys  of 1 scopes" in await command("rotate", "scope", "shop")
    assert "scope keys  of 1 scopes" in await command("rotate", "scope", "--all")
    await settled(service)
    assert "0 values to be sealed anew" in await command("status")
    assert await asyncio.to_thread(main, ["keys", "rotate", "scope", "other", *directory]) == 1
    assert await service.admin.get("Shop", "key") == b"value"
