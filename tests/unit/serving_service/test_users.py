"""Which user an endpoint's models run as: its own, and nobody else's for as long as there is anything of it."""

import os
import sqlite3
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from servicekit.database import SqliteConnection
from servicekit.storage import Connection
from serving_service import isolation, store
from serving_service.launches import Launches, LaunchImpossible
from serving_service.settings import ServingSettings
from tests.support.exhaustion import no_descriptor_left, out_of_descriptors

USERS = range(200, 203)


@pytest.fixture
def connection() -> Iterator[Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None, factory=SqliteConnection)
    connection.execute("PRAGMA foreign_keys=ON")
    for script in sorted((files("serving_service") / "migrations").iterdir(), key=lambda entry: entry.name):
        connection.executescript(script.read_text())
    for name in "abcd":
        connection.execute(
            "INSERT INTO endpoints (id, name, creator_id, creator, description, tags, created_at, updated_at,"
            " latest_version, config_update, failures, is_deleted)"
            " VALUES (?, ?, '1', 'c', '', '[]', 1, 1, 0, '', '{}', 0)",
            (name, name),
        )
    yield connection
    connection.close()


def test_each_endpoint_has_a_user_and_keeps_it(connection: Connection) -> None:
    assert [store.user_of(connection, name, USERS, ()) for name in "abab"] == [200, 201, 200, 201]


def test_a_user_is_free_again_when_nothing_is_left_of_its_endpoint(connection: Connection) -> None:
    assert [store.user_of(connection, name, USERS, ()) for name in "abcd"] == [200, 201, 202, None]
    store.mark_deleted(connection, "b")
    assert store.user_of(connection, "d", USERS, ()) is None  # its replicas may still run
    store.purge(connection, "b")
    assert store.user_of(connection, "d", USERS, ()) == 201


def test_a_user_whose_processes_run_is_not_given_away(connection: Connection) -> None:
    assert store.user_of(connection, "a", USERS, {200, 201}) == 202
    assert store.user_of(connection, "b", USERS, {200, 201}) is None
    assert store.user_of(connection, "a", USERS, {202}) == 202  # its own replicas


def test_an_endpoint_gets_another_user_when_the_range_has_moved(connection: Connection) -> None:
    assert store.user_of(connection, "a", USERS, ()) == 200
    assert store.user_of(connection, "a", range(300, 301), ()) == 300


def test_each_start_has_a_higher_epoch(connection: Connection) -> None:
    assert [store.next_epoch(connection) for _ in range(3)] == [1, 2, 3]


def test_users_of_processes_are_seen() -> None:
    assert os.getuid() in isolation._users_of_processes()


def test_a_user_is_not_free_because_its_process_could_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
        isolation._users_of_processes()
    monkeypatch.setattr(Path, "read_text", out_of_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        isolation._users_of_processes()


def test_what_is_missing_is_said_and_where_it_is_demanded_nothing_runs() -> None:
    missing = ("Models run as the service's own user: only root can start them as others.",)
    assert isolation.Isolation().notice == isolation.Isolation(is_required=True).refusal == ""
    assert isolation.Isolation(missing=missing).refusal == ""
    assert missing[0] in isolation.Isolation(missing=missing).notice
    refusal = isolation.Isolation(missing=missing, is_required=True).refusal
    assert "TESSERA_ISOLATION" in refusal
    assert missing[0] in refusal


async def test_a_launch_is_refused_before_anything_is_done_for_it() -> None:
    nothing: Any = None
    launches = Launches(
        *(nothing,) * 6,
        None,
        nothing,
        refusal="Models may not run here.",
        download_deadline=1.0,
        build_deadline=1.0,
        reference_deadline=1.0,
    )
    with pytest.raises(LaunchImpossible, match="Models may not run here"):
        await launches.prepare(nothing, 1, nothing, "r1", print)


@pytest.mark.parametrize("users", [range(5), range(2**32 - 5, 2**32)])
def test_root_and_users_that_there_cannot_be_are_refused_as_users_of_models(users: range) -> None:
    with pytest.raises(ValueError, match="TESSERA_MODEL_USERS"):
        ServingSettings(data_dir=Path("/nonexistent"), model_users=users)
