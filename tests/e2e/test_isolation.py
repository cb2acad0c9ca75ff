"""What a hostile model can do where models are isolated: to the platform, to the others, to what comes after it.

It is tried with both ways to start a model: as a program of its own, and forked from the template. Only root can
isolate. What this kernel offers must then be used: nothing is skipped for it.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving_service import cgroups
from serving_service.isolation import Isolation, probed
from serving_service.launcher import Launch, LocalLauncher, LocalReplica, ReplicaState
from serving_service.shim.supervisor import is_held
from serving_service.template import Template
from tests.support import hostile_model, model_servers
from tests.support.eventually import eventually
from tests.support.mlflow_models import model_of
from tests.support.model_servers import answer, command, found_by
from tests.support.templates import SERVICE, is_forked, pid_of, running_template

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can start models as other users")

USERS = range(1_999_990_000, 1_999_990_010)
LIMITS = cgroups.Limits(processes=100, memory=256 << 20)
BAD, GOOD = f"bad-{os.getpid()}", f"good-{os.getpid()}"  # names of groups are the machine's, which others may use
SECRET = "sk-0123456789-abcdefghij"
READY, HOSTILE = Path(model_servers.__file__), Path(hostile_model.__file__)
COMMANDS = {READY: command("ready"), HOSTILE: hostile_model.command()}


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def member_of_a_group() -> Iterator[None]:
    """A starter's groups must not be the model's."""
    groups = os.getgroups()
    os.setgroups([*groups, 54_321])
    yield
    os.setgroups(groups)


@pytest.fixture(scope="module", params=["executed", "forked"])
async def template(request: pytest.FixtureRequest) -> AsyncIterator[Template | None]:
    """The two ways: without one, models are programs of their own."""
    if request.param == "executed":
        yield None
    else:
        async with running_template() as template:
            yield template


@pytest.fixture
async def launcher(directory: Path, template: Template | None) -> AsyncIterator[LocalLauncher]:
    launcher = LocalLauncher(
        directory / "replicas",
        None,
        service_environment=SERVICE,
        cgroups=cgroups.found(LIMITS),
        template=template,
    )
    yield launcher
    for replica in (await launcher.adopt()).values():
        await replica.stop(0)


def a_launch(
    template: Template | None, model: Path, program: Path, replica_id: str, user: int, **variables: str
) -> Launch:
    """A launch of a program of the tests: by its command, or as the model that it is, too."""
    return Launch(
        replica_id=replica_id,
        model_path=model,
        environment={"MANNER": "ready", **variables},
        command=COMMANDS[program] if template is None else None,
        user=user,
    )


async def ready(replica: LocalReplica) -> int:
    async with asyncio.timeout(60):
        seen = await replica.wait(ReplicaState.STARTING)
    assert seen.state == ReplicaState.READY, (seen, await replica.logs(2_000))
    assert seen.pid is not None
    return seen.pid


async def test_everything_that_isolates_is_in_force_here_and_a_trial_leaves_nothing(
    launcher: LocalLauncher, directory: Path
) -> None:
    assert await probed(launcher, cgroups.found(LIMITS), USERS, is_required=True) == Isolation(
        users=USERS, is_required=True
    )
    assert list((directory / "replicas").iterdir()) == []


async def test_a_model_runs_as_its_own_user_in_its_own_directories(
    launcher: LocalLauncher, directory: Path, template: Template | None
) -> None:
    model = model_of(READY, directory / "model")
    replica = await launcher.start(a_launch(template, model, READY, "r1", USERS[3]))
    await ready(replica)
    found = await found_by(replica.address)
    own = directory / "replicas" / "r1"
    assert await is_forked(own) == (template is not None)
    assert (found["uid"], found["gid"], found["groups"]) == (USERS[3], USERS[3], [])
    assert found["directory"] == f"{own}/work"
    assert found["fds"] == [0, 1, 2, 3, 4]
    assert found["privileges"] == {
        **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16), "NoNewPrivs": "1"
    }  # fmt: skip
    owners = {path.name: (path.stat().st_uid, path.stat().st_mode & 0o777) for path in (own, *own.iterdir())}
    assert owners == {
        "r1": (0, 0o700),
        "work": (USERS[3], 0o700),
        "tmp": (USERS[3], 0o700),
        "http.sock": (0, 0o600),
        "control.sock": (0, 0o600),
        "lock": (0, 0o600),
    }


@dataclass
class Scene:
    """A hostile model beside a good one, and a data directory around both."""

    directory: Path
    hostile: LocalReplica
    good: LocalReplica

    async def attempt(self, name: str) -> str:
        return (await answer(self.hostile.address, path=f"/{name.replace(' ', '_')}"))[2].decode()


@pytest.fixture
async def scene(launcher: LocalLauncher, directory: Path, template: Template | None) -> AsyncIterator[Scene]:
    for name in ("root.key", "visible-to-root"):
        (directory / name).write_text(SECRET)
        (directory / name).chmod(0o644)  # what protects it is that nobody comes there
    connection = sqlite3.connect(directory / "serving.db")
    connection.execute("CREATE TABLE t (c)")
    connection.close()
    model = model_of(HOSTILE, directory / "models" / "m")
    (model / "open").mkdir()
    (model / "open").chmod(0o777)
    program = model / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    innocent = model_of(READY, directory / "models" / "innocent")
    good = await launcher.start(a_launch(template, innocent, READY, GOOD, USERS[1], KEY=SECRET))
    victim = await ready(good)
    own = directory / "replicas" / BAD
    targets = {
        "other_model": victim,
        "service": os.getpid(),
        "template": pid_of(template) if template else os.getpid(),
        "database": str(directory / "serving.db"),
        "key_file": str(directory / "root.key"),
        "data_directory": str(directory),
        "service_socket": str(directory / "service.sock"),
        "other_directory": str(directory / "replicas" / GOOD),
        "own_directory": str(own),
        "model": str(model),
        "own_group": next(
            str(h.parent / f"tessera-{BAD}") for h in cgroups.found(LIMITS).hierarchies if "pids" in h.kinds
        ),
        "setuid_program": str(program),
    }
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(str(directory / "service.sock"))
        service.listen()
        (directory / "service.sock").chmod(0o666)
        attack = json.dumps(targets)
        hostile = await launcher.start(a_launch(template, model, HOSTILE, BAD, USERS[2], TARGETS=attack))
        await ready(hostile)
        yield Scene(directory, hostile, good)


async def test_a_hostile_model_is_denied_everything(scene: Scene) -> None:
    outcomes = {name: await scene.attempt(name) for name in hostile_model.ATTEMPTS}
    assert {name: said for name, said in outcomes.items() if not said.startswith("denied")} == {}
    assert len(outcomes) >= 25
    await scene.attempt("kill everybody")
    assert (await scene.good.state()).state is ReplicaState.READY
    assert (await found_by(scene.good.address))["environment"]["KEY"] == SECRET
    assert (await scene.hostile.state()).state is ReplicaState.READY


async def test_a_model_may_have_so_many_files_and_no_more(scene: Scene) -> None:
    assert 900 < int(await scene.attempt("files")) <= 1_024


async def test_nothing_that_a_model_leaves_in_shared_places_or_behind_links_outlives_it(scene: Scene) -> None:
    assert await scene.attempt("shared") == "3"  # it may write there, in places of its own
    assert await scene.attempt("links") == "done"
    await scene.hostile.stop(5)
    left = [path for place in hostile_model.SHARED for path in Path(place).glob("left-by-*")]
    assert left == []
    assert (scene.directory / "root.key").read_text() == SECRET
    assert [path.name for path in (scene.directory / "replicas").iterdir()] == [GOOD]


async def test_a_fork_bomb_is_bounded_and_its_neighbour_does_not_notice(scene: Scene) -> None:
    assert 50 < int(await scene.attempt("forks")) < LIMITS.processes
    assert (await found_by(scene.good.address))["environment"]["KEY"] == SECRET


async def test_a_memory_bomb_ends_where_its_limit_is_and_its_neighbour_does_not_notice(scene: Scene) -> None:
    assert await scene.attempt("memory") == "denied: killed"
    assert (await found_by(scene.good.address))["environment"]["KEY"] == SECRET


async def test_a_model_that_uses_all_its_memory_is_said_to_have_done_so(scene: Scene) -> None:
    with contextlib.suppress(ConnectionError, IndexError):
        await scene.attempt("own memory")
    async with asyncio.timeout(60):
        seen = await scene.hostile.wait(ReplicaState.READY)
    assert seen.cause == "the model server used all the memory that it may"


def groups() -> set[Path]:
    """Every group of a replica that there is on this machine."""
    return {path for hierarchy in cgroups.found(LIMITS).hierarchies for path in hierarchy.parent.glob("tessera-*")}


async def test_what_was_forked_away_ends_with_its_replica_even_when_the_shim_was_killed(
    scene: Scene, launcher: LocalLauncher
) -> None:
    survivor = int(await scene.attempt("second life"))
    own = {path for path in groups() if path.name == f"tessera-{BAD}"}
    shim = json.loads((scene.directory / "replicas" / BAD / "lock").read_bytes())["pid"]
    os.kill(shim, signal.SIGKILL)
    await eventually(lambda: not is_held(scene.directory / "replicas" / BAD / "lock"))
    assert Path(f"/proc/{survivor}").exists()
    assert list(await launcher.adopt()) == [GOOD]
    await eventually(lambda: not Path(f"/proc/{survivor}").exists())
    assert own
    assert not own & groups()


async def test_groups_end_with_their_replica(scene: Scene) -> None:
    before = {path for path in groups() if path.name == f"tessera-{BAD}"}
    assert before
    await scene.attempt("second life")
    await scene.hostile.stop(1)
    assert not before & groups()


async def test_groups_of_a_replica_whose_starter_ended_half_way_are_removed(
    launcher: LocalLauncher, directory: Path
) -> None:
    found = cgroups.found(LIMITS)
    folder = directory / "replicas" / BAD
    folder.mkdir(parents=True)
    (folder / "lock").write_text(json.dumps({"model_pid": None, "cgroups": found.named(BAD)}))
    found.make(BAD)
    assert await launcher.adopt() == {}
    assert not any(Path(group).exists() for group in found.named(BAD))
