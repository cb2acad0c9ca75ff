"""A backup holds one state of the platform, shows every change of it, and makes the same platform elsewhere (R25)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from secrets_service import rootkey
from servicekit import backups, database
from servicekit.errors import StartError
from servicekit.storage import StorageError
from tessera.cli import archive, backup, verify
from tessera.cli.__main__ import main
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import an_input
from tests.support.canaries import Canary, found_in_files
from tests.support.eventually import eventually
from tests.support.platform import running_pair
from tests.support.reference_kms import Keys, Plugin, listening
from tests.support.secrets import RunningSecrets, data_directory, refusal, running_secrets
from tests.support.seed import seeded
from tests.support.serving import TINY, RunningServing, ServingCaller, no_replicas, running_serving
from tests.support.stack import clean_environment

Ready = pb.EndpointState.READY
CEILING = 120.0
"""Seconds within which anything happens on a machine that does much else, too."""

REFERENCE = {"SAYS": "{{secrets/shop/key}}"}


@dataclass(frozen=True)
class Platform:
    """Secrets and Serving on a data directory, as its admin."""

    directory: Path
    secrets: RunningSecrets
    serving: RunningServing
    token: str

    @property
    def admin(self) -> ServingCaller:
        return self.serving.public(self.token)

    async def ready(self, name: str) -> None:
        await self.until(name, lambda endpoint: endpoint.state.ready == Ready, what=f"{name} is ready")

    async def until(self, name: str, claim: Callable[[pb.ServingEndpointDetailed], bool], *, what: str) -> None:
        """Returns once the claim about an endpoint holds."""

        async def holds() -> bool:
            return claim(await self.admin.get(name))

        await eventually(holds, within=CEILING, what=what)

    async def says(self, name: str) -> str:
        """What the model of an endpoint was given to say."""
        return (await self.admin.query(name))[1].decode()


@asynccontextmanager
async def running(directory: Path, token: str = "", **changes: Any) -> AsyncIterator[Platform]:
    """The platform; in one that is restored, the admin has the token that it had before."""
    async with running_pair(directory, **changes) as (secrets, serving):
        yield Platform(directory, secrets, serving, token or secrets.admin_token)


async def back_up(platform: Platform, target: Path) -> Path:
    assert await backup.made(argparse.Namespace(target=target, data_dir=platform.directory)) == 0
    return target


async def ran(words: list[str]) -> int:
    """The status of a command, beside the platform that is in this process, too."""
    return await asyncio.to_thread(main, words)


def root_key(directory: Path) -> tuple[str, str]:
    return "--root-key", str(directory / "root.key")


@dataclass(frozen=True)
class Made:
    """A backup, and what it was made of."""

    folder: Path
    key: Path
    token: str
    canaries: tuple[Canary, ...]


@pytest.fixture(scope="module")
async def made() -> AsyncIterator[Made]:
    """Made of a platform with values, rights and an endpoint, and never changed."""
    with data_directory() as directory:
        canaries = [Canary.new("a value"), Canary.new("a value before")]
        async with running(directory / "data") as platform:
            admin = platform.secrets.admin
            await admin.create_scope("shop")
            for canary in reversed(canaries):
                await admin.put("shop", "key", canary.value)
            alice = await platform.secrets.user("alice")
            await admin.grant("shop", "alice", secrets_pb2.READ)
            canaries.append(Canary.of("a token", alice.metadata[0][1].removeprefix("Bearer ")))
            canaries.append(Canary.of("the admin's token", platform.token))
            locks = directory / "data" / "serving" / "locks"
            locks.mkdir()
            (locks / f"{'a1' * 16}.txt").write_text("tiny==1.0\n")
            with contextlib.closing(sqlite3.connect(directory / "data" / "registry.db")) as registry:
                registry.executescript("CREATE TABLE models (name TEXT); INSERT INTO models VALUES ('churn');")
            await platform.admin.create("demo", TINY, environment=REFERENCE)
            await platform.ready("demo")
            logs = directory / "data" / "audit"
            await eventually(lambda: len(list(logs.glob("*.jsonl"))) == 2, within=CEILING, what="both audit logs")
            folder = await back_up(platform, directory / "backup")
            key = directory / "data" / "root.key"
            canaries.append(Canary.of("the root key", key.read_bytes()))
            yield Made(folder, key, platform.token, tuple(canaries))


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """The backup, to be spoilt."""
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


@pytest.fixture
def directory() -> Iterator[Path]:
    with data_directory() as path:
        yield path


# --- one state ---


async def test_backup_under_load_is_of_one_moment_and_nobody_notices(directory: Path) -> None:
    async with running(directory / "data") as platform:
        admin = platform.secrets.admin
        await admin.create_scope("shop")
        written = 0

        async def write() -> None:
            nonlocal written
            while True:
                for key in ("one", "two"):
                    await admin.put("shop", key, str(written + 1))
                written += 1

        async def more() -> None:
            wanted = written + 5
            await eventually(lambda: written >= wanted or writing.done(), within=CEILING)

        writing = asyncio.create_task(write())
        await more()
        acknowledged = written
        folder = await back_up(platform, directory / "backup")
        await more()
        assert not writing.done()
        writing.cancel()
        key = root_key(platform.directory)
    assert await ran(["restore", str(folder), str(directory / "restored"), *key]) == 0
    async with running(directory / "restored", platform.token) as restored:
        admin = restored.secrets.public(platform.token)
        one, two = [int(await admin.get("shop", key)) for key in ("one", "two")]
        assert acknowledged <= two <= one <= two + 1


async def test_what_happens_between_the_two_copies_leaves_nothing_that_cannot_be_launched(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(directory / "data") as platform:
        await platform.secrets.admin.create_scope("shop")
        await platform.secrets.admin.put("shop", "key", "said")
        for name in ("changed", "deleted"):
            await platform.admin.create(name, TINY, environment=REFERENCE)
            await platform.ready(name)
        monkeypatch.setattr(backup._Copying, "begun", _after_the_first(backup._Copying.begun, lambda: change(platform)))
        folder = await back_up(platform, directory / "backup")
        assert await platform.admin.names() == ["changed", "late"]
        await eventually(
            lambda: granted(platform.directory) == {("changed", 2), ("late", 1)}, within=CEILING
        )  # and is told in the end
    assert await ran(["restore", str(folder), str(directory / "restored"), *root_key(platform.directory)]) == 0
    async with running(directory / "restored", platform.token) as restored:
        assert await restored.admin.names() == ["changed", "deleted"]
        for name in ("changed", "deleted"):
            await eventually(lambda name=name: _says(restored, name, "said"), within=CEILING, what=f"{name} answers")
        assert (await restored.admin.get("changed")).config.config_version == 1


def _after_the_first(
    begun: Callable[[Any], Awaitable[Any]], between: Callable[[], Awaitable[None]]
) -> Callable[[Any], Awaitable[Any]]:
    called = 0

    async def patched(channel: Any) -> Any:
        nonlocal called
        called += 1
        if called == 2:
            await between()
        return await begun(channel)

    return patched


async def change(platform: Platform) -> None:
    """Ends a configuration and an endpoint, begins another one, and gives whoever wants to say so the time to."""
    await platform.admin.update("changed", an_input(TINY, environment_vars={**REFERENCE, "MORE": "2"}))
    await platform.until("changed", lambda endpoint: endpoint.config.config_version == 2, what="the second version")
    await platform.admin.delete("deleted")
    await platform.admin.create("late", TINY, environment=REFERENCE)
    with contextlib.suppress(AssertionError):
        await eventually(lambda: ("changed", 1) not in granted(platform.directory), within=0.5)


def granted(directory: Path) -> set[tuple[str, int]]:
    """Names of endpoints, and the configurations that Secrets would let be launched."""
    with contextlib.closing(sqlite3.connect(f"file:{directory}/serving/serving.db?mode=ro", uri=True)) as serving:
        names = dict(serving.execute("SELECT id, name FROM endpoints"))
    with contextlib.closing(sqlite3.connect(f"file:{directory}/secrets/secrets.db?mode=ro", uri=True)) as secrets:
        rows = secrets.execute("SELECT endpoint_id, version FROM launch_grants").fetchall()
    return {(names.get(endpoint_id, "deleted"), version) for endpoint_id, version in rows}


async def _says(platform: Platform, name: str, text: str) -> bool:
    with contextlib.suppress(Exception):
        return text in await platform.says(name)
    return False


async def test_restored_platform_starts_replicas_of_its_own_and_stops_those_of_the_other(directory: Path) -> None:
    """It finds the other's sockets, as after a restore in the place of what was lost."""
    data, restored = directory / "data", directory / "restored"
    async with running_secrets(data) as secrets, running_serving(data, route_ack_seconds=0.3) as serving:
        platform = Platform(data, secrets, serving, secrets.admin_token)
        await platform.admin.create("demo", TINY)
        await platform.ready("demo")
        folder = await back_up(platform, directory / "backup")
        (theirs,) = (await serving.replicas()).items()
    assert epoch(folder / "serving.db") < 1_000
    assert await ran(["restore", str(folder), str(restored), *root_key(data)]) == 0
    (data / "run").rename(restored / "run")
    async with running(restored, secrets.admin_token) as again:
        await again.ready("demo")

        async def only_ours() -> bool:
            found = await again.serving.replicas()
            return len(found) == 1 and theirs[0] not in found

        await eventually(only_ours, within=CEILING, what="one replica, of our own")
        assert epoch(restored / "serving" / "serving.db") > 1_700_000_000


