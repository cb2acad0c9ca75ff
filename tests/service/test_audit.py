"""The audit log of a running Secrets service: complete, in order, tamper-evident, and nothing goes without it (S27)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import threading
import uuid
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from servicekit import audit, audit_export, audit_store, audit_tail, database
from servicekit.audit_files import Diverged, FileSink
from servicekit.audit_records import AuditKey, Head, verify
from servicekit.audit_tail import AuditTail
from servicekit.context import Principal
from servicekit.database import SqliteConnection
from serving_service import audit_key
from tessera.identity.v1 import audit_pb2, identity_pb2, permissions_pb2
from tessera.identity.v1 import audit_pb2_grpc as audit_rpc
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.serving.v1 import serving_pb2
from tests.support.eventually import eventually
from tests.support.platform import running_platform
from tests.support.secrets import RunningSecrets, data_directory, refusal, running_secrets
from tests.support.serving import running_serving

VALUE = "canary-of-the-audit-log-0123456789"


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


def records_in(directory: Path, service: str = "secrets") -> list[dict[str, Any]]:
    files = sorted((directory / "audit").glob(f"{service}-*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_bytes().splitlines()]


async def recorded(service: RunningSecrets, name: str, count: int) -> list[dict[str, Any]]:
    """The records of calls of one method, once there are so many in the files."""

    def found() -> list[dict[str, Any]]:
        records = records_in(service.settings.data_dir)
        return [each for each in records if each["method"].endswith(f"/{name}")]

    await eventually(lambda: len(found()) >= count)
    return found()


async def keys_of(service: RunningSecrets, log: str = "secrets") -> dict[str, list[AuditKey]]:
    channel = service.peer_channels["operator"]
    answer = await audit_rpc.AuditKeysStub(channel).ListKeys(audit_pb2.ListAuditKeysRequest(), timeout=10)
    return {log: [AuditKey(each.key) for each in answer.keys if each.service == log]}


async def test_each_call_has_one_record_allowed_or_refused(service: RunningSecrets) -> None:
    ada = await service.user("ada@example.com")
    await service.admin.create_scope("s")
    await service.admin.put("s", "k", VALUE)
    await asyncio.gather(*(service.admin.get("s", "k") for _ in range(30)))
    for _ in range(3):
        assert (await refusal(ada.get("s", "k"))).code is grpc.StatusCode.PERMISSION_DENIED
    await refusal(service.public("dapi-wrong").get("s", "k"))
    await service.admin.keys("s")
    reads = await recorded(service, "GetSecret", 34)
    await recorded(service, "ListSecrets", 1)
    assert len(reads) == 34
    allowed = [each for each in reads if each["outcome"] == "OK"]
    refused = [each for each in reads if each["actor"] == "ada@example.com"]
    assert (len(allowed), len(refused)) == (30, 3)
    assert {each["permission"] for each in reads} == {"scope READ"}
    assert all(each["object"] == "scope=s key=k" and each["is_admin_read"] for each in allowed)
    assert {each["values"][0]["secret"] for each in allowed} == {"s/k"}
    (put,) = await recorded(service, "PutSecret", 1)
    assert put["values"][0]["hmac"] == allowed[0]["values"][0]["hmac"]
    (stranger,) = [each for each in reads if not each["actor"]]
    assert (stranger["outcome"], stranger["source"]) == ("PERMISSION_DENIED", "127.0.0.1")
    records = records_in(service.settings.data_dir)
    assert [each["seq"] for each in records] == list(range(1, len(records) + 1))
    assert VALUE not in json.dumps(records)


def changes_in(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [change for each in records for change in each.get("changes", ())]


async def test_who_becomes_an_admin_and_who_is_none_any_more_is_in_the_log(service: RunningSecrets) -> None:
    admin, ada = service.admin, await service.admin.create_user("ada@example.com")
    listed = await admin(admin.scim.ListGroups, identity_pb2.ListRequest(filter='displayName eq "admins"'))
    (admins,) = listed.resources
    first = [identity_pb2.Member(value=each.value) for each in admins.members]
    for members in ([*first, identity_pb2.Member(value=ada.id)], first, first):
        request = identity_pb2.ReplaceGroupRequest(id=admins.id, display_name="admins", members=members)
        await admin(admin.scim.ReplaceGroup, request)
    alone = identity_pb2.ReplaceGroupRequest(id=admins.id, display_name="admins")
    await refusal(admin(admin.scim.ReplaceGroup, alone))  # the last admin stays
    about = {"principal": "ada@example.com", "principal_id": ada.id, "group": "admins"}
    joined, left, same, refused = await recorded(service, "ReplaceGroup", 4)
    assert joined["changes"] == [{**about, "now": "member"}]
    assert left["changes"] == [{**about, "now": "no member"}]
    assert "changes" not in same
    assert refused["outcome"] != "OK"
    assert "changes" not in refused


async def test_what_becomes_of_people_is_in_the_log(service: RunningSecrets) -> None:
    admin, ada = service.admin, await service.admin.create_user("ada@example.com")
    about = {"principal": "ada@example.com", "principal_id": ada.id}
    request = identity_pb2.ReplaceUserRequest(id=ada.id, user_name="lovelace@example.com", active=False)
    await admin(admin.scim.ReplaceUser, request)
    await admin(admin.scim.DeleteUser, identity_pb2.DeleteRequest(id=ada.id))
    assert changes_in(await recorded(service, "CreateUser", 1)) == [{**about, "now": "exists"}]
    assert changes_in(await recorded(service, "ReplaceUser", 1)) == [
        {**about, "now": "renamed", "name": "lovelace@example.com"},
        {**about, "now": "inactive"},
    ]
    about["principal"] = "lovelace@example.com"
    assert changes_in(await recorded(service, "DeleteUser", 1)) == [{**about, "now": "deleted"}]
    group = await admin(admin.scim.CreateGroup, identity_pb2.CreateGroupRequest(display_name="one"))
    renamed = identity_pb2.ReplaceGroupRequest(id=group.id, display_name="other")
    await admin(admin.scim.ReplaceGroup, renamed)
    await admin(admin.scim.DeleteGroup, identity_pb2.DeleteRequest(id=group.id))
    found = [await recorded(service, f"{verb}Group", 1) for verb in ("Create", "Replace", "Delete")]
    assert changes_in([each for records in found for each in records]) == [
        {"group": "one", "group_id": group.id, "now": "exists"},
        {"group": "one", "group_id": group.id, "now": "renamed", "name": "other"},
        {"group": "other", "group_id": group.id, "now": "deleted"},
    ]


async def test_which_levels_of_an_endpoint_are_others_and_which_scopes_have_new_keys_is_in_the_log(
    service: RunningSecrets,
) -> None:
    admin = service.admin
    await admin.create_user("ada@example.com")
    endpoint, _ = await service.grant(admin)

    def entry(level: permissions_pb2.PermissionLevel.ValueType) -> permissions_pb2.AccessControlRequest:
        return permissions_pb2.AccessControlRequest(user_name="ada@example.com", permission_level=level)

    for level in (permissions_pb2.CAN_QUERY, permissions_pb2.CAN_MANAGE, permissions_pb2.CAN_MANAGE):
        update = permissions_pb2.UpdatePermissionsRequest(
            serving_endpoint_id=endpoint, access_control_list=[entry(level)]
        )
        await admin(admin.permissions.UpdatePermissions, update)
    await admin(admin.permissions.SetPermissions, permissions_pb2.SetPermissionsRequest(serving_endpoint_id=endpoint))
    updates = await recorded(service, "UpdatePermissions", 3)
    assert [each.get("changes") for each in updates] == [
        [{"user": "ada@example.com", "now": "CAN_QUERY"}],
        [{"user": "ada@example.com", "now": "CAN_MANAGE"}],
        None,
    ]
    assert {"user": "ada@example.com", "now": "no permission"} in changes_in(
        await recorded(service, "SetPermissions", 1)
    )
    for scope in ("one", "two", "three"):
        await admin.create_scope(scope)
    operator = service.peer("operator")
    await operator(operator.key_rotation.RotateScopeKeys, pb.RotateScopeKeysRequest(scopes=["two", "ONE"]))
    rotated = changes_in(await recorded(service, "RotateScopeKeys", 1))
    assert rotated == [{"scope": "one", "now": "new key"}, {"scope": "two", "now": "new key"}]


async def test_which_credential_was_made_for_whom_is_in_the_log(service: RunningSecrets) -> None:
    ada = await service.admin.create_user("ada@example.com")
    caller = service.public(await service.token_for("ada@example.com"))
    await refusal(caller.keys("of-no-scope"))
    (use,) = await recorded(service, "ListSecrets", 1)
    made = changes_in(await recorded(service, "CreateOboToken", 1))
    assert made == [{"token_id": use["credential"], "owner_id": ada.id, "now": "good"}]


async def test_what_a_record_tells_of_a_change_has_a_small_length_whatever_names_it_tells(tmp_path: Path) -> None:
    async with a_trail(tmp_path) as trail:
        a_call(trail)
        name = "\U0001f600" * 255
        for _ in range(audit.MOST_CHANGES):
            audit.changed(principal=name, principal_id="1" * 16, group=name, now="no permission")
        await trail._database.write(trail.append)
        (record,) = await records_of(trail)
    assert len(json.dumps(record["changes"])) <= 650 * audit.MOST_CHANGES  # as docs/audit.md says


async def test_what_one_record_does_not_hold_goes_on_in_the_next(service: RunningSecrets) -> None:
    admin = service.admin
    users = [await admin.create_user(f"user-{number}") for number in range(2 * audit.MOST_CHANGES + 1)]
    members = [identity_pb2.Member(value=each.id) for each in users]
    await admin(admin.scim.CreateGroup, identity_pb2.CreateGroupRequest(display_name="many", members=members))
    records = await recorded(service, "CreateGroup", 3)
    assert [each.get("part") for each in records] == [None, 2, 3]
    assert [len(each["changes"]) for each in records] == [audit.MOST_CHANGES, audit.MOST_CHANGES, 2]
    assert len({(each["request_id"], each["actor"], each["outcome"]) for each in records}) == 1
    assert {each["principal"] for each in changes_in(records) if "principal" in each} == {
        each.user_name for each in users
    }
    log = [path.read_bytes() for path in sorted((service.settings.data_dir / "audit").glob("secrets-*"))]
    assert verify(b"".join(log).splitlines(), await keys_of(service)).is_whole


async def test_a_refused_credential_is_recorded_at_the_exchange(service: RunningSecrets) -> None:
    await refusal(service.assertion("dapi-nobody"))
    (record,) = await recorded(service, "ExchangeToken", 1)
    assert (record["outcome"], record["via"], record["actor"]) == ("PERMISSION_DENIED", "gateway", "service:gateway")
    assert "dapi-nobody" not in json.dumps(record)


async def test_a_token_that_is_renewed_while_it_reads_has_the_record_of_its_read(service: RunningSecrets) -> None:
    await service.admin.create_scope("s")
    await service.admin.put("s", "k", VALUE)
    ada = await service.user("ada@example.com")
    operator = service.peer("operator")
    await operator(operator.key_rotation.RotateStoreKey, pb.RotateStoreKeyRequest())
    assert await service.admin.get("s", "k") == VALUE.encode()
    await refusal(ada.get("s", "k"))
    await service.admin.keys("s")
    await recorded(service, "ListSecrets", 1)
    allowed, refused = await recorded(service, "GetSecret", 2)
    assert (allowed["outcome"], allowed["object"]) == ("OK", "scope=s key=k")
    assert [each["secret"] for each in allowed["values"]] == ["s/k"]
    assert (refused["outcome"], refused["actor"]) == ("PERMISSION_DENIED", "ada@example.com")


async def test_who_asks_too_often_is_counted_and_fills_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PUBLISH_SECONDS", 0.2)
    async with running_secrets(tokens_per_minute=3) as service:
        ada = await service.user("ada@example.com")  # with one token
        for _ in range(2):
            await ada(ada.tokens.CreateToken, identity_pb2.CreateTokenRequest())
        for _ in range(3):
            found = await refusal(ada(ada.tokens.CreateToken, identity_pb2.CreateTokenRequest()))
            assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED

        def counts() -> list[dict[str, Any]]:
            records = records_in(service.settings.data_dir)
            return [each for record in records if record["method"] == "audit/counted" for each in record["counts"]]

        await eventually(lambda: sum(each["calls"] for each in counts()) == 3)
        assert {(each["source"], each["cause"]) for each in counts()} == {("127.0.0.1", "too many requests")}
        assert len(await recorded(service, "CreateToken", 2)) == 2


async def test_what_is_shed_is_counted_and_fills_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PUBLISH_SECONDS", 0.2)
    async with running_secrets(calls=1) as service:
        await service.admin.create_scope("s")
        await service.admin.put("s", "k", VALUE)
        answers = await asyncio.gather(*(service.admin.get("s", "k") for _ in range(40)), return_exceptions=True)
        shed = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert shed
        assert {each.code() for each in shed} == {grpc.StatusCode.RESOURCE_EXHAUSTED}

        def counted() -> int:
            records = records_in(service.settings.data_dir)
            counts = [each for record in records if record["method"] == "audit/counted" for each in record["counts"]]
            assert {(each["source"], each["cause"]) for each in counts} <= {("127.0.0.1", "too many requests")}
            return sum(each["calls"] for each in counts)

        await eventually(lambda: counted() == len(shed))
        assert len(await recorded(service, "GetSecret", 40 - len(shed))) == 40 - len(shed)


async def test_a_launch_says_for_which_endpoint_and_replica_it_read_what(service: RunningSecrets) -> None:
    await service.admin.create_scope("s")
    await service.admin.put("s", "k", VALUE)
    endpoint_id, _ = await service.grant(service.admin, ("s", "k"))
    await service.resolve(endpoint_id, ("s", "k"), replica_id="r7")
    await service.resolve(endpoint_id, ("s", "other"), replica_id="r8")
    allowed, refused = await recorded(service, "Resolve", 2)
    assert allowed["actor"] == "service:serving"
    assert endpoint_id in allowed["on_behalf_of"]
    assert f"version=1 endpoint_id={endpoint_id} replica_id=r7" in allowed["object"]
    assert [(each["secret"], each["version"]) for each in allowed["values"]] == [("s/k", 1)]
    assert (refused["outcome"], "values" in refused) == ("REFUSED", False)


async def test_the_files_are_a_whole_log_also_after_a_restart(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, "servicekit.audit")
    directory = tmp_path / "d"
    for _ in range(2):
        async with running_secrets(directory) as service:
            await service.admin(service.admin.secrets.ListScopes, pb.ListScopesRequest())
            keys = await keys_of(service)
    heads = [
        Head(each.__dict__["seq"], each.__dict__["mac"]) for each in caplog.records if each.message == "audit head"
    ]
    assert len(heads) == 2
    assert len(records_in(directory)) == heads[-1].seq
    lines = b"".join(path.read_bytes() for path in sorted((directory / "audit").glob("secrets-*"))).splitlines()
    assert verify(lines, keys, heads).problems == []
    assert not verify(lines[: heads[-1].seq - 1], keys, heads).is_whole
    assert {oct(path.stat().st_mode & 0o777) for path in (directory / "audit").iterdir()} == {"0o600"}


async def lacks_audit(service: RunningSecrets) -> bool:
    """Whether a value is refused because nothing can be recorded."""
    try:
        await service.admin.get("s", "k")
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE and "audit log" in (error.details() or "")
    return False


async def test_a_new_store_key_brings_new_audit_keys_and_the_chains_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_key, "LOOK_SECONDS", 0.1)
    async with running_platform() as platform:
        operator = platform.secrets.peer("operator")
        directory = platform.secrets.settings.data_dir
        admin = platform.endpoints_of("admin")

        def in_use(log: str) -> str:
            records = records_in(directory, log)
            return str(records[-1]["key"]) if records else ""

        async def changes() -> bool:
            """Has both logs go on until no record is under a key of before."""
            with contextlib.suppress(grpc.aio.AioRpcError):
                await admin.get("none")
            await platform.secrets.admin.keys("s")
            return not before & {in_use("secrets"), in_use("serving")}

        before = {""}
        await platform.secrets.admin.create_scope("s")
        for _ in range(2):
            await eventually(changes, what="the newest audit keys are in use")
            before |= {in_use("secrets"), in_use("serving")}
            await operator(operator.key_rotation.RotateStoreKey, pb.RotateStoreKeyRequest())
        await eventually(changes, what="the newest audit keys are in use")
        for log in ("secrets", "serving"):
            files = sorted((directory / "audit").glob(f"{log}-*"))
            lines = b"".join(path.read_bytes() for path in files).splitlines()
            assert verify(lines, await keys_of(platform.secrets, log)).problems == []
            used = [json.loads(line)["key"] for line in lines]
            assert len(set(used)) == 3
            assert sorted(set(used), key=used.index) == [key for key, _ in itertools.groupby(used)], "none comes back"
        assert len(await recorded(platform.secrets, "GetKey", 3)) == 3, "a key is handed over when it is another one"


async def test_where_the_files_cannot_be_written_values_and_changes_are_refused(service: RunningSecrets) -> None:
    await service.admin.create_scope("s")
    await service.admin.put("s", "k", VALUE)
    await recorded(service, "PutSecret", 1)
    directory = service.settings.data_dir / "audit"
    moved = directory.rename(directory.with_name("elsewhere"))
    directory.write_text("in the way")

    await eventually(partial(lacks_audit, service), what="values leave without a log")
    assert (await refusal(service.admin.put("s", "k", "other"))).code is grpc.StatusCode.UNAVAILABLE
    assert (await refusal(service.admin.create_scope("t"))).code is grpc.StatusCode.UNAVAILABLE
    assert await service.admin.keys("s") == ["k"]  # neither a value nor a change
    assert await service.assertion(service.admin_token)
    directory.unlink()
    moved.rename(directory)

    async def is_read() -> bool:
        return not await lacks_audit(service) and await service.admin.get("s", "k") == VALUE.encode()

    await eventually(is_read)


async def test_with_a_full_disk_values_and_changes_are_refused_until_there_is_room(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.admin.create_scope("s")
    await service.admin.put("s", "k", VALUE)
    transaction = database._transaction
    is_full = True

    def on_the_disk(connection: SqliteConnection, begin: str, *args: Any, **kwargs: Any) -> Any:
        if begin == "BEGIN IMMEDIATE":
            # No page more than there are, or any number.
            connection.execute(f"PRAGMA max_page_count={1 if is_full else 1 << 30}")
        return transaction(connection, begin, *args, **kwargs)

    monkeypatch.setattr(audit_store, "drop", lambda *_: None)  # nothing makes room either
    monkeypatch.setattr(database, "_transaction", on_the_disk)
    await eventually(partial(lacks_audit, service), what="values leave without a record")
    assert (await refusal(service.admin.put("s", "k", "x" * 100_000))).code is grpc.StatusCode.UNAVAILABLE
    assert await service.admin.keys("s") == ["k"]
    assert await service.assertion(service.admin_token)
    is_full = False
    assert await service.admin.get("s", "k") == VALUE.encode()
    await service.admin.put("s", "k", "x" * 100_000)
    records = await recorded(service, "PutSecret", 2)
    assert [each["outcome"] for each in records if each["outcome"] == "OK"] == ["OK"] * 2


async def test_serving_records_its_calls_and_answers_queries_while_it_cannot() -> None:
    async with running_platform() as platform:
        await platform.introduce("bob")
        admin, bob = platform.endpoints_of("admin"), platform.endpoints_of("bob")
        await admin.create("demo", "ready")
        await admin.settled("demo")
        for _ in range(3):
            await admin.get("demo")
        with pytest.raises(grpc.aio.AioRpcError):
            await bob.get("demo")
        directory = platform.secrets.settings.data_dir / "audit"

        def found(name: str) -> list[dict[str, Any]]:
            records = records_in(directory.parent, "serving")
            return [each for each in records if each["method"].endswith(f"/{name}")]

        await eventually(lambda: any(each["actor"] == "bob" for each in found("GetServingEndpoint")))
        (created,) = found("CreateServingEndpoint")
        assert (created["actor"], created["outcome"], created["object"]) == ("admin", "OK", "name=demo")
        (refused,) = [each for each in found("GetServingEndpoint") if each["actor"] == "bob"]
        assert (refused["outcome"], refused["permission"]) == ("NOT_FOUND", "endpoint CAN_VIEW")
        kept = directory.rename(directory.with_name("kept"))
        directory.write_text("in the way")

        async def is_refused() -> bool:
            try:
                await admin.create(f"refused-{uuid.uuid4().hex[:8]}", "ready")
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE and "audit log" in (error.details() or "")
            return False

        await eventually(is_refused, what="endpoints are made without a record")
        assert (await admin.get("demo")).name == "demo"
        await admin.query("demo")
        directory.unlink()
        kept.rename(directory)

        async def is_made() -> bool:
            return not await is_refused()

        await eventually(is_made)


class SyslogServer:
    """A datagram socket, and the records that came there."""

    def __init__(self, path: Path) -> None:
        self.lines: list[bytes] = []
        self._path = path
        self._socket = self._bound()

    def look(self) -> list[int]:
        """Takes what came; the numbers of all records until now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.lines.append(self._socket.recv(1 << 20).partition(b" audit - ")[2])
        return [json.loads(line)["seq"] for line in self.lines]

    def stop(self) -> None:
        self.look()
        self._socket.close()
        self._path.unlink()

    def start_again(self) -> None:
        self._socket = self._bound()

    def _bound(self) -> socket.socket:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        bound.setblocking(False)
        bound.bind(str(self._path))
        return bound


