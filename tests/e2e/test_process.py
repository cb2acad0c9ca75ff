"""A service as a process: its settings, its signals, its pid file, its end; what it says when it cannot go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from servicekit import process
from tests.support.eventually import eventually
from tests.support.sockets import short_directory
from tests.support.tiny_service import CANARY

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with short_directory() as path:
        yield path / "data"


class Service:
    """The tiny service, running."""

    def __init__(self, data_dir: Path, process: subprocess.Popen[str], log: Path) -> None:
        self.pid_file = data_dir / "run" / "tiny.pid"
        self.process = process
        self._log = log

    def lines(self) -> list[dict[str, Any]]:
        """What it logged: every line of its standard error is one."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def says(self, event: str) -> bool:
        return any(line["event"] == event for line in self.lines())

    async def started(self) -> None:
        await eventually(lambda: self.says("started"), what="the service says that it started")

    def status(self, within: float = 10) -> int:
        return self.process.wait(within)


@contextmanager
def service(data_dir: Path, manner: str = "good", flag: str = "-I", **environ: str) -> Iterator[Service]:
    data_dir.parent.mkdir(exist_ok=True)
    log = data_dir.parent / "log"
    environment = {
        "PATH": os.environ["PATH"],
        "TESSERA_DATA_DIR": str(data_dir),
        "TINY_MANNER": manner,
    } | environ
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, flag, "-m", "tests.support.tiny_service"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            text=True,
        )
    try:
        yield Service(data_dir, process, log)
    finally:
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-m", "tests.support.tiny_service", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environ,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_help_lists_the_settings() -> None:
    shown = run("--help", TINY_PLACES="not looked at")
    assert shown.returncode == 0
    assert "A service for tests." in shown.stdout
    for variable in ("TINY_MANNER  (default: good)", "TESSERA_DATA_DIR  (default: /nonexistent/", "TESSERA_SUPERVISED"):
        assert variable in shown.stdout


def test_wrong_settings_are_said_one_to_a_line_and_end_the_process_with_status_2() -> None:
    ended = run(TINY_PLACES="many", TINY_MANNER="odd", TESSERA_LOG_LEVEL="loud")
    assert ended.returncode == 2
    assert sorted(line.split()[:2] for line in ended.stderr.splitlines()) == [
        ["tiny_service:", "TESSERA_LOG_LEVEL"],
        ["tiny_service:", "TINY_MANNER"],
        ["tiny_service:", "TINY_PLACES"],
    ]


@pytest.mark.parametrize("variable", process.DEBUGGING)
def test_debugging_aid_that_would_tell_is_refused(variable: str) -> None:
    ended = run(**{variable: "debug"}, TINY_PLACES="many")
    assert ended.returncode == 2
    assert f"tiny_service: {variable} " in ended.stderr
    assert "TINY_PLACES" not in ended.stderr


@pytest.mark.parametrize("flag", ["-I", "-P"])
async def test_variables_that_the_interpreter_would_heed_are_dropped_and_named(data_dir: Path, flag: str) -> None:
    """However it is started: whoever forgets the isolated mode has the service start itself again."""
    shadows = data_dir.parent / "shadows"
    shadows.mkdir(parents=True)
    (shadows / "sitecustomize.py").write_text("import tracemalloc; tracemalloc.start()")
    variables = (
        "ASYNCIODEBUG",
        "BREAKPOINT",
        "DEVMODE",
        "DUMPREFS",
        "FAULTHANDLER",
        "INSPECT",
        "STARTUP",
        "TRACEMALLOC",
    )
    dropped = {f"PYTHON{variable}": "1" for variable in variables}
    dropped |= {"PYTHONPATH": str(shadows), "SSLKEYLOGFILE": str(data_dir.parent / "keys")}
    if flag == "-I":  # otherwise they print, or are the end of an interpreter that is not ours yet
        dropped |= dict.fromkeys(("PYTHONHOME", "PYTHONMALLOCSTATS", "PYTHONPROFILEIMPORTTIME", "PYTHONVERBOSE"), "1")
    with service(data_dir, "telling", flag=flag, **dropped, PYTHON_VERSION="of an image") as tiny:
        await tiny.started()
        (warning,) = (line for line in tiny.lines() if line["event"] == "variables are ignored")
        assert warning["variables"] == sorted(dropped)
        (seen,) = (line for line in tiny.lines() if line["event"] == "interpreter")
        assert (seen["is_isolated"], seen["aids"]) == (True, [])
        assert not {str(shadows), ""} & set(seen["path"])
        assert set(seen["variables"]) - {"LC_CTYPE"} == {"PATH", "TESSERA_DATA_DIR", "TINY_MANNER"}
        tiny.process.terminate()
        assert tiny.status() == 0
    assert not (data_dir.parent / "keys").exists()


