"""The use cases of endpoints: check everything, record what is desired, wake the controller; and read.

What a change needs of Secrets (grants, and permissions of a new endpoint) stands in another database. So we reserve,
Secrets grants, we commit; what a failure leaves in between is taken back at once, or by the next start. To a caller
without any permission an endpoint does not exist.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import grpc

from servicekit import once
from servicekit.access import AccessTable
from servicekit.context import Level, Principal, current_decision
from servicekit.database import Database
from servicekit.errors import ServiceError
from servicekit.once import Answers
from serving_service import configs, store
from serving_service.controllers import Controllers
from serving_service.environment import SecretReferences
from serving_service.errors import (
    ConfigVersionNotFound,
    EndpointExists,
    EndpointNotFound,
    EndpointPermissionDenied,
    EntityNotFound,
    UpdateInProgress,
)
from serving_service.model import ConfigUpdate, Endpoint, EndpointConfig, EntityState
from serving_service.registry import Registry
from serving_service.settlement import Settlement
from tessera import policy
from tessera.serving.v1 import serving_pb2 as pb

T = TypeVar("T")

LOG_BYTES = 1 << 20
"""How much of a log is handed out: its end."""


@dataclass(frozen=True)
class View:
    """An endpoint with the states of the entities of its active and of its pending configuration."""

    endpoint: Endpoint
    active: dict[str, EntityState]
    pending: dict[str, EntityState]
    level: Level
    """What the caller may do with it."""


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


class Endpoints:
    """What callers do with endpoints."""

    def __init__(
        self,
        database: Database,
        registry: Registry,
        references: SecretReferences,
        controllers: Controllers,
        *,
        access: AccessTable,
        settlement: Settlement,
        answers: Answers,
    ) -> None:
        self._database = database
        self._registry = registry
        self._references = references
        self._controllers = controllers
        self._access = access
        self._settlement = settlement
        self._answers = answers
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

    async def logs(self, name: str, entity: str, *, caller: Principal) -> str:
        """The latest output of a served entity: the pending configuration's when it has one of that name."""
        endpoint, _ = await self._found(name, caller)
        config = _config_with(endpoint, entity, None)
        return await self._controllers.logs(endpoint.id, config.version, entity, LOG_BYTES)

    async def build_logs(self, name: str, entity: str, version: int | None, *, caller: Principal) -> str:
        """How the environment of a served entity came about."""
        endpoint, _ = await self._found(name, caller)
        config = _config_with(endpoint, entity, version)
        return (
            f"Served entity '{entity}' of configuration version {config.version}: "
            f"The model runs in the service's own Python environment; nothing was built.\n"
        )

    async def _create(self, request: pb.CreateServingEndpointRequest, caller: Principal) -> View:
        await self._database.read(self._answers.look)
        configs.check_create(request)
        now = _now()
        pending = None
        if request.HasField("config"):
            pending = configs.read_config(request.config, at="config", version=1, author=caller.name, now=now)
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
            description=request.description,
            tags=tuple((tag.key, tag.value) for tag in request.tags),
            created_at=now,
            updated_at=now,
            latest_version=1 if pending else 0,
            pending=pending,
            config_update=ConfigUpdate.IN_PROGRESS if pending else ConfigUpdate.NOT_UPDATING,
        )
        view = self._view(endpoint, Level.CAN_MANAGE)

        def commit(connection: sqlite3.Connection) -> View:
            store.commit_endpoint(connection, endpoint)
            return view

        await self._database.write(store.reserve_endpoint, endpoint)
        try:
            await self._references.grant(endpoint.id, pending, is_new=True)
            await self._database.write(self._answers.once, commit)
        except BaseException:
            self._settlement.deleted(endpoint.id)
            await self._database.write(store.release_endpoint, endpoint.id)
            raise
        self._controllers.created(endpoint.id)
        return view

    async def _update_config(self, name: str, config: pb.EndpointCoreConfigInput, caller: Principal) -> View:
        await self._database.read(self._answers.look)
        endpoint, level = await self._found(name, caller)
        if endpoint.is_updating:
            raise UpdateInProgress(name)
        pending = configs.read_config(
            config, at="", version=endpoint.latest_version + 1, author=caller.name, now=_now()
        )
        pending = await self._with_models(pending)
        updated = replace(
            endpoint,
            pending=pending,
            latest_version=pending.version,
            updated_at=pending.created_at,
            config_update=ConfigUpdate.IN_PROGRESS,
            failures={},
        )
        view = self._view(updated, level)

        def commit(connection: sqlite3.Connection) -> View:
            store.propose_config(connection, endpoint, pending)
            return view

        await self._database.write(store.reserve_version, endpoint, pending.version)
        try:
            await self._references.grant(endpoint.id, pending, is_new=False)
            await self._database.write(self._answers.once, commit)
        except BaseException as error:
            is_verdict = isinstance(error, ServiceError) and error.code in _VERDICTS
            if not is_verdict:
                self._settlement.dropped(endpoint.id, pending.version)
            await self._database.write(store.release_version, endpoint.id, is_used=not is_verdict)
            raise
        if endpoint.pending is not None:
            self._settlement.dropped(endpoint.id, endpoint.pending.version)
        self._controllers.wake(endpoint.id)
        return view

    async def _delete(self, name: str, caller: Principal) -> None:
        await self._database.read(self._answers.look)
        endpoint, _ = await self._found(name, caller)

        def delete(connection: sqlite3.Connection) -> None:
            if not store.mark_deleted(connection, endpoint.id):
                raise EndpointNotFound(name)

        await self._database.write(self._answers.once, delete)
        self._controllers.deleted(endpoint.id)
        self._settlement.deleted(endpoint.id)

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
        needed = Level[decision.row.level]
        await self._access.known()
        # Nothing else is read on behalf of who may not see it: the time of the answer would tell that it is there.
        endpoint_id = await self._database.read(store.id_of, name)
        # Asked in any case, so that an endpoint that cannot be judged looks like one that does not exist.
        level = self._access.level(caller, endpoint_id or "")
        if endpoint_id is None or level is None:
            raise EndpointNotFound(name)
        if level < needed:
            raise EndpointPermissionDenied(caller.name, needed, name)
        endpoint = await self._database.read(store.endpoint_with_id, endpoint_id)
        if endpoint is None or endpoint.is_deleted:
            raise EndpointNotFound(name)
        decision.allow()
        return endpoint, level

    async def _with_models(self, config: EndpointConfig) -> EndpointConfig:
        """The configuration with what the registry says about its models; raises for one that is not there."""
        models = await asyncio.gather(
            *(self._registry.describe(entity.model.name, entity.model.version) for entity in config.entities)
        )
        described = zip(config.entities, models, strict=True)
        return replace(config, entities=tuple(replace(entity, model=model) for entity, model in described))

    def _view(self, endpoint: Endpoint, level: Level) -> View:
        return View(endpoint, self._states(endpoint, endpoint.active), self._states(endpoint, endpoint.pending), level)

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


def _now() -> int:
    return time.time_ns() // 1_000_000