def epoch(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT epoch FROM epochs").fetchone()[0])


# --- the same platform elsewhere ---


async def test_restored_platform_is_the_same(made: Made, directory: Path) -> None:
    restored = directory / "restored"
    assert await ran(["restore", str(made.folder), str(restored), "--root-key", str(made.key)]) == 0
    assert (restored / "serving" / "locks" / f"{'a1' * 16}.txt").read_text() == "tiny==1.0\n"
    with contextlib.closing(sqlite3.connect(restored / "registry.db")) as registry:
        assert registry.execute("SELECT name FROM models").fetchall() == [("churn",)]
    assert {path.stat().st_mode & 0o777 for path in restored.rglob("*")} == {0o600, 0o700}
    async with running(restored, made.token) as platform:
        await platform.ready("demo")
        assert made.canaries[0].value in await platform.says("demo")
        admin = platform.secrets.public(made.token)
        assert await admin.get("shop", "key") == made.canaries[0].value.encode()
        assert [each.version for each in await admin.versions("shop", "key")] == [2, 1]
        assert await admin.restore("shop", "key", 1) == 3
        assert await admin.get("shop", "key") == made.canaries[1].value.encode()
        assert await admin.acls("shop") == [("admin", "MANAGE"), ("alice", "READ")]


def test_backup_shows_no_secret_and_nobody_but_its_owner_may_read_it(made: Made) -> None:
    assert found_in_files([made.folder], made.canaries) == []
    assert found_in_files([made.key.parent], made.canaries), "the search does not find what is there"
    assert made.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in made.folder.rglob("*")} == {0o600, 0o700}
    names = {path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*")}
    files = {"secrets.db", "serving.db", "registry.db", "manifest.json", "manifest.check"}
    first = "000000000001.jsonl"
    logs = {"audit", f"audit/secrets-{first}", f"audit/serving-{first}"}
    assert names == files | logs | {"locks", f"locks/{'a1' * 16}.txt"}


async def test_audit_logs_go_on_as_one_after_a_restore(made: Made, directory: Path) -> None:
    restored, keys = directory / "restored", directory / "keys"
    assert await ran(["restore", str(made.folder), str(restored), "--root-key", str(made.key)]) == 0
    logs = sorted((restored / "audit").iterdir())
    assert len(logs) == 2
    before = [path.read_bytes() for path in logs]
    async with running(restored, made.token) as platform:
        assert await ran(["audit", "keys", str(keys), "--data-dir", str(restored)]) == 0
        await platform.ready("demo")
        await eventually(
            lambda: all(path.stat().st_size > len(old) for path, old in zip(logs, before, strict=True)), within=CEILING
        )
        await platform.secrets.public(made.token).get("shop", "key")  # which a log that does not fit would refuse
    for path, old in zip(logs, before, strict=True):
        assert path.read_bytes().startswith(old)
        assert await ran(["audit", "verify", str(path), "--keys", str(keys)]) == 0


async def test_backup_is_restored_with_the_root_key_that_it_was_made_under(directory: Path) -> None:
    async with running(directory / "data") as platform:
        await platform.secrets.admin.create_scope("shop")
        operator = platform.secrets.peer("operator")
        before = await back_up(platform, directory / "before")
        for rotate in (operator.key_rotation.RotateStoreKey, operator.key_rotation.RotateRootKey):
            request = rotate is operator.key_rotation.RotateRootKey
            await operator(
                rotate, secrets_pb2.RotateRootKeyRequest() if request else secrets_pb2.RotateStoreKeyRequest()
            )
        after = await back_up(platform, directory / "after")
    keys = {after: directory / "data" / "root.key", before: directory / "data" / "root.key.previous"}
    for folder, key in keys.items():
        assert await ran(["verify", str(folder), "--root-key", str(key)]) == 0
        other = keys[before if folder == after else after]
        with pytest.raises(StartError, match=f"{rootkey.load(other).id}, but .*{rootkey.load(key).id}"):
            await asyncio.to_thread(verified, folder, other)
        assert await ran(["restore", str(folder), str(directory / "refused"), "--root-key", str(other)]) == 1
        assert not (directory / "refused").exists()
        assert await ran(["restore", str(folder), str(directory / f"of-{folder.name}"), "--root-key", str(key)]) == 0


async def test_backup_under_a_key_service_is_verified_and_restored_with_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data, folder, socket = directory / "data", directory / "backup", directory / "kms" / "plugin.sock"
    source = f"kms:{socket}"
    keys = Keys(directory / "kms-keys")
    async with listening(socket, Plugin(keys)):
        async with (
            no_replicas(data),
            running_secrets(data, root_key_source=source) as secrets,
            running_serving(data, route_ack_seconds=0.3) as serving,
        ):
            await secrets.admin.create_scope("shop")
            await secrets.admin.put("shop", "key", "value")
            await back_up(Platform(data, secrets, serving, secrets.admin_token), folder)
            token = secrets.admin_token
        assert (
            "which is in it, encrypted: only the key service of this platform decrypts it." in capsys.readouterr().out
        )
        assert await ran(["restore", str(folder), str(directory / "refused")]) == 1
        assert "is in it, encrypted by a key service. Set TESSERA_ROOT_KEY_SOURCE" in capsys.readouterr().err
        assert await ran(["verify", str(folder)]) == 0
        assert "Not looked at without the root key" in capsys.readouterr().out
        monkeypatch.setenv("TESSERA_ROOT_KEY_SOURCE", source)
        assert await ran(["verify", str(folder)]) == 0
        assert "it opens, and all rights and sealed values are whole" in capsys.readouterr().out
        keys.rotate()  # what was encrypted before still opens
        assert await ran(["restore", str(folder), str(directory / "restored")]) == 0
        assert not list((directory / "restored").glob("root.key*")), "the key stays where it is"
        async with running_secrets(directory / "restored", root_key_source=source) as secrets:
            assert await secrets.public(token).get("shop", "key") == b"value"
    for command in (["verify", str(folder)], ["restore", str(folder), str(directory / "refused")]):
        assert await ran(command) == 1, "the plugin is not there"
        async with listening(socket, Plugin(Keys(directory / "other-keys"))):
            assert await ran(command) == 1, "it is that of another key service"
    assert not (directory / "refused").exists()
    assert str(socket) in capsys.readouterr().err


# --- what is damaged ---


def verified(folder: Path, key: Path | None = None) -> list[str]:
    """What is wrong with a backup; raises StartError for what is none."""
    opened = archive.opened(folder)
    found = verify.faults_without_key(opened, print)
    source = verify.root_key(argparse.Namespace(root_key=key))
    return found or ([] if source is None else asyncio.run(verify.faults_with_key(opened, source)))


def test_each_of_a_hundred_changed_bits_is_found_without_the_root_key(copy: Path) -> None:
    chance = seeded()
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert verified(copy) == []
    # Half of them anywhere, the rest in a file each time: small ones would hardly be met.
    anywhere = [path for path in files for _ in range(path.stat().st_size)]
    for number in range(100):
        path = chance.choice(anywhere) if number % 2 else chance.choice(files)
        content = bytearray(path.read_bytes())
        content[at := chance.randrange(len(content))] ^= 1 << (bit := chance.randrange(8))
        path.write_bytes(content)
        assert is_damaged(copy), f"bit {bit} of byte {at} of {path.name}"
        content[at] ^= 1 << bit
        path.write_bytes(content)
    assert verified(copy) == []


def is_damaged(folder: Path) -> bool:
    try:
        return bool(verified(folder))
    except StartError:
        return True


@pytest.mark.parametrize("name", ["secrets.db", "serving.db", "registry.db", "manifest.json", "manifest.check"])
def test_file_that_is_cut_off_missing_or_a_link_is_found(copy: Path, name: str, tmp_path: Path) -> None:
    path, kept = copy / name, tmp_path / "kept"
    kept.write_bytes(path.read_bytes())
    os.truncate(path, path.stat().st_size - 1)
    assert is_damaged(copy)
    path.unlink()
    assert is_damaged(copy)
    path.symlink_to(kept)
    assert is_damaged(copy)


def test_file_that_does_not_belong_to_a_backup_is_found(copy: Path) -> None:
    (copy / "locks" / "more.txt").touch()
    assert verified(copy) == ["locks/more.txt does not belong to it"]


def test_damaged_backup_is_not_restored(made: Made, copy: Path, tmp_path: Path, capsys: Any) -> None:
    with (copy / "serving.db").open("r+b") as file:
        file.seek(5_000)
        file.write(b"x")
    assert main(["verify", str(copy)]) == 1
    assert "damaged: serving.db is not as it was written" in capsys.readouterr().out
    assert main(["restore", str(copy), str(tmp_path / "restored"), "--root-key", str(made.key)]) == 1
    assert "serving.db is not as it was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def forge(folder: Path, **facts: Any) -> None:
    """Makes the manifest of a backup anew, with all digests right, as somebody can who has no key."""
    document = json.loads((folder / "manifest.json").read_bytes()) | facts
    for file in document["files"]:
        content = (folder / file["name"]).read_bytes()
        file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
    mac = bytes.fromhex((folder / "manifest.check").read_text().splitlines()[0])
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "manifest.check").write_bytes(archive.check(manifest, mac))


