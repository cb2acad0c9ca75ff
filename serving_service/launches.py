"""From a served entity to a launch: its model's files and its environment, then its secrets' values, right before they
are needed.

What goes wrong is one of two things: `LaunchImpossible`, which only a person can change, or `LaunchDelayed`, which time
may cure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc

from servicekit.errors import ServiceError
from servicekit.storage import Storage, StorageError
from serving_service import caches, phases, store
from serving_service.build_logs import BuildLogs
from serving_service.buildenv import BuildDelayed, BuildImpossible
from serving_service.environment import ResolvedEnvironment, SecretReferences, UnresolvableError
from serving_service.gpu_pool import GpuPool, GpusImpossible, GpusTaken
from serving_service.isolation import ModelUsers, UsersExhausted
from serving_service.launcher import Launch, ModelPython
from serving_service.model import Endpoint, ServedEntity
from serving_service.model_environments import EnvironmentLog, ModelEnvironments
from serving_service.phases import LaunchPhase
from serving_service.registry import Registry
from serving_service.settlement import Settlement

_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)


class _NotLaunched(Exception):
    def __init__(self, phase: LaunchPhase, problem: str) -> None:
        super().__init__(phases.failed(phase, problem))
        self.phase = phase


class LaunchImpossible(_NotLaunched):
    """The launch cannot be; the message says what to change."""


class LaunchDelayed(_NotLaunched):
    """Something that the launch needs is not there just now."""


class Launches:
    """Makes launches of what the registry and Secrets hold."""

    def __init__(
        self,
        database: Storage,
        registry: Registry,
        environments: ModelEnvironments,
        build_logs: BuildLogs,
        references: SecretReferences,
        settlement: Settlement,
        users: ModelUsers | None,
        gpus: GpuPool,
        *,
        refusal: str = "",
        download_deadline: float,
        build_deadline: float,
        reference_deadline: float,
    ) -> None:
        """`users` is None where models run as the service's own user; with a `refusal`, nothing may be launched.

        Deadlines are in seconds.
        """
        self._database = database
        self._registry = registry
        self._environments = environments
        self._build_logs = build_logs
        self._references = references
        self._settlement = settlement
        self._users = users
        self._gpus = gpus
        self._refusal = refusal
        self._download_deadline = download_deadline
        self._build_deadline = build_deadline
        self._reference_deadline = reference_deadline

    async def prepare(
        self,
        endpoint: Endpoint,
        version: int,
        entity: ServedEntity,
        replica_id: str,
        enter: Callable[[LaunchPhase], None],
    ) -> Launch:
        """Everything that one replica is started from; `enter` hears which phase begins.

        Raises LaunchImpossible or LaunchDelayed.
        """
        if self._refusal:
            raise LaunchImpossible(LaunchPhase.START, self._refusal)
        enter(LaunchPhase.MODEL_DOWNLOAD)
        # Before anything is fetched: what has no place to run needs nothing else.
        gpus = await self._taken_gpus(endpoint, entity, replica_id)
        while True:
            path = await self._downloaded(entity)
            if await self._holds(replica_id, path, LaunchPhase.MODEL_DOWNLOAD):
                break
        enter(LaunchPhase.ENVIRONMENT_BUILD)
        while True:
            python = await self._built(endpoint, version, entity, path)
            if python is None or await self._holds(replica_id, python.folder, LaunchPhase.ENVIRONMENT_BUILD):
                break
        enter(LaunchPhase.REFERENCE)
        resolved = await self._resolved(endpoint, version, entity, replica_id)
        enter(LaunchPhase.START)
        try:
            user = await self._users.of(endpoint.id) if self._users else None
        except UsersExhausted as error:
            raise LaunchImpossible(LaunchPhase.START, str(error)) from None
        except OSError as error:
            unknown = f"Which users have processes cannot be seen: {error.strerror}."
            raise LaunchDelayed(LaunchPhase.START, unknown) from None
        return Launch(
            replica_id=replica_id,
            model_path=path,
            environment=resolved.variables,
            masked_values=resolved.secrets,
            user=user,
            python=python,
            gpus=gpus,
        )

    async def _taken_gpus(self, endpoint: Endpoint, entity: ServedEntity, replica_id: str) -> tuple[str, ...] | None:
        phase = LaunchPhase.START
        try:
            return await self._gpus.take(endpoint, entity, replica_id)
        except GpusImpossible as error:
            raise LaunchImpossible(phase, str(error)) from None
        except GpusTaken as error:
            raise LaunchDelayed(phase, str(error)) from None
        except StorageError:
            raise LaunchDelayed(phase, "Who has which GPU cannot be recorded.") from None

    async def _holds(self, replica_id: str, folder: Path, phase: LaunchPhase) -> bool:
        """Whether a cached folder is there for as long as the replica is; else it was dropped a moment ago."""
        try:
            await self._database.write(store.add_use, replica_id, str(folder))
        except StorageError:
            raise LaunchDelayed(phase, "What the launch uses cannot be recorded.") from None
        return caches.mark_used(folder)

    async def _downloaded(self, entity: ServedEntity) -> Path:
        phase = LaunchPhase.MODEL_DOWNLOAD
        try:
            async with asyncio.timeout(self._download_deadline):
                return await self._registry.fetch(entity.model)
        except ServiceError as error:
            raise _kind(error)(phase, error.message) from None
        except TimeoutError:
            late = phases.overdue(self._download_deadline, "TESSERA_DOWNLOAD_DEADLINE_SECONDS")
            raise LaunchImpossible(phase, f"{late} Make the model smaller, or allow more.") from None
        except OSError as error:
            raise LaunchDelayed(phase, f"The model's files cannot be kept: {error.strerror}.") from None

    async def _built(self, endpoint: Endpoint, version: int, entity: ServedEntity, model: Path) -> ModelPython | None:
        said = self._build_logs.begin(endpoint.id, version, entity.name)
        try:
            return await self._environment(model, said)
        except (LaunchImpossible, LaunchDelayed) as error:
            said.outcome = str(error)
            raise
        finally:
            self._build_logs.end(endpoint.id, version, entity.name, said)

    async def _environment(self, model: Path, said: EnvironmentLog) -> ModelPython | None:
        phase = LaunchPhase.ENVIRONMENT_BUILD
        try:
            async with asyncio.timeout(self._build_deadline):
                return await self._environments.of(model, said)
        except BuildImpossible as error:
            raise LaunchImpossible(phase, str(error)) from None
        except BuildDelayed as error:
            raise LaunchDelayed(phase, str(error)) from None
        except TimeoutError:
            late = phases.overdue(self._build_deadline, "TESSERA_BUILD_DEADLINE_SECONDS")
            raise LaunchImpossible(phase, f"{late} Its build log says how far it came.") from None
        except OSError as error:
            raise LaunchDelayed(phase, f"The environment cannot be kept: {error.strerror}.") from None

    async def _resolved(
        self, endpoint: Endpoint, version: int, entity: ServedEntity, replica_id: str
    ) -> ResolvedEnvironment:
        phase = LaunchPhase.REFERENCE
        try:
            async with asyncio.timeout(self._reference_deadline):
                return await self._references.resolve(
                    entity, endpoint_id=endpoint.id, version=version, replica_id=replica_id
                )
        except UnresolvableError as error:
            phase = LaunchPhase.PERMISSION if error.is_permission else phase
            raise LaunchImpossible(phase, str(error)) from None
        except ServiceError as error:
            raise _kind(error)(phase, error.message) from None
        except TimeoutError:
            # It is Secrets that is late, and the model's fault in no case.
            late = phases.overdue(self._reference_deadline, "TESSERA_REFERENCE_DEADLINE_SECONDS")
            raise LaunchDelayed(phase, late) from None

    def ended(self, replica_id: str) -> None:
        """Lets go of what a launch held, once its process is over or there is never going to be one; idempotent."""
        self._settlement.ended(replica_id)

    def dropped(self, endpoint_id: str, version: int) -> None:
        """Gives back what a configuration was granted that is never going to be launched again; idempotent."""
        self._settlement.dropped(endpoint_id, version)


def _kind(error: ServiceError) -> type[LaunchDelayed | LaunchImpossible]:
    return LaunchDelayed if error.code in _PASSING else LaunchImpossible
