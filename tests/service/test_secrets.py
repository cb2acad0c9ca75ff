"""Scopes and secrets as a client meets them, and what is kept of them: contract 4.2 to 4.4, and the encrypted store."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from secrets_service import files, scopes
from servicekit.errors import StartError
from servicekit.logs import JsonLines
from servicekit.process import STATUS_FAILED
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.eventually import eventually
from tests.support.secrets import Caller, RunningSecrets, data_directory, failures_of, refusal, running_secrets
from tests.support.starts import tried

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
CANARY = b"canary-7Qk2vX9mR4tB8wZ1"


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


@pytest.fixture
async def alice(service: RunningSecrets) -> Caller:
    """Owner of the scope `Shop`, which holds `Db.Password`."""
    alice = await service.user("alice@example.com")
    await alice.create_scope("Shop")
    await alice.put("Shop", "Db.Password", "s3cret")
    return alice


# --- scopes ---


async def test_scopes_are_listed_by_name_to_every_user(service: RunningSecrets, alice: Caller) -> None:
    await alice.create_scope("aisle")
    bob = await service.user("bob")
    answer = await bob(bob.secrets.ListScopes, pb.ListScopesRequest())
    assert [(scope.name, scope.backend_type) for scope in answer.scopes] == [
        ("aisle", pb.DATABRICKS),
        ("Shop", pb.DATABRICKS),
    ]


@pytest.mark.parametrize("name", ["Shop", "SHOP", "shop"])
async def test_scope_name_is_taken_in_every_letter_case(alice: Caller, name: str) -> None:
    refused = await refusal(alice.create_scope(name))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "RESOURCE_ALREADY_EXISTS")
    assert refused.message == "Scope Shop already exists!"
    assert refused.facts["http_status"] == "400"


@pytest.mark.parametrize("name", ["", "a" * 129, "a/b", "a b", "a\n", "scópe", "a:b", "ａ"])
async def test_bad_scope_name_is_refused(alice: Caller, name: str) -> None:
    for call in (alice.create_scope(name), alice.put(name, "key", "value"), alice.get(name, "key"), alice.keys(name)):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, INVALID)
        assert refused.message.startswith("scope:")


async def test_longest_scope_name_and_every_character_are_taken(alice: Caller) -> None:
    for name in ("a" * 128, "az.AZ-09_@"):
        await alice.create_scope(name)
        assert await alice.acls(name) == [("alice@example.com", "MANAGE")]


async def test_only_users_can_be_the_initial_manager(alice: Caller) -> None:
    for manager in ("admins", "Users", "alice@example.com"):
        refused = await refusal(alice.create_scope("other", manager))
        assert refused.reason == INVALID
        assert refused.message.startswith("initial_manage_principal:")


@pytest.mark.parametrize("backend", [pb.AZURE_KEYVAULT, 7])
async def test_other_backends_are_refused(alice: Caller, backend: pb.ScopeBackendType.ValueType) -> None:
    request = pb.CreateScopeRequest(scope="vault", scope_backend_type=backend)
    refused = await refusal(alice(alice.secrets.CreateScope, request))
    assert (refused.reason, refused.message) == (INVALID, "scope_backend_type: only DATABRICKS is offered.")


async def test_number_of_scopes_is_limited(alice: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "MOST_SCOPES", 2)
    await alice.create_scope("second")
    refused = await refusal(alice.create_scope("third"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RESOURCE_LIMIT_EXCEEDED")
    # What exists already is said before that there is no more room.
    assert (await refusal(alice.create_scope("second"))).reason == "RESOURCE_ALREADY_EXISTS"


async def test_documented_limits() -> None:
    assert (scopes.MOST_SCOPES, scopes.MOST_SECRETS, scopes.MOST_ACLS) == (1_000, 1_000, 1_000)
    assert scopes.LONGEST_VALUE == 131_072


async def test_deleted_scope_takes_its_secrets_and_acls_with_it(service: RunningSecrets, alice: Caller) -> None:
    await alice.grant("Shop", "users", pb.READ)
    await alice(alice.secrets.DeleteScope, pb.DeleteScopeRequest(scope="shop"))
    assert (await refusal(alice.keys("Shop"))).message == "Scope Shop does not exist!"
    bob = await service.user("bob")
    await bob.create_scope("SHOP")
    assert await bob.keys("Shop") == []
    assert await bob.acls("Shop") == [("bob", "MANAGE")]
    assert (await refusal(alice.keys("Shop"))).reason == "PERMISSION_DENIED"


async def test_missing_scope_is_said_to_everybody_before_permission(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    for call in (
        bob(bob.secrets.DeleteScope, pb.DeleteScopeRequest(scope="X")),
        bob.put("X", "key", "value"),
        bob.delete("X", "key"),
        bob.get("X", "key"),
        bob.keys("X"),
        bob.grant("X", "users", pb.READ),
        bob.acls("X"),
        bob(bob.secrets.GetAcl, pb.GetAclRequest(scope="X", principal="users")),
        bob(bob.secrets.DeleteAcl, pb.DeleteAclRequest(scope="X", principal="users")),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, MISSING)
        assert refused.message == "Scope X does not exist!"


# --- values ---


@pytest.mark.parametrize(
    "value", ["", "text", "line\n", " spaces ", "snow ☃", b"", b"\x00\xff\xfe", b"x" * 131_072, "é" * 65_536]
)
async def test_value_comes_back_byte_for_byte(alice: Caller, value: str | bytes) -> None:
    await alice.put("Shop", "key", value)
    assert await alice.get("Shop", "key") == (value.encode() if isinstance(value, str) else value)


@pytest.mark.parametrize("value", [b"x" * 131_073, "é" * 65_536 + "x"])
async def test_value_beyond_the_limit_is_refused_and_the_old_one_stays(alice: Caller, value: str | bytes) -> None:
    refused = await refusal(alice.put("Shop", "Db.Password", value))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, INVALID)
    assert "131072" in refused.message
    assert await alice.get("Shop", "Db.Password") == b"s3cret"


async def test_put_without_a_value_is_malformed(alice: Caller) -> None:
    refused = await refusal(alice(alice.secrets.PutSecret, pb.PutSecretRequest(scope="Shop", key="key")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


@pytest.mark.parametrize("key", ["", "k" * 129, "a/b", "a@b", "a b", "a\n", "clé"])
async def test_bad_key_is_refused(alice: Caller, key: str) -> None:
    for call in (alice.put("Shop", key, "value"), alice.get("Shop", key), alice.delete("Shop", key)):
        refused = await refusal(call)
        assert refused.reason == INVALID
        assert refused.message.startswith("key:")


async def test_key_is_found_in_every_letter_case_and_shown_as_first_given(alice: Caller) -> None:
    await alice.put("sHOP", "DB.PASSWORD", "changed")
    assert await alice.keys("SHOP") == ["Db.Password"]
    answer = await alice(alice.secrets.GetSecret, pb.GetSecretRequest(scope="shop", key="db.password"))
    assert (answer.key, answer.value) == ("Db.Password", b"changed")


async def test_key_that_was_deleted_is_shown_as_newly_given(alice: Caller) -> None:
    await alice.delete("shop", "DB.password")
    await alice.put("Shop", "DB.PASSWORD", "new")
    assert await alice.keys("Shop") == ["DB.PASSWORD"]
    assert await alice.get("Shop", "Db.Password") == b"new"


async def test_put_refreshes_the_time_of_the_secret(service: RunningSecrets, alice: Caller) -> None:
    async def updated() -> int:
        answer = await alice(alice.secrets.ListSecrets, pb.ListSecretsRequest(scope="Shop"))
        return int(answer.secrets[0].last_updated_timestamp)

    before = await updated()
    assert abs(before / 1000 - service.clock()) < 60  # milliseconds
    service.clock.offset += 5
    await alice.put("Shop", "Db.Password", "again")
    assert 5_000 <= await updated() - before < 65_000


async def test_keys_are_listed_by_name(alice: Caller) -> None:
    for key in ("zeta", "Alpha", "beta"):
        await alice.put("Shop", key, "value")
    assert await alice.keys("Shop") == ["Alpha", "beta", "Db.Password", "zeta"]


async def test_missing_key_is_not_found_and_delete_is_not_idempotent(alice: Caller) -> None:
    await alice.delete("Shop", "Db.Password")
    for call in (alice.get("SHOP", "Db.Password"), alice.delete("SHOP", "Db.Password")):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, MISSING)
        assert refused.message == "Secret does not exist with scope: Shop and key: Db.Password"


async def test_number_of_secrets_in_a_scope_is_limited(alice: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "MOST_SECRETS", 3)

    async def is_full(key: str) -> bool:
        return (await refusal(alice.put("small", key, "value"))).reason == "RESOURCE_LIMIT_EXCEEDED"

    for _ in range(2):  # the second scope may have the place of the first
        await alice.create_scope("small")
        for key in ("one", "two", "three"):
            await alice.put("small", key, "value")
        assert await is_full("four")
        await alice.put("small", "ONE", "a full scope still takes new values of its keys")
        for key, other in (("one", "four"), ("four", "one"), ("two", "two")):
            await alice.delete("small", key)
            await alice.put("small", other, "value")
            assert await is_full("five")
        await alice(alice.secrets.DeleteScope, pb.DeleteScopeRequest(scope="small"))


# --- at rest ---


async def test_restart_keeps_everything() -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as first:
            alice = await first.user("alice")
            token = await first.token_for("alice")
            await alice.create_scope("Shop", "users")
            await alice.put("Shop", "Key", CANARY)
            platform = await first.assertion(token)
            key, admin_token = first.settings.root_key.read_bytes(), first.admin_token
        async with running_secrets(directory) as second:
            assert second.settings.root_key.read_bytes() == key
            assert second.admin_token == admin_token
            alice = second.public(token)
            assert await alice.get("shop", "key") == CANARY
            assert await alice.acls("Shop") == [("users", "MANAGE")]
            # An assertion of the first process is good at the second: the signing key is the same.
            assert await second.peer("gateway", platform).get("shop", "key") == CANARY
            assert await second.admin.get("shop", "key") == CANARY


def _lost(key: Path) -> None:
    key.unlink()


def _wrong(key: Path) -> None:
    key.write_bytes(b"w" * 32)


def _empty(key: Path) -> None:
    key.write_bytes(b"")


def _truncated(key: Path) -> None:
    key.write_bytes(key.read_bytes()[:31])


def _too_long(key: Path) -> None:
    key.write_bytes(key.read_bytes() + b"\n")


def _readable_by_others(key: Path) -> None:
    key.chmod(0o644)


def _symbolic_link(key: Path) -> None:
    key.rename(key.with_name("elsewhere"))
    key.symlink_to("elsewhere")


def _directory(key: Path) -> None:
    key.unlink()
    key.mkdir()


def _writable_by_the_group(key: Path) -> None:
    key.chmod(0o620)


def _for_nobody(key: Path) -> None:
    key.chmod(0o000)


def _pipe(key: Path) -> None:
    key.unlink()
    os.mkfifo(key, 0o600)


def _only_the_one_before(key: Path) -> None:
    """As after a rotation whose new key was lost."""
    key.rename(key.with_name("root.key.previous"))


def _only_a_staged_one(key: Path) -> None:
    """As of a rotation that never came to its end, with the key in use lost."""
    key.unlink()
    files.write_private(key.with_name("root.key.next"), b"n" * 32, replace=False)


def _before_the_last_rotation(key: Path) -> None:
    key.with_name("root.key.previous").replace(key)


def _of_another_user(key: Path) -> None:
    os.chown(key, 65_534, -1)


HARMS: list[Callable[[Path], None]] = [
    _lost,
    _wrong,
    _empty,
    _truncated,
    _too_long,
    _readable_by_others,
    _writable_by_the_group,
    _for_nobody,
    _symbolic_link,
    _directory,
    _pipe,
    _only_the_one_before,
    _only_a_staged_one,
    _before_the_last_rotation,
    *([_of_another_user] if os.geteuid() == 0 else []),  # nobody else can give a file away
]


async def test_harmed_root_key_stops_the_start_and_changes_nothing() -> None:
    """As processes that end with a status, and leave every file as it was; the way out that the message names works."""
    with data_directory() as founded, data_directory() as copies:
        async with running_secrets(founded) as service:
            await service.admin.create_scope("Shop")
            await service.admin.put("Shop", "key", CANARY)
            operator = service.peer("operator")
            await operator(operator.key_rotation.RotateRootKey, pb.RotateRootKeyRequest())
        kept = service.settings.root_key.read_bytes()
        directories = {harm.__name__.lstrip("_"): copies / harm.__name__ for harm in HARMS}
        for harm, directory in zip(HARMS, directories.values(), strict=True):
            shutil.copytree(founded, directory)
            harm(directory / "root.key")
        before = {name: _files(directory) for name, directory in directories.items()}
        for name, ended in (await tried(directories)).items():
            assert ended.status == STATUS_FAILED, name
            assert (ended.log[-1]["event"], "root key" in ended.log[-1]["cause"]) == ("cannot start", True), name
            assert _files(directories[name]) == before[name], name
        for directory in directories.values():
            key = directory / "root.key"
            if key.is_dir():
                key.rmdir()
            key.unlink(missing_ok=True)
            key.write_bytes(kept)
            key.chmod(0o400)
            async with running_secrets(directory) as service:
                assert await service.admin.get("Shop", "key") == CANARY


def _files(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that is below a directory: mode, owner, and content or where a link leads."""
    found = {}
    for path in directory.rglob("*"):
        status, content = path.lstat(), b""
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif path.is_file() and os.access(path, os.R_OK):
            content = path.read_bytes()
        found[str(path.relative_to(directory))] = status.st_mode, status.st_uid, content
    return found


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        ("DELETE FROM platform", "holds data"),
        ("DELETE FROM keyring", "has lost its keyring"),
        ("UPDATE keyring SET record = substr(record, 1, 60)", "is damaged"),
        ("UPDATE keyring SET record = zeroblob(100)", "is damaged"),
        ("UPDATE keyring SET root_key_id = 'another'", "was sealed under another"),
        ("UPDATE platform SET store_id = zeroblob(16)", "is damaged"),
        ("DELETE FROM signing_keys", "has lost its signing keys"),
        ("UPDATE signing_keys SET record = zeroblob(100)", "is damaged"),
    ],
)
async def test_store_that_lost_what_it_begins_with_is_not_founded_again(edit: str, cause: str) -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            await service.admin.create_scope("Shop")
            database, key = service.settings.database, service.settings.root_key
        with closing(sqlite3.connect(database)) as connection:
            connection.execute(edit)
            connection.commit()
        before, content, token = key.read_bytes(), _dump(database), service.admin_token
        with pytest.raises(StartError, match=cause):
            async with running_secrets(directory):
                pass
        assert (key.read_bytes(), _dump(database)) == (before, content)
        assert service.settings.admin_token.read_text().strip() == token


