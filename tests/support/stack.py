"""A whole platform as its users run it: `tessera up` with real processes, on free ports and a directory of its own.

Everything is read from what `tessera up` prints. If it does not get ready, or the test fails, its logs are shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import processes

READY_SECONDS = 60.0
STOP_SECONDS = 12.0

# What of this process's own environment could point a stack somewhere else.
_FOREIGN = ("TESSERA_", "MLFLOW_", "DATABRICKS_")
_SHOWN_LINES = 60

UNHURRIED = {"TESSERA_CHANGES_PER_SECOND": "0", "TESSERA_ENDPOINT_CHANGES_PER_5_MINUTES": "0"}
"""Tests are one user who does in a minute what people do in a day."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A platform that runs, or ran."""

    data_dir: Path
    process: subprocess.Popen[bytes]
    output_file: Path
    url: str
    secrets_address: str
    serving_address: str
    registry_uri: str
    token: str = field(repr=False)

    def pids(self) -> dict[str, int]:
        """The process number of each service that runs now, by short name."""
        found = {}
        for name in ("secrets", "serving", "gateway"):
            with contextlib.suppress(OSError, ValueError):
                found[name] = int((self.data_dir / "run" / f"{name}.pid").read_text())
        return found

    def processes(self) -> dict[int, str]:
        """Every process that belongs to the data directory, replicas included."""
        return processes.of_directory(self.data_dir)

    def output(self) -> str:
        """What `tessera up` printed so far."""
        return self.output_file.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends `tessera up` by a signal and returns its exit status; does nothing when it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


@contextlib.contextmanager
def running_stack(
    tmp: Path | None = None, *, arguments: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Stack]:
    """Runs `tessera up` on the data directory `tmp`, which is kept; or on one of its own, which is removed.

    `arguments` are more of the command's own, `environment` adds variables. Leaving stops it by its process number.
    """
    directory = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp")) if tmp is None else tmp
    try:
        with _running(directory, arguments, environment or {}) as stack:
            yield stack
    finally:
        if tmp is None:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _running(directory: Path, arguments: tuple[str, ...], environment: Mapping[str, str]) -> Iterator[Stack]:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    output = directory / "up.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command(directory), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**clean_environment(), **UNHURRIED, **environment},
            start_new_session=True,
        )
    try:
        yield _ready(directory, process, output)
    except BaseException:
        _show(directory, output)
        raise
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def command(directory: Path) -> list[str]:
    """`tessera up` on a directory and on free ports."""
    ports = ["--port", "0", "--secrets-port", "0", "--serving-port", "0"]
    return [sys.executable, "-P", "-m", "tessera.cli", "up", "--data-dir", str(directory), *ports]


def clean_environment() -> dict[str, str]:
    """This process's environment without what is said about another platform."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}


def _ready(directory: Path, process: subprocess.Popen[bytes], output: Path) -> Stack:
    deadline = time.monotonic() + READY_SECONDS
    while "\nCtrl-C stops everything.\n" not in (text := output.read_text()):
        if process.poll() is not None:
            raise AssertionError(f"tessera up ended with status {process.returncode} instead of getting ready")
        if time.monotonic() > deadline:
            raise AssertionError(f"tessera up was not ready after {READY_SECONDS:.0f} s")
        time.sleep(0.02)
    return Stack(
        data_dir=directory,
        process=process,
        output_file=output,
        url=_named("REST", text),
        secrets_address=_named(r"Secrets \(gRPC\)", text),
        serving_address=_named(r"Serving \(gRPC\)", text),
        registry_uri=_named("Model registry", text),
        token=Path(_named("Token", text)).read_text().strip(),
    )


def _named(name: str, text: str) -> str:
    found = re.search(rf"^  {name} +(\S+)$", text, re.MULTILINE)
    assert found, f"tessera up does not say where {name} is"
    return found[1]


def _show(directory: Path, output: Path) -> None:
    for file in (output, *sorted((directory / "run").glob("*.log"))):
        lines = file.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        sys.stderr.write("\n".join([f"--- {file.name}", *lines, ""]))
