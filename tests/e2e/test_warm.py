"""Replicas that are forked from the template: the same as those that are programs of their own, but sooner there.

What holds a forked model in is proved in `test_isolation`, beside the programs.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from serving_service import template as templates
from serving_service.launcher import Launch, LaunchError, LocalLauncher, LocalReplica, Observation, ReplicaState
from serving_service.template import Template
from tests.support import model_servers
from tests.support.eventually import eventually
from tests.support.mlflow_models import fingerprint, model_of, save_model
from tests.support.model_servers import answer, found_by
from tests.support.templates import SERVICE, is_forked, pid_of, running_template

SECRET = "sk-0123456789-abcdefghij"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
async def template() -> AsyncIterator[Template]:
    async with running_template() as template:
        yield template


@pytest.fixture(autouse=True)
async def ready_template(template: Template) -> None:
    """Some of these tests end it."""
    await eventually(lambda: template.suits(()), within=60, what="the template is ready")


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is one of the little programs; the variable MANNER says which."""
    return model_of(Path(model_servers.__file__), tmp_path_factory.mktemp("programs"))


@pytest.fixture
async def launcher(directory: Path, template: Template) -> AsyncIterator[LocalLauncher]:
    launcher = a_launcher(directory, template)
    yield launcher
    for replica in (await launcher.adopt()).values():
        await replica.stop(0)


def a_launcher(directory: Path, template: Template | None) -> LocalLauncher:
    return LocalLauncher(directory / "replicas", None, service_environment=SERVICE, template=template)


def a_launch(model: Path, manner: str = "ready", replica_id: str = "r1", **environment: str) -> Launch:
    return Launch(
        replica_id=replica_id,
        model_path=model,
        environment={"MANNER": manner, **environment},
        masked_values=(SECRET,),
    )


async def ready(replica: LocalReplica) -> Observation:
    async with asyncio.timeout(60):
        seen = await replica.wait(ReplicaState.STARTING)
    assert seen.state == ReplicaState.READY, (seen, await replica.logs(2_000))
    return seen


async def stopped(replica: LocalReplica) -> Observation:
    async with asyncio.timeout(60):
        seen = await replica.state()
        while seen.state != ReplicaState.STOPPED:
            seen = await replica.wait(seen.state)
    return seen


# --- what a forked model is started with ----------------------------------------------------------------------------


async def test_a_forked_model_is_started_with_exactly_what_one_that_is_executed_is(
    launcher: LocalLauncher, directory: Path, programs: Path
) -> None:
    variables = {"OPENAI_API_KEY": SECRET, "EMPTY": "", "NAME": "ü \n"}
    found = {}
    for way, starter in (("forked", launcher), ("executed", a_launcher(directory, None))):
        replica = await starter.start(a_launch(programs, **variables))
        seen = await ready(replica)
        assert (await is_forked(directory / "replicas" / "r1")) == (way == "forked")
        found[way] = await found_by(replica.address)
        assert found[way].pop("pid") == seen.pid
        found[way]["command line"] = psutil.Process(seen.pid).cmdline()
        found[way]["files of its own in /proc"] = Path(f"/proc/{seen.pid}/environ").stat().st_uid
        await replica.stop(5)
    # MLflow makes this when it is imported.
    sessions = {each["environment"].pop("_MLFLOW_TELEMETRY_SESSION_ID") for each in found.values()}
    assert len(sessions) == 2
    for key in found["executed"]:  # one by one, so that a difference is shown
        assert found["forked"][key] == found["executed"][key], key
    assert found["forked"].keys() == found["executed"].keys()
    assert {name: found["forked"]["environment"][name] for name in variables} == variables
    assert found["forked"]["fds"] == [0, 1, 2, 3, 4]


