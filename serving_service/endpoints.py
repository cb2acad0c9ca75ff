"""The use cases of endpoints: check everything, record what is desired, wake the controller; and read.

What a change needs of Secrets (grants, and permissions of a new endpoint) stands in another database. So we reserve,
Secrets grants, we commit; what a failure leaves in between is taken back at once, or by the next start. To a caller
without any permission an endpoint does not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc

from servicekit import once, warnings
from servicekit.access import AccessTable
from servicekit.context import Level, Principal, current_decision
from servicekit.errors import FeatureDisabled, ServiceError, Unavailable
from servicekit.once import Answers
from servicekit.storage import Connection, Storage, StorageError
from serving_service import configs, details, mlmodel, monitoring, openapi, quotas, store
from serving_service.build_logs import BuildLogs
from serving_service.controllers import Controllers
from serving_service.environment import SecretReferences
from serving_service.errors import (
    ConfigVersionNotFound,
    EndpointExists,
    EndpointNotFound,
    EntityNotFound,
    NotDescribable,
    NothingToCancel,
    NotStoppable,
    NotStopped,
    TelemetryNotSupported,
    UpdateInProgress,
)
from serving_service.followers import Followers, News
from serving_service.gpus import Machine
from serving_service.model import ConfigUpdate, Deployment, Endpoint, EndpointConfig, EntityState, Minute, MinuteOfUse
from serving_service.monitoring import Monitoring, Page
from serving_service.outputs import LOG_BYTES, BuildOutput, ReplicaOutput
from serving_service.phases import LaunchEvent
from serving_service.registry import Registry
from serving_service.settlement import Settlement
from tessera import policy
from tessera.serving.v1 import serving_pb2 as pb

log = logging.getLogger(__name__)

T = TypeVar("T")

FILES_SECONDS = 8.0
"""How long a description waits for the files of models that are not here any more."""


@dataclass(frozen=True)
class View:
    """An endpoint with the states of the entities of its active and of its pending configuration."""

    endpoint: Endpoint
    active: dict[str, EntityState]
    pending: dict[str, EntityState]
    level: Level
    """What the caller may do with it."""
    url: str = ""
    """Where a route-optimized one is asked; empty for any other."""

    @property
    def is_ready(self) -> bool:
        """Whether all of its active configuration answers; what is at zero, or comes up from there, counts too."""
        return self.endpoint.active is not None and all(
            state.deployment in (Deployment.READY, Deployment.CREATING) for state in self.active.values()
        )


_VERDICTS = frozenset(
    (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
    )
)
"""Answers of Secrets after which nothing is granted; after any other nobody knows."""

RELEASE_SECONDS = 1.0
"""Until a reservation that could not be released is released again."""


class Endpoints:
    """What callers do with endpoints."""

    def __init__(
        self,
        database: Storage,
        registry: Registry,
        references: SecretReferences,
        controllers: Controllers,
        build_logs: BuildLogs,
        followers: Followers,
        *,
        access: AccessTable,
        settlement: Settlement,
        answers: Answers,
        monitoring: Monitoring,
        public_url: str,
        can_notify: bool,
        machine: Machine,
        often: quotas.EndpointChanges,
    ) -> None:
        """`machine` is where models run, `often` how often endpoints may be made or changed."""
        self._database = database
        self._registry = registry
        self._references = references
        self._controllers = controllers
        self._build_logs = build_logs
        self._followers = followers
        self._access = access
        self._settlement = settlement
        self._answers = answers
        self._monitoring = monitoring
        self._public_url = public_url
        self._can_notify = can_notify
        self._machine = machine
        self._often = often
        self._changes: set[asyncio.Task[Any]] = set()
        self._asked: dict[tuple[int, str], asyncio.Task[Any]] = {}
        """Changes under way whose callers chose their ids."""

    async def create(self, request: pb.CreateServingEndpointRequest, *, caller: Principal) -> View:
        """Creates an endpoint; nothing of it is there when this raises."""
        return await self._to_its_end(lambda: self._create(request, caller))

    async def update_config(self, name: str, config: pb.EndpointCoreConfigInput, *, caller: Principal) -> View:
        """Records a new pending configuration; the active one goes on."""
        return await self._to_its_end(lambda: self._update_config(name, config, caller))

    async def get(self, name: str, *, caller: Principal) -> View:
        """The endpoint of that name."""
        return self._view(*await self._found(name, caller))

    async def list_visible(self, *, caller: Principal) -> list[View]:
        """Every endpoint that the caller may see, by name."""
        await self._access.known()
        ids = await self._database.read(store.all_ids)
        decision = current_decision(policy.ENDPOINT)
        needed = Level[decision.row.level]
        levels = {each: self._access.level(caller, each) for each in ids}
        decision.allow()  # everybody may ask; what is shown is decided for each
        # As for one endpoint, nothing else is read of those that the caller may not see.
        visible = {each: level for each, level in levels.items() if level and level >= needed}
        endpoints = await self._database.read(store.endpoints_with_ids, list(visible))
        return [self._view(endpoint, visible[endpoint.id]) for endpoint in endpoints]

    async def delete(self, name: str, *, caller: Principal) -> None:
        """Deletes an endpoint at once; its replicas are stopped afterwards."""
        await self._to_its_end(lambda: self._delete(name, caller))

    async def stop(self, name: str, *, caller: Principal) -> View:
        """Has the endpoint rest until it is started."""
        return await self._to_its_end(lambda: self._stop(name, caller))

    async def start(self, name: str, *, caller: Principal) -> View:
        """Deploys the configuration of a stopped endpoint as a new version."""
        return await self._to_its_end(lambda: self._start(name, caller))

    async def cancel_update(self, name: str, *, caller: Principal) -> View:
        """Gives up the update that is under way."""
        return await self._to_its_end(lambda: self._cancel_update(name, caller))

    async def patch_tags(self, request: pb.PatchServingEndpointTagsRequest, *, caller: Principal) -> Endpoint:
        """Adds and removes tags."""

        def change(endpoint: Endpoint) -> Endpoint:
            added = details.read_tags(request.add_tags, at="add_tags")
            tags = details.changed_tags(endpoint.tags, added=added, deleted=request.delete_tags)
            return replace(endpoint, tags=tags)

        return await self._to_its_end(lambda: self._change(request.name, change, caller))

    async def put_rate_limits(self, request: pb.PutServingEndpointRateLimitsRequest, *, caller: Principal) -> Endpoint:
        """Replaces the rate limits in the older spelling."""

        def change(endpoint: Endpoint) -> Endpoint:
            return replace(endpoint, rate_limits=details.read_rate_limits(request.rate_limits))

        return await self._to_its_end(lambda: self._change(request.name, change, caller))

    async def put_ai_gateway(self, name: str, gateway: pb.AiGatewayConfig, *, caller: Principal) -> Endpoint:
        """Replaces the AI gateway configuration."""

        def change(endpoint: Endpoint) -> Endpoint:
            return replace(endpoint, ai_gateway=details.read_ai_gateway(gateway, at=""))

        return await self._to_its_end(lambda: self._change(name, change, caller))

    async def update_notifications(
        self, name: str, notifications: pb.EmailNotifications | None, *, caller: Principal
    ) -> Endpoint:
        """Replaces whom to tell about ended updates; None: they stay as they are."""

        def change(endpoint: Endpoint) -> Endpoint:
            if notifications is None:
                return endpoint
            return replace(endpoint, email_notifications=self._notifications(name, notifications))

        return await self._to_its_end(lambda: self._change(name, change, caller))

    async def patch_telemetry(self, name: str, telemetry: pb.TelemetryConfig | None, *, caller: Principal) -> View:
        """Replaces the telemetry configuration; None removes it."""
        return await self._to_its_end(lambda: self._patch_telemetry(name, telemetry, caller))

    async def events(self, name: str, *, caller: Principal) -> list[LaunchEvent]:
        """What the endpoint's launches did when, the oldest first."""
        endpoint, _ = await self._found(name, caller)
        # In this order: what is stored meanwhile is seen twice rather than not at all.
        unstored = self._controllers.events(endpoint.id)
        stored = await self._database.read(store.events_of, endpoint.id)
        known = {(event.replica_id, event.phase) for event in stored}
        new = [event for event in unstored if (event.replica_id, event.phase) not in known]
        return sorted((*stored, *new), key=lambda event: event.started_at)

    async def metrics(self, name: str, *, caller: Principal) -> bytes:
        """What was measured of the endpoint, as text for Prometheus."""
        endpoint, _ = await self._found(name, caller)
        return self._monitoring.metrics(endpoint)

    async def metrics_history(
        self, request: pb.ListServingEndpointMetricsHistoryRequest, *, caller: Principal
    ) -> Page[Minute]:
        """What was measured of the endpoint in each minute."""
        endpoint, _ = await self._found(request.name, caller)
        return await self._monitoring.history(endpoint, monitoring.read_period(request))

    async def usage(self, request: pb.ListServingEndpointUsageRequest, *, caller: Principal) -> Page[MinuteOfUse]:
        """Who used the endpoint in each minute."""
        endpoint, _ = await self._found(request.name, caller)
        return await self._monitoring.usage(endpoint, monitoring.read_period(request))

    async def logs(self, name: str, entity: str, *, caller: Principal) -> str:
        """The latest output of a served entity: the pending configuration's when it has one of that name."""
        endpoint, _ = await self._found(name, caller)
        config = _config_with(endpoint, entity, None)
        return await self._controllers.logs(endpoint.id, config.version, entity, LOG_BYTES)

    async def build_logs(self, name: str, entity: str, version: int | None, *, caller: Principal) -> str:
        """How the environment of a served entity came about."""
        endpoint, _ = await self._found(name, caller)
        config = _config_with(endpoint, entity, version)
        return await self._build_logs.text(endpoint.id, config.version, entity)

    async def follow_logs(self, name: str, entity: str, *, caller: Callable[[], Principal]) -> AsyncIterator[str]:
        """The output of a served entity as it comes, and signs of life, which are empty.

        Ends when nothing of it is going to run any more; `caller` tells each time who asks.
        """
        first, _ = await self._found(name, caller())
        output = ReplicaOutput(self._database, self._controllers, first.id, entity)

        async def look() -> News:
            endpoint = await self._same(first, caller())
            config = _config_with(endpoint, entity, None)
            is_all = endpoint.is_at_rest(config) and not self._controllers.has_replicas(
                endpoint.id, config.version, entity
            )
            return News(await output.news(config.version), is_all)

        async for text in self._followers.follow(caller().id, look):
            yield text

    async def follow_build_logs(
        self, name: str, entity: str, version: int | None, *, caller: Callable[[], Principal]
    ) -> AsyncIterator[str]:
        """As `follow_logs`, how the environment of a served entity comes about, until it has or never will."""
        first, _ = await self._found(name, caller())
        config = _config_with(first, entity, version)
        output = BuildOutput(self._build_logs, first.id, config.version, entity)

        async def look() -> News:
            endpoint = await self._same(first, caller())
            is_pending = endpoint.pending is not None and endpoint.pending.version == config.version
            return await output.news(is_awaited=is_pending and endpoint.is_updating)

        async for text in self._followers.follow(caller().id, look):
            yield text

    async def openapi(self, name: str, *, caller: Principal) -> bytes:
        """How the endpoint's entities are queried, as an OpenAPI document in JSON."""
        view = self._view(*await self._found(name, caller))
        config = view.endpoint.active
        if config is None or not view.is_ready:
            raise NotDescribable(name, NotDescribable.IS_NOT_READY)
        folders = await self._fetched(config)
        # Without a public address: relative to where the document is read, which is the same.
        url = f"{self._public_url}/serving-endpoints/{name}"
        try:
            return await asyncio.to_thread(_described, name, url, config.version, folders)
        except mlmodel.UnusableSignature as error:
            raise NotDescribable(name, f"{error}.") from None
        except OSError:
            raise Unavailable("The models' files cannot be read just now. Try again.", retry_after=5) from None

    async def _fetched(self, config: EndpointConfig) -> dict[str, Path]:
        """The folders of the models' files by entity; those of what runs are here already."""
        try:
            async with asyncio.timeout(FILES_SECONDS):
                paths = await asyncio.gather(*(self._registry.fetch(entity.model) for entity in config.entities))
        except TimeoutError:
            raise Unavailable("The models' files are being fetched just now. Try again.", retry_after=5) from None
        return dict(zip([entity.name for entity in config.entities], paths, strict=True))

    async def _create(self, request: pb.CreateServingEndpointRequest, caller: Principal) -> View:
        await self._database.read(self._answers.look)
        configs.check_create(request)
        described = self._described(request)
        self._often.check()
        now = _now()
        pending = None
        if request.HasField("config"):
            pending = configs.read_config(
                request.config, at="config", version=1, author=caller.name, now=now, machine=self._machine
            )
            # Said before the registry is asked about models; the reservation looks again.
            if await self._database.read(store.endpoint_named, request.name) is not None:
                raise EndpointExists(request.name)
            pending = await self._with_models(pending)
        endpoint = Endpoint(
            id=uuid.uuid4().hex,
            name=request.name,
            creator_id=caller.id,
            creator=caller.name,
            creator_kind="ServicePrincipal" if caller.kind == "service_principal" else "User",
            created_at=now,
            updated_at=now,
            latest_version=1 if pending else 0,
            pending=pending,
            config_update=ConfigUpdate.IN_PROGRESS if pending else ConfigUpdate.NOT_UPDATING,
            **described,
        )
        details.check_listed(endpoint)
        view = self._view(endpoint, Level.CAN_MANAGE)

        def commit(connection: Connection) -> View:
            if pending is not None:
                _check_quotas(connection, endpoint.id, pending)
            store.commit_endpoint(connection, endpoint)
            return view

        if pending is not None:
            await self._database.read(_check_quotas, endpoint.id, pending)
        await self._database.write(store.reserve_endpoint, endpoint)
        is_granted = False
        try:
            await self._references.grant(endpoint.id, pending, is_new=True)
            is_granted = True
            self._often.count()
            await self._database.write(self._answers.once, commit)
        except BaseException as error:
            if is_granted or not _is_verdict(error):
                self._settlement.deleted(endpoint.id)
            await self._release(partial(store.release_endpoint, endpoint_id=endpoint.id))
            raise
        self._controllers.created(endpoint.id)
        return view

    def _described(self, request: pb.CreateServingEndpointRequest) -> dict[str, Any]:
        """What a create request says beside the configuration; raises InvalidParameter or FeatureDisabled."""
        if request.route_optimized and not self._public_url:
            raise FeatureDisabled(
                "route_optimized: this platform does not know the address that clients reach it under. Have"
                " TESSERA_PUBLIC_URL set for the Serving service, or leave the field out."
            )
        telemetry = details.read_telemetry(request.telemetry_config, at="telemetry_config")
        has_telemetry = request.HasField("telemetry_config") and request.HasField("config")
        return {
            "rate_limits": details.read_rate_limits(request.rate_limits),
            "description": request.description,
            "tags": details.read_tags(request.tags, at="tags"),
            "ai_gateway": details.read_ai_gateway(request.ai_gateway, at="ai_gateway"),
            "email_notifications": self._notifications(request.name, request.email_notifications)
            if request.HasField("email_notifications")
            else None,
            "telemetry_config": telemetry if has_telemetry else None,
            "budget_policy_id": request.budget_policy_id,
            "route_optimized": request.route_optimized,
        }

    async def _change(self, name: str, change: Callable[[Endpoint], Endpoint], caller: Principal) -> Endpoint:
        """Changes what stands beside the configuration; `change` is given what is recorded by then."""
        await self._database.read(self._answers.look)
        endpoint, _ = await self._found(name, caller)

        def commit(connection: Connection) -> Endpoint:
            current = store.endpoint_with_id(connection, endpoint.id)
            if current is None or current.is_deleted:
                raise EndpointNotFound(name)
            changed = replace(change(current), updated_at=_now())
            details.check_listed(changed)
            store.save_details(connection, changed)
            return changed

        changed = await self._database.write(self._answers.once, commit)
        self._controllers.wake(endpoint.id)  # gateways keep to rate limits, which may have changed
        return changed

    async def _patch_telemetry(self, name: str, telemetry: pb.TelemetryConfig | None, caller: Principal) -> View:
        await self._database.read(self._answers.look)
        endpoint, level = await self._found(name, caller)
        said = None if telemetry is None else details.read_telemetry(telemetry, at="telemetry_config")
        if endpoint.is_updating:
            raise UpdateInProgress(name)
        if endpoint.active is None and endpoint.pending is None:
            raise TelemetryNotSupported
        view = self._view(replace(endpoint, telemetry_config=said, updated_at=_now()), level)

        def commit(connection: Connection) -> View:
            current = store.endpoint_with_id(connection, endpoint.id)
            if current is None or current.is_deleted:
                raise EndpointNotFound(name)
            if (current.latest_version, current.is_updating) != (endpoint.latest_version, False):
                raise UpdateInProgress(name)
            changed = replace(current, telemetry_config=said, updated_at=view.endpoint.updated_at)
            details.check_listed(changed)
            store.save_details(connection, changed)
            return view

        return await self._database.write(self._answers.once, commit)

    async def _update_config(self, name: str, config: pb.EndpointCoreConfigInput, caller: Principal) -> View:
        await self._database.read(self._answers.look)
        endpoint, level = await self._found(name, caller)
        if endpoint.is_updating:
            raise UpdateInProgress(name)
        self._often.check()
        pending = configs.read_config(
            config,
            at="",
            version=endpoint.latest_version + 1,
            author=caller.name,
            now=_now(),
            machine=self._machine,
        )
        return await self._proposed(endpoint, level, await self._with_models(pending), count=self._often.count)

    async def _proposed(
        self, endpoint: Endpoint, level: Level, pending: EndpointConfig, *, count: Callable[[], None] = lambda: None
    ) -> View:
        """Has the endpoint, as it was seen, deploy a configuration of the next version; `count` is called before it is
        recorded, and may raise."""
        updated = replace(
            endpoint,
            pending=pending,
            latest_version=pending.version,
            updated_at=pending.created_at,
            config_update=ConfigUpdate.IN_PROGRESS,
            failures={},
        )
        details.check_listed(updated)
        view = self._view(updated, level)

        def commit(connection: Connection) -> View:
            _check_quotas(connection, endpoint.id, pending)
            store.propose_config(connection, endpoint, pending)
            current = store.endpoint_with_id(connection, endpoint.id)
            assert current is not None
            details.check_listed(current)  # tags may have been added meanwhile
            return view

        await self._database.read(_check_quotas, endpoint.id, pending)
        await self._database.write(store.reserve_version, endpoint, pending.version)
        is_granted = False
        try:
            await self._references.grant(endpoint.id, pending, is_new=False)
            is_granted = True
            count()
            await self._database.write(self._answers.once, commit)
        except BaseException as error:
            is_used = is_granted or not _is_verdict(error)
            if is_used:
                self._settlement.dropped(endpoint.id, pending.version)
            await self._release(partial(store.release_version, endpoint_id=endpoint.id, is_used=is_used))
            raise
        if endpoint.pending is not None:
            self._settlement.dropped(endpoint.id, endpoint.pending.version)
        self._controllers.wake(endpoint.id)
        return view

    async def _start(self, name: str, caller: Principal) -> View:
        await self._database.read(self._answers.look)
        endpoint, level = await self._found(name, caller)
        if endpoint.is_updating:
            raise UpdateInProgress(name)
        if not endpoint.is_stopped or endpoint.active is None:
            raise NotStopped(name)
        pending = replace(endpoint.active, version=endpoint.latest_version + 1, created_at=_now())
        return await self._proposed(endpoint, level, pending)

    async def _stop(self, name: str, caller: Principal) -> View:
        await self._database.read(self._answers.look)
        endpoint, level = await self._found(name, caller)
        if endpoint.is_updating:
            raise NotStoppable(name, NotStoppable.IS_UPDATING)
        if endpoint.active is None:
            raise NotStoppable(name, NotStoppable.IS_BARE)
        stopped = replace(
            endpoint,
            is_stopped=True,
            pending=None,
            config_update=ConfigUpdate.NOT_UPDATING,
            failures={},
            updated_at=_now(),
        )
        view = self._view(stopped, level)

        def commit(connection: Connection) -> View:
            store.stop_endpoint(connection, stopped)
            return view

        await self._database.write(self._answers.once, commit)
        if endpoint.pending is not None:
            self._settlement.dropped(endpoint.id, endpoint.pending.version)
        self._controllers.wake(endpoint.id)
        return view

    async def _cancel_update(self, name: str, caller: Principal) -> View:
        await self._database.read(self._answers.look)
        endpoint, level = await self._found(name, caller)
        if not endpoint.is_updating or endpoint.pending is None:
            raise NothingToCancel(name)
        state = EntityState(Deployment.ABORTED, f"Given up, because {caller.name} cancelled the update.")
        canceled = replace(
            endpoint,
            config_update=ConfigUpdate.UPDATE_CANCELED,
            failures={entity.name: state for entity in endpoint.pending.entities},
            updated_at=_now(),
        )
        view = self._view(canceled, level)

        def commit(connection: Connection) -> View:
            store.cancel_update(connection, canceled)
            return view

        await self._database.write(self._answers.once, commit)
        self._controllers.wake(endpoint.id)
        return view

    async def _delete(self, name: str, caller: Principal) -> None:
        await self._database.read(self._answers.look)
        endpoint, _ = await self._found(name, caller)

        def delete(connection: Connection) -> None:
            if not store.mark_deleted(connection, endpoint.id):
                raise EndpointNotFound(name)

        await self._database.write(self._answers.once, delete)
        self._controllers.deleted(endpoint.id)
        self._settlement.deleted(endpoint.id)

    async def _release(self, release: Callable[[Connection], None]) -> None:
        """Takes a reservation back, now or as soon as the database can be written again: nobody else would."""
        try:
            await self._database.write(release)
        except StorageError:
            log.warning("a reservation cannot be released yet")
            task = asyncio.create_task(self._release_later(release), name="reservation")
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)

    async def _release_later(self, release: Callable[[Connection], None]) -> None:
        while True:
            await asyncio.sleep(RELEASE_SECONDS)
            with contextlib.suppress(StorageError):
                await self._database.write(release)
                return

    async def _to_its_end(self, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Makes a change that ends as it will, also when whoever asked for it is gone; retries of it wait for it."""
        asked = once.chosen_id()
        while asked is not None and asked in self._asked:
            await asyncio.wait([self._asked[asked]])
        task = asyncio.create_task(change(), name="endpoint change")
        self._changes.add(task)
        if asked is not None:
            self._asked[asked] = task
        task.add_done_callback(partial(self._changed, asked))
        return await asyncio.shield(task)

    def _changed(self, asked: tuple[int, str] | None, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if asked is not None:
            del self._asked[asked]
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody need hear of it when the caller is gone

    async def _found(self, name: str, caller: Principal) -> tuple[Endpoint, Level]:
        """An endpoint on which the caller has the level that the policy asks for, and the level that it has.

        Raises EndpointNotFound and EndpointPermissionDenied.
        """
        decision = current_decision(policy.ENDPOINT)
        await self._access.known()
        # Nothing else is read on behalf of who may not see it: the time of the answer would tell that it is there.
        endpoint_id = await self._database.read(store.id_of, name)
        level = self._access.decide(decision, caller, name=name, endpoint_id=endpoint_id)
        if endpoint_id is None or level is None:
            raise EndpointNotFound(name)
        endpoint = await self._database.read(store.endpoint_with_id, endpoint_id)
        if endpoint is None or endpoint.is_deleted:
            raise EndpointNotFound(name)
        return endpoint, level

    async def _same(self, known: Endpoint, caller: Principal) -> Endpoint:
        """An endpoint as it is now, as `_found`; another one that has taken its name by now is not it."""
        endpoint, _ = await self._found(known.name, caller)
        if endpoint.id != known.id:
            raise EndpointNotFound(known.name)
        return endpoint

    async def _with_models(self, config: EndpointConfig) -> EndpointConfig:
        """The configuration with what the registry says about its models; raises for one that is not there."""
        models = await asyncio.gather(
            *(self._registry.describe(entity.model.name, entity.model.version) for entity in config.entities)
        )
        described = zip(config.entities, models, strict=True)
        return replace(config, entities=tuple(replace(entity, model=model) for entity, model in described))

    def _notifications(self, name: str, notifications: pb.EmailNotifications) -> details.Plain:
        """Whom to tell, with a warning when there is no way to tell anybody."""
        said = details.read_notifications(notifications, at="email_notifications")
        if any(said.values()) and not self._can_notify:
            warnings.warn(
                "notifications are not sent",
                "email_notifications: they are kept, but this platform has no mail server or webhook for them.",
                endpoint=name,
            )
        return said

    def _view(self, endpoint: Endpoint, level: Level) -> View:
        has_url = endpoint.route_optimized and self._public_url
        return View(
            endpoint,
            self._states(endpoint, endpoint.active),
            self._states(endpoint, endpoint.pending),
            level,
            f"{self._public_url}/serving-endpoints/{endpoint.name}/invocations" if has_url else "",
        )

    def _states(self, endpoint: Endpoint, config: EndpointConfig | None) -> dict[str, EntityState]:
        if config is None:
            return {}
        return {entity.name: self._controllers.state_of(endpoint, config, entity.name) for entity in config.entities}


def _config_with(endpoint: Endpoint, entity: str, version: int | None) -> EndpointConfig:
    """The configuration that has the entity: of that version, else the pending one, else the active one."""
    known = [config for config in (endpoint.pending, endpoint.active) if config is not None]
    if version is not None:
        known = [config for config in known if config.version == version]
        if not known:
            raise ConfigVersionNotFound(endpoint.name, version)
    for config in known:
        if config.entity(entity) is not None:
            return config
    raise EntityNotFound(endpoint.name, entity)


def _described(name: str, url: str, version: int, folders: Mapping[str, Path]) -> bytes:
    """Reads the models' files. Raises NotDescribable, UnusableSignature, OSError."""
    signatures = {}
    for entity, folder in folders.items():
        try:
            signature = mlmodel.read(folder)
        except mlmodel.UnusableSignature as error:
            raise NotDescribable(name, f"served entity '{entity}': {error}.") from None
        if signature is None:
            raise NotDescribable(name, NotDescribable.HAS_NO_SIGNATURE.format(entity=entity))
        signatures[entity] = signature
    return openapi.document(name, url, version, signatures)


def _check_quotas(connection: Connection, endpoint_id: str, config: EndpointConfig) -> None:
    """Before Secrets is asked for anything, and again when it is recorded: others may have come in between."""
    quotas.check(config, store.deployed_by_others(connection, endpoint_id))


def _now() -> int:
    return time.time_ns() // 1_000_000


def _is_verdict(error: BaseException) -> bool:
    return isinstance(error, ServiceError) and error.code in _VERDICTS
