"""Load from programs that cost little: h2load for gRPC, wrk for HTTP, never from Python.

Each load is preceded by a short one that is not counted. Both programs run on the load core.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles

from tests.bench import programs
from tests.bench.run import Run

PACKAGES = {"h2load": "nghttp2-client", "wrk": "wrk", "taskset": "util-linux"}
"""The programs, and the Debian packages that they are in."""

_WARM_UP_SECONDS = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one load went."""

    requests: int
    rps: float
    p50_ms: float
    p99_ms: float
    fails: int
    """Answers that were not the expected ones, and requests without an answer."""
    front_us: float = 0.0
    """Processor time of the process under measurement for one request, in microseconds."""
    foreign_percent: float = 0.0
    """How much of the machine was used by processes that take no part."""


@dataclass(frozen=True, kw_only=True)
class Grpc:
    """Unary calls of one method with one message; `answer_bytes` is the length of the answer's message."""

    address: str
    method: str
    message: bytes
    answer_bytes: int
    authorization: str = field(repr=False)
    connections: int
    streams: int

    def run(self, seconds: int, directory: Path) -> Result:
        """Calls for so many seconds."""
        body, log = directory / "h2load.bin", directory / "h2load.log"
        body.write_bytes(struct.pack(">?I", False, len(self.message)) + self.message)
        log.unlink(missing_ok=True)
        # h2load takes headers as arguments only: whoever calls this uses a token that dies with the benchmark.
        headers = ["content-type: application/grpc", "te: trailers", f"authorization: {self.authorization}"]
        text = _output(
            [
                *["h2load", "-t", "1", "-c", str(self.connections), "-m", str(self.streams), "-D", str(seconds)],
                *["-d", str(body), "--log-file", str(log)],
                *[word for header in headers for word in ("-H", header)],
                f"http://{self.address}{self.method}",
            ],
            os.environ,
        )
        return self.result(text, log, seconds)

    def result(self, text: str, log: Path, seconds: int) -> Result:
        """What h2load says in its summary and in its log of single calls."""
        done, failed, errored, timed_out = map(
            int, _found(r"(\d+) done, \d+ succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", text)
        )
        # An error of gRPC is an HTTP 200 without a message, so that the bytes tell what the status does not.
        data = int(_found(r"\((\d+)\) data", text)[0])
        answers = data // (self.answer_bytes + 5)
        times = [int(line.split("\t")[2]) / 1000 for line in log.read_text().splitlines()]
        cuts = quantiles(times, n=100)
        return Result(
            requests=done,
            rps=done / seconds,
            p50_ms=cuts[49],
            p99_ms=cuts[98],
            fails=failed + errored + timed_out + max(0, done - answers),
        )


@dataclass(frozen=True, kw_only=True)
class Http:
    """One request over keep-alive connections; a `body` makes it a POST."""

    url: str
    authorization: str = field(repr=False)
    connections: int
    body: str | None = None

    def run(self, seconds: int, directory: Path) -> Result:
        """Sends for so many seconds."""
        script = Path(__file__).parent / "request.lua"
        environment = {
            **os.environ,
            "BENCH_METHOD": "GET" if self.body is None else "POST",
            "BENCH_BODY": self.body or "",
            "BENCH_AUTHORIZATION": self.authorization,
        }
        command = ["wrk", "-t", "1", "-c", str(self.connections), "-d", f"{seconds}s", "-s", str(script), self.url]
        facts = json.loads(_output(command, environment).splitlines()[-1])
        return Result(
            requests=facts["requests"],
            rps=facts["requests"] / facts["seconds"],
            p50_ms=facts["p50"],
            p99_ms=facts["p99"],
            fails=facts["fails"],
        )


@dataclass(frozen=True)
class Subject:
    """What is measured: one process with its descendants, and those that work behind it."""

    pid: int
    behind: Sequence[int] = ()
    is_beside_load: bool = False
    """Whether it shares the core of the load, as it does when another subject has it behind itself."""
    is_pinned: bool = True
    """Whether what takes part keeps to one core each; if not, the machine places it."""


def measured(load: Grpc | Http, subject: Subject, run: Run) -> Result:
    """One load, with what it cost the subject."""

    def once() -> tuple[Result, float]:
        others = programs.Bystanders([subject.pid, *subject.behind])
        before = programs.cpu_seconds([subject.pid])
        result = load.run(run.seconds, run.directory)
        used = programs.cpu_seconds([subject.pid]) - before
        return replace(result, front_us=used / max(result.requests, 1) * 1e6), others.percent()

    front = [] if subject.is_beside_load else [subject.pid]
    beside = [subject.pid, *subject.behind] if subject.is_beside_load else subject.behind
    with programs.pinned(front, beside) if subject.is_pinned else nullcontext():
        load.run(_WARM_UP_SECONDS, run.directory)
        result, foreign = programs.undisturbed(once, run.patience)
    return replace(result, foreign_percent=foreign)


def require_programs() -> None:
    """Ends with status 2, saying what to install, when a program is missing."""
    missing = [name for name in PACKAGES if shutil.which(name) is None]
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        sys.stderr.write(f"{', '.join(missing)} not found; on Debian: apt install {packages}\n")
        sys.exit(2)


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    pinned = ["taskset", "-c", str(programs.LOAD_CORE), *command]
    return subprocess.run(pinned, capture_output=True, text=True, check=True, env=environment).stdout


def _found(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"a load program said something else than expected:\n{text}")
    return found.groups()