def test_unknown_argument_is_refused() -> None:
    assert run("--places=3").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_process_in_order(data_dir: Path, number: signal.Signals) -> None:
    with service(data_dir) as tiny:
        await tiny.started()
        assert tiny.pid_file.read_text() == f"{tiny.process.pid}\n"
        assert stat.S_IMODE(tiny.pid_file.stat().st_mode) == 0o600
        tiny.process.send_signal(number)
        assert tiny.status() == 0
        assert [line["event"] for line in tiny.lines()] == ["started", "stopping", "stopped"]
        assert not tiny.pid_file.exists()


async def test_second_signal_ends_a_process_that_hangs_at_once(data_dir: Path) -> None:
    with service(data_dir, "hangs-when-stopped") as tiny:
        await tiny.started()
        tiny.process.terminate()
        await eventually(lambda: tiny.says("stopping"))
        assert tiny.process.poll() is None
        tiny.process.terminate()
        assert tiny.status(within=10) == 128 + signal.SIGTERM


async def test_service_ends_in_order_when_its_supervisor_is_gone(data_dir: Path) -> None:
    with service(data_dir, TESSERA_SUPERVISED="true") as tiny:
        await tiny.started()
        assert tiny.process.stdin is not None
        tiny.process.stdin.close()
        assert tiny.status(within=10) == 0
        assert [line["event"] for line in tiny.lines()][1:] == ["the supervisor is gone", "stopping", "stopped"]
        assert not tiny.pid_file.exists()


@pytest.mark.parametrize("manner", ["hangs-when-stopped", "blocks-when-stopped", "blocked"])
async def test_service_without_a_supervisor_ends_within_five_seconds_whatever_hangs(
    data_dir: Path, manner: str
) -> None:
    with service(data_dir, manner, TESSERA_SUPERVISED="true") as tiny:
        await tiny.started()
        await eventually(lambda: manner != "blocked" or tiny.says("blocked"))
        assert tiny.process.stdin is not None
        gone = time.monotonic()
        tiny.process.stdin.close()
        assert tiny.status() == 1
        assert time.monotonic() - gone < 5


async def test_service_that_is_not_supervised_does_not_mind_its_input(data_dir: Path) -> None:
    with service(data_dir) as tiny:
        await tiny.started()
        assert tiny.process.stdin is not None
        tiny.process.stdin.close()
        tiny.process.terminate()
        assert tiny.status() == 0
        assert not tiny.says("the supervisor is gone")


@pytest.mark.parametrize("manner", ["dying-job", "ending-job", "cancelled-job"])
async def test_background_job_that_ends_takes_the_process_with_it(data_dir: Path, manner: str) -> None:
    with service(data_dir, manner) as tiny:
        assert tiny.status() == 1
        (line,) = [line for line in tiny.lines() if line["level"] == "critical"]
        assert (line["event"], line["job"]) == ("background job died", "work")
        assert ("ValueError" in line.get("exception", "")) == (manner == "dying-job")
        assert CANARY not in json.dumps(tiny.lines())
        assert not tiny.pid_file.exists()


async def test_job_that_returns_when_it_is_cancelled_has_not_died(data_dir: Path) -> None:
    with service(data_dir, "obliging-job") as tiny:
        await tiny.started()
        tiny.process.terminate()
        assert tiny.status() == 0


async def test_service_that_cannot_start_says_why_in_one_line(data_dir: Path) -> None:
    with service(data_dir, "cannot-start") as tiny:
        assert tiny.status() == 1
        (line,) = tiny.lines()
        assert (line["level"], line["event"]) == ("error", "cannot start")
        assert line["cause"] == "The shop is closed. Open it first."


async def test_service_that_crashes_says_where_in_one_line_without_the_text(data_dir: Path) -> None:
    with service(data_dir, "crashes") as tiny:
        assert tiny.status() == 1
        (line,) = tiny.lines()
        assert (line["level"], line["event"]) == ("critical", "failed")
        assert line["exception"].startswith("ValueError < ")
        assert CANARY not in json.dumps(line)
