"""Models from a real registry, by the real helper; and what the service makes of a helper that is not well."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from servicekit import database
from servicekit.errors import Unavailable
from serving_service import caches, registry_helper
from serving_service import registry as module
from serving_service.app import MIGRATIONS
from serving_service.caches import FolderCache
from serving_service.errors import DiskFull, ModelBroken, ModelChanged, ModelNotFound, RegistryUnusable
from serving_service.helper_variables import HelperVariables
from serving_service.model import ModelVersion
from serving_service.registry import MODEL_FOLDER, MlflowRegistry, shown
from tests.support.eventually import eventually
from tests.support.registered_models import GOOD, MODEL, registry_uri
from tests.support.serving import serving_settings
from tests.support.sockets import short_directory
from tests.support.wheels import variables_file

SECONDS_TO_IMPORT_MLFLOW = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[MlflowRegistry]:
    """The registry of all tests, for those that only ask."""
    with short_directory() as path:
        async with running_registry(registry_uri(), path) as registry:
            yield registry


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast this machine imports mlflow."""
    monkeypatch.setattr(module, "DESCRIBE_SECONDS", SECONDS_TO_IMPORT_MLFLOW)


@contextlib.asynccontextmanager
async def running_registry(uri: str, folder: Path, *, file: Path | None = None) -> AsyncIterator[MlflowRegistry]:
    variables = HelperVariables(file, service_environment=os.environ)
    cache = FolderCache(folder / "models", content=MODEL_FOLDER, bound=1 << 30, used=nothing)
    async with database.opened(folder / "serving.db", MIGRATIONS) as opened:
        registry = MlflowRegistry(uri, cache, variables, opened, closed=[folder / "platform" / "serving"])
        task = asyncio.create_task(registry.run())
        try:
            yield registry
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def a_copy_of_the_registry(folder: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copy(registry_uri().removeprefix("sqlite:///"), folder / "registry.db"))


def rewrite(registered: Path, statement: str, *values: str | None) -> None:
    """Changes the database of a registry behind its back."""
    with contextlib.closing(sqlite3.connect(registered)) as connection, connection:
        connection.execute(statement, values)


async def nothing() -> frozenset[str]:
    return frozenset()


async def helper_of(registry: MlflowRegistry) -> psutil.Process:
    """The helper process of a registry, once it is there."""
    await eventually(lambda: registry._started.is_set())
    assert registry._helper is not None
    return psutil.Process(registry._helper.pid)


async def test_a_helper_that_cannot_be_started_just_now_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = asyncio.create_subprocess_exec
    refused: list[Any] = []

    async def no_process_at_first(*arguments: Any, **options: Any) -> Any:
        if not refused:
            refused.append(arguments)
            raise BlockingIOError(errno.EAGAIN, "no process to be had")
        return await start(*arguments, **options)

    monkeypatch.setattr(module, "RESTART_SECONDS", 0.01)
    monkeypatch.setattr("asyncio.create_subprocess_exec", no_process_at_first)
    async with running_registry(registry_uri(), folder) as registry:
        assert (await registry.describe(MODEL, GOOD)).version == GOOD
    assert refused


async def test_a_registered_version_is_described_and_fetched(folder: Path) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        assert (model.name, model.version) == (MODEL, GOOD)
        assert model.source
        assert model.created_at > 1_600_000_000_000
        # As MLflow logs models today: the source names a logged model, and the files are where that one's are.
        assert model.source.startswith("models:/m-")
        assert model.location is not None
        assert (Path(model.location) / "MLmodel").is_file()
        path = await registry.fetch(model)
        assert (path / "MLmodel").is_file()
        assert path.parents[1] == folder / "models"
        assert [each.name for each in (folder / "models").iterdir()] == [path.parent.name]
        assert sorted(each.name for each in path.parent.iterdir()) == ["manifest.json", "model"]


@pytest.mark.parametrize(("name", "version"), [(MODEL, "99"), (MODEL, "latest"), ("nobody", "1"), ("a/b", "1")])
async def test_what_is_not_registered_is_not_found_by_name(shared: MlflowRegistry, name: str, version: str) -> None:
    with pytest.raises(ModelNotFound, match=f"Version {version} of model '{name}'"):
        await shared.describe(name, version)