def test_change_that_somebody_made_who_can_make_digests_is_found_with_the_root_key(
    made: Made, copy: Path, tmp_path: Path
) -> None:
    with contextlib.closing(sqlite3.connect(copy / "serving.db")) as serving:
        serving.execute("UPDATE configs SET content = replace(content, 'tiny', 'evil')")
        serving.commit()
    forge(copy)
    assert verified(copy) == []
    with pytest.raises(StartError, match="was changed since it was made"):
        verified(copy, made.key)
    assert main(["restore", str(copy), str(tmp_path / "restored"), "--root-key", str(made.key)]) == 1
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("facts", [{"format": 2}, {"format": "1"}, {"files": [{"name": "../x"}]}, {"files": []}])
def test_backup_of_another_kind_is_refused_in_one_line(copy: Path, facts: Any, capsys: Any) -> None:
    manifest = json.dumps(json.loads((copy / "manifest.json").read_bytes()) | facts).encode()
    (copy / "manifest.json").write_bytes(manifest)
    (copy / "manifest.check").write_bytes(archive.check(manifest, b"mac"))
    assert main(["verify", str(copy)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tessera: ")
    assert said.count("\n") == 1
    assert ("newer version" in said) == (facts == {"format": 2})


def test_backup_of_a_newer_database_is_refused(copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy / "secrets.db")) as secrets:
        secrets.execute("PRAGMA user_version = 999")
    forge(copy)
    (found,) = verified(copy)
    assert found.startswith("secrets.db: it was written by a newer version")


async def test_what_was_damaged_before_the_backup_is_told_and_restored_when_asked_for(
    directory: Path, capsys: Any
) -> None:
    async with running(directory / "data") as platform:
        admin = platform.secrets.admin
        for scope in ("good", "bad", "worse"):
            await admin.create_scope(scope)
            await admin.put(scope, "key", "value")
        with contextlib.closing(sqlite3.connect(directory / "data" / "secrets" / "secrets.db")) as secrets:
            secrets.execute(
                "UPDATE acls SET permission = 1 WHERE scope_id = (SELECT id FROM scopes WHERE name = 'bad')"
            )
            secrets.execute(
                "UPDATE versions SET record = zeroblob(100) WHERE key_id = (SELECT k.id FROM keys k JOIN scopes s"
                " ON s.id = k.scope_id WHERE s.name = 'worse')"
            )
            secrets.commit()
        folder, key = await back_up(platform, directory / "backup"), platform.directory / "root.key"
    assert await asyncio.to_thread(verified, folder) == []
    damage = [
        "secrets.db: the stored rights of scope bad were changed",
        "secrets.db: the value of worse/key does not open",
    ]
    assert await asyncio.to_thread(verified, folder, key) == damage
    restore = ["restore", str(folder), str(directory / "restored"), "--root-key", str(key)]
    assert await ran(restore) == 1
    assert "--with-damage" in capsys.readouterr().err
    assert await ran([*restore, "--with-damage"]) == 0
    async with running_secrets(directory / "restored") as service:
        admin = service.public(platform.token)
        assert await admin.get("good", "key") == b"value"
        for scope in ("bad", "worse"):
            assert (await refusal(admin.get(scope, "key"))).reason == "DATA_LOSS"


# --- what is refused, and what is left of what was interrupted ---


def test_restore_makes_a_directory_and_never_touches_one_that_holds_something(
    made: Made, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "root.key").touch()
    (tmp_path / "empty").mkdir()
    key = ["--root-key", str(made.key)]
    assert main(["restore", str(made.folder), str(tmp_path / "full"), *key]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["restore", str(made.folder), str(tmp_path / "empty")]) == 1
    assert f"it takes the root key {rootkey.load(made.key).id}" in capsys.readouterr().err
    assert main(["restore", str(made.folder), str(tmp_path / "empty"), *key]) == 0
    assert main(["restore", str(made.folder), str(tmp_path / "empty"), *key]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_root_key_that_is_to_stay_where_it_is_is_not_copied(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_ROOT_KEY_FILE", str(made.key))
    assert main(["restore", str(made.folder), str(tmp_path / "restored")]) == 0
    assert (tmp_path / "restored" / "secrets" / "secrets.db").exists()
    assert not list((tmp_path / "restored").glob("root.key*"))


async def test_backup_overwrites_nothing(directory: Path) -> None:
    (directory / "there").mkdir()
    async with running(directory / "data") as platform:
        with pytest.raises(StartError, match="is there already"):
            await back_up(platform, directory / "there")
    assert list((directory / "there").iterdir()) == []


async def test_backup_says_so_when_nothing_runs(directory: Path) -> None:
    (directory / "data").mkdir()
    with pytest.raises(StartError, match="No platform is running"):
        await backup.made(argparse.Namespace(target=directory / "backup", data_dir=directory / "data"))
    assert sorted(path.name for path in directory.iterdir()) == ["data"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_backup_that_is_ended_leaves_nothing_that_looks_like_one(
    directory: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, copying, enough = database.Database.copy, asyncio.Event(), asyncio.Event()

    async def waiting(self: database.Database, to: Path) -> None:
        await copy(self, to)
        copying.set()
        await enough.wait()

    monkeypatch.setattr(database.Database, "copy", waiting)
    async with running(directory / "data") as platform:
        words = ["backup", str(directory / "backup"), "--data-dir", str(platform.directory)]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tessera.cli", *words), env=clean_environment()
        )
        await copying.wait()
        monkeypatch.setattr(backups, "PATIENCE_SECONDS", 0.1)
        with pytest.raises(StartError, match="Another backup is being made"):
            await back_up(platform, directory / "second")
        process.send_signal(number)
        await process.wait()
        left = [path for path in directory.iterdir() if path != platform.directory]
        assert len(left) == (number is signal.SIGKILL)
        for folder in left:
            with pytest.raises(StartError, match="is no backup"):
                archive.opened(folder)
        monkeypatch.setattr(backups, "PATIENCE_SECONDS", CEILING)
        enough.set()
        await eventually(
            lambda: not list((platform.directory / "serving" / "copies").iterdir()), within=CEILING, what="no copy left"
        )
        assert verified(await back_up(platform, directory / "backup")) == []


async def test_copy_that_a_killed_service_left_is_gone_with_its_next_start(directory: Path) -> None:
    left = [directory / name / "copies" / "tmp1" for name in ("secrets", "serving")]
    for folder in left:
        folder.mkdir(mode=0o700, parents=True)
        (folder / "half.db").touch()
    async with running(directory):
        assert not any(folder.exists() for folder in left)


async def test_backup_fails_with_the_reason_when_there_is_no_room(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(self: database.Database, to: Path) -> None:
        raise StorageError("database or disk is full")

    async with running(directory / "data") as platform:
        monkeypatch.setattr(database.Database, "copy", full)
        with pytest.raises(StartError, match="There is no backup: No copy can be made: database or disk is full"):
            await back_up(platform, directory / "backup")
    assert sorted(path.name for path in directory.iterdir()) == ["data"]
