"""Telling people how an update ended: noted with the end itself, delivered afterwards, in the background.

The rule: what is noted is delivered or said in the log. A notice is written in the transaction that ends the update, so
it is there exactly when the update has ended, and it stays until it was taken or a day has passed. Each recipient has a
notice of their own, so nobody is told again because somebody else could not be. Only a process that dies after a notice
was taken and before it was crossed out tells it twice; both have the same id. Nothing here keeps an update waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from servicekit.storage import Connection, Storage, StorageError
from serving_service import store
from serving_service.model import Endpoint, EndpointConfig, EntityState, Notice

log = logging.getLogger(__name__)

KEPT_SECONDS = 24 * 3600.0
"""For how long delivery is tried."""

MOST_NOTICES = 10_000
"""That wait at the same time, of all endpoints."""

MOST_OF_ONE = 500
"""That wait of one endpoint, so that it leaves room for the others."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 600.0
"""Between attempts; each pause is twice the one before."""

UNREADABLE_SECONDS = 1.0


class NotTaken(Exception):
    """This notice was not taken, and will not be: there is no use in trying again."""


class NotTakenYet(Exception):
    """This notice was not taken now; others may be."""


class Courier(Protocol):
    """A way to tell. Everything that `deliver` raises beside the two above means that nothing can be delivered now."""

    @property
    def name(self) -> str:
        """What its notices are noted under."""

    def recipients(self, addresses: list[str]) -> list[str]:
        """Who gets a notice each, when these addresses are to be told."""

    async def deliver(self, notice: Notice) -> None:
        """Returns when the notice was taken; raises NotTaken, NotTakenYet."""


@dataclass(frozen=True)
class _Due:
    """What is next: a notice now, or none before so many seconds; None: not before there is a new one."""

    notice: Notice | None = None
    seconds: float | None = None


class Outbox:
    """The notices that wait. `run` delivers them; `now` tells Unix seconds."""

    def __init__(self, database: Storage, *couriers: Courier, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._couriers = {courier.name: courier for courier in couriers}
        self._now = now
        self._noted = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether there is any way to tell anybody."""
        return bool(self._couriers)

    def note(
        self,
        connection: Connection,
        endpoint: Endpoint,
        config: EndpointConfig,
        failures: Mapping[str, EntityState],
    ) -> None:
        """Notes that an update to a configuration has ended, within the transaction that ends it.

        `failures` says how its entities ended when it failed; empty: it went well.
        """
        outcome = "failure" if failures else "success"
        addresses = store.to_tell(connection, endpoint.id, f"on_update_{outcome}")
        if not addresses:
            return
        now = round(self._now() * 1000)
        content = _content(endpoint, config, failures, ended_at=now)
        notices = [
            Notice(
                id=uuid.uuid4().hex,
                courier=courier.name,
                recipient=recipient,
                content=content,
                created_at=now,
                due_at=now,
            )
            for courier in self._couriers.values()
            for recipient in courier.recipients(addresses)
        ]
        self._drop_others(connection)
        if not store.add_notices(connection, endpoint.id, notices, most=MOST_NOTICES, most_of_one=MOST_OF_ONE):
            log.error("notices are dropped: too many wait", extra={"endpoint": endpoint.name, "notices": len(notices)})

    async def clear(self) -> None:
        """Drops what is too old of couriers that there are no longer; before `run`."""
        await self._database.write(self._drop_others)

    def noted(self) -> None:
        """Has what was noted a moment ago be delivered."""
        self._noted.set()

    async def run(self) -> None:
        """Delivers until cancelled."""
        while True:
            self._noted.clear()
            due = await self._next()
            if due.notice is not None:
                await self._attempt(due.notice)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due.seconds):
                    await self._noted.wait()

    async def _next(self) -> _Due:
        try:
            first = await self._database.read(store.first_notice, list(self._couriers))
        except StorageError:
            return _Due(seconds=UNREADABLE_SECONDS)
        if first is None:
            return _Due()
        wait = first.due_at / 1000 - self._now()
        return _Due(seconds=wait) if wait > 0 else _Due(notice=first)

    async def _attempt(self, notice: Notice) -> None:
        facts = {"endpoint": notice.content["endpoint"], "notice": notice.id, "courier": notice.courier}
        if self._now() - notice.created_at / 1000 > KEPT_SECONDS:
            log.error("notice is dropped: it could not be delivered for a day", extra=facts)
            await self._write(store.remove_notice, notice.id)
            return
        try:
            await self._couriers[notice.courier].deliver(notice)
        except NotTaken as error:
            log.error("notice is dropped: it was refused", extra={**facts, "problem": str(error)})
            await self._write(store.remove_notice, notice.id)
        except NotTakenYet as error:
            log.warning("notice was not taken and is tried again", extra={**facts, "problem": str(error)})
            await self._write(store.delay_notice, notice.id, self._after(notice))
        except Exception as error:
            # Whoever takes notices is not there; the others that wait for it would only wait longer.
            log.warning("notices cannot be delivered now", extra={**facts, "problem": _problem(error)})
            await self._write(store.delay_notice, notice.id, self._after(notice), whole_courier=True)
        else:
            log.info("notice delivered", extra=facts)
            await self._write(store.remove_notice, notice.id)

    def _after(self, notice: Notice) -> int:
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(notice.attempts, 10), LONGEST_PAUSE_SECONDS)
        return round((self._now() + pause) * 1000)

    def _drop_others(self, connection: Connection) -> None:
        before = round((self._now() - KEPT_SECONDS) * 1000)
        if dropped := store.drop_notices_of_others(connection, list(self._couriers), before=before):
            log.error("notices are dropped: nothing is set any more that delivers them", extra={"notices": dropped})

    async def _write(self, change: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Records what became of a notice; until that can be done no other is delivered, which would be too often."""
        while True:
            try:
                await self._database.write(change, *arguments, **named)
                return
            except StorageError:
                log.warning("what became of a notice cannot be recorded yet")
                await asyncio.sleep(UNREADABLE_SECONDS)


def _content(
    endpoint: Endpoint, config: EndpointConfig, failures: Mapping[str, EntityState], *, ended_at: int
) -> dict[str, Any]:
    """What is told: no variables, and causes as `deployment_state_message` has them."""
    return {
        "event": "update_failed" if failures else "update_succeeded",
        "endpoint": endpoint.name,
        "endpoint_id": endpoint.id,
        "config_version": config.version,
        "ended_at": ended_at,
        "served_entities": [
            {
                "name": entity.name,
                "entity_name": entity.model.name,
                "entity_version": entity.model.version,
                **({"problem": failures[entity.name].message} if entity.name in failures else {}),
            }
            for entity in config.entities
        ],
    }


def _problem(error: Exception) -> str:
    """What is in the way, without anything that a foreign server said."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else type(error).__name__
