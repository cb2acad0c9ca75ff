"""What holds models in on this machine, found out at the service's start by launching a program that is held in so.

What cannot be in force is said, in the log and in the state of every endpoint, or, where a setting demands isolation,
nothing is launched without it. It is never in force for one model and not for another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from servicekit.storage import Storage
from serving_service import store
from serving_service.cgroups import Cgroups
from serving_service.launcher import Launch, Launcher, LaunchError, ReplicaGoneError, ReplicaState

log = logging.getLogger(__name__)

_PROBE_SECONDS = 30.0
# What every model server needs of the interpreter and of the installed packages, without the time that mlflow takes.
_PROBE = "import importlib.util, serving_service.model_server.report as r; assert importlib.util.find_spec('mlflow')"


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What is in force, and what is not."""

    users: range | None = None
    """The user ids that endpoints get, one each; None: models run as the service's own user."""
    missing: tuple[str, ...] = ()
    """What is not in force, and why: a sentence each."""
    is_required: bool = False
    """Whether models may run only where nothing is missing."""

    @property
    def notice(self) -> str:
        """What those who deploy models are told; empty when there is nothing to tell."""
        how = "Not wholly isolated" if self.users else "Not isolated from the platform"
        return f"{how}: {' '.join(self.missing)}" if self.missing else ""

    @property
    def summary(self) -> str:
        """What the person who starts the platform is told."""
        if self.users:
            own = f"each endpoint's models run as a user of their own ({self.users[0]}-{self.users[-1]})"
            return " ".join([f"{own}." if self.missing else own, *self.missing])
        return self.refusal or self.notice

    @property
    def refusal(self) -> str:
        """Why nothing may be launched; empty when it may."""
        if not (self.is_required and self.missing):
            return ""
        return f"Models may not run here, because TESSERA_ISOLATION demands what is missing: {' '.join(self.missing)}"


class UsersExhausted(Exception):
    """Every user id of the range belongs to an endpoint already, or to processes that are not ours."""


class ModelUsers:
    """Gives each endpoint a user of its own, for as long as there is anything of it."""

    def __init__(self, database: Storage, users: range) -> None:
        self._database = database
        self._users = users

    async def of(self, endpoint_id: str) -> int:
        """The endpoint's user; raises UsersExhausted, and OSError where it is not known whose processes run."""
        busy = await asyncio.to_thread(_users_of_processes)
        uid = await self._database.write(store.user_of, endpoint_id, self._users, busy)
        if uid is None:
            raise UsersExhausted(
                f"All {len(self._users)} user ids from {self._users[0]} on are in use. Widen TESSERA_MODEL_USERS."
            )
        return uid


async def probed(launcher: Launcher, cgroups: Cgroups, users: range, *, is_required: bool) -> Isolation:
    """What is in force here, with `launcher`, which uses `cgroups`; says in the log what is not."""
    missing = list(cgroups.missing)
    reason = await _why_not(launcher, users[-1])
    if reason:
        missing.insert(0, f"Models run as the service's own user: {reason}.")
    isolation = Isolation(users=None if reason else users, missing=tuple(missing), is_required=is_required)
    if missing:
        log.warning("models are not isolated", extra={"missing": missing, "user": os.getuid(), "required": is_required})
    else:
        log.info("models are isolated", extra={"users": [users[0], users[-1]]})
    return isolation


async def _why_not(launcher: Launcher, user: int) -> str:
    """Why models cannot run as a user of their own; empty when they can."""
    if os.getuid() != 0:
        return "only root can start them as others"
    command = (sys.executable, "-P", "-c", _PROBE)
    launch = Launch(
        replica_id=f"probe-{uuid.uuid4().hex[:8]}",
        model_path=Path(__file__).parent,
        environment={},
        command=command,
        user=user,
    )
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            replica = await launcher.start(launch)
            try:
                seen = await replica.state()
                while seen.state is not ReplicaState.STOPPED:
                    seen = await replica.wait(seen.state)
                said = await replica.logs(2_000)
            finally:
                await replica.stop(0)
    except (LaunchError, ReplicaGoneError, TimeoutError, OSError) as error:
        return str(error) or "a trial took too long"
    if seen.exit_code == 0:
        return ""
    return said.strip().rpartition("\n")[2] or seen.cause


def _users_of_processes() -> frozenset[int]:
    """The real, effective and saved users of all processes; raises OSError."""
    found: set[int] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            lines = (process / "status").read_text(errors="replace").splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is hidden from us
        found.update(int(number) for line in lines if line.startswith("Uid:") for number in line.split()[1:4])
    return frozenset(found)
