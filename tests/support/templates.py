"""A template that runs, for launchers of tests, and whether a replica was forked from one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from serving_service.launcher import model_environment
from serving_service.template import Template
from tests.support.eventually import eventually

SERVICE = {"PATH": "/usr/bin:/bin"}


@contextlib.asynccontextmanager
async def running_template() -> AsyncIterator[Template]:
    """A template that is ready; leaving ends it."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as directory:
        template = Template(model_environment({}, directory=Path(directory), service=SERVICE))
        running = asyncio.create_task(template.run())
        try:
            await eventually(lambda: template.suits(()), within=60, what="the template is ready")
            yield template
        finally:
            running.cancel()
            await asyncio.wait([running])


async def is_forked(directory: Path) -> bool:
    """Whether the replica of a directory was forked; else it is a program of its own."""
    await eventually(lambda: "pid" in json.loads((directory / "lock").read_bytes()), what="the shim has its identity")
    shim = json.loads((directory / "lock").read_bytes())["pid"]
    arguments = Path(f"/proc/{shim}/cmdline").read_bytes()
    assert b"shim" in arguments
    return b"-m serving_service.shim" in arguments


def pid_of(template: Template) -> int:
    """The process of a template that is ready."""
    assert template._life is not None
    return template._life.process.pid
