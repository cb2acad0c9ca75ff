"""Environments of models, built by the real uv out of wheels that are made here, without any network."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from serving_service.buildenv import BuildDelayed, BuildImpossible
from serving_service.helper_variables import HelperVariables
from serving_service.launcher import ModelPython
from serving_service.model_environments import EnvironmentLog, ModelEnvironments, Places
from tests.support.eventually import eventually
from tests.support.sockets import short_directory
from tests.support.wheels import index_variables, make_wheel, serving_index, variables_file

PASSWORD = "canary-of-the-index"
SECONDS = 120.0


@dataclass
class Workshop:
    """A folder with wheels, models and the environments made of them."""

    folder: Path
    used: set[str] = field(default_factory=set)
    """What replicas use."""

    @property
    def wheels(self) -> Path:
        return self.folder / "wheels"

    @property
    def places(self) -> Places:
        return Places.below(self.folder)

    def model(self, name: str, *requirements: str, python: str | None = None) -> Path:
        """The folder of a model that was logged with these requirements."""
        model = self.folder / "models" / name
        model.mkdir(parents=True)
        (model / "requirements.txt").write_text("\n".join(requirements))
        if python:
            (model / "python_env.yaml").write_text(f"python: {python}\ndependencies: [-r requirements.txt]\n")
        return model

    @contextlib.asynccontextmanager
    async def environments(
        self, variables: Mapping[str, str] | None = None, *, bound: int = 1 << 30
    ) -> AsyncIterator[ModelEnvironments]:
        """The environments of a service that runs; it takes packages from our wheels unless told otherwise."""
        variables = index_variables(self.wheels) if variables is None else variables
        file = variables_file(self.folder / "helpers.env", dict(variables))

        async def used() -> set[str]:
            return self.used

        found = ModelEnvironments(
            self.places,
            HelperVariables(file, service_environment=os.environ),
            bound=bound,
            used=used,
            runner=(),
        )
        task = asyncio.create_task(found.run())
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def built(self) -> set[str]:
        """The names of all environments, and of whatever else lies there."""
        folder = self.places.environments
        return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    with short_directory() as folder:
        make_wheel(folder / "wheels", "tiny", "1.0")
        yield Workshop(folder)


def output_of(python: ModelPython | None, *arguments: str) -> str:
    """What a program says that an environment's interpreter runs."""
    assert python is not None
    return subprocess.run(
        [python.executable, "-P", *arguments], env={}, capture_output=True, text=True, check=True
    ).stdout


