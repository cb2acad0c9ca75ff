"""One worker per endpoint: it looks at the records and at the replicas, plans, and carries the plan out.

What is decided is recorded before it is done, so that a successor of this process can tell whose a replica is. What can
take long (a launch, a drain) goes on beside the worker and wakes it when something has changed. A replica is never
stopped because something could not be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from servicekit.errors import Unavailable
from servicekit.storage import Connection, Storage, StorageError
from serving_service import details, phases, reconcile, scaling, store
from serving_service.gpu_pool import GpuPool
from serving_service.launch_metrics import LaunchMetrics
from serving_service.launcher import (
    Launch,
    Launcher,
    LaunchError,
    Observation,
    ReplicaGoneError,
    ReplicaHandle,
    ReplicaState,
)
from serving_service.launches import LaunchDelayed, Launches, LaunchImpossible
from serving_service.model import Deployment, Endpoint, EndpointConfig, EntityState, ReplicaRecord, ServedEntity
from serving_service.notices import Outbox
from serving_service.phases import LaunchEvent, LaunchPhase, Outcome
from serving_service.probes import READINESS_SECONDS, Probes
from serving_service.reconcile import Phase, Replica
from serving_service.routes import EndpointRoutes, EntityRoutes, ReplicaAddress, RouteTable
from serving_service.scaling import Patience, Scaling
from serving_service.slots import LaunchSlots
from serving_service.timeline import Timeline

log = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 10.0
"""Between TERM and KILL of a replica that is stopped."""

DELETE_DRAIN_SECONDS = 30.0
"""How long requests in flight may take to finish when their endpoint is deleted."""

KEPT_LOG_BYTES = 1 << 18
"""Of what the last replica of an entity had printed."""

LOADING = phases.doing(LaunchPhase.LOAD)

UNREADABLE_SECONDS = 1.0
"""Until something that did not answer is asked again."""


@dataclass(frozen=True)
class LastEnded:
    """The last replica of an entity that ended and whose log is kept."""

    replica_id: str
    position: int
    """How many lines it had printed."""


@dataclass(frozen=True, kw_only=True)
class Doors:
    """What every controller works with."""

    database: Storage
    launcher: Launcher
    launches: Launches
    probes: Probes
    routes: RouteTable
    launched: LaunchMetrics
    outbox: Outbox
    notice: str
    """What the state of every served entity that is ready says besides; empty when there is nothing to say."""
    inference_deadline: float
    deploy_deadline: float
    load_deadline: float
    patience: Patience
    slots: LaunchSlots
    gpus: GpuPool


class EndpointController:
    """The worker of one endpoint."""

    def __init__(self, endpoint_id: str, doors: Doors) -> None:
        self.endpoint_id = endpoint_id
        self._doors = doors
        self._replicas: dict[str, Replica] = {}
        self._handles: dict[str, ReplicaHandle] = {}
        self._timeline = Timeline(endpoint_id, doors.database, doors.launched)
        self._ready_since: dict[str, float] = {}
        self._versions: dict[tuple[int, str], str] = {}
        """The version of the model of each served entity, by its configuration and its name."""
        self.processes: dict[str, int] = {}
        """The process of each replica that is ready."""
        self._last_ended: dict[tuple[int, str], LastEnded] = {}
        self._keeping = asyncio.Lock()
        self._probing: dict[str, asyncio.Task[None]] = {}
        self._condemned: dict[str, str] = {}
        self._retries: dict[tuple[int, str], reconcile.Retry] = {}
        self._deadlines: dict[int, float] = {}
        self._scaling = Scaling(doors.patience)
        self._counts: Mapping[str, int] = {}
        """How many replicas each entity of the active version was found to need."""
        self._preparing: set[str] = set()
        self._launching: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._woken.set()
        self._next_look: float | None = None
        self._is_deleted = False

    def wake(self) -> None:
        """Has the worker look again."""
        self._woken.set()

    def load_changed(self) -> None:
        """Takes the load of the entities into account."""
        now = time.monotonic()
        self._hear_loads(now)
        if not self._is_deleted and self._needed(now) != self._counts:
            self.wake()

    def deleted(self) -> None:
        """Takes the routes away at once; the worker does the rest."""
        self._withdraw()
        self.wake()

    def adopt(self, record: ReplicaRecord, handle: ReplicaHandle, seen: Observation | None) -> None:
        """Takes over a replica that a predecessor of this process started; `seen` is None when it did not answer."""
        self._replicas[record.id] = Replica(id=record.id, version=record.version, entity=record.entity, message=LOADING)
        self._handles[record.id] = handle
        if seen is None or seen.state is ReplicaState.STARTING:
            began = phases.since(LaunchPhase.LOAD, time.time() if seen is None else seen.since)
            self._timeline.go_on(self._replicas[record.id], began)
        if seen is not None:
            if seen.state is ReplicaState.READY:
                self._ready(record.id)  # as it was for our predecessor: requests go on in the meantime
            self._observe(record.id, seen)
        self._spawn(self._watch(record.id, handle))

    def publish(self, endpoint: Endpoint, config: EndpointConfig | None) -> None:
        """Puts the ready replicas of a configuration into the table of routes."""
        if not self._is_deleted:
            if config is not None and config is endpoint.active:
                self._follow(config)
            entities = self._entity_routes(config) if config else ()
            if endpoint.is_stopped and config is endpoint.active:
                entities = tuple(replace(each, replicas=(), is_asleep=False, problem="") for each in entities)
            self._doors.routes.publish(
                EndpointRoutes(
                    endpoint_id=endpoint.id,
                    name=endpoint.name,
                    entities=entities,
                    limits=details.limits(endpoint),
                    is_usage_tracked=details.is_usage_tracked(endpoint),
                    is_stopped=endpoint.is_resting,
                )
            )

    def state_of(self, endpoint: Endpoint, config: EndpointConfig, entity: str) -> EntityState:
        """How an entity of the active or the pending configuration is."""
        if endpoint.active is not None and config.version == endpoint.active.version:
            return self._active_state(config.version, entity, self._counts.get(entity, 1))
        if not endpoint.is_updating:
            return endpoint.failures.get(entity, EntityState(Deployment.FAILED, ""))
        ready, count = self._observed().ready(config.version, entity), _first(config).replicas[entity]
        if ready >= count:
            return EntityState(Deployment.READY, "Ready. The update ends when every served entity is.")
        return EntityState(Deployment.CREATING, self._progress(config.version, entity, count))

    def _active_state(self, version: int, entity: str, count: int) -> EntityState:
        if self._observed().ready(version, entity):
            progress = self._progress(version, entity, count)
            return EntityState(Deployment.READY, " ".join(filter(None, (progress, self._doors.notice))))
        doing = self._doing(version, entity)
        if not self._is_asleep(version, entity):
            return EntityState(Deployment.RECOVERING, doing)
        if self._observed().live(version, entity) or (count and not self._hindrance(version, entity)):
            return EntityState(Deployment.CREATING, f"Scaling from zero... {doing}")
        if problem := self._scaling.problem(entity):
            return EntityState(Deployment.RECOVERING, f"{problem} It is going to be tried again when it is asked for.")
        return EntityState(Deployment.READY, "Scaled to zero")

    def events(self) -> list[LaunchEvent]:
        """The phases of launches that are not stored: those that go on, and those that ended a moment ago."""
        return self._timeline.unstored()

    def ready(self, entity: str, entity_version: str) -> list[str]:
        """The replicas that are ready and serve that version of a model under that name."""
        return [
            each.id
            for each in self._replicas.values()
            if each.phase is Phase.READY
            and each.entity == entity
            and self._versions.get((each.version, entity)) == entity_version
        ]

    def states(self) -> list[str]:
        """The state of each replica."""
        return ["stopping" if each.is_stopping else each.phase.name.lower() for each in self._replicas.values()]

    async def logs(self, version: int, entity: str, max_bytes: int) -> str:
        """The latest output of the newest replica of an entity; when there is none, of the last one that ended.

        Raises Unavailable.
        """
        newest = [r.id for r in self._replicas.values() if (r.version, r.entity) == (version, entity)]
        handle = self._handles.get(newest[-1]) if newest else None
        try:
            if handle is not None and (text := await handle.logs(max_bytes)):
                return text
        except OSError:
            raise Unavailable("The replica cannot be asked for its log just now. Try again.", retry_after=1) from None
        except ReplicaGoneError:
            pass
        return await self._doors.database.read(store.last_log, self.endpoint_id, version, entity)

    def handles(self, version: int, entity: str) -> dict[str, ReplicaHandle]:
        """The replicas of an entity that can be asked for their output, the oldest first."""
        return {
            each.id: self._handles[each.id]
            for each in self._replicas.values()
            if (each.version, each.entity) == (version, entity) and each.id in self._handles
        }

    def last_ended(self, version: int, entity: str) -> LastEnded | None:
        """Whose output the kept log of an entity is; None when that is not known."""
        return self._last_ended.get((version, entity))

    def has_replicas(self, version: int, entity: str) -> bool:
        """Whether any replica of an entity starts, answers, or is still being stopped."""
        return any(
            (each.version, each.entity) == (version, entity) and each.phase is not Phase.ENDED
            for each in self._replicas.values()
        )

    async def run(self) -> None:
        """Works until the endpoint is deleted and nothing is left of it."""
        self._spawn(self._timeline.run())
        try:
            while True:
                await self._wait()
                try:
                    if not await self._pass():
                        return
                except Exception as error:
                    # Most likely the disk is full. Nothing is stopped meanwhile, and the next pass plans anew.
                    kind = (type(error), error, error.__traceback__)
                    log.error("endpoint controller failed", extra={"endpoint": self.endpoint_id}, exc_info=kind)
                    await asyncio.sleep(UNREADABLE_SECONDS)
                    self.wake()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait(self) -> None:
        delay = None if self._next_look is None else max(self._next_look - time.monotonic(), 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._woken.wait()
        self._woken.clear()

    async def _pass(self) -> bool:
        """Observe, plan, record, act, once. False when the endpoint is gone with all its replicas."""
        endpoint = await self._doors.database.read(store.endpoint_with_id, self.endpoint_id)
        if endpoint is None:
            return False
        if endpoint.is_deleted:
            self._withdraw()
            if not self._replicas:
                await self._doors.database.write(store.purge, endpoint.id)
                return False
        # One moment for all: what is due by the end of the plan was not due for it, and has to be looked at again.
        now = time.monotonic()
        desired = self._desired(endpoint, now)
        if not endpoint.is_deleted:
            self.publish(endpoint, endpoint.active)
        for action in reconcile.plan(desired, self._observed(), now):
            await self._carry_out(endpoint, action)
        self._next_look = self._look_after(desired, now)
        return True

    def _look_after(self, desired: reconcile.Desired, now: float) -> float | None:
        """When time alone makes another plan."""
        is_scaled = bool(self._counts) and not (desired.is_deleted or desired.is_stopped)
        looks = (
            reconcile.next_look(desired, self._observed(), now),
            self._scaling.next_change(now) if is_scaled else None,
        )
        return min((look for look in looks if look is not None), default=None)

    def _withdraw(self) -> None:
        self._is_deleted = True  # a pass that began before must not publish any more
        self._doors.routes.remove(self.endpoint_id)

    def _desired(self, endpoint: Endpoint, now: float) -> reconcile.Desired:
        wanted = {config.version: config for config in (endpoint.active, endpoint.pending) if config is not None}
        self._versions = {
            (config.version, each.name): each.model.version for config in wanted.values() for each in config.entities
        }
        self._retries = {key: retry for key, retry in self._retries.items() if key[0] in wanted}
        self._last_ended = {key: last for key, last in self._last_ended.items() if key[0] in wanted}
        if endpoint.pending is not None and endpoint.pending.version not in self._deadlines:
            # Timed on the clock that nobody can set; what passed before this process started is taken from the record.
            left = endpoint.pending.created_at / 1000 + self._doors.deploy_deadline - time.time()
            left = min(max(left, 0), self._doors.deploy_deadline)
            self._deadlines = {endpoint.pending.version: now + left}
        return reconcile.Desired(
            is_deleted=endpoint.is_deleted,
            is_updating=endpoint.is_updating,
            active=self._wanted(endpoint, now),
            pending=_first(endpoint.pending) if endpoint.pending else None,
            is_stopped=endpoint.is_stopped,
            deadline=self._deadlines[endpoint.pending.version] if endpoint.pending is not None else 0.0,
        )

    def _wanted(self, endpoint: Endpoint, now: float) -> reconcile.Wanted | None:
        """What is to run of the active version, as the load asks for just now."""
        config = endpoint.active
        if config is None or endpoint.is_deleted:
            return None
        self._follow(config)
        self._hear_loads(now)
        self._counts = self._needed(now)
        return reconcile.Wanted(config.version, self._counts)

    def _follow(self, config: EndpointConfig) -> None:
        """Turns to the entities of the active version, in case they are other ones than before."""
        ready = {entity.name: self._observed().ready(config.version, entity.name) for entity in config.entities}
        self._scaling.follow(config, ready, time.monotonic())

    def _hear_loads(self, now: float) -> None:
        for entity in self._scaling.entities:
            self._scaling.loaded(entity, self._doors.routes.loads.of(self.endpoint_id, entity), now)

    def _needed(self, now: float) -> Mapping[str, int]:
        version, observed = self._scaling.version, self._observed()
        return {
            entity: self._scaling.wanted(
                entity, ready=observed.ready(version, entity), live=observed.live(version, entity), now=now
            )
            for entity in self._scaling.entities
        }

    def _is_asleep(self, version: int, entity: str) -> bool:
        return version == self._scaling.version and self._scaling.is_asleep(entity)

    def _hindrance(self, version: int, entity: str) -> str:
        """Why an entity that is asleep is not woken just now, whoever asks; empty when it is."""
        retry = self._retries.get((version, entity))
        has_failed = retry is not None and not retry.waits and time.monotonic() < retry.not_before
        return retry.message if retry is not None and has_failed else ""

    def _observed(self) -> reconcile.Observed:
        return reconcile.Observed(replicas=tuple(self._replicas.values()), retries=self._retries)

    async def _carry_out(self, endpoint: Endpoint, action: reconcile.Action) -> None:
        match action:
            case reconcile.StartReplica(version, name):
                config = next(c for c in (endpoint.active, endpoint.pending) if c is not None and c.version == version)
                entity = config.entity(name)
                assert entity is not None
                await self._start(endpoint, version, entity)
            case reconcile.Activate(version):
                await self._activate(endpoint, version)
            case reconcile.FailUpdate(version, causes):
                await self._fail(endpoint, version, dict(causes))
            case reconcile.StopReplica(replica_id, keep_log):
                drain = DELETE_DRAIN_SECONDS if endpoint.is_deleted else self._doors.inference_deadline
                self._change(replica_id, is_stopping=True)
                if not endpoint.is_deleted:
                    self.publish(endpoint, endpoint.active)  # nobody is sent there any more, so it can be drained
                self._spawn(self._stop(replica_id, drain=drain, keep_log=keep_log))

    async def _start(self, endpoint: Endpoint, version: int, entity: ServedEntity) -> None:
        replica = Replica(id=uuid.uuid4().hex, version=version, entity=entity.name, message="Waiting to be started.")
        await self._doors.database.write(
            store.add_replica, ReplicaRecord(replica.id, endpoint.id, version, entity.name)
        )
        self._replicas[replica.id] = replica
        self._preparing.add(replica.id)
        self._launching[replica.id] = self._spawn(self._launch(endpoint, entity, replica))

    async def _activate(self, endpoint: Endpoint, version: int) -> None:
        config = endpoint.pending
        assert config is not None
        self.publish(endpoint, config)
        await self._doors.routes.acknowledged()
        # A replica may have died while the gateways were told; then the old ones go on and this version is not done.
        is_ready = self._observed().is_ready(_first(config))
        if is_ready and await self._ended_update(endpoint, config, {}):
            log.info("configuration activated", extra={"endpoint": endpoint.name, "version": version})
            if endpoint.active is not None:
                self._doors.launches.dropped(endpoint.id, endpoint.active.version)
        self.wake()

    async def _fail(self, endpoint: Endpoint, version: int, causes: dict[str, str]) -> None:
        assert endpoint.pending is not None
        culprits = ", ".join(f"'{name}'" for name in causes)
        aborted = EntityState(Deployment.ABORTED, f"Given up, because served entity {culprits} failed.")
        failures = {
            entity.name: EntityState(Deployment.FAILED, causes[entity.name]) if entity.name in causes else aborted
            for entity in endpoint.pending.entities
        }
        await self._ended_update(endpoint, endpoint.pending, failures)
        for name, cause in causes.items():
            for replica in self._observed().of(version, name):
                self._timeline.end(replica.id, Outcome.FAILED, message=cause)
        log.info("configuration failed", extra={"endpoint": endpoint.name, "version": version, "causes": causes})
        self.wake()

    async def _ended_update(
        self, endpoint: Endpoint, config: EndpointConfig, failures: Mapping[str, EntityState]
    ) -> bool:
        """Ends an update, and notes who is to be told, in one transaction; False when it is too late."""

        def commit(connection: Connection) -> bool:
            if failures:
                is_ended = store.fail_update(connection, endpoint.id, config.version, failures)
            else:
                is_ended = store.activate(connection, endpoint.id, config.version)
            if is_ended:
                self._doors.outbox.note(connection, endpoint, config, failures)
            return is_ended

        is_ended = await self._doors.database.write(commit)
        self._doors.outbox.noted()
        return is_ended

    async def _launch(self, endpoint: Endpoint, entity: ServedEntity, replica: Replica) -> None:
        try:
            await self._doors.slots.take(replica.id)
            launch = await self._doors.launches.prepare(
                endpoint, replica.version, entity, replica.id, partial(self._enter, replica)
            )
            self._preparing.discard(replica.id)
            handle = await self._started(launch)
            del launch  # with its secrets
        except (LaunchImpossible, LaunchDelayed) as error:
            is_final = isinstance(error, LaunchImpossible)
            await self._not_started(endpoint, replica, error.phase, str(error), is_final=is_final)
        except LaunchError as error:
            cause = phases.failed(LaunchPhase.START, str(error))
            await self._not_started(endpoint, replica, LaunchPhase.START, cause, is_final=False)
        except OSError as error:
            cause = phases.failed(LaunchPhase.START, f"The replica's files cannot be made: {error.strerror}")
            log.warning("replica has no files", extra={"replica": replica.id, "path": error.filename})
            await self._not_started(endpoint, replica, LaunchPhase.START, cause, is_final=False)
        except Exception as error:
            kind = (type(error), error, error.__traceback__)
            log.error("replica could not be started", extra={"replica": replica.id}, exc_info=kind)
            phase = self._timeline.phase(replica.id) or LaunchPhase.START
            cause = phases.failed(phase, "The replica could not be started; the service's log says why")
            await self._not_started(endpoint, replica, phase, cause, is_final=False)
        else:
            self._handles[replica.id] = handle
            self._enter(replica, LaunchPhase.LOAD)
            self._spawn(self._watch(replica.id, handle))
        finally:
            self._preparing.discard(replica.id)
            del self._launching[replica.id]
            if replica.id not in self._handles:
                self._doors.slots.give_back(replica.id)
            self.wake()

    async def _started(self, launch: Launch) -> ReplicaHandle:
        """Starts a replica, whole: who is cancelled meanwhile leaves one that can be found, not one half there."""
        starting = asyncio.ensure_future(self._doors.launcher.start(launch))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.gather(starting, return_exceptions=True)
            raise

    def _enter(self, replica: Replica, phase: LaunchPhase) -> None:
        self._timeline.enter(replica, phase)
        self._change(replica.id, message=phases.doing(phase))

    async def _not_started(
        self, endpoint: Endpoint, replica: Replica, phase: LaunchPhase, message: str, *, is_final: bool
    ) -> None:
        key = (replica.version, replica.entity)
        log.info("replica not started", extra={"endpoint": endpoint.name, "replica": replica.id, "cause": message})
        self._timeline.end(replica.id, Outcome.FAILED, message=message, failed_at=phase)
        if is_final:
            self._retry(replica, message, ready_seconds=0, is_final=True)
            if endpoint.pending is not None and endpoint.pending.version == replica.version:
                await self._doors.gpus.give_back(replica.id)
                self._doors.launches.ended(replica.id)
                self._change(replica.id, phase=Phase.ENDED, message=message, is_final=True)
                return
        else:
            self._retries[key] = reconcile.after_wait(self._retries.get(key), message=message, now=time.monotonic())
        await self._forget(replica.id)

    async def _watch(self, replica_id: str, handle: ReplicaHandle) -> None:
        """Follows a replica until it has ended."""
        known: ReplicaState | None = None
        while known is not ReplicaState.STOPPED:
            try:
                async with asyncio.timeout(self._seconds_to_load(replica_id)):
                    seen = await (handle.state() if known is None else handle.wait(known))
            except ReplicaGoneError as error:
                if replica_id in self._replicas and not self._replicas[replica_id].is_stopping:
                    phase = self._timeline.phase(replica_id)
                    cause = str(error) if phase is None else phases.failed(phase, str(error))
                    self._ended(replica_id, cause, is_final=False)
                    self._change(replica_id, is_stopping=True)
                    await self._stop(replica_id, drain=0, keep_log=False)
                return
            except (TimeoutError, OSError):
                if self._seconds_to_load(replica_id) == 0:
                    await self._give_up_loading(replica_id, handle)
                    return
                await asyncio.sleep(UNREADABLE_SECONDS)  # it may be well all the same
                continue
            known = seen.state
            self._observe(replica_id, seen)
            if known is ReplicaState.READY:
                self._probing[replica_id] = self._spawn(self._probe(replica_id, handle))
            self.wake()
        await self._doors.gpus.give_back(replica_id)
        await self._keep_log(replica_id, handle)

    def _seconds_to_load(self, replica_id: str) -> float | None:
        """For how long a replica may go on loading its model; None when it does not, or is being stopped anyway."""
        loading = self._timeline.duration(replica_id)
        is_loading = self._timeline.phase(replica_id) is LaunchPhase.LOAD
        if loading is None or not is_loading or self._replicas[replica_id].is_stopping:
            return None
        return max(self._doors.load_deadline - loading / 1000, 0.0)

    async def _give_up_loading(self, replica_id: str, handle: ReplicaHandle) -> None:
        late = phases.overdue(self._doors.load_deadline, "TESSERA_LOAD_DEADLINE_SECONDS")
        # First its process, so that no other replica is started beside it.
        await self._end(handle, dismiss=False)
        await self._doors.gpus.give_back(replica_id)
        if replica_id in self._replicas:
            self._ended(replica_id, phases.failed(LaunchPhase.LOAD, late), is_final=True)
        self.wake()

    def _observe(self, replica_id: str, seen: Observation) -> None:
        replica = self._replicas.get(replica_id)
        if replica is None or replica.phase is Phase.ENDED:
            return
        facts = {"endpoint": self.endpoint_id, "replica": replica_id, "entity": replica.entity}
        match seen.state:
            case ReplicaState.READY:
                if seen.pid is not None:
                    self.processes[replica_id] = seen.pid
                if replica.phase is not Phase.READY:
                    self._enter(replica, LaunchPhase.READINESS)
                    log.info("model loaded", extra={**facts, "load_seconds": seen.load_seconds})
            case ReplicaState.FAILED | ReplicaState.STOPPED:
                was_loaded = replica.phase is Phase.READY or seen.load_seconds is not None
                cause = seen.cause if was_loaded else phases.failed(LaunchPhase.LOAD, seen.cause)
                is_final = not was_loaded
                if replica_id in self._condemned:
                    # One that was never ready will not be the next time either.
                    cause, is_final = self._condemned.pop(replica_id), replica.phase is not Phase.READY
                self._ended(replica_id, cause, is_final=is_final)
                log.info("replica ended", extra={**facts, "exit_code": seen.exit_code, "cause": cause})

    async def _probe(self, replica_id: str, handle: ReplicaHandle) -> None:
        """Takes a replica for ready when it answers, and ends it when it does not any more."""
        probes = self._doors.probes
        if self._replicas[replica_id].phase is not Phase.READY:
            if not await probes.ready(handle.address):
                mute = f"The model server says that it is ready and does not answer for {READINESS_SECONDS:g} s"
                await self._condemn(replica_id, handle, phases.failed(LaunchPhase.READINESS, mute))
                return
            self._ready(replica_id)
            self.wake()
        await probes.silent(handle.address)
        hung = f"It has not answered for the {probes.patience:g} s that TESSERA_LIVENESS_DEADLINE_SECONDS allows."
        await self._condemn(replica_id, handle, hung)

    def _ready(self, replica_id: str) -> None:
        replica = self._replicas.get(replica_id)
        if replica is None or replica.phase is not Phase.STARTING:
            return
        self._timeline.end(replica_id, Outcome.SUCCEEDED)
        self._doors.slots.give_back(replica_id)
        self._ready_since[replica_id] = time.monotonic()
        self._change(replica_id, phase=Phase.READY, message="")
        log.info("replica ready", extra={"endpoint": self.endpoint_id, "replica": replica_id, "entity": replica.entity})

    def _stop_probing(self, replica_id: str) -> None:
        if (probing := self._probing.pop(replica_id, None)) is not None:
            probing.cancel()

    async def _condemn(self, replica_id: str, handle: ReplicaHandle, cause: str) -> None:
        """Ends a replica that runs and is no good; what watches it learns of the end, and for what cause."""
        if replica_id in self._replicas and not self._replicas[replica_id].is_stopping:
            self._condemned[replica_id] = cause
            await self._end(handle, dismiss=False)

    def _ended(self, replica_id: str, message: str, *, is_final: bool) -> None:
        replica = self._replicas[replica_id]
        self._stop_probing(replica_id)
        self._doors.slots.give_back(replica_id)
        if replica.is_stopping:
            self._timeline.end(replica_id, Outcome.ABANDONED)
        else:
            self._timeline.end(replica_id, Outcome.FAILED, message=message)
        now = time.monotonic()
        ready_seconds = now - self._ready_since.pop(replica_id, now)
        self.processes.pop(replica_id, None)
        if not replica.is_stopping and message:  # it did not end because it was asked to
            self._retry(replica, message, ready_seconds=ready_seconds, is_final=is_final)
        self._change(replica_id, phase=Phase.ENDED, message=message, is_final=is_final)
        self._doors.launches.ended(replica_id)

    def _retry(self, replica: Replica, message: str, *, ready_seconds: float, is_final: bool) -> None:
        """Has an entity whose replica ended tried again; one that could not be woken, when somebody asks for it."""
        key = (replica.version, replica.entity)
        is_patient = is_final and self._is_asleep(*key)
        if is_patient:
            self._scaling.not_woken(replica.entity, message)
        self._retries[key] = reconcile.after_end(
            self._retries.get(key),
            ready_seconds=ready_seconds,
            message=message,
            now=time.monotonic(),
            is_patient=is_patient,
        )

    async def _stop(self, replica_id: str, *, drain: float, keep_log: bool) -> None:
        launching = self._launching.get(replica_id)
        if launching is not None:
            if replica_id in self._preparing:
                launching.cancel()
            await asyncio.wait([launching])
        self._stop_probing(replica_id)
        self._timeline.end(replica_id, Outcome.ABANDONED)
        handle = self._handles.get(replica_id)
        if handle is not None:
            if self._replicas[replica_id].phase is Phase.READY:
                await self._doors.routes.drained(replica_id, timeout=drain)
            await self._end(handle, dismiss=False)
            await self._keep_log(replica_id, handle)
            if not keep_log:
                await self._end(handle, dismiss=True)
        if keep_log:
            await self._doors.gpus.give_back(replica_id)
            self._doors.launches.ended(replica_id)
            self._change(replica_id, phase=Phase.ENDED, is_stopping=False)
        else:
            await self._forget(replica_id)
        self.wake()

    async def _keep_log(self, replica_id: str, handle: ReplicaHandle) -> None:
        """Records what a replica that has ended had printed; not being able to costs the log and nothing else."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return  # whoever stopped it has done so
        try:
            said = await handle.output(KEPT_LOG_BYTES)
            if said.text:
                async with self._keeping:
                    # Whose log is kept is not known until its end: it changes when the transaction does.
                    self._last_ended.pop((replica.version, replica.entity), None)
                    write = self._doors.database.write
                    await write(store.keep_log, self.endpoint_id, replica.version, replica.entity, said.text)
                    self._last_ended[replica.version, replica.entity] = LastEnded(replica_id, said.position)
        except (ReplicaGoneError, TimeoutError, OSError, RuntimeError, StorageError):
            log.warning("log of a replica that has ended cannot be kept", extra={"replica": replica_id})

    async def _end(self, handle: ReplicaHandle, *, dismiss: bool) -> None:
        while True:
            try:
                await handle.stop(STOP_GRACE_SECONDS, dismiss=dismiss)
            except ReplicaGoneError:
                return
            except (TimeoutError, OSError, RuntimeError):
                log.warning("replica cannot be stopped yet", extra={"replica": handle.replica_id})
                await asyncio.sleep(UNREADABLE_SECONDS)
            else:
                return

    async def _forget(self, replica_id: str) -> None:
        while True:
            try:
                await self._doors.database.write(store.remove_replica, replica_id)
                break
            except StorageError:
                log.warning("replica cannot be forgotten yet", extra={"replica": replica_id})
                await asyncio.sleep(UNREADABLE_SECONDS)
        self._doors.launches.ended(replica_id)
        for memory in (self._replicas, self._handles, self._ready_since, self._condemned, self.processes):
            memory.pop(replica_id, None)

    def _entity_routes(self, config: EndpointConfig) -> tuple[EntityRoutes, ...]:
        shares: Mapping[str, int] = {route.entity: route.percentage for route in config.routes}
        return tuple(self._routes_of(config.version, entity, shares[entity.name]) for entity in config.entities)

    def _routes_of(self, version: int, entity: ServedEntity, share: int) -> EntityRoutes:
        replicas = [each for each in self._observed().of(version, entity.name) if each.phase is Phase.READY]
        is_asleep = not replicas and self._is_asleep(version, entity.name)
        problem = self._hindrance(version, entity.name) if is_asleep else ""
        return EntityRoutes(
            entity.name,
            entity.model.version,
            share,
            tuple(ReplicaAddress(replica.id, self._handles[replica.id].address) for replica in replicas),
            is_asleep=is_asleep and not problem,
            problem=problem,
        )

    def _progress(self, version: int, entity: str, count: int) -> str:
        """What goes on with an entity that has fewer replicas than it is to have; empty when it has not."""
        ready = self._observed().ready(version, entity)
        if ready >= count:
            return ""
        doing = self._doing(version, entity)
        return f"{ready} of {count} replicas are ready. {doing}" if ready else doing

    def _doing(self, version: int, entity: str) -> str:
        """What goes on with replicas that are not ready, or what they wait for."""
        replicas = self._observed().of(version, entity)
        starting = [replica for replica in replicas if replica.is_live and replica.phase is not Phase.READY]
        retry = self._retries.get((version, entity))
        if starting:
            message = self._timeline.message(starting[-1].id) or starting[-1].message
            return message if retry is None else f"{message} Before: {retry.message}"
        if retry is not None:
            return f"{retry.message} It is going to be tried again."
        return "Waiting to be started."

    def _change(self, replica_id: str, **facts: Any) -> None:
        if replica_id in self._replicas:
            self._replicas[replica_id] = replace(self._replicas[replica_id], **facts)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"endpoint {self.endpoint_id}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            kind = (type(error), error, error.__traceback__)
            log.error("endpoint controller failed", extra={"endpoint": self.endpoint_id}, exc_info=kind)


def _first(config: EndpointConfig) -> reconcile.Wanted:
    """What a version is to have before it is activated."""
    return reconcile.Wanted(config.version, {each.name: scaling.bounds(each).first for each in config.entities})