async def test_nothing_goes_without_the_syslog_server_that_is_to_have_the_records() -> None:
    with data_directory() as directory:
        server = SyslogServer(directory / "log")
        forwarding: dict[str, Any] = {"audit_forward": f"unix:{directory / 'log'}"}
        async with running_secrets(directory, **forwarding) as service:
            await service.admin.create_scope("s")
            await service.admin.put("s", "k", VALUE)
            await eventually(lambda: bool(server.look()))
            server.stop()
            await eventually(partial(lacks_audit, service), what="values leave without the server")
            assert (await refusal(service.admin.create_scope("t"))).code is grpc.StatusCode.UNAVAILABLE
            assert await service.admin.keys("s") == ["k"]
            server.start_again()

            async def is_read() -> bool:
                server.look()
                return not await lacks_audit(service)

            await eventually(is_read)
            keys = await keys_of(service)
            await eventually(lambda: server.look()[-1] >= records_in(directory)[-1]["seq"])
        before = server.look()[-1]
        async with running_secrets(directory, **forwarding) as service:
            await service.admin.keys("s")
            await eventually(lambda: server.look()[-1] > before)
        assert server.look() == list(range(1, len(server.lines) + 1))  # each of them once
        assert verify(server.lines, keys).problems == []
        server.stop()