def processes_below(folder: Path) -> list[psutil.Process]:
    """Everything that runs with a path of the folder among its arguments."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
    return found


@dataclass
class SilentIndex:
    """An index that takes every request and never answers; whoever waits for it does so for longer than any test."""

    listener: socket.socket

    @property
    def variables(self) -> dict[str, str]:
        """What leads to it."""
        address = f"http://user:{PASSWORD}@127.0.0.1:{self.listener.getsockname()[1]}/simple"
        return {"UV_DEFAULT_INDEX": address, "UV_HTTP_TIMEOUT": "3600"}

    def is_asked(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(select.select([self.listener], [], [], 0)[0])


@contextlib.contextmanager
def silent_index() -> Iterator[SilentIndex]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield SilentIndex(listener)


# --- which environment ----------------------------------------------------------------------------------------------


async def test_a_model_whose_needs_are_met_runs_in_the_services_own_environment(workshop: Workshop) -> None:
    said = EnvironmentLog()
    model = workshop.model("m", f"mlflow=={metadata.version('mlflow-skinny')}", "pandas", "numpy>1; python_version>'3'")
    async with workshop.environments() as environments:
        assert await environments.of(model, said) is None
    assert "nothing is built" in said.text()
    assert workshop.built() == set()


async def test_an_environment_has_what_was_asked_for_and_the_model_server_and_nothing_of_the_services(
    workshop: Workshop,
) -> None:
    said = EnvironmentLog()
    async with workshop.environments() as environments:
        python = await environments.of(workshop.model("m", "tiny==1.0"), said)
    assert output_of(python, "-c", "import tiny; print(tiny.VERSION)") == "1.0\n"
    assert python is not None
    assert "--report-fd" in output_of(python, str(python.program), "--help")
    program = "import importlib.util as i; print([i.find_spec(n) for n in ('grpc', 'servicekit', 'pandas')])"
    assert output_of(python, "-c", program) == "[None, None, None]\n"
    assert workshop.built() == {python.folder.parent.name}
    assert "tiny is not installed" in said.text()
    assert "+ tiny==1.0" in said.text()


async def test_who_runs_the_model_can_read_its_environment_and_nobody_but_us_can_write_it(workshop: Workshop) -> None:
    async with workshop.environments() as environments:
        python = await environments.of(workshop.model("m", "tiny"), EnvironmentLog())
    assert python is not None
    for path in (python.folder, *python.folder.rglob("*"), python.program, *python.program.rglob("*")):
        mode = path.stat().st_mode & 0o777
        assert mode & 0o022 == 0, path
        assert mode & 0o004, path
    assert workshop.places.environments.stat().st_mode & 0o777 == 0o700
    assert list(python.folder.rglob("tiny*.pyc"))


async def test_five_launches_at_a_time_build_once_and_a_later_one_needs_no_index(workshop: Workshop) -> None:
    models = [workshop.model(f"m{number}", "tiny") for number in range(5)]
    said = [EnvironmentLog() for _ in models]
    async with workshop.environments() as environments:
        async with asyncio.timeout(SECONDS):
            found = await asyncio.gather(*(environments.of(*each) for each in zip(models, said, strict=True)))
        assert len(set(found)) == 1
        assert len({log.text() for log in said}) == 1
        assert said[0].text().count("Building environment") == 1
        # A newer one does not matter either: the same needs lead to the same packages.
        make_wheel(workshop.wheels, "tiny", "2.0")
    with silent_index() as nowhere:
        async with workshop.environments(nowhere.variables) as environments, asyncio.timeout(SECONDS):
            later = EnvironmentLog()
            assert await environments.of(models[0], later) == found[0]
    assert "was built before" in later.text()
    assert "+ tiny==1.0" in later.text()


async def test_an_environment_is_built_again_without_an_index_when_its_packages_are_in_the_cache(
    workshop: Workshop,
) -> None:
    model = workshop.model("m", "tiny")
    with serving_index(workshop.wheels) as url:
        variables = {"UV_DEFAULT_INDEX": url, "UV_HTTP_RETRIES": "0"}
        async with workshop.environments(variables) as environments:
            python = await environments.of(model, EnvironmentLog())
    assert python is not None
    shutil.rmtree(python.folder.parent)
    async with workshop.environments(variables) as environments:
        assert await environments.of(model, EnvironmentLog()) == python
    assert output_of(python, "-c", "import tiny; print(tiny.VERSION)") == "1.0\n"


async def test_a_wheel_that_came_with_the_model_is_installed(workshop: Workshop) -> None:
    model = workshop.model("m", "code/private-3.0-py3-none-any.whl")
    make_wheel(model / "code", "private", "3.0", requires=["tiny"])
    async with workshop.environments() as environments:
        python = await environments.of(model, EnvironmentLog())
    assert output_of(python, "-c", "import private, tiny; print(private.VERSION, tiny.VERSION)") == "3.0 1.0\n"


async def test_nothing_of_a_package_runs_while_its_environment_is_built(workshop: Workshop) -> None:
    mark = workshop.folder / "mark"
    start = {"tiny.pth": f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"}
    make_wheel(workshop.wheels, "tiny", "1.0", files=start)
    async with workshop.environments() as environments:
        python = await environments.of(workshop.model("m", "tiny"), EnvironmentLog())
    assert not mark.exists()
    output_of(python, "-c", "")
    assert mark.exists()


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requirements", "cause"),
    [
        (["no-such-package==1.0"], "no-such-package was not found in the"),
        (["tiny==9"], "there is no version of tiny==9"),
        (["tiny==1.0", "greedy"], "all versions of greedy depend on tiny>=2"),
        (["raw"], "put a wheel into the index"),
    ],
)
async def test_what_cannot_be_installed_is_named_and_leaves_nothing(
    workshop: Workshop, requirements: list[str], cause: str
) -> None:
    make_wheel(workshop.wheels, "greedy", "1.0", requires=["tiny>=2"])
    with tarfile.open(workshop.wheels / "raw-1.0.tar.gz", "w:gz") as archive:
        for name in ("raw-1.0/PKG-INFO", "raw-1.0/setup.py"):
            content = b"Metadata-Version: 2.1\nName: raw\nVersion: 1.0\n" if "PKG" in name else b"raise SystemExit(1)\n"
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    said = EnvironmentLog()
    async with workshop.environments() as environments:
        with pytest.raises(BuildImpossible, match=cause):
            await environments.of(workshop.model("m", *requirements), said)
    assert requirements[-1] in said.text()
    assert workshop.built() == set()


async def test_an_index_that_is_not_there_delays_and_its_password_is_nowhere(workshop: Workshop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    variables = {
        "UV_DEFAULT_INDEX": f"http://user:{PASSWORD}@127.0.0.1:{port}/simple",
        "UV_HTTP_RETRIES": "0",
    }
    said = EnvironmentLog()
    async with workshop.environments(variables) as environments:
        with pytest.raises(BuildDelayed, match="cannot be reached just now") as caught:
            await environments.of(workshop.model("m", "tiny"), said)
    assert PASSWORD not in str(caught.value) + said.text()
    assert workshop.built() == set()


async def test_a_cause_holds_nothing_of_what_only_helpers_may_see(workshop: Workshop) -> None:
    variables = {"UV_OFFLINE": "1", "UV_FIND_LINKS": f"/nowhere/{PASSWORD}"}
    said = EnvironmentLog()
    async with workshop.environments(variables) as environments:
        with pytest.raises(BuildImpossible, match=r"`--find-links` directory: \[secret\]") as caught:
            await environments.of(workshop.model("m", "tiny"), said)
    assert PASSWORD not in str(caught.value) + said.text()


@pytest.mark.parametrize(("python", "cause"), [("3.9.1", "Python 3.9"), ("3.99.0", "Python 3.99, which is not")])
async def test_a_python_that_is_not_there_is_named_and_not_fetched(workshop: Workshop, python: str, cause: str) -> None:
    async with workshop.environments() as environments:
        with pytest.raises(BuildImpossible, match=cause):
            await environments.of(workshop.model("m", "tiny", python=python), EnvironmentLog())
    assert workshop.built() == set()


async def test_a_full_disk_is_the_cause_and_nothing_is_left(workshop: Workshop) -> None:
    make_wheel(workshop.wheels, "big", "1.0", files={"big_data.txt": "0123456789" * 50_000})
    async with workshop.environments(bound=200_000) as environments:
        with pytest.raises(BuildDelayed, match="disk that environments are kept on is full"):
            await environments.of(workshop.model("m", "big"), EnvironmentLog())
    assert workshop.built() == set()


# --- given up, killed, dropped --------------------------------------------------------------------------------------


async def test_a_build_ends_whole_when_the_last_who_waits_gives_up(workshop: Workshop) -> None:
    model = workshop.model("m", "tiny")
    with silent_index() as nowhere:
        async with workshop.environments(nowhere.variables) as environments:
            first, second = (asyncio.create_task(environments.of(model, EnvironmentLog())) for _ in range(2))
            await eventually(nowhere.is_asked)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert processes_below(workshop.folder)
            second.cancel()
            async with asyncio.timeout(SECONDS / 2):
                await asyncio.gather(second, return_exceptions=True)
            assert processes_below(workshop.folder) == []
            assert workshop.built() == set()


async def test_a_build_ends_with_its_service_and_its_log_can_be_read_meanwhile(workshop: Workshop) -> None:
    said = EnvironmentLog()
    with silent_index() as nowhere:
        async with workshop.environments(nowhere.variables) as environments:
            waiting = asyncio.create_task(environments.of(workshop.model("m", "tiny"), said))
            await eventually(lambda: "Resolving" in said.text() and bool(processes_below(workshop.folder)))
        await asyncio.gather(waiting, return_exceptions=True)
        assert processes_below(workshop.folder) == []
    assert workshop.built() == set()


_SERVICE = """
import asyncio, sys
from pathlib import Path
from tests.service.test_model_environments import Workshop, silent_index
from serving_service.model_environments import EnvironmentLog