@pytest.mark.parametrize("version", ["1 ", " 1", "1\n", "01", "+1", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 30])
async def test_a_version_has_one_spelling(shared: MlflowRegistry, version: str) -> None:
    with pytest.raises(ModelNotFound):
        await shared.describe(MODEL, version)


@pytest.mark.parametrize("place", ["other", "other/root.key"])
async def test_a_version_that_is_registered_at_a_place_without_a_model_is_not_kept(folder: Path, place: str) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "root.key").write_text("canary")
    registered, where = a_copy_of_the_registry(folder), str(folder / place)
    rewrite(registered, "UPDATE model_versions SET source = ?, storage_location = ?", where, where)
    async with running_registry(f"sqlite:///{registered}", folder) as registry:
        with pytest.raises(ModelBroken, match=r"Version 1 of model .* without an MLmodel file\. Register"):
            await registry.fetch(await registry.describe(MODEL, GOOD))
        assert list((folder / "models").iterdir()) == []


@pytest.mark.parametrize("place", ["platform/serving/models/key/model", "platform/serving", "platform", "link"])
async def test_a_version_that_is_registered_in_the_platform_is_not_taken_for_a_model(folder: Path, place: str) -> None:
    """Also where there is an MLmodel file: the copy of a model that others are granted secrets for, say."""
    inside = folder / "platform" / "serving" / "models" / "key" / "model"
    inside.mkdir(parents=True)
    (folder / "link").symlink_to(inside)
    (folder / place / "MLmodel").write_text("flavors: {}")
    registered = a_copy_of_the_registry(folder)
    async with running_registry(f"sqlite:///{registered}", folder) as registry:
        for where in (str(folder / place), f"file://{folder / place}"):
            rewrite(registered, "UPDATE model_versions SET source = ?, storage_location = ?", where, where)
            with pytest.raises(ModelBroken, match=r"at a place that holds the platform's own data\. Register"):
                await registry.fetch(await registry.describe(MODEL, GOOD))
        assert list((folder / "models").iterdir()) == []


def test_the_platforms_own_folders_are_where_it_writes_and_not_all_of_its_data_directory(folder: Path) -> None:
    settings = serving_settings(folder, audit_dir=folder / "elsewhere")
    named = {folder / name for name in ("audit", "elsewhere", "run", "secrets", "serving")}
    assert set(settings.own_folders) == {*named, settings.sockets}


@pytest.mark.parametrize("link", ["root.key", "deep"])
async def test_a_link_of_a_registered_version_may_not_lead_out_of_its_folder(folder: Path, link: str) -> None:
    place = folder / "platform" / "artifacts"
    (place / "data").mkdir(parents=True)
    (place / "MLmodel").write_text("flavors: {}")
    (place / "data" / "weights").write_text("1, 2")
    (place / "latest").symlink_to("data/weights")
    (place.parent / "deep").mkdir()
    (place.parent / "deep" / "root.key").write_text("canary")
    (place.parent / "root.key").write_text("canary")
    registered = a_copy_of_the_registry(folder)
    rewrite(registered, "UPDATE model_versions SET source = ?, storage_location = ?", str(place), str(place))
    async with running_registry(f"sqlite:///{registered}", folder) as registry:
        (place / "data" / "more").symlink_to(place.parent / link)
        with pytest.raises(ModelBroken, match=r"its file '.*data/more.*' is a link that leads out of its folder\."):
            await registry.fetch(await registry.describe(MODEL, GOOD))
        assert list((folder / "models").iterdir()) == []
        (place / "data" / "more").unlink()
        path = await registry.fetch(await registry.describe(MODEL, GOOD))
        assert (path / "latest").read_text() == "1, 2"


