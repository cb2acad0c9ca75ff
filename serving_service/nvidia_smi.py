"""The door to the driver of the GPUs: NVIDIA's own program, which comes with it, asked which there are and how busy.

A program, and not the driver's library, because a driver that hangs takes along whoever has called it. Of its output
only the table of named fields is used, which NVIDIA has kept the same from release to release. Nothing here waits for
the program longer than a few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving_service.gpus import Machine

log = logging.getLogger(__name__)

PROGRAM = "nvidia-smi"
ANSWER_SECONDS = 15.0
"""A driver that was not used for a while initialises every GPU first."""

_END_SECONDS = 1.0
_LINE_LENGTH = 300


class DriverError(Exception):
    """The driver does not say what it was asked; the message says what it says instead."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy one GPU is, 0 to 1; None where the driver does not know."""

    use: float | None
    """The share of the last moment in which anything ran on it."""
    memory: float | None


def program(path: str | None) -> Path | None:
    """NVIDIA's program in a search path; None when it is not there, as where there is no driver."""
    found = shutil.which(PROGRAM, path=path or os.defpath)
    return None if found is None else Path(found).absolute()


async def machine(asked: Path | None, wanted: Collection[str] | None) -> Machine:
    """What there is of GPUs here; `wanted` are the UUIDs of those that may be given away, None: all of them.

    Says in the log what there is, and what is not right. A GPU that is divided (MIG) is not given away.
    """
    if asked is None:
        return Machine()
    if wanted is not None and not wanted:
        log.info("no gpus are given to models, as TESSERA_GPUS says")
        return Machine(has_driver=True)
    try:
        rows = await _table(asked, "uuid", "name", "mig.mode.current")
    except DriverError as error:
        log.warning("gpus cannot be used", extra={"cause": str(error)})
        return Machine(has_driver=True)
    there = {row["uuid"]: row["name"] for row in rows if row["mig.mode.current"] != "Enabled"}
    divided = [row["uuid"] for row in rows if row["uuid"] not in there]
    missing = sorted(set(wanted or ()) - there.keys())
    if divided or missing:
        log.warning("some gpus are not given to models", extra={"divided": divided, "not_there": missing})
    devices = {uuid: name for uuid, name in there.items() if wanted is None or uuid in wanted}
    log.info("gpus found", extra={"gpus": devices})
    return Machine(has_driver=True, devices=tuple(devices))


async def loads(asked: Path) -> Mapping[str, Load]:
    """How busy each GPU is, by UUID; raises DriverError."""
    rows = await _table(asked, "uuid", "utilization.gpu", "memory.used", "memory.total")
    return {
        row["uuid"]: Load(
            _share(row["utilization.gpu"], "100"),
            _share(row["memory.used"], row["memory.total"]),
        )
        for row in rows
    }


def _share(part: str, whole: str) -> float | None:
    """A part of a whole; None where one of them is no number, such as `[N/A]`."""
    try:
        return float(part) / float(whole)
    except (ValueError, ZeroDivisionError):
        return None


async def _table(asked: Path, *fields: str) -> list[dict[str, str]]:
    """These fields of every GPU; raises DriverError."""
    said = await _said(asked, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    # It puts warnings into the table that are no rows, such as one about a damaged inforom.
    rows = [row for row in csv.reader(said.splitlines(), skipinitialspace=True) if len(row) == len(fields)]
    if not rows and said.strip():
        raise DriverError(f"{asked} says: {said.strip()[:_LINE_LENGTH]}")
    return [dict(zip(fields, (field.strip() for field in row), strict=True)) for row in rows]


async def _said(asked: Path, *arguments: str) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *(str(asked), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": f"{asked.parent}{os.pathsep}{os.defpath}", "LC_ALL": "C"},
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise DriverError(f"{asked} cannot be run: {error.strerror}") from None
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        raise DriverError(f"{asked} did not answer for {ANSWER_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            await _ended(process)
    text = output.decode(errors="replace")
    if process.returncode != 0:
        lines = text.strip().splitlines() or [f"it ended with status {process.returncode}"]
        raise DriverError(f"{asked} says: {lines[-1][:_LINE_LENGTH]}")
    return text


async def _ended(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    # One that the driver holds in the kernel cannot be ended, and is not waited for.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