async def test_a_forked_model_and_its_shim_show_no_variable_and_keep_nothing_of_the_template(
    launcher: LocalLauncher, directory: Path, programs: Path, template: Template
) -> None:
    model = (await ready(await launcher.start(a_launch(programs, OPENAI_API_KEY=SECRET)))).pid
    assert model is not None
    shim = psutil.Process(json.loads((directory / "replicas" / "r1" / "lock").read_bytes())["pid"])
    assert psutil.Process(model).ppid() == shim.pid
    assert not {os.getpid(), pid_of(template)} & {parent.pid for parent in shim.parents()}
    assert os.getsid(shim.pid) == shim.pid
    for pid in (shim.pid, model, pid_of(template)):
        for file in ("environ", "cmdline"):
            assert SECRET.encode() not in Path(f"/proc/{pid}/{file}").read_bytes()
    kept = {str(path.readlink()) for path in Path(f"/proc/{shim.pid}/fd").iterdir()}
    assert {entry for entry in kept if not entry.startswith(("socket:", "pipe:"))} == {
        "/dev/null",
        str(directory / "replicas" / "r1" / "lock"),
    }


async def test_no_two_forked_models_draw_the_same_numbers(launcher: LocalLauncher, programs: Path) -> None:
    drawn = []
    for name in ("r1", "r2"):
        replica = await launcher.start(a_launch(programs, "drawing", name))
        await ready(replica)
        drawn.append((await found_by(replica.address))["drawn"])
    assert drawn[0].keys() == {"random", "numpy", "ssl", "uuid1", "uuid4", "file"}
    assert [name for name in drawn[0] if drawn[0][name] == drawn[1][name]] == []


async def test_a_variable_that_is_read_at_the_start_is_honoured_by_a_start(
    launcher: LocalLauncher, directory: Path, programs: Path
) -> None:
    await launcher.start(a_launch(programs, TZ="Asia/Tokyo"))
    assert not await is_forked(directory / "replicas" / "r1")


async def test_a_model_with_gpus_is_executed_and_one_without_is_forked_and_sees_none(
    launcher: LocalLauncher, directory: Path, programs: Path
) -> None:
    for gpus, is_expected in (((), True), (("GPU-1", "GPU-2"), False)):
        name = f"r{len(gpus)}"
        replica = await launcher.start(dataclasses.replace(a_launch(programs, replica_id=name), gpus=gpus))
        await ready(replica)
        assert await is_forked(directory / "replicas" / name) == is_expected
        assert (await found_by(replica.address))["environment"]["CUDA_VISIBLE_DEVICES"] == ",".join(gpus)


# --- what reaches the shim ------------------------------------------------------------------------------------------


async def test_a_real_model_answers_prints_and_ends_in_good_order(
    launcher: LocalLauncher, directory: Path, tmp_path: Path
) -> None:
    replica = await launcher.start(a_launch(save_model(tmp_path), OPENAI_API_KEY=SECRET))
    await ready(replica)
    assert await is_forked(directory / "replicas" / "r1")
    body = json.dumps({"dataframe_records": [{"name": "OPENAI_API_KEY"}]}).encode()
    status, _, content = await answer(replica.address, path="/invocations", body=body)
    assert (status, json.loads(content)) == (200, {"predictions": [fingerprint(SECRET)]})
    assert "loaded with [secret]\n" in await replica.logs(100_000)
    await replica.stop(10, dismiss=False)
    assert (await replica.state()).exit_code == 0


async def test_a_model_that_cannot_be_loaded_says_why(launcher: LocalLauncher, directory: Path) -> None:
    replica = await launcher.start(a_launch(directory / "nothing"))
    seen = await stopped(replica)
    assert await is_forked(directory / "replicas" / "r1")
    assert "nothing" in seen.cause
    assert seen.exit_code == 1


async def test_the_exit_status_and_the_signal_that_ended_a_forked_model_are_known(
    launcher: LocalLauncher, programs: Path
) -> None:
    dying = await launcher.start(a_launch(programs, "ready", "r1"))
    await ready(dying)
    with contextlib.suppress(ConnectionError, IndexError):
        await answer(dying.address, path="/die")
    assert (await stopped(dying)).exit_code == 7
    killed = await launcher.start(a_launch(programs, "ready", "r2"))
    pid = (await ready(killed)).pid
    assert pid is not None
    os.kill(pid, signal.SIGSEGV)
    assert (await stopped(killed)).cause == "the model server was ended by SIGSEGV"


async def test_what_a_model_forked_away_ends_with_it(launcher: LocalLauncher, programs: Path) -> None:
    replica = await launcher.start(a_launch(programs, "forking"))
    await ready(replica)
    daemon = (await found_by(replica.address))["daemon"]
    assert psutil.pid_exists(daemon)
    await replica.stop(5)
    assert not psutil.pid_exists(daemon)