async def test_a_value_waits_for_its_record(service: RunningSecrets, monkeypatch: pytest.MonkeyPatch) -> None:
    await service.admin.create_scope("s")
    await service.admin.put("s", "k", VALUE)
    gate = asyncio.Event()
    commit = audit.Trail._commit

    async def held(trail: audit.Trail, batch: Any) -> None:
        await gate.wait()
        await commit(trail, batch)

    monkeypatch.setattr(audit.Trail, "_commit", held)
    reads = [asyncio.create_task(service.admin.get("s", "k")) for _ in range(3)]
    try:
        for _ in range(10):  # in the meantime others are answered, who came later
            assert await service.admin.keys("s") == ["k"]
        assert not any(read.done() for read in reads)
    finally:
        gate.set()
    assert await asyncio.gather(*reads) == [VALUE.encode()] * 3


async def test_a_change_that_cannot_be_recorded_is_not_made(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise audit.AuditUnavailable("for a test")

    with monkeypatch.context() as patched:
        patched.setattr(audit_store, "append", failing)
        await refusal(service.admin.create_scope("s"))
    await service.admin.create_scope("s")  # it was not there


MIGRATIONS = sorted((Path(__file__).parents[2] / "secrets_service/migrations").glob("*_audit*.sql"))


def with_tables(directory: Path) -> Path:
    """A folder of migrations that make the tables of an audit log."""
    directory.mkdir()
    for number, path in enumerate(MIGRATIONS, start=1):
        (directory / f"{number:04}_audit.sql").write_text(path.read_text())
    return directory


@contextlib.asynccontextmanager
async def a_trail(directory: Path) -> AsyncIterator[audit.Trail]:
    """An audit trail by itself, in a database of its own; what follows waits for `records_of`."""
    async with database.opened(directory / "a.db", with_tables(directory / "m")) as opened:
        trail = audit.Trail("secrets", opened, AuditKey(bytes(32)))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(trail, "_flush_soon", lambda: None)
            yield trail


async def records_of(trail: audit.Trail, most: int = 100) -> list[dict[str, Any]]:
    audit.Trail._flush_soon(trail)
    await trail.close()
    return [json.loads(text) for _, text in await trail._database.read(audit_store.after, 0, most)]


async def told_of(trail: audit.Trail) -> list[tuple[str, str, str]]:
    """Outcome, reason, and what the caller was told, of each record."""
    return [(each["outcome"], each["reason"], each.get("told", "")) for each in await records_of(trail)]


def a_call(trail: audit.Trail) -> audit.Entry:
    return trail.begin("m", None, request_id="r", source="", via="gateway")


def is_gone(call: audit.Entry, code: str = "CANCELLED") -> None:
    """The caller does not wait for the answer any more."""
    call.ended(code, "", is_lack_of_audit=False, is_credential=False)


async def test_a_refusal_whose_caller_was_gone_before_is_recorded_as_one(tmp_path: Path) -> None:
    async with a_trail(tmp_path) as trail:
        call = a_call(trail)

        def refuse(connection: Any) -> None:
            is_gone(call, "DEADLINE_EXCEEDED")
            audit.refused("CREATOR_INACTIVE")
            trail.append(connection)

        await trail._database.write(refuse)
        assert await told_of(trail) == [
            ("REFUSED", "CREATOR_INACTIVE", "DEADLINE_EXCEEDED"),
            ("DEADLINE_EXCEEDED", "", ""),
        ]


@pytest.mark.parametrize("place", ["facts", "_append"])
async def test_a_change_is_recorded_as_made_when_its_caller_goes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    async with a_trail(tmp_path) as trail:
        call = a_call(trail)
        owner = audit.Entry if place == "facts" else audit.Trail
        whole = getattr(owner, place)

        def switched(*args: Any) -> Any:
            monkeypatch.setattr(owner, place, whole)
            is_gone(call)
            return whole(*args)

        monkeypatch.setattr(owner, place, switched)
        await trail._database.write(trail.append)
        assert await told_of(trail) == [("OK", "", "CANCELLED" if place == "facts" else "")]


async def test_what_a_use_case_adds_while_a_call_ends_is_in_the_record_of_the_change_alone(tmp_path: Path) -> None:
    async with a_trail(tmp_path) as trail:
        call = a_call(trail)
        audit.value("s/a", 1, b"a")
        is_gone(call)
        audit.value("s/b", 1, b"b")
        audit.note(is_admin_read=True)
        await trail._database.write(trail.append)
        made, ended = await records_of(trail)
        assert (made["outcome"], made["told"], made["is_admin_read"]) == ("OK", "CANCELLED", True)
        assert [each["secret"] for each in made["values"]] == ["s/a", "s/b"]
        assert (ended["outcome"], "told" in ended, "is_admin_read" in ended) == ("CANCELLED", False, False)
        assert [each["secret"] for each in ended["values"]] == ["s/a"]


async def test_a_record_that_could_not_be_appended_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise audit.AuditUnavailable("for a test")

    async with a_trail(tmp_path) as trail:
        call = a_call(trail)
        monkeypatch.setattr(audit_store, "append", failing)
        with pytest.raises(audit.AuditUnavailable):
            await trail._database.write(trail.append)
        monkeypatch.undo()
        is_gone(call)
        assert await told_of(trail) == [("CANCELLED", "", "")]


@pytest.mark.parametrize("character", ["a", '"', "é", "\U0001f600", "\x00", " "])
async def test_a_record_of_a_call_has_a_small_length_whatever_names_it_tells(tmp_path: Path, character: str) -> None:
    name = character * 255
    caller = Principal("9" * 18, name, frozenset(), token_id="f" * 32, token_expires_at=None)
    async with a_trail(tmp_path) as trail:
        for module in (pb, identity_pb2, permissions_pb2, serving_pb2):
            for kind in map(GetMessageClass, module.DESCRIPTOR.message_types_by_name.values()):
                if not kind.DESCRIPTOR.name.endswith("Request"):
                    continue
                request = kind()
                for field in kind.DESCRIPTOR.fields:
                    if field.cpp_type == field.CPPTYPE_STRING and not field.is_repeated:
                        is_text = field.type == field.TYPE_STRING
                        is_id = field.name.endswith("id")
                        given = name[: audit.LONGEST_ID] if is_id else name * 100
                        setattr(request, field.name, given if is_text else given.encode())
                call = a_call(trail)
                call.request_id, call.source, call.caller = "r" * 64, f"fe80::1%{name}", caller
                call.object = audit.about(request)
                audit.note(on_behalf_of=name)
                audit.refused(name * 100)
                is_gone(call, "OK")
        lengths = [len(json.dumps(each, separators=(",", ":"))) for each in await records_of(trail, 1_000)]
        assert len(lengths) > 70
        assert max(lengths) <= 2_500  # as docs/audit.md says


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a" * 256, "a" * 256),
        ("a" * 257, "a" * 256 + "..."),
        ("\U0001f600" * 21 + "aaaa", "\U0001f600" * 21 + "aaaa"),  # twelve bytes each, of which none is cut through
        ("\U0001f600" * 22, "\U0001f600" * 21 + "..."),
        ("é" * 100, "é" * 42 + "..."),
    ],
)
async def test_a_name_is_cut_where_it_takes_too_many_bytes(tmp_path: Path, name: str, shown: str) -> None:
    async with a_trail(tmp_path) as trail:
        a_call(trail)
        audit.note(about=name)
        await trail._database.write(trail.append)
        (record,) = await records_of(trail)
        assert record["about"] == shown


