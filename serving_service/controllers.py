"""All endpoint controllers: found again when the service starts, one more for each new endpoint.

Nothing is started or stopped before every replica that outlived the last process has been found, and the table of
routes is not shown to anybody before it holds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import Counter

from servicekit.measures import Key
from serving_service import store
from serving_service.controller import STOP_GRACE_SECONDS, Doors, EndpointController, LastEnded
from serving_service.launcher import Observation, ReplicaGoneError, ReplicaHandle
from serving_service.model import Deployment, Endpoint, EndpointConfig, EntityState, ReplicaRecord
from serving_service.phases import LaunchEvent
from serving_service.reconcile import Phase

log = logging.getLogger(__name__)


STOPPED = EntityState(Deployment.ABORTED, "The endpoint was stopped. Start it to have it serve again.")


REPLICA_STATES = (*(phase.name.lower() for phase in Phase), "stopping")


class Controllers:
    """The controllers of all endpoints."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        self._controllers: dict[str, EndpointController] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._created: set[str] = set()
        self._is_recovered = False
        doors.routes.loads.on_change = self.load_changed

    async def run(self) -> None:
        """Finds again what there is, then works until cancelled. Replicas go on without us."""
        try:
            async with asyncio.TaskGroup() as orphans:
                await self._recover(orphans)
            await asyncio.Event().wait()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def wake(self, endpoint_id: str) -> None:
        """Has an endpoint's controller look again."""
        if endpoint_id in self._controllers:
            self._controllers[endpoint_id].wake()

    def load_changed(self, endpoint_id: str) -> None:
        """Has an endpoint's controller take its load into account."""
        if endpoint_id in self._controllers:
            self._controllers[endpoint_id].load_changed()

    def created(self, endpoint_id: str) -> None:
        """Gives a new endpoint its controller."""
        if self._is_recovered:
            self._add(EndpointController(endpoint_id, self._doors))
        else:
            self._created.add(endpoint_id)

    def deleted(self, endpoint_id: str) -> None:
        """Takes a deleted endpoint's routes away and has its replicas stopped."""
        if endpoint_id in self._controllers:
            self._controllers[endpoint_id].deleted()

    def state_of(self, endpoint: Endpoint, config: EndpointConfig, entity: str) -> EntityState:
        """How an entity of the active or the pending configuration is."""
        is_active = endpoint.active is not None and config.version == endpoint.active.version
        if is_active and endpoint.is_stopped:
            return STOPPED
        controller = self._controllers.get(endpoint.id)
        if controller is not None:
            return controller.state_of(endpoint, config, entity)
        if is_active:
            # The service has just started: what was ready counts as ready until it is found otherwise.
            return EntityState(Deployment.READY, self._doors.notice)
        waiting = EntityState(Deployment.CREATING, "Waiting to be started.")
        return waiting if endpoint.is_updating else endpoint.failures.get(entity, waiting)

    def events(self, endpoint_id: str) -> list[LaunchEvent]:
        """The phases of an endpoint's launches that are not stored."""
        controller = self._controllers.get(endpoint_id)
        return controller.events() if controller is not None else []

    def ready(self, key: Key) -> list[str]:
        """The replicas of a served entity that are ready, by its name and the version of its model."""
        controller = self._controllers.get(key.endpoint_id)
        return controller.ready(key.entity, key.entity_version) if controller is not None else []

    def count(self) -> int:
        """How many endpoints there are, those included that are being deleted."""
        return len(self._controllers)

    def replicas(self) -> dict[str, float]:
        """How many replicas are in which state."""
        states = Counter(state for controller in self._controllers.values() for state in controller.states())
        return {state: states[state] for state in REPLICA_STATES}

    def processes(self) -> dict[str, int]:
        """The process of every replica that is ready."""
        return {each: pid for controller in self._controllers.values() for each, pid in controller.processes.items()}

    async def logs(self, endpoint_id: str, version: int, entity: str, max_bytes: int) -> str:
        """The latest output of an entity."""
        controller = self._controllers.get(endpoint_id)
        if controller is None:  # the service has just started
            return await self._doors.database.read(store.last_log, endpoint_id, version, entity)
        return await controller.logs(version, entity, max_bytes)

    def handles(self, endpoint_id: str, version: int, entity: str) -> dict[str, ReplicaHandle]:
        """The replicas of an entity that can be asked for their output, the oldest first."""
        controller = self._controllers.get(endpoint_id)
        return controller.handles(version, entity) if controller is not None else {}

    def last_ended(self, endpoint_id: str, version: int, entity: str) -> LastEnded | None:
        """Whose output the kept log of an entity is; None when that is not known."""
        controller = self._controllers.get(endpoint_id)
        return controller.last_ended(version, entity) if controller is not None else None

    def has_replicas(self, endpoint_id: str, version: int, entity: str) -> bool:
        """Whether any replica of an entity starts, answers, or is still being stopped; True while that is not known."""
        controller = self._controllers.get(endpoint_id)
        return controller is None or controller.has_replicas(version, entity)

    async def _recover(self, orphans: asyncio.TaskGroup) -> None:
        database, routes = self._doors.database, self._doors.routes
        # The replicas first: one that were started between the two would look like a stranger's.
        handles = await self._doors.launcher.adopt()
        seen = dict(zip(handles, await asyncio.gather(*map(_look, handles.values())), strict=True))
        records = {record.id: record for record in await database.read(store.all_replicas)}
        for replica_id in records.keys() - handles.keys():
            await database.write(store.remove_replica, replica_id)
            self._doors.launches.ended(replica_id)
        for replica_id in handles.keys() - records.keys():
            log.warning("replica belongs to no endpoint and is stopped", extra={"replica": replica_id})
            orphans.create_task(_stop_orphan(handles[replica_id]))
        endpoints = await database.read(store.all_endpoints, deleted=True)
        controllers = {endpoint.id: EndpointController(endpoint.id, self._doors) for endpoint in endpoints}
        for replica_id in records.keys() & handles.keys():
            record: ReplicaRecord = records[replica_id]
            controllers[record.endpoint_id].adopt(record, handles[replica_id], seen[replica_id])
        for endpoint in endpoints:
            if not endpoint.is_deleted:
                controllers[endpoint.id].publish(endpoint, endpoint.active)
        self._is_recovered = True
        routes.loaded()
        for controller in controllers.values():
            self._add(controller)
        for endpoint_id in self._created - controllers.keys():
            self.created(endpoint_id)
        log.info("recovered", extra={"endpoints": len(endpoints), "replicas": len(handles)})

    def _add(self, controller: EndpointController) -> None:
        endpoint_id = controller.endpoint_id
        self._controllers[endpoint_id] = controller
        # On nobody's behalf: a request's context, with its caller and an assertion that expires, must not live on here.
        task = asyncio.create_task(controller.run(), name=f"controller {endpoint_id}", context=contextvars.Context())
        self._tasks[endpoint_id] = task
        task.add_done_callback(lambda _: self._remove(endpoint_id))

    def _remove(self, endpoint_id: str) -> None:
        del self._controllers[endpoint_id]
        del self._tasks[endpoint_id]


async def _look(handle: ReplicaHandle) -> Observation | None:
    with contextlib.suppress(ReplicaGoneError, OSError):
        return await handle.state()
    return None


async def _stop_orphan(handle: ReplicaHandle) -> None:
    with contextlib.suppress(ReplicaGoneError, OSError):
        await handle.stop(STOP_GRACE_SECONDS)