@pytest.mark.parametrize("is_empty", [False, True], ids=["missing", "empty"])
async def test_lost_store_is_not_founded_again_beside_its_audit_files(is_empty: bool) -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            await service.admin.create_scope("Shop")
            database, files = service.settings.database, directory / "audit"
            await eventually(lambda: any(path.stat().st_size for path in files.glob("secrets-*")))
        for path in database.parent.glob("secrets.db*"):
            path.unlink()
        if is_empty:
            database.touch()
        for _ in range(2):  # a start that was refused does not pave the way
            with pytest.raises(StartError, match=r"secrets.db is missing or empty.*secrets-0+1.jsonl.*restore"):
                async with running_secrets(directory):
                    pass
        assert service.settings.admin_token.read_text().strip() == service.admin_token
        files.rename(directory / "kept")
        async with running_secrets(directory) as service:
            await service.admin.create_scope("Shop")


def _dump(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        return list(connection.iterdump())


async def test_root_key_of_another_user_stops_the_start_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            await service.admin.create_scope("Shop")
        content = _dump(service.settings.database)
        with monkeypatch.context() as patch:
            # Somebody else's file, where we are not root and cannot give it away.
            patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
            with pytest.raises(StartError, match=r"The root key .* belongs to another user"):
                async with running_secrets(directory):
                    pass
        assert _dump(service.settings.database) == content


async def test_process_without_its_root_key_exits_with_a_status_and_a_cause() -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            service.settings.root_key.unlink()
        ended = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-I", "-m", "secrets_service"],
            env={"TESSERA_DATA_DIR": str(directory), "TESSERA_SECRETS_LISTEN": "127.0.0.1:0", "PATH": ""},
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert ended.returncode == 1
        last = json.loads(ended.stderr.splitlines()[-1])
        assert last["event"] == "cannot start"
        assert "root.key is missing" in last["cause"]
        assert not (directory / "root.key").exists()


async def test_start_that_crashed_before_it_was_complete_starts_over() -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            first_token = service.admin_token
        # What a crash before the founding transaction leaves: key, token file, and a database without content.
        for part in (directory / "secrets").iterdir():
            part.unlink()
        async with running_secrets(directory) as service:
            assert service.admin_token != first_token
            await service.admin.create_scope("Shop")
            assert (await refusal(service.public(first_token).create_scope("Other"))).reason == "PERMISSION_DENIED"


async def test_second_service_on_the_same_data_is_refused(service: RunningSecrets) -> None:
    with pytest.raises(StartError, match="in use by another process"):
        async with running_secrets(service.settings.data_dir):
            pass
    await service.admin.create_scope("still-there")


async def test_files_are_for_their_owner_alone(service: RunningSecrets) -> None:
    assert service.settings.root_key.stat().st_mode & 0o777 == 0o600
    assert service.settings.admin_token.stat().st_mode & 0o777 == 0o600
    assert service.settings.sockets.stat().st_mode & 0o777 == 0o700
    assert service.settings.database.stat().st_mode & 0o077 == 0
    assert len(service.settings.root_key.read_bytes()) == 32


async def test_neither_value_nor_token_is_on_disk_or_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            alice = await service.user("alice")
            token = await service.token_for("alice")
            await alice.create_scope("Shop")
            for name, value in (("a", CANARY), ("b", CANARY * 1000)):
                await alice.put("Shop", name, value)
                assert await alice.get("Shop", name) == value
            await refusal(alice.put("Shop", "a/b", CANARY))
            await refusal(alice.put("Shop", "c", CANARY * 10_000))
            await refusal(service.public(token[:-1]).keys("Shop"))
            assertion = await service.assertion(token)
            await service.peer("serving", assertion).keys("Shop")
            endpoint_id, _ = await service.grant(alice, ("Shop", "a"))
            assert (await service.resolve(endpoint_id, ("Shop", "a"))).values
            await alice.delete("Shop", "b")
            searched = {CANARY, token.encode(), token[16:59].encode(), assertion.encode()}
            while_running = _containing(directory, searched)
        assert while_running == []
        assert _containing(directory, searched) == []
        assert caplog.records
        lines = "\n".join(JsonLines("test").format(record) for record in caplog.records).encode()
        assert not [True for text in searched if text in lines]
        # The search itself finds what is there: the admin's token in its file.
        assert _containing(directory, {service.admin_token.encode()}) == ["admin.token"]


def _containing(directory: Path, texts: set[bytes]) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any(path.name == "secrets.db" for path in files)
    return [path.name for path in files if any(text in path.read_bytes() for text in texts)]


async def test_moved_or_changed_ciphertext_is_data_loss_and_others_still_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            for scope in ("one", "two"):
                await service.admin.create_scope(scope)
                for key in ("a", "b", "c"):
                    await service.admin.put(scope, key, CANARY)
            endpoint_id, _ = await service.grant(service.admin, ("one", "a"), ("one", "b"))
        with sqlite3.connect(directory / "secrets" / "secrets.db") as connection:
            copy = "UPDATE versions SET record = (SELECT record FROM versions WHERE key_id = ?) WHERE key_id = ?"
            connection.execute(copy, (2, 1))  # another key of the same scope
            connection.execute(copy, (6, 3))  # the same key of another scope
            connection.execute("UPDATE versions SET version = version + 1 WHERE key_id = 4")
            connection.execute("UPDATE keys SET last_version = last_version + 1 WHERE id = 4")
            connection.execute("UPDATE versions SET record = substr(record, 1, 20) WHERE key_id = 5")
        connection.close()
        async with running_secrets(directory) as service:
            for scope, key in (("one", "a"), ("one", "c"), ("two", "a"), ("two", "b")):
                refused = await refusal(service.admin.get(scope, key))
                assert (refused.code, refused.reason) == (grpc.StatusCode.DATA_LOSS, "DATA_LOSS")
                assert key in refused.message
            assert await service.admin.get("one", "b") == CANARY
            assert await service.admin.get("two", "c") == CANARY
            answer = await service.resolve(endpoint_id, ("one", "a"), ("one", "b"))
            assert failures_of(answer) == [("one", "a", "DAMAGED", "")]
            assert answer.values == []
            # A new value cures it.
            await service.admin.put("one", "a", "new")
            assert await service.admin.get("one", "a") == b"new"

            def are_recorded() -> bool:
                texts = [path.read_text() for path in (directory / "audit").glob("*.jsonl")]
                # What follows the last end of a line is still being written.
                records = [json.loads(line) for text in texts for line in text.split("\n")[:-1]]
                reads = [record["outcome"] for record in records if record["method"].endswith("/GetSecret")]
                return reads.count("DATA_LOSS") == 4

            await eventually(are_recorded)
        assert [record.levelname for record in caplog.records if record.message == "stored secret is damaged"]


async def test_old_ciphertext_of_a_key_does_not_open_again() -> None:
    with data_directory() as directory:
        database = directory / "secrets" / "secrets.db"
        async with running_secrets(directory) as service:
            await service.admin.create_scope("one")
            await service.admin.put("one", "a", "old")
        with sqlite3.connect(database) as connection:
            [(old,)] = connection.execute("SELECT record FROM versions").fetchall()
        connection.close()
        async with running_secrets(directory) as service:
            await service.admin.delete("one", "a")
            await service.admin.put("one", "a", "new")
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE versions SET record = ?", (old,))
        connection.close()
        async with running_secrets(directory) as service:
            assert (await refusal(service.admin.get("one", "a"))).reason == "DATA_LOSS"


async def test_data_that_was_copied_elsewhere_opens_with_its_key() -> None:
    with data_directory() as directory, data_directory() as other:
        async with running_secrets(directory) as service:
            await service.admin.create_scope("Shop")
            await service.admin.put("Shop", "key", CANARY)
        shutil.copytree(directory / "secrets", other / "secrets")
        shutil.copy(directory / "root.key", other / "safe.key")
        async with running_secrets(other, root_key_file=other / "safe.key") as service:
            assert not service.settings.admin_token.exists()
            alice = service.public((directory / "admin.token").read_text().strip())
            assert await alice.get("Shop", "key") == CANARY
