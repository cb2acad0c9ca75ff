"""Starts of Secrets that are to be refused, as processes, many at the same time.

`python -I tests/support/starts.py DIRECTORY ...` imports the service once, forks it anew for each data directory, has
it do there what `python -I -m secrets_service` does, and prints how each ended: a list of exit statuses, -14 for one
that went on. What it logged is in `DIRECTORY.log`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secrets_service.app import running
from secrets_service.settings import SecretsSettings
from servicekit import process

SECONDS = 60
"""How long a start may go on that is not refused."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a start ended."""

    status: int
    log: list[dict[str, Any]]


async def tried(directories: Mapping[str, Path]) -> dict[str, Ended]:
    """Starts Secrets on each data directory, and how each start ended, by the same names."""
    command = [sys.executable, "-I", __file__, *map(str, directories.values())]
    starting = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    told, _ = await starting.communicate()
    statuses = json.loads(told)
    return {
        name: Ended(status=status, log=[json.loads(line) for line in _log(directory).read_text().splitlines()])
        for (name, directory), status in zip(directories.items(), statuses, strict=True)
    }


def _log(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.log")


def _start(directory: Path) -> int:
    os.environ.clear()
    os.environ.update(TESSERA_DATA_DIR=str(directory), TESSERA_SECRETS_LISTEN="127.0.0.1:0")
    sys.argv[1:] = []
    os.dup2(os.open(_log(directory), os.O_WRONLY | os.O_CREAT, 0o600), 2)
    signal.alarm(SECONDS)
    return process.run("secrets_service", "", SecretsSettings, running)


def _forked(directory: Path) -> int:
    if child := os.fork():
        return child
    status = 99  # of none of ours
    try:
        status = _start(directory)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    children = [_forked(Path(argument)) for argument in sys.argv[1:]]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))  # noqa: T201