async def test_a_version_that_the_registry_has_at_another_place_by_now_is_not_fetched(folder: Path) -> None:
    """Its source and its time are still the same, and it is the place that decides what code gets the secrets."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "MLmodel").write_text("flavors: {}")
    registered = a_copy_of_the_registry(folder)
    async with running_registry(f"sqlite:///{registered}", folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        rewrite(registered, "UPDATE model_versions SET storage_location = ?", str(folder / "elsewhere"))
        with pytest.raises(RegistryUnusable, match=r"at another place .* Update the endpoint's configuration"):
            await registry.fetch(model)
        assert list((folder / "models").iterdir()) == []
        moved = await registry.describe(MODEL, GOOD)
        assert (moved.source, moved.created_at) == (model.source, model.created_at)
        assert (await registry.fetch(moved) / "MLmodel").read_text() == "flavors: {}"
        rewrite(registered, "UPDATE model_versions SET storage_location = ?", model.location)
        with pytest.raises(ModelChanged):  # rather than that the copy of what lay elsewhere is taken for it
            await registry.fetch(model)


async def test_a_configuration_from_before_places_were_recorded_is_fetched_from_where_it_is(folder: Path) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        older = ModelVersion(name=MODEL, version=GOOD, source=model.source, created_at=model.created_at)
        assert (await registry.fetch(older) / "MLmodel").is_file()


async def test_files_that_were_overwritten_since_they_were_first_fetched_are_not_launched(folder: Path) -> None:
    """Whoever may write where models lie is not who was granted the secrets."""
    registered, place = a_copy_of_the_registry(folder), folder / "store"
    place.mkdir()
    (place / "MLmodel").write_text("flavors: {}")
    rewrite(registered, "UPDATE model_versions SET storage_location = ?", str(place))
    async with running_registry(f"sqlite:///{registered}", folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        path = await registry.fetch(model)
        shutil.rmtree(path.parent)
        (place / "MLmodel").write_text("flavors: []")
        with pytest.raises(ModelChanged, match=rf"version {GOOD} of model '{MODEL}' .* Put back .*; or register"):
            await registry.fetch(model)
        assert list((folder / "models").iterdir()) == []
        (place / "MLmodel").write_text("flavors: {}")
        assert await registry.fetch(model) == path


async def test_a_cached_version_that_was_changed_with_its_manifest_is_fetched_again(folder: Path) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        path = await registry.fetch(await registry.describe(MODEL, GOOD))
    original = (path / "MLmodel").read_bytes()
    (path / "MLmodel").write_bytes(original + b"# and more\n")
    caches.seal(path)
    async with running_registry(registry_uri(), folder) as registry:
        assert await registry.fetch(await registry.describe(MODEL, GOOD)) == path
        assert (path / "MLmodel").read_bytes() == original


async def test_a_version_that_was_fetched_by_an_earlier_program_is_known_from_then_on(folder: Path) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        path = await registry.fetch(model)
    rewrite(folder / "serving.db", "DELETE FROM fetched")
    async with running_registry(registry_uri(), folder) as registry:
        inode = path.stat().st_ino
        assert await registry.fetch(model) == path
        assert path.stat().st_ino == inode, "it was not fetched again"
    (path / "MLmodel").write_bytes(b"flavors: {}")
    caches.seal(path)
    async with running_registry(registry_uri(), folder) as registry:
        await registry.fetch(model)
        assert (path / "MLmodel").read_bytes() != b"flavors: {}"


async def test_concurrent_fetches_download_once_and_later_ones_not_at_all(folder: Path) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        asked: list[str] = []
        ask = registry._ask

        async def counted(request: dict[str, str], *, timeout: float) -> dict[str, str]:
            asked.append(request["op"])
            return await ask(request, timeout=timeout)

        registry._ask = counted  # type: ignore[method-assign]
        paths = await asyncio.gather(*(registry.fetch(model) for _ in range(5)))
        await registry.fetch(model)
        assert asked == ["fetch"]
        assert len(set(paths)) == 1


async def test_who_gives_up_waiting_does_not_end_the_download_of_others(folder: Path) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        ask, is_asked, may_go_on = registry._ask, asyncio.Event(), asyncio.Event()

        async def held_up(request: dict[str, str], *, timeout: float) -> dict[str, str]:
            is_asked.set()
            await may_go_on.wait()
            return await ask(request, timeout=timeout)

        registry._ask = held_up  # type: ignore[method-assign]
        first, second = (asyncio.create_task(registry.fetch(model)) for _ in range(2))
        await is_asked.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        may_go_on.set()
        assert (await second).is_dir()


async def test_a_version_that_was_registered_anew_is_not_taken_for_the_old_one(folder: Path) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        old = ModelVersion(name=model.name, version=model.version, source=model.source, created_at=1)
        with pytest.raises(RegistryUnusable, match="registered anew"):
            await registry.fetch(old)
        assert list((folder / "models").iterdir()) == []


async def test_a_registry_that_is_not_there_yet_holds_no_models_and_is_not_made(folder: Path) -> None:
    async with running_registry(f"sqlite:///{folder}/registry.db", folder) as registry:
        with pytest.raises(ModelNotFound):
            await registry.describe(MODEL, GOOD)
        assert not (folder / "registry.db").exists()


async def test_a_registry_that_is_just_being_made_holds_no_models_yet(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "registry.db")) as connection:
        connection.execute("CREATE TABLE registered_models (name TEXT)")
    async with running_registry(f"sqlite:///{folder}/registry.db", folder) as registry:
        with pytest.raises(ModelNotFound):
            await registry.describe(MODEL, GOOD)


async def test_a_wrong_address_is_a_clear_error_without_its_password(folder: Path) -> None:
    async with running_registry("nonsense://user:canary@host/path", folder) as registry:
        with pytest.raises(RegistryUnusable, match=r"nonsense://host/path.*TESSERA_MODEL_REGISTRY") as caught:
            await registry.describe(MODEL, GOOD)
    assert "canary" not in caught.value.message


async def test_a_file_that_is_no_database_is_a_clear_error(folder: Path) -> None:
    (folder / "registry.db").write_text("nothing of the kind " * 100)
    async with running_registry(f"sqlite:///{folder}/registry.db", folder) as registry:
        with pytest.raises(RegistryUnusable, match="no database of MLflow"):
            await registry.describe(MODEL, GOOD)


async def test_a_helper_that_dies_is_started_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTART_SECONDS", 0.0)
    async with running_registry(f"sqlite:///{folder}/registry.db", folder) as registry:
        helper = await helper_of(registry)
        helper.kill()
        await eventually(lambda: registry._helper is not None and registry._helper.pid != helper.pid)
        with pytest.raises(ModelNotFound):
            await registry.describe(MODEL, GOOD)


async def test_whoever_waits_when_the_helper_dies_may_try_again(folder: Path) -> None:
    async with running_registry(f"sqlite:///{folder}/registry.db", folder) as registry:
        helper = await helper_of(registry)
        helper.suspend()
        waiting = asyncio.create_task(registry.describe(MODEL, GOOD))
        await eventually(lambda: bool(registry._waiting))
        helper.kill()
        with pytest.raises(Unavailable, match="helper ended"):
            await waiting


async def test_whoever_asks_a_helper_that_has_just_ended_may_try_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_: bytes) -> None:  # as uvloop says it
        raise RuntimeError("unable to perform operation on <WriteUnixTransport closed=True>; the handler is closed")

    async with running_registry(f"sqlite:///{folder}/registry.db", folder) as registry:
        await helper_of(registry)
        assert registry._helper is not None
        monkeypatch.setattr(registry._helper.stdin, "write", closed)
        with pytest.raises(Unavailable, match="helper ended"):
            await registry.describe(MODEL, GOOD)


async def test_a_helper_that_hangs_is_not_waited_for_longer_than_the_deadline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DESCRIBE_SECONDS", 0.1)
    async with running_registry(f"sqlite:///{folder}/registry.db", folder) as registry:
        (await helper_of(registry)).suspend()
        with pytest.raises(Unavailable, match="did not answer in time"):
            await registry.describe(MODEL, GOOD)


async def test_no_helper_is_left_when_the_service_stops(folder: Path) -> None:
    async with running_registry(f"sqlite:///{folder}/registry.db", folder) as registry:
        helper = await helper_of(registry)
    assert not helper.is_running()


async def test_a_helper_whose_service_was_killed_ends_by_itself(folder: Path) -> None:
    helper = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "serving_service.registry_helper",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert helper.stdin is not None
    assert helper.stdout is not None
    helper.stdin.write(
        b'{"registry": "sqlite:///nowhere.db", "closed": []}\n'
        b'{"id": 1, "op": "describe", "name": "a", "version": "1"}\n'
    )
    assert b'"missing"' in await helper.stdout.readline()
    helper.stdin.close()
    async with asyncio.timeout(SECONDS_TO_IMPORT_MLFLOW):
        assert await helper.wait() == 0


@pytest.mark.parametrize("is_cut", [True, False])
async def test_a_cached_version_that_is_not_whole_is_fetched_again(folder: Path, is_cut: bool) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        path = await registry.fetch(await registry.describe(MODEL, GOOD))
    if is_cut:
        os.truncate(path / "MLmodel", 3)
    else:  # as earlier versions of this platform kept it, or a copy that was cut short
        (path.parent / "manifest.json").unlink()
    async with running_registry(registry_uri(), folder) as registry:
        assert await registry.fetch(await registry.describe(MODEL, GOOD)) == path
        assert (path / "MLmodel").stat().st_size > 3
        assert (path.parent / "manifest.json").exists()


def test_a_download_that_lacks_something_that_its_store_lists_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors")
    listed = [("MLmodel", 7), ("data/weights", 10)]
    for content, problem in ((None, "0 of 10 bytes"), (b"123", "3 of 10 bytes")):
        if content is not None:
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "weights").write_bytes(content)
        with pytest.raises(registry_helper.Incomplete, match=f"'data/weights' has {problem}"):
            registry_helper.check_whole(listed, tmp_path)
    (tmp_path / "data" / "weights").write_bytes(bytes(10))
    registry_helper.check_whole(listed, tmp_path)


async def test_a_full_disk_is_said_to_be_the_cause_and_nothing_is_left(folder: Path) -> None:
    async with running_registry(registry_uri(), folder) as registry:
        model = await registry.describe(MODEL, GOOD)
        (await helper_of(registry)).rlimit(psutil.RLIMIT_FSIZE, (10, psutil.RLIM_INFINITY))
        with pytest.raises(DiskFull, match="disk that models are kept on is full"):
            await registry.fetch(model)
        assert list((folder / "models").iterdir()) == []


async def test_a_helper_gets_new_credentials_when_their_file_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_SECONDS", 0.0)
    file = variables_file(folder / "helpers.env", {"MLFLOW_TRACKING_TOKEN": "first"})
    async with running_registry(registry_uri(), folder, file=file) as registry:
        first = await helper_of(registry)
        assert first.environ()["MLFLOW_TRACKING_TOKEN"] == "first"
        await registry.describe(MODEL, GOOD)
        assert (await helper_of(registry)).pid == first.pid
        variables_file(file, {"MLFLOW_TRACKING_TOKEN": "second"})
        await registry.describe(MODEL, GOOD)
        assert (await helper_of(registry)).environ()["MLFLOW_TRACKING_TOKEN"] == "second"


async def test_what_an_earlier_process_did_not_finish_is_removed(folder: Path) -> None:
    leftover = folder / "models" / ".unfinished-1"
    leftover.mkdir(parents=True)
    async with running_registry(f"sqlite:///{folder}/registry.db", folder):
        await eventually(lambda: not leftover.exists())


def test_an_address_is_shown_without_user_password_and_parameters() -> None:
    assert shown("postgresql://u:p@db:5432/r?password=x") == "postgresql://db:5432/r"
    assert shown("sqlite:////data/registry.db") == "sqlite:////data/registry.db"


def test_one_thread_at_a_time_imports_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules import each other in a circle: the second would find one half made and blame the registry."""
    inside, most = 0, 0
    begun = threading.Barrier(2)

    def slow() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        with contextlib.suppress(threading.BrokenBarrierError):
            begun.wait(0.2)  # in vain, when the other has to wait
        inside -= 1

    monkeypatch.setattr(registry_helper, "_mlflow", slow)
    registry = registry_helper.Registry("http://127.0.0.1:1")
    threads = [threading.Thread(target=registry.warm) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