@pytest.mark.parametrize(
    ("principal", "shown"),
    [
        ("ada@example.com", "ada@example.com"),
        ("Jörg", "Jörg"),
        ("x permission=READ", '"x permission=READ"'),
        ('x" permission="READ', r'"x\" permission=\"READ"'),
        ("x\\", r'"x\\"'),
        ("a=b", '"a=b"'),
        ("(41 characters)", '"(41 characters)"'),
        ("a\n\u2028", '"a\\n\u2028"'),
        (" " * 300, '"' + " " * 252 + '"...'),
        ('"' * 300, '"' + r"\"" * 63 + '"...'),
    ],
)
def test_a_name_is_not_taken_for_further_fields(principal: str, shown: str) -> None:
    request = pb.PutAclRequest(scope="s", principal=principal, permission=pb.READ)
    assert audit.about(request) == f"scope=s principal={shown} permission=READ"


async def test_rotation_and_retention_keep_the_chain(tmp_path: Path) -> None:
    key = AuditKey(bytes(32))
    async with database.opened(tmp_path / "a.db", with_tables(tmp_path / "m")) as opened:
        trail = audit.Trail("secrets", opened, key)
        sink = FileSink(tmp_path / "audit", "secrets", file_bytes=3_000, keep_bytes=12_000, keep_seconds=1e9)
        exporter = audit_export.Exporter(trail, opened, sink)
        for number in range(60):
            await trail.event("test", object=f"{number}" * 50)
            if number % 5 == 4:
                await exporter.move()
        files = sink.files()
        lines = b"".join(path.read_bytes() for path in files).splitlines()
        verdict = verify(lines, {"secrets": [key]}, [await opened.read(audit_store.head)])
        assert verdict.problems == []
        assert len(files) > 2
        assert verdict.first > 1
        assert not verify(b"".join(path.read_bytes() for path in files[1:]).splitlines(), {"secrets": [key]}).is_whole
        without_one = [path for path in files if path != files[1]]
        assert not verify(b"".join(p.read_bytes() for p in without_one).splitlines(), {"secrets": [key]}).is_whole


