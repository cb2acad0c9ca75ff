"""What a follower of an output has not been told yet: of the replicas of a served entity, and of the making of its
environment.

Lines that begin with `--- ` are ours: they say who speaks from there on, and how many lines are left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from servicekit.storage import Storage
from serving_service import store
from serving_service.build_logs import BuildLogs
from serving_service.controller import LastEnded
from serving_service.controllers import Controllers
from serving_service.followers import News
from serving_service.launcher import ReplicaGoneError, ReplicaHandle
from serving_service.model_environments import EnvironmentLog
from serving_service.shim.ring import Excerpt

LOG_BYTES = 1 << 20
"""How much of a log is handed out: its end."""

NEWS_BYTES = 1 << 18
"""How much of what came since is told at a time: more than anybody can read, and little to ask a busy shim for."""

GONE = ""
"""Stands for a replica whose id is not known any more."""


class ReplicaOutput:
    """What the replicas of one served entity print, those too that are started later and those that end meanwhile."""

    def __init__(self, database: Storage, controllers: Controllers, endpoint_id: str, entity: str) -> None:
        self._database = database
        self._controllers = controllers
        self._endpoint_id = endpoint_id
        self._entity = entity
        self._told: dict[str, int] = {}
        """How many lines of each replica were told, or are not going to be."""
        self._speaker: str | None = None
        self._is_first = True

    async def news(self, version: int) -> str:
        """What replicas of a version have printed since the last time; at first what there is, as far as it is kept."""
        handles = self._controllers.handles(self._endpoint_id, version, self._entity)
        max_bytes = LOG_BYTES if self._is_first else NEWS_BYTES
        read = await asyncio.gather(*(self._read(each, max_bytes // len(handles)) for each in handles.values()))
        said = {each: excerpt for each, excerpt in zip(handles, read, strict=True) if excerpt is not None}
        ended = await (self._of_predecessor(version, said) if self._is_first else self._of_last(version, said))
        text = "".join(self._tell(each, version, excerpt) for each, excerpt in (ended | said).items())
        self._is_first = False
        return text

    async def _read(self, handle: ReplicaHandle, max_bytes: int) -> Excerpt | None:
        """None when it does not answer: it is asked again, or what it had printed is kept."""
        try:
            return await handle.output(max_bytes, after=self._told.get(handle.replica_id, 0))
        except (ReplicaGoneError, OSError, RuntimeError):
            return None

    async def _of_predecessor(self, version: int, said: Mapping[str, Excerpt]) -> dict[str, Excerpt]:
        """As in a log that is not followed: what the last one that ended had printed, where no other said anything."""
        last = self._controllers.last_ended(self._endpoint_id, version, self._entity)
        if last is not None and last.replica_id not in said:
            self._told[last.replica_id] = last.position
        if any(excerpt.text for excerpt in said.values()):
            return {}
        text = await self._kept(version, last)
        return {last.replica_id if last else GONE: Excerpt(text, last.position if last else 0, 0)} if text else {}

    async def _of_last(self, version: int, said: Mapping[str, Excerpt]) -> dict[str, Excerpt]:
        """What was not told of the last one that ended before its process was gone."""
        last = self._controllers.last_ended(self._endpoint_id, version, self._entity)
        if last is None or last.replica_id in said:
            return {}
        asked = last.position - self._told.get(last.replica_id, 0)
        if asked <= 0:
            return {}
        kept = await self._kept(version, last)
        if not kept:
            return {}
        lines = kept.split("\n")[:-1][-asked:]
        text = "".join(f"{line}\n" for line in lines)
        return {last.replica_id: Excerpt(text, last.position, asked - len(lines))}

    async def _kept(self, version: int, last: LastEnded | None) -> str:
        """The kept log; empty when it may be another one's by now, which the next look tells."""
        text = await self._database.read(store.last_log, self._endpoint_id, version, self._entity)
        return text if self._controllers.last_ended(self._endpoint_id, version, self._entity) == last else ""

    def _tell(self, replica_id: str, version: int, said: Excerpt) -> str:
        self._told[replica_id] = said.position
        if not said.text and not said.missing:
            return ""
        notes = ""
        if replica_id != self._speaker:
            self._speaker = replica_id
            notes = f"--- replica {replica_id} of configuration {version}\n"
            if replica_id == GONE:
                notes = f"--- a replica of configuration {version} that has ended\n"
        return notes + ("" if self._is_first else _left_out(said)) + said.text


class BuildOutput:
    """What is said of how the environment of one served entity comes about."""

    def __init__(self, build_logs: BuildLogs, endpoint_id: str, version: int, entity: str) -> None:
        self._build_logs = build_logs
        self._key = (endpoint_id, version, entity)
        self._said: EnvironmentLog | None = None
        self._position = 0
        self._is_told = False
        """Whether it was told to its end."""

    async def news(self, *, is_awaited: bool) -> News:
        """What was said since the last time; all is said with the outcome.

        `is_awaited`: the launch is still to come, or is going to be tried again where it failed.
        """
        if self._said is None or self._is_told:
            opened = self._build_logs.opened(*self._key)
            if opened is None and self._said is None and (text := await self._build_logs.text(*self._key)):
                return News(text, is_all=True)
            if opened is None or opened is self._said:
                return News("", is_all=not is_awaited)
            self._said, self._position = opened, 0
        said = self._said.since(self._position)
        self._position, self._is_told = said.position, self._said.is_over
        is_tried_again = bool(self._said.outcome) and is_awaited
        return News(_left_out(said) + said.text, is_all=self._is_told and not is_tried_again)


def _left_out(said: Excerpt) -> str:
    return f"--- {said.missing} lines are left out\n" if said.missing else ""
