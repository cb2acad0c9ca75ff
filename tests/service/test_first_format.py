"""A store of the first format, as an older version of this program wrote it, is brought up to date and loses nothing.

`first_format.json` is such a store, with what was in it. It was written once and stays as it is: to write another takes
that version of the program.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from secrets_service import foundation, rootsource, store
from secrets_service.app import MIGRATIONS
from servicekit import channels, database
from servicekit.errors import StartError
from tessera.identity.v1 import identity_pb2 as identity
from tests.support.secrets import (
    Caller,
    Clock,
    RunningSecrets,
    data_directory,
    failures_of,
    refusal,
    running_secrets,
    settings_for,
)

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "first_format.json").read_text())


@contextmanager
def old_store() -> Iterator[Path]:
    """A data directory of the first format."""
    with data_directory() as directory:
        (directory / "secrets").mkdir(mode=0o700)
        with closing(sqlite3.connect(path_of(directory), isolation_level=None)) as connection:
            connection.executescript("\n".join(FACTS["sql"]) + f"\nPRAGMA user_version={FACTS['user_version']};")
        key = directory / "root.key"
        key.write_bytes(bytes.fromhex(FACTS["root_key"]))
        key.chmod(0o600)
        (directory / "admin.token").write_text(FACTS["admin"])
        yield directory


def path_of(directory: Path) -> Path:
    return directory / "secrets" / "secrets.db"


def then() -> Clock:
    """The time when the store was written: its tokens do not last for ever."""
    clock = Clock()
    clock.offset = FACTS["made_at"] + 30 - time.time()
    return clock


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[RunningSecrets]:
    async with running_secrets(directory, clock=then()) as service:
        yield service


def rows(directory: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(f"file:{path_of(directory)}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


async def has_everything(service: RunningSecrets) -> None:
    """Nothing that the old store held is lost."""
    ada, bob = service.public(FACTS["ada"]), service.public(FACTS["bob"])
    assert await ada.get("Shop", "Key") == b"three"
    assert await bob.get("Shop", "Binary") == bytes(range(256))
    assert [each.version for each in await ada.versions("Shop", "Key")] == [3, 2, 1]
    assert sorted(await ada.acls("Shop")) == [("ada", "MANAGE"), ("bob", "READ")]
    assert await service.admin.acls("Empty") == [("users", "MANAGE")]
    assert (await refusal(ada.get("Shop", "Harmed"))).reason == "DATA_LOSS"
    assert (await refusal(ada.get("Shop", "Gone"))).reason == "RESOURCE_DOES_NOT_EXIST"
    [gone] = await ada.versions("Shop", "Gone")
    assert (gone.held, gone.deleted) == (True, True)
    answer = await service.resolve(FACTS["endpoint_id"], ("Shop", "Key"))
    assert (list(answer.values), failures_of(answer)) == ([b"three"], [])


async def test_everything_is_there_and_nothing_of_the_old_format_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with old_store() as directory:
        async with running(directory) as service:
            await has_everything(service)
            assert await service.public(FACTS["ada"]).restore("Shop", "Key", 1) == 4
            assert await service.public(FACTS["bob"]).get("Shop", "Key") == b"one"
        told = [record for record in caplog.records if record.message == "store brought to the present format"]
        assert [(record.levelno, vars(record)["damaged_records"]) for record in told] == [(logging.WARNING, 1)]
        for table, left in (("versions", 1), ("signing_keys", 0), ("answers", 0)):
            old = rows(directory, f"SELECT count(*) FROM {table} WHERE substr(record, 1, 1) = x'01'")
            assert old == [(left,)], table
        assert rows(directory, "SELECT * FROM first_format") == []
        async with running(directory) as service:
            assert await service.public(FACTS["ada"]).get("Shop", "Key") == b"one"
            await service.public(FACTS["ada"]).put("Shop", "Harmed", "cured")
            assert await service.public(FACTS["ada"]).get("Shop", "Harmed") == b"cured"


async def test_what_was_signed_or_answered_before_is_good_after() -> None:
    with old_store() as directory:
        async with running(directory) as service:
            ada = service.public(FACTS["ada"])
            chosen = Caller(ada.channel, *ada.metadata, (channels.REQUEST_ID, "chosen-1"))
            request = identity.CreateTokenRequest(comment="retried", lifetime_seconds=700 * 24 * 3600)
            assert (await chosen(chosen.tokens.CreateToken, request)).token_value == FACTS["retried_token"]
            robot = service.public(FACTS["access_token"])
            me = await robot(robot.scim.GetMe, identity.GetMeRequest())
            assert me.id == FACTS["robot_id"]


async def test_tokens_get_a_mac_under_the_new_key_when_they_are_used() -> None:
    with old_store() as directory:
        names = {"ada": FACTS["ada"], "bob": FACTS["bob"], "robot": FACTS["client_secret"]}
        ids = {name: text[4:16] for name, text in names.items()}

        def versions() -> dict[str, int]:
            by_id = dict(rows(directory, "SELECT id, mac_version FROM tokens"))
            return {name: by_id[token_id] for name, token_id in ids.items()}

        async with running(directory) as service:
            assert versions() == {"ada": 0, "bob": 0, "robot": 0}
            await service.public(FACTS["ada"]).keys("Shop")
            assert versions() == {"ada": 1, "bob": 0, "robot": 0}
            peer = service.peer("gateway")
            client = identity.ClientCredential(client_id=FACTS["client_id"], client_secret=FACTS["client_secret"])
            await peer(peer.authority.IssueToken, identity.IssueTokenRequest(client=client))
            assert versions() == {"ada": 1, "bob": 0, "robot": 1}
        async with running(directory) as service:
            for token in (FACTS["ada"], FACTS["bob"]):
                await service.public(token).keys("Shop")
            assert versions() == {"ada": 1, "bob": 1, "robot": 1}


@pytest.mark.parametrize("content", [bytes(32), b""])
async def test_another_root_key_migrates_nothing(content: bytes) -> None:
    with old_store() as directory:
        key = directory / "root.key"
        right = key.read_bytes()
        key.write_bytes(content)
        with pytest.raises(StartError, match="root key"):
            async with running(directory):
                pass
        assert rows(directory, "SELECT count(*) FROM keyring") == [(0,)]
        assert rows(directory, "SELECT count(*) FROM versions WHERE key_version <> 0") == [(0,)]
        key.write_bytes(right)
        async with running(directory) as service:
            await has_everything(service)


async def test_store_that_was_migrated_and_lost_its_keyring_is_not_migrated_again() -> None:
    with old_store() as directory:
        async with running(directory):
            pass
        with closing(sqlite3.connect(path_of(directory))) as connection:
            connection.execute("DELETE FROM keyring")
            connection.commit()
        with pytest.raises(StartError, match="lost its keyring"):
            async with running(directory):
                pass
        assert rows(directory, "SELECT count(*) FROM keyring") == [(0,)]


STEPS = (
    "insert_scope_key",
    "replace_record",
    "replace_signing_key",
    "replace_answer",
    "insert_keyring",
    "end_first_format",
)
"""What the migration writes, by the functions of store.py that do."""


async def test_start_that_is_killed_at_any_step_is_finished_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the files before and after each write, and after the transaction, is what a kill leaves."""
    with old_store() as directory, data_directory() as images:
        taken: list[Path] = []

        def take(step: str) -> None:
            image = images / f"{len(taken):03}-{step}"
            shutil.copytree(directory / "secrets", image / "secrets", ignore=shutil.ignore_patterns("*-shm"))
            for file in ("root.key", "admin.token"):
                shutil.copy(directory / file, image / file)
            taken.append(image)

        def watched(step: str) -> None:
            write = getattr(store, step)

            def writing(*args: Any, **kwargs: Any) -> Any:
                take(f"before-{step}")
                result = write(*args, **kwargs)
                take(f"after-{step}")
                return result

            monkeypatch.setattr(store, step, writing)

        async def erase(opened: database.Database) -> None:
            take("before-erase")

        for step in STEPS:
            watched(step)
        monkeypatch.setattr(database.Database, "erase", erase)
        await migrated(directory)
        monkeypatch.undo()
        take("end")
        assert {step for step in STEPS if any(image.name.endswith(step) for image in taken)} == set(STEPS)
        for image in taken:
            keyring = await migrated(image)
            assert sorted(keyring.token_mac_keys()) == [0, 1], image
            assert rows(image, "SELECT count(*) FROM versions WHERE substr(record, 1, 1) = x'01'") == [(1,)], image
        async with running(taken[len(taken) // 2]) as service:
            await has_everything(service)


async def migrated(directory: Path) -> Any:
    """The keyring of the store in a directory, which is brought up to date; all of its signing keys open."""
    settings = settings_for(directory)
    async with database.opened(settings.database, MIGRATIONS) as opened:
        return (await foundation.opened(settings, rootsource.chosen(settings), opened, then())).keyring


async def test_process_that_is_killed_in_the_middle_loses_nothing() -> None:
    """The same with a real process and a real end."""
    with old_store() as directory:
        ended = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", KILLED],
            env={**os.environ, "TESSERA_DATA_DIR": str(directory), "TESSERA_SECRETS_LISTEN": "127.0.0.1:0"},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        async with running(directory) as service:
            await has_everything(service)


KILLED = """
import os, signal
from secrets_service import store
from secrets_service.app import running
from secrets_service.settings import SecretsSettings
from servicekit import process

def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

store.replace_answer = killed
process.run("secrets_service", "", SecretsSettings, running)
"""