async def test_what_is_recorded_while_records_are_moved_is_moved_with_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_export, "AT_ONCE", 2)
    async with database.opened(tmp_path / "a.db", with_tables(tmp_path / "m")) as opened:
        trail = audit.Trail("secrets", opened, AuditKey(bytes(32)))
        sink = FileSink(tmp_path / "audit", "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
        moved: list[list[int]] = []
        add, loop = sink.add, asyncio.get_running_loop()

        def add_while_another_comes(records: list[tuple[int, str]]) -> None:
            add(records)
            moved.append([seq for seq, _ in records])
            asyncio.run_coroutine_threadsafe(trail.event("test"), loop).result(timeout=10)

        monkeypatch.setattr(sink, "add", add_while_another_comes)
        exporter = audit_export.Exporter(trail, opened, sink)
        for _ in range(4):
            await trail.event("test")
        async with asyncio.timeout(30):
            await exporter.move()
            await exporter.move()
        assert moved == [[1, 2], [3, 4], [5, 6], [7], [8]]


async def test_a_log_is_read_back_over_files_and_what_is_in_none_yet(tmp_path: Path) -> None:
    async with database.opened(tmp_path / "a.db", with_tables(tmp_path / "m")) as opened:
        trail = audit.Trail("secrets", opened, AuditKey(bytes(32)))
        sink = FileSink(tmp_path / "audit", "secrets", file_bytes=3_000, keep_bytes=1 << 30, keep_seconds=1e9)
        exporter = audit_export.Exporter(trail, opened, sink)
        tail = AuditTail(opened, sink)
        assert await tail.newest(10) == await tail.after(0, 10) == []
        for number in range(60):
            await trail.event("test", object=f"{number}" * 50)
            if number % 5 == 4 and number < 50:
                await exporter.move()
        assert len(sink.files()) > 2
        for after in range(61):
            numbers = list(range(after + 1, 61))
            assert [seq for seq, _ in await tail.after(after, 1_000)] == numbers
            assert [seq for seq, _ in await tail.after(after, 7)] == numbers[:7]
            assert [seq for seq, _ in await tail.newest(60 - after)] == numbers
        lines = [text.encode() for _, text in await tail.after(0, 1_000)]
        assert verify(lines, {"secrets": [trail.key] if trail.key else []}).problems == []
        await trail.event("test", object="x" * audit_tail.MOST_BYTES)
        assert [seq for seq, _ in await tail.after(58, 1_000)] == [59, 60]
        assert [seq for seq, _ in await tail.after(60, 1_000)] == [61]
        assert [seq for seq, _ in await tail.newest(3)] == [61]


def a_sink(directory: Path, *, records: int, service: str = "secrets") -> FileSink:
    """Files of one record each."""
    sink = FileSink(directory / "audit", service, file_bytes=1, keep_bytes=1 << 30, keep_seconds=1e9)
    for number in range(1, records + 1):
        sink.add([(number, f'{{"seq":{number}}}')])
    return sink


@pytest.mark.parametrize("gone", [1, 2, 3])
async def test_a_file_that_expires_while_a_log_is_read_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    async with a_trail(tmp_path) as trail:
        sink = a_sink(tmp_path, records=4)
        files = sink.files()

        def listed() -> list[Path]:
            for path in files[:gone]:
                path.unlink(missing_ok=True)
            return files

        monkeypatch.setattr(sink, "files", listed)
        tail = AuditTail(trail._database, sink)
        assert [seq for seq, _ in await tail.after(0, 10)] == list(range(gone + 1, 5))
        assert [seq for seq, _ in await tail.after(gone, 1)] == [gone + 1]


async def test_what_is_read_of_a_log_has_no_gap_where_a_file_expires_behind_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_trail(tmp_path) as trail:
        sink = a_sink(tmp_path, records=3)
        files = sink.files()
        files[1].unlink()
        monkeypatch.setattr(sink, "files", lambda: files)  # the first was opened before both went
        assert [seq for seq, _ in await AuditTail(trail._database, sink).after(0, 10)] == [3]


def test_who_writes_while_another_still_does_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = FileSink(tmp_path, "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
    records = [(1, '{"seq":1}'), (2, '{"seq":2}')]
    write, other = sink._write, threading.Thread(target=sink.add, args=(records,))

    def interrupted(first: int, content: bytes) -> None:
        monkeypatch.setattr(sink, "_write", write)
        other.start()
        other.join(timeout=0.2)  # in which it would be done if nothing kept it
        write(first, content)

    monkeypatch.setattr(sink, "_write", interrupted)
    sink.add(records)
    other.join()
    (file,) = sink.files()
    assert file.read_text() == '{"seq":1}\n{"seq":2}\n'


async def test_half_a_line_of_a_killed_process_is_taken_back(tmp_path: Path) -> None:
    sink = FileSink(tmp_path, "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
    sink.add([(1, '{"seq":1}'), (2, '{"seq":2}')])
    (file,) = sink.files()
    with file.open("ab") as torn:
        torn.write(b'{"seq":3,"ha')
    again = FileSink(tmp_path, "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
    again.add([(2, '{"seq":2}'), (3, '{"seq":3}')])
    assert file.read_text().splitlines() == ['{"seq":1}', '{"seq":2}', '{"seq":3}']


async def test_files_whose_end_could_not_be_read_are_read_again_before_they_are_continued(tmp_path: Path) -> None:
    sink = FileSink(tmp_path, "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
    sink.add([(1, '{"seq":1}'), (2, '{"seq":2}')])
    (file,) = sink.files()
    file.rename(tmp_path / "kept")
    file.mkdir()
    again = FileSink(tmp_path, "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
    with pytest.raises(IsADirectoryError):
        again.add([(2, '{"seq":2}'), (3, '{"seq":3}')])
    file.rmdir()
    (tmp_path / "kept").rename(file)
    again.add([(2, '{"seq":2}'), (3, '{"seq":3}')])
    assert file.read_text().splitlines() == ['{"seq":1}', '{"seq":2}', '{"seq":3}']


async def test_files_of_another_history_are_not_continued(tmp_path: Path) -> None:
    sink = FileSink(tmp_path, "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
    sink.add([(number, f'{{"seq":{number}}}') for number in range(1, 6)])
    (file,) = sink.files()
    # The database was restored to what it was after record 2, and has gone on from there.
    restored = FileSink(tmp_path, "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
    for records in ([(3, '{"seq":3,"other":1}')], [(4, '{"seq":4}'), (5, '{"seq":5,"other":1}')]):
        with pytest.raises(Diverged):
            restored.add(records)
    file.rename(tmp_path / "kept")
    restored.add([(3, '{"seq":3,"other":1}')])
    assert restored.files()[0].read_text() == '{"seq":3,"other":1}\n'


async def test_a_store_beside_files_of_another_history_changes_nothing_from_the_first_call_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            await service.admin.create_scope("s")
            await service.admin.put("s", "k", VALUE)
            await recorded(service, "PutSecret", 1)
        store = directory / "secrets" / "secrets.db"
        shutil.copy(store, tmp_path)
        async with running_secrets(directory) as service:
            await service.admin.create_scope("later")
            await recorded(service, "CreateScope", 2)
        shutil.copy(tmp_path / "secrets.db", store)
        look = asyncio.Event()
        move = audit_export.Exporter.move

        async def held(exporter: audit_export.Exporter) -> None:
            await look.wait()
            await move(exporter)

        monkeypatch.setattr(audit_export.Exporter, "move", held)
        async with running_secrets(directory) as service:
            assert (await refusal(service.admin.create_scope("t"))).code is grpc.StatusCode.UNAVAILABLE
            assert await lacks_audit(service)
            look.set()
            await asyncio.sleep(3 * audit_export.LOOK_SECONDS)
            assert await lacks_audit(service), "a look without records to move takes nothing back"
            (directory / "audit").rename(directory / "kept")

            async def is_read() -> bool:
                return not await lacks_audit(service) and await service.admin.get("s", "k") == VALUE.encode()

            await eventually(is_read)


async def test_serving_looks_at_its_files_before_it_takes_a_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def held(_: audit_export.Exporter) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(audit_export.Exporter, "move", held)
    with data_directory() as directory:
        a_sink(directory, records=3, service="serving")
        async with running_serving(directory):
            assert "audit log fails" in caplog.messages


@pytest.mark.parametrize(("gone", "lacking"), [("all", (1, 4)), ("end", (4, 4)), ("oldest", None), ("none", None)])
async def test_records_that_are_gone_from_the_end_of_the_files_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gone: str, lacking: tuple[int, int] | None
) -> None:
    async with database.opened(tmp_path / "a.db", with_tables(tmp_path / "m")) as opened:
        trail = audit.Trail("secrets", opened, AuditKey(bytes(32)))
        place = partial(FileSink, tmp_path / "audit", "secrets", keep_bytes=1 << 30, keep_seconds=1e9)
        exporter = audit_export.Exporter(trail, opened, place(file_bytes=1))
        for _ in range(2):
            await trail.event("test")
            await exporter.move()
        for _ in range(2):
            await trail.event("test")
        await exporter.move()
        files = place(file_bytes=1).files()
        assert len(files) == 3
        for path in {"all": files, "oldest": files[:1]}.get(gone, []):
            path.unlink()
        if gone == "end":
            os.truncate(files[-1], files[-1].stat().st_size - 10)
        again = audit_export.Exporter(trail, opened, place(file_bytes=1))
        await again.compare()
        await again.move()
        said = [record.__dict__ for record in caplog.records if record.message == "audit files lack records"]
        assert [(each["first"], each["last"]) for each in said] == ([lacking] if lacking else [])
        assert trail.is_failing() == 0.0


async def test_too_many_records_that_wait_count_as_a_sink_that_fails(tmp_path: Path) -> None:
    async with database.opened(tmp_path / "a.db", with_tables(tmp_path / "m")) as opened:
        trail = audit.Trail("secrets", opened, AuditKey(bytes(32)))
        (tmp_path / "audit").write_text("in the way")
        sink = FileSink(tmp_path / "audit", "secrets", file_bytes=1 << 20, keep_bytes=1 << 30, keep_seconds=1e9)
        exporter = audit_export.Exporter(trail, opened, sink, most_unexported=3)
        for _ in range(3):
            await trail.event("test")
        await exporter.move()
        assert (trail.backlog, trail.is_failing()) == (3, 1.0)
        (tmp_path / "audit").unlink()
        await exporter.move()
        assert (trail.backlog, trail.is_failing()) == (0, 0.0)