async def main():
    workshop = Workshop(Path(sys.argv[1]))
    with silent_index() as nowhere:
        async with workshop.environments(nowhere.variables) as environments:
            await environments.of(Path(sys.argv[2]), EnvironmentLog())

asyncio.run(main())
"""


async def test_what_a_killed_service_was_building_ends_and_is_never_used(workshop: Workshop) -> None:
    model = workshop.model("m", "tiny")
    root = Path(__file__).parents[2]
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _SERVICE, str(workshop.folder), str(model)), cwd=root
    )
    try:
        await eventually(lambda: len(processes_below(workshop.folder)) > 1, within=60)
    finally:
        service.send_signal(signal.SIGKILL)
        await service.wait()
    await eventually(lambda: not processes_below(workshop.folder))
    (leftover,) = workshop.built()
    async with workshop.environments() as environments:
        await eventually(lambda: leftover not in workshop.built())
        python = await environments.of(model, EnvironmentLog())
    assert output_of(python, "-c", "import tiny; print(tiny.VERSION)") == "1.0\n"


async def test_what_was_not_used_for_longest_goes_first_and_never_what_is_used(workshop: Workshop) -> None:
    for name in ("first", "second", "third"):
        data = {f"{name}_data.txt": "a" * 5_000_000}
        make_wheel(workshop.wheels, name, "1.0", files=data)
    built: list[ModelPython] = []
    async with workshop.environments() as environments:
        for name in ("first", "second", "third"):
            python = await environments.of(workshop.model(name, name), EnvironmentLog())
            assert python is not None
            built.append(python)
            workshop.used.add(str(built[0].folder))
    assert {python.folder.parent.name for python in built} == workshop.built()
    assert workshop.places.packages.exists()
    async with workshop.environments(bound=12_000_000):
        await eventually(lambda: len(workshop.built()) == 2)
    # The packages, which only save time, and the oldest that nobody uses.
    assert {python.folder.parent.name for python in (built[0], built[2])} == workshop.built()
    assert not workshop.places.packages.exists()