async def test_many_at_once_are_themselves_and_leave_nothing_with_the_template(
    launcher: LocalLauncher, directory: Path, programs: Path, template: Template
) -> None:
    names = [f"r{number}" for number in range(12)]
    replicas = await asyncio.gather(*(launcher.start(a_launch(programs, "ready", name, NAME=name)) for name in names))
    await asyncio.gather(*map(ready, replicas))
    assert all([await is_forked(directory / "replicas" / name) for name in names])
    found = await asyncio.gather(*(found_by(replica.address) for replica in replicas))
    assert [each["environment"]["NAME"] for each in found] == names
    await asyncio.gather(*(replica.stop(5) for replica in replicas))
    process = psutil.Process(pid_of(template))
    assert (process.children(recursive=True), process.num_fds(), process.num_threads()) == ([], 3, 1)
    assert process.rlimit(psutil.RLIMIT_CORE) == (1, 1)
    assert list((directory / "replicas").iterdir()) == []


# --- the template comes and goes ------------------------------------------------------------------------------------


async def test_a_killed_template_is_missed_by_nobody_and_comes_back(
    launcher: LocalLauncher, directory: Path, programs: Path, template: Template
) -> None:
    before = await launcher.start(a_launch(programs, "ready", "before"))
    first = await ready(before)
    killed = pid_of(template)
    os.kill(killed, signal.SIGKILL)
    await launcher.start(a_launch(programs, "ready", "meanwhile"))
    assert not await is_forked(directory / "replicas" / "meanwhile")
    assert await before.state() == first
    assert (await found_by(before.address))["pid"] == first.pid
    await eventually(lambda: template.suits(()) and pid_of(template) != killed, within=60)
    after = await launcher.start(a_launch(programs, "ready", "after"))
    await ready(after)
    assert await is_forked(directory / "replicas" / "after")
    found = await a_launcher(directory, None).adopt()
    assert sorted(found) == ["after", "before", "meanwhile"]
    assert await found["before"].state() == first


async def test_a_template_that_does_nothing_is_ended_and_replaced_by_a_program(
    launcher: LocalLauncher, directory: Path, programs: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_ANSWER_SECONDS", 0.5)
    paused = pid_of(template)
    os.kill(paused, signal.SIGSTOP)
    replica = await launcher.start(a_launch(programs))
    assert not await is_forked(directory / "replicas" / "r1")
    assert (await replica.state()).state == ReplicaState.STARTING
    assert not psutil.pid_exists(paused)


async def test_what_is_in_the_way_of_a_forked_shim_is_said_and_nothing_is_left(
    directory: Path, programs: Path, template: Template
) -> None:
    deep = directory / ("d" * 100)
    with pytest.raises(LaunchError, match="too long"):
        await a_launcher(deep, template).start(a_launch(programs))
    assert list((deep / "replicas").iterdir()) == []
    assert template.suits(())


KEEPER = """
import asyncio, sys
from tests.support.templates import pid_of, running_template

async def main():
    async with running_template() as template:
        print(pid_of(template), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_template_ends_with_the_process_that_keeps_it_however_that_ends() -> None:
    keeper = await asyncio.create_subprocess_exec(sys.executable, "-c", KEEPER, stdout=subprocess.PIPE, cwd=ROOT)
    assert keeper.stdout is not None
    kept = psutil.Process(int(await keeper.stdout.readline()))
    keeper.kill()
    await keeper.wait()
    await eventually(lambda: _has_ended(kept))


def _has_ended(process: psutil.Process) -> bool:
    """What has ended and only waits for init to look at it has ended, too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


async def test_a_template_that_is_of_no_use_says_why_and_is_not_used(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "uvicorn.py").write_text("raise ImportError('the wheel is broken')")
    template = Template({**SERVICE, "HOME": "/", "TMPDIR": "/", "PYTHONPATH": str(directory)})
    running = asyncio.create_task(template.run())
    await eventually(lambda: any("the wheel is broken" in str(vars(each)) for each in caplog.records), within=30)
    assert not template.suits(())
    running.cancel()
    await asyncio.wait([running])
