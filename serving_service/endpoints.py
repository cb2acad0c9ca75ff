"""The use cases of endpoints: check everything, record what is desired, wake the controller; and read.

For now an endpoint belongs to its creator and to admins; to everybody else it does not exist.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from dataclasses import dataclass, replace

from servicekit.context import Principal
from servicekit.database import Database
from serving_service import configs, store
from serving_service.controllers import Controllers
from serving_service.environment import SecretReferences, references_of
from serving_service.errors import (
    ConfigVersionNotFound,
    EndpointExists,
    EndpointNotFound,
    EntityNotFound,
    UpdateInProgress,
)
from serving_service.model import ConfigUpdate, Endpoint, EndpointConfig, EntityState
from serving_service.registry import Registry
from tessera.serving.v1 import serving_pb2 as pb

LOG_BYTES = 1 << 20
"""How much of a log is handed out: its end."""


@dataclass(frozen=True)
class View:
    """An endpoint with the states of the entities of its active and of its pending configuration."""

    endpoint: Endpoint
    active: dict[str, EntityState]
    pending: dict[str, EntityState]


def may_manage(caller: Principal, creator_id: str) -> bool:
    """Whether the caller may do anything at all with an endpoint."""
    return caller.is_admin or caller.id == creator_id


class Endpoints:
    """What callers do with endpoints."""

    def __init__(
        self, database: Database, registry: Registry, references: SecretReferences, controllers: Controllers
    ) -> None:
        self._database = database
        self._registry = registry
        self._references = references
        self._controllers = controllers

    async def create(self, request: pb.CreateServingEndpointRequest, *, caller: Principal) -> View:
        """Creates an endpoint; nothing of it is there when this raises."""
        configs.check_create(request)
        now = _now()
        pending = None
        if request.HasField("config"):
            pending = configs.read_config(request.config, at="config", version=1, author=caller.name, now=now)
            # Said before anybody is asked about secrets and models; the transaction below looks again.
            if await self._database.read(store.endpoint_named, request.name) is not None:
                raise EndpointExists(request.name)
            await self._references.check(pending.entities, creator_id="", known=())
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
        await self._database.write(store.add_endpoint, endpoint)
        self._controllers.created(endpoint.id)
        return self._view(endpoint)

    async def update_config(self, name: str, config: pb.EndpointCoreConfigInput, *, caller: Principal) -> View:
        """Records a new pending configuration; the active one goes on."""
        endpoint = await self._found(name, caller)
        if endpoint.is_updating:
            raise UpdateInProgress(name)
        pending = configs.read_config(
            config, at="", version=endpoint.latest_version + 1, author=caller.name, now=_now()
        )
        before = [each for each in (endpoint.active, endpoint.pending) if each is not None]
        known = {folded for each in before for folded in references_of(each.entities)}
        await self._references.check(pending.entities, creator_id=endpoint.creator_id, known=known)
        pending = await self._with_models(pending)
        await self._database.write(store.propose_config, endpoint, pending)
        self._controllers.wake(endpoint.id)
        return self._view(
            replace(
                endpoint,
                pending=pending,
                latest_version=pending.version,
                updated_at=pending.created_at,
                config_update=ConfigUpdate.IN_PROGRESS,
                failures={},
            )
        )

    async def get(self, name: str, *, caller: Principal) -> View:
        """The endpoint of that name."""
        return self._view(await self._found(name, caller))

    async def list_visible(self, *, caller: Principal) -> list[View]:
        """Every endpoint that the caller may see, by name."""
        endpoints = await self._database.read(store.all_endpoints, deleted=False)
        return [self._view(endpoint) for endpoint in endpoints if may_manage(caller, endpoint.creator_id)]

    async def delete(self, name: str, *, caller: Principal) -> None:
        """Deletes an endpoint at once; its replicas are stopped afterwards."""
        endpoint = await self._found(name, caller)
        if not await self._database.write(store.mark_deleted, endpoint.id):
            raise EndpointNotFound(name)
        self._controllers.deleted(endpoint.id)

    async def logs(self, name: str, entity: str, *, caller: Principal) -> str:
        """The latest output of a served entity: the pending configuration's when it has one of that name."""
        endpoint = await self._found(name, caller)
        config = _config_with(endpoint, entity, None)
        return await self._controllers.logs(endpoint.id, config.version, entity, LOG_BYTES)

    async def build_logs(self, name: str, entity: str, version: int | None, *, caller: Principal) -> str:
        """How the environment of a served entity came about."""
        config = _config_with(await self._found(name, caller), entity, version)
        return (
            f"Served entity '{entity}' of configuration version {config.version}: "
            f"The model runs in the service's own Python environment; nothing was built.\n"
        )

    async def _found(self, name: str, caller: Principal) -> Endpoint:
        def find(connection: sqlite3.Connection) -> Endpoint | None:
            # Nothing is read on behalf of who may not see it: the time of the answer would tell that it is there.
            creator_id = store.creator_of(connection, name)
            if creator_id is None or not may_manage(caller, creator_id):
                return None
            return store.endpoint_named(connection, name)

        endpoint = await self._database.read(find)
        if endpoint is None:
            raise EndpointNotFound(name)
        return endpoint

    async def _with_models(self, config: EndpointConfig) -> EndpointConfig:
        """The configuration with what the registry says about its models; raises for one that is not there."""
        models = await asyncio.gather(
            *(self._registry.describe(entity.model.name, entity.model.version) for entity in config.entities)
        )
        described = zip(config.entities, models, strict=True)
        return replace(config, entities=tuple(replace(entity, model=model) for entity, model in described))

    def _view(self, endpoint: Endpoint) -> View:
        return View(endpoint, self._states(endpoint, endpoint.active), self._states(endpoint, endpoint.pending))

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
