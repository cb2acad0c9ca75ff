"""The command line in this process, against a platform that may be in this process too."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from unittest import mock

from tessera.cli.__main__ import main


@dataclass
class Ran:
    """A command that runs or ran."""

    output: io.StringIO = field(default_factory=io.StringIO)
    errors: io.StringIO = field(default_factory=io.StringIO)
    status: int | None = None

    @property
    def said(self) -> str:
        """What it has printed."""
        return self.output.getvalue()

    @property
    def complained(self) -> str:
        """What it has printed to standard error."""
        return self.errors.getvalue()


async def tessera(environment: Mapping[str, str], *arguments: str) -> Ran:
    """Runs one command to its end; one at a time, because what a process prints to is the same for all."""
    async with running(environment, *arguments) as ran:
        pass
    return ran


@asynccontextmanager
async def running(environment: Mapping[str, str], *arguments: str) -> AsyncIterator[Ran]:
    """Runs one command meanwhile, and waits for its end."""
    ran = Ran()

    def run() -> None:
        try:
            ran.status = main(arguments)
        except SystemExit as end:  # of the parser of arguments
            ran.status = end.code if isinstance(end.code, int) else 1

    variables = {name: value for name, value in os.environ.items() if not name.startswith("DATABRICKS_")}
    with (
        mock.patch.dict(os.environ, {**variables, **environment}, clear=True),
        contextlib.redirect_stdout(ran.output),
        contextlib.redirect_stderr(ran.errors),
    ):
        ended = asyncio.create_task(asyncio.to_thread(run))
        try:
            yield ran
        finally:
            await ended


def login(url: str, token: str) -> dict[str, str]:
    """The variables that name a platform and who asks."""
    return {"DATABRICKS_HOST": url, "DATABRICKS_TOKEN": token}
