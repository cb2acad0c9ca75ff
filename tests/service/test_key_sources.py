"""Where the root key comes from: an inherited descriptor, a credential, a plugin; and what if it does not (S4).

The plugin is the one of `tests/support/reference_kms.py`, at a real socket, and what stands in for its outages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from socket import AF_UNIX, SHUT_WR, socketpair
from socket import socket as new_socket
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secrets_service import app, kms
from secrets_service.errors import KeySourceDown
from secrets_service.settings import SecretsSettings
from servicekit import channels, settings, sockets
from servicekit.errors import StartError
from servicekit.logs import JsonLines
from tessera.cli.__main__ import main
from tessera.kms.v2 import kms_pb2, kms_pb2_grpc
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.canaries import Canary, found_in, found_in_files
from tests.support.eventually import eventually
from tests.support.reference_kms import NONCE_LENGTH, Keys, Plugin, listening
from tests.support.secrets import Caller, RunningSecrets, data_directory, refusal, running_secrets, settings_for

KEY = bytes(range(32))
PATIENCE = 60.0


@pytest.fixture
def directory() -> Iterator[Path]:
    with data_directory() as path:
        yield path


@pytest.fixture
def socket(directory: Path) -> Path:
    return directory / "kms" / "plugin.sock"


@pytest.fixture
def keys(directory: Path) -> Keys:
    return Keys(directory / "kms-keys")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kms, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(app, "SEALED_RETRY_SECONDS", 0.02)


async def status(service: RunningSecrets) -> pb.KeyStatus:
    operator = service.peer("operator")
    answer: pb.KeyStatus = await operator(operator.key_rotation.GetKeyStatus, pb.GetKeyStatusRequest())
    return answer


async def rotate_root(service: RunningSecrets) -> pb.KeyStatus:
    operator = service.peer("operator")
    answer: pb.KeyStatus = await operator(operator.key_rotation.RotateRootKey, pb.RotateRootKeyRequest())
    return answer


async def put_one(service: RunningSecrets) -> None:
    await service.admin.create_scope("Shop")
    await service.admin.put("Shop", "key", "value")


async def has_one(service: RunningSecrets) -> bool:
    admin = service.public((service.settings.data_dir / "admin.token").read_text().strip())
    return await admin.get("Shop", "key") == b"value"


def dump(directory: Path) -> list[str]:
    with closing(sqlite3.connect(directory / "secrets" / "secrets.db")) as connection:
        return list(connection.iterdump())


# --- given at the start ---


@contextlib.contextmanager
def handed_over(content: bytes, *, is_ended: bool = True) -> Iterator[str]:
    """A descriptor as a supervisor hands it over; the service is to close it."""
    ours, theirs = socketpair()
    ours.sendall(content)
    if is_ended:
        ours.shutdown(SHUT_WR)
    theirs.set_inheritable(True)
    with ours:
        yield f"fd:{theirs.detach()}"
        ours.settimeout(PATIENCE)
        assert ours.recv(1) == b""


def credential(directory: Path, content: bytes, mode: int = 0o400) -> Path:
    """A directory of credentials with one in it."""
    folder = directory / "credentials"
    folder.mkdir(exist_ok=True)
    (folder / "root").unlink(missing_ok=True)
    (folder / "root").write_bytes(content)
    (folder / "root").chmod(mode)
    return folder


async def test_root_key_comes_from_a_descriptor(directory: Path) -> None:
    with handed_over(KEY) as source:
        async with running_secrets(directory, root_key_source=source) as service:
            await put_one(service)
            assert (await status(service)).root_key_source == f"descriptor {source[3:]}"
            refused = await refusal(rotate_root(service))
            assert (refused.reason, "TESSERA_PREVIOUS_ROOT_KEY_SOURCE" in refused.message) == ("BAD_REQUEST", True)
    assert not (directory / "root.key").exists()
    with handed_over(KEY) as source:
        async with running_secrets(directory, root_key_source=source) as service:
            assert await has_one(service)


async def test_root_key_comes_from_a_credential(directory: Path) -> None:
    for mode in (0o400, 0o440):
        given: dict[str, Any] = {
            "root_key_source": "credential:root",
            "credentials_directory": credential(directory, KEY, mode),
        }
        async with running_secrets(directory, **given) as service:
            if mode == 0o400:
                await put_one(service)
            assert await has_one(service)
            assert (await status(service)).root_key_source == "credential root"
    assert not (directory / "root.key").exists()


async def test_store_moves_from_a_file_to_a_descriptor_and_on_to_a_credential(directory: Path) -> None:
    async with running_secrets(directory) as service:
        await put_one(service)
    old = directory / "root.key"
    with handed_over(KEY) as source:
        async with running_secrets(directory, root_key_source=source, previous_root_key_file=old) as service:
            assert await has_one(service)
    old.unlink()
    other: dict[str, Any] = {
        "root_key_source": "credential:root",
        "credentials_directory": credential(directory, KEY[::-1]),
    }
    with handed_over(KEY) as source:
        async with running_secrets(directory, previous_root_key_source=source, **other) as service:
            assert await has_one(service)
    async with running_secrets(directory, **other) as service:
        assert await has_one(service)


async def test_descriptor_without_the_right_key_stops_the_start_and_changes_nothing(directory: Path) -> None:
    with handed_over(KEY) as source:
        async with running_secrets(directory, root_key_source=source) as service:
            await put_one(service)
    kept = dump(directory)
    for content in (b"", KEY[:31], KEY + b"\n", KEY[::-1]):
        with handed_over(content) as source, pytest.raises(StartError, match="root key of descriptor"):
            async with running_secrets(directory, root_key_source=source):
                pass
        assert dump(directory) == kept
    assert not (directory / "root.key").exists()


async def test_descriptor_that_nobody_closes_does_not_hang_the_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets_service.rootsource.DESCRIPTOR_SECONDS", 0.1)
    with handed_over(KEY, is_ended=False) as source, pytest.raises(StartError, match="close the other end"):
        async with running_secrets(directory, root_key_source=source):
            pass


async def test_credential_without_the_right_key_stops_the_start_and_changes_nothing(directory: Path) -> None:
    given: dict[str, Any] = {"root_key_source": "credential:root", "credentials_directory": credential(directory, KEY)}
    async with running_secrets(directory, **given) as service:
        await put_one(service)
    kept = dump(directory)
    for content, mode, problem in (
        (KEY[::-1], 0o400, "was sealed under"),
        (b"", 0o400, "exactly 32 bytes"),
        (KEY, 0o444, "has mode 0444"),
        (KEY, 0o460, "has mode 0460"),
        (None, 0o400, "is missing"),
    ):
        credential(directory, content or b"", mode)
        if content is None:
            (directory / "credentials" / "root").unlink()
        with pytest.raises(StartError, match=problem):
            async with running_secrets(directory, **given):
                pass
        assert dump(directory) == kept


def problem_with(**environment: str) -> str:
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(SecretsSettings, {"TESSERA_DATA_DIR": "/nowhere", **environment})
    return str(caught.value)


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"TESSERA_ROOT_KEY_SOURCE": "env:KEY"}, "A key in the environment is not taken"),
        ({"TESSERA_ROOT_KEY_SOURCE": "file:/x"}, "TESSERA_ROOT_KEY_FILE says which"),
        ({"TESSERA_ROOT_KEY_SOURCE": "fd:2"}, "3 or more"),
        ({"TESSERA_ROOT_KEY_SOURCE": "fd:x"}, "whole number"),
        ({"TESSERA_ROOT_KEY_SOURCE": "fd:987654"}, "was not handed to this process"),
        ({"TESSERA_ROOT_KEY_SOURCE": "credential:../x"}, "name of a credential"),
        ({"TESSERA_ROOT_KEY_SOURCE": "credential:x"}, "CREDENTIALS_DIRECTORY is not set"),
        ({"TESSERA_ROOT_KEY_SOURCE": "kms:plugin.sock"}, "absolute path"),
        ({"TESSERA_ROOT_KEY_SOURCE": f"kms:/{'x' * 107}"}, "at most 107 bytes"),
        ({"TESSERA_ROOT_KEY_SOURCE": "kms:/a", "TESSERA_ROOT_KEY_FILE": "/b"}, "set one of them"),
        ({"TESSERA_ROOT_KEY_SOURCE": "kms:/a", "TESSERA_PREVIOUS_ROOT_KEY_SOURCE": "kms:/b"}, "by way of a file"),
        ({"TESSERA_PREVIOUS_ROOT_KEY_SOURCE": "kms:/a", "TESSERA_PREVIOUS_ROOT_KEY_FILE": "/b"}, "name two keys"),
        ({"TESSERA_PREVIOUS_ROOT_KEY_SOURCE": "file"}, "expected fd:N, credential:NAME or kms:/path"),
    ],
)
def test_source_that_cannot_be_is_refused_by_name(environment: dict[str, str], problem: str) -> None:
    assert problem in problem_with(**environment)


def test_descriptor_of_our_own_is_not_taken_for_an_inherited_one() -> None:
    reading, writing = os.pipe()
    try:
        assert "was not handed to this process" in problem_with(TESSERA_ROOT_KEY_SOURCE=f"fd:{reading}")
    finally:
        os.close(reading)
        os.close(writing)


# --- a plugin ---


@asynccontextmanager
async def with_plugin(directory: Path, socket: Path, keys: Keys) -> AsyncIterator[RunningSecrets]:
    async with listening(socket, Plugin(keys)), running_secrets(directory, root_key_source=f"kms:{socket}") as service:
        yield service


def root_key_of(directory: Path, keys: Keys) -> bytes:
    """The root key in clear, as only the key service can have it."""
    with closing(sqlite3.connect(directory / "secrets" / "secrets.db")) as connection:
        [(wrapped,)] = connection.execute("SELECT wrapped FROM keyring").fetchall()
    answer = kms_pb2.EncryptResponse.FromString(wrapped[1:])
    cipher = keys.cipher(answer.key_id)
    assert cipher is not None
    nonce, sealed = answer.ciphertext[:NONCE_LENGTH], answer.ciphertext[NONCE_LENGTH:]
    return cipher.decrypt(nonce, sealed, answer.key_id.encode())


async def test_root_key_is_encrypted_by_a_plugin_and_nowhere_in_clear(
    directory: Path, socket: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    canaries = []
    async with with_plugin(directory, socket, keys) as service:
        await put_one(service)
        source = (await status(service)).root_key_source
        assert source == f"KMS plugin {socket}, key {keys.current}"
        canaries.append(Canary.of("the first root key", root_key_of(directory, keys)))
        ids = {(await status(service)).root_key_id, (await rotate_root(service)).root_key_id}
        assert len(ids) == 2
    async with with_plugin(directory, socket, keys) as service:
        assert await has_one(service)
        canaries.append(Canary.of("the second root key", root_key_of(directory, keys)))
        assert found_in_files([directory], canaries) == []
    assert found_in_files([directory], canaries) == []
    assert caplog.records
    lines = "\n".join(JsonLines("test").format(record) for record in caplog.records).encode()
    assert found_in(lines, canaries, place="the log") == []
    assert not list(directory.glob("root.key*"))


async def test_new_key_of_the_plugin_gets_a_new_root_key_and_the_old_one_can_go(
    directory: Path, socket: Path, keys: Keys, quick: None
) -> None:
    async with with_plugin(directory, socket, keys) as service:
        await put_one(service)
        before, old = await status(service), keys.current
        fresh = keys.rotate()

        async def follows() -> bool:
            return fresh in (await status(service)).root_key_source

        await eventually(follows, within=PATIENCE)
        assert (await status(service)).root_key_id != before.root_key_id
        keys.forget(old)
    async with with_plugin(directory, socket, keys) as service:
        assert await has_one(service)


async def test_outage_of_the_plugin_stops_nothing_that_runs(
    directory: Path, socket: Path, keys: Keys, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        plugin = AsyncExitStack()
        await plugin.enter_async_context(listening(socket, Plugin(keys)))
        service = await stack.enter_async_context(running_secrets(directory, root_key_source=f"kms:{socket}"))
        await put_one(service)
        await plugin.aclose()

        async def is_seen() -> bool:
            return (await status(service)).root_key_source.endswith("(does not answer)")

        await eventually(is_seen, within=PATIENCE)
        assert await has_one(service)
        await service.admin.put("Shop", "key", "value")
        operator = service.peer("operator")
        await operator(operator.key_rotation.RotateStoreKey, pb.RotateStoreKeyRequest())
        await operator(operator.key_rotation.RotateScopeKeys, pb.RotateScopeKeysRequest())
        refused = await refusal(rotate_root(service))
        assert (refused.code, "does not answer" in refused.message) == (grpc.StatusCode.UNAVAILABLE, True)
        assert await health(service.peer_channels["gateway"]) == health_pb2.HealthCheckResponse.SERVING
        assert (
            len([1 for record in caplog.records if record.message == "key source fails" and record.levelno > 20]) == 1
        )
        await stack.enter_async_context(listening(socket, Plugin(keys)))

        async def is_back() -> bool:
            return not await is_seen()

        await eventually(is_back, within=PATIENCE)
        await rotate_root(service)
        assert await has_one(service)


async def health(channel: grpc.aio.Channel) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status)


async def test_restart_without_the_plugin_stays_sealed_and_goes_on_when_it_is_back(
    directory: Path, socket: Path, keys: Keys, quick: None
) -> None:
    async with with_plugin(directory, socket, keys) as service:
        await put_one(service)
    kept = dump(directory)
    own = settings_for(directory, root_key_source=f"kms:{socket}")
    async with AsyncExitStack() as stack:
        entering = asyncio.create_task(
            stack.enter_async_context(running_secrets(directory, root_key_source=f"kms:{socket}"))
        )
        address = sockets.socket_address(own.sockets, callee="secrets", caller="gateway")
        channel = await stack.enter_async_context(channels.opened(address))

        async def says_so() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return bool(await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING)
            return False

        await eventually(says_so, within=PATIENCE)
        gateway = Caller(channel)
        for call in (gateway.get("Shop", "key"), gateway.create_scope("Other")):
            refused = await refusal(call)
            assert refused.answer == (
                grpc.StatusCode.UNAVAILABLE,
                "TEMPORARILY_UNAVAILABLE",
                "Secrets is sealed until the source of its root key answers.",
            )
        assert not entering.done()
        assert dump(directory) == kept
        await stack.enter_async_context(listening(socket, Plugin(keys)))
        service = await asyncio.wait_for(entering, PATIENCE)
        assert await has_one(service)

        async def is_ready() -> bool:
            return bool(await health(service.peer_channels["gateway"]) == health_pb2.HealthCheckResponse.SERVING)

        await eventually(is_ready, within=PATIENCE)


async def test_sealed_process_ends_when_it_is_told_to(directory: Path, socket: Path) -> None:
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-I", "-m", "secrets_service"],
        env={
            "TESSERA_DATA_DIR": str(directory),
            "TESSERA_SECRETS_LISTEN": "127.0.0.1:0",
            "TESSERA_ROOT_KEY_SOURCE": f"kms:{socket}",
            "PATH": "",
        },
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        line = await asyncio.to_thread(process.stderr.readline)
        while b"sealed until" not in line:
            assert line, "it ended"
            line = await asyncio.to_thread(process.stderr.readline)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, PATIENCE) == 0
        assert b"stopped before it was started" in await asyncio.to_thread(process.stderr.read)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert not (directory / "admin.token").exists()


class Misbehaving(Plugin):
    """Does as the reference does, but for one thing."""

    def __init__(self, keys: Keys, **answers: Callable[[Any], Any]) -> None:
        super().__init__(keys)
        self.answers = answers

    async def Status(self, request: kms_pb2.StatusRequest, context: Any) -> kms_pb2.StatusResponse:
        answer: kms_pb2.StatusResponse = self._changed("status", await super().Status(request, context))
        return answer

    async def Encrypt(self, request: kms_pb2.EncryptRequest, context: Any) -> kms_pb2.EncryptResponse:
        answer: kms_pb2.EncryptResponse = self._changed("encrypt", await super().Encrypt(request, context))
        return answer

    async def Decrypt(self, request: kms_pb2.DecryptRequest, context: Any) -> kms_pb2.DecryptResponse:
        answer: kms_pb2.DecryptResponse = self._changed("decrypt", await super().Decrypt(request, context))
        return answer

    def _changed(self, call: str, answer: Any) -> Any:
        return self.answers.get(call, lambda same: same)(answer)


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "another version": ({"status": lambda _: kms_pb2.StatusResponse(version="v1")}, "speaks version v1"),
    "no key id": ({"status": lambda _: kms_pb2.StatusResponse(version="v2", healthz="ok")}, "id of its key"),
    "nothing encrypted": (
        {"encrypt": lambda answer: kms_pb2.EncryptResponse(key_id=answer.key_id)},
        "longer than it may be, or empty",
    ),
    "too long": (
        {"encrypt": lambda answer: kms_pb2.EncryptResponse(key_id=answer.key_id, ciphertext=bytes(2000))},
        "longer than it may be, or empty",
    ),
    "something else decrypted": (
        {"decrypt": lambda _: kms_pb2.DecryptResponse(plaintext=bytes(32))},
        "does not give back what it encrypted",
    ),
    "a short key decrypted": ({"decrypt": lambda _: kms_pb2.DecryptResponse(plaintext=b"x")}, "no key of 32 bytes"),
}


async def test_plugin_that_would_lose_the_root_key_founds_no_store(directory: Path, socket: Path, keys: Keys) -> None:
    plugin = Misbehaving(keys)
    async with listening(socket, plugin):
        for plugin.answers, problem in BAD.values():
            with pytest.raises(StartError, match=f"cannot be used: .*{problem}.*Nothing was changed"):
                async with running_secrets(directory, root_key_source=f"kms:{socket}"):
                    pass
    assert not (directory / "admin.token").exists()


async def test_plugin_that_would_lose_the_root_key_gets_none_of_a_store_that_runs(
    directory: Path, socket: Path, keys: Keys
) -> None:
    plugin = Misbehaving(keys)
    async with listening(socket, plugin), running_secrets(directory, root_key_source=f"kms:{socket}") as service:
        await put_one(service)
        before = await status(service)
        for plugin.answers, problem in BAD.values():
            refused = await refusal(rotate_root(service))
            assert (refused.reason, problem in refused.message) == ("BAD_REQUEST", True)
        assert await status(service) == before
    async with with_plugin(directory, socket, keys) as service:
        assert await has_one(service)


async def test_plugin_that_is_not_well_is_waited_for(directory: Path, socket: Path, keys: Keys, quick: None) -> None:
    plugin = Misbehaving(keys, status=lambda _: kms_pb2.StatusResponse(version="v2", healthz="no\nnetwork"))
    async with listening(socket, plugin), AsyncExitStack() as stack:
        entering = asyncio.create_task(
            stack.enter_async_context(running_secrets(directory, root_key_source=f"kms:{socket}"))
        )
        await asyncio.wait({entering}, timeout=0.3)
        assert not entering.done()
        plugin.answers = {}
        service = await asyncio.wait_for(entering, PATIENCE)
        await put_one(service)
        plugin.answers = {"status": lambda _: kms_pb2.StatusResponse(version="v2", healthz="no\nnetwork")}
        refused = await refusal(rotate_root(service))
        assert "it says of itself: no?network" in refused.message


async def test_socket_where_nobody_listens_is_told_from_a_plugin_that_answers(
    directory: Path, socket: Path, keys: Keys
) -> None:
    class Unavailable(Plugin):
        async def Status(self, request: kms_pb2.StatusRequest, context: Any) -> kms_pb2.StatusResponse:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "")
            raise AssertionError

    async def cause() -> str:
        with pytest.raises(KeySourceDown, match="does not answer: KMS plugin") as caught:
            await kms.KmsPlugin(socket).status()
        return caught.value.message

    way_out = "Start the plugin, or name the socket that it listens at."
    assert (await cause()).endswith(f"{socket}: its socket cannot be found (No such file or directory). {way_out}")
    async with listening(socket, Unavailable(keys)):
        assert (await cause()).endswith(f"{socket}: it answered UNAVAILABLE. See the plugin's log.")
    socket.unlink(missing_ok=True)
    with new_socket(AF_UNIX) as left:
        left.bind(str(socket))  # and nobody listens, as after a crash
    assert f"{socket}: nothing listens at that socket, or" in await cause()
    assert (await cause()).endswith(way_out)


async def test_plugin_without_the_key_stops_the_start_and_nothing_is_changed(
    directory: Path, socket: Path, keys: Keys
) -> None:
    async with with_plugin(directory, socket, keys) as service:
        await put_one(service)
    kept, old = dump(directory), keys.current
    keys.rotate()
    keys.forget(old)
    with pytest.raises(StartError, match="it answered NOT_FOUND"):
        async with with_plugin(directory, socket, keys):
            pass
    assert dump(directory) == kept


async def test_edited_answer_of_the_plugin_stops_the_start(directory: Path, socket: Path, keys: Keys) -> None:
    async with with_plugin(directory, socket, keys) as service:
        await put_one(service)
    database, kept = service.settings.database, service.settings.database.read_bytes()
    for edit, problem in (
        ("UPDATE keyring SET wrapped = NULL", "none for this store"),
        ("UPDATE keyring SET wrapped = x''", "is damaged"),
        ("UPDATE keyring SET wrapped = x'01ff'", "is damaged"),
        ("UPDATE keyring SET wrapped = substr(wrapped, 1, length(wrapped) - 1)", "is damaged"),
        ("UPDATE keyring SET root_key_id = 'another'", "was sealed under another"),
    ):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute(edit)
            connection.commit()
        edited = dump(directory)
        with pytest.raises(StartError, match=problem):
            async with with_plugin(directory, socket, keys):
                pass
        assert dump(directory) == edited
        database.write_bytes(kept)


async def test_store_moves_from_a_file_to_a_plugin_and_back(directory: Path, socket: Path, keys: Keys) -> None:
    async with running_secrets(directory) as service:
        await put_one(service)
    async with listening(socket, Plugin(keys)):
        source = f"kms:{socket}"
        with pytest.raises(StartError, match=r"none for this store.*TESSERA_PREVIOUS_ROOT_KEY_FILE"):
            async with running_secrets(directory, root_key_source=source):
                pass
        old = directory / "root.key"
        async with running_secrets(directory, root_key_source=source, previous_root_key_file=old) as service:
            assert await has_one(service)
        old.unlink()
        async with running_secrets(directory, root_key_source=source) as service:
            assert await has_one(service)
        old.write_bytes(KEY)
        old.chmod(0o600)
        async with running_secrets(directory, previous_root_key_source=source) as service:
            assert await has_one(service)
            assert (await status(service)).root_key_source == f"file {old}"
    async with running_secrets(directory) as service:
        assert await has_one(service)


async def test_socket_that_others_could_have_put_there_gets_no_root_key(
    directory: Path, socket: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_refused(problem: str) -> None:
        with pytest.raises(StartError, match=problem):
            async with running_secrets(directory, root_key_source=f"kms:{socket}"):
                pass

    async with listening(socket, Plugin(keys)):
        socket.parent.chmod(0o770)
        await is_refused("others could have put it there")
        socket.parent.chmod(0o700)
        if os.getuid() == 0:
            os.chown(socket, 4321, 4321)
            await is_refused("others could have put it there")
        else:
            with monkeypatch.context() as patch:
                patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
                await is_refused("others could have put it there")
        socket.unlink()
        socket.write_text("")
        await is_refused("is no socket")


async def test_plugin_that_hangs_is_given_up_after_its_deadline(
    directory: Path, socket: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = asyncio.Event()

    class Hanging(Plugin):
        async def Encrypt(self, request: kms_pb2.EncryptRequest, context: Any) -> kms_pb2.EncryptResponse:
            await hangs.wait()
            return await super().Encrypt(request, context)

    plugin = Hanging(keys)
    hangs.set()
    async with listening(socket, plugin), running_secrets(directory, root_key_source=f"kms:{socket}") as service:
        await put_one(service)
        hangs.clear()
        monkeypatch.setattr(kms, "DEADLINE_SECONDS", 0.2)
        refused = await refusal(rotate_root(service))
        assert (refused.code, "DEADLINE_EXCEEDED" in refused.message) == (grpc.StatusCode.UNAVAILABLE, True)
        assert await has_one(service)


async def test_operator_is_told_where_the_root_key_comes_from(
    directory: Path, socket: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    async with with_plugin(directory, socket, keys) as service:
        command = ["keys", "status", "--data-dir", str(service.settings.data_dir)]
        assert await asyncio.to_thread(main, command) == 0
        assert f", from KMS plugin {socket}, key {keys.current}\n" in capsys.readouterr().out


async def test_reference_plugin_runs_as_a_program(directory: Path, socket: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.reference_kms", str(socket), str(directory / "kms-keys"))
    )
    try:
        async with channels.opened(f"unix:{socket}") as channel:
            await asyncio.wait_for(channel.channel_ready(), PATIENCE)
            stub = kms_pb2_grpc.KeyManagementServiceStub(channel)
            answer = await stub.Status(kms_pb2.StatusRequest(), timeout=10)
            assert (answer.version, answer.healthz) == ("v2", "ok")
    finally:
        process.kill()
        await process.wait()
