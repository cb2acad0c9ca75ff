"""The whole platform on one data directory: three services that are kept running, and an orderly end of everything.

Whoever enters `running` has a platform that answers; whoever leaves it, however, leaves no process behind: services
are asked, then killed, and the replicas, which outlive Serving on purpose, end because `up.lock` says `stopping`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servicekit import settings, sockets, tls
from servicekit.errors import StartError
from tessera.cli import addresses, lock, readiness, replicas
from tessera.cli.addresses import Addresses
from tessera.cli.service_log import ServiceLog
from tessera.cli.service_process import ServiceProcess, module

Tell = Callable[[str], None]

COMMANDS: Mapping[str, Sequence[str]] = {
    "secrets": module("secrets_service"),
    "serving": module("serving_service"),
    "gateway": module("gateway"),
}
"""How each service is started, by its short name."""

_READY_SECONDS = 60.0
_SILENT_SECONDS = 3.0
"""For how long nobody has to be told what a start waits for."""
_PREDECESSOR_SECONDS = 6.0
_ROTATE_SECONDS = 1.0

# An end takes less than ten seconds in all: 8 to end by being asked, then everything that is left is killed.
_ASKED_SECONDS = 8.0
_DRAIN_SECONDS = 5.0
_KILLED_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run."""

    environment: Mapping[str, str] = field(repr=False)
    """The environment of the services; the TESSERA_* variables in it are our settings too."""
    host: str = "127.0.0.1"
    ports: Mapping[str, int]
    """By service name; 0 is any free port."""
    commands: Mapping[str, Sequence[str]] = field(default_factory=lambda: COMMANDS)


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A platform that runs."""

    data_dir: Path
    addresses: Addresses
    public_url: str
    """The base URL of the REST API as clients are told it."""
    registry_uri: str
    """The MLflow registry that models are served from."""
    isolation: str
    """What isolates the models from the platform, or that nothing does, as Serving says."""
    lives: Sequence[asyncio.Task[None]] = field(repr=False)

    async def stay(self) -> None:
        """Stays until the supervision itself breaks, which only a bug can do; raises what broke it."""
        await _first_end(self.lives)


@asynccontextmanager
async def running(config: Config, tell: Tell, *, hurry: asyncio.Event) -> AsyncIterator[Platform]:
    """Starts the platform, waits until it answers, and ends it when the context is left; at once if `hurry` is set.

    `tell` gets one line per event. Raises StartError when the platform cannot start, settings.SettingsError for wrong
    TESSERA_* variables.
    """
    configured = settings.load(settings.ServiceSettings, config.environment)
    tls.configured(configured)  # in one line here, instead of in the logs of three services
    run = configured.data_dir / "run"
    # By itself first: `parents` would make it with the mode that is usual, and registries in it are for nobody else.
    configured.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.mkdir(mode=0o700, exist_ok=True)
    async with lock.held(run) as up_lock:
        await _end_of_predecessor(run)
        chosen = addresses.chosen(config.host, config.ports, has_tls=configured.has_tls)
        registry = (
            config.environment.get("TESSERA_MODEL_REGISTRY") or f"sqlite:///{configured.data_dir / 'registry.db'}"
        )
        public_url = config.environment.get("TESSERA_PUBLIC_URL") or chosen.url
        environment = {
            **config.environment,
            # Programs are started by fork and exec at once; without this gRPC says so in the log each time.
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            # A stranger's failed handshake would be a line that is no event.
            "GRPC_VERBOSITY": "ERROR",
            "TESSERA_DATA_DIR": str(configured.data_dir),
            "TESSERA_SUPERVISED": "true",
            "TESSERA_DRAIN_SECONDS": f"{_DRAIN_SECONDS:g}",
            "TESSERA_SUPERVISOR_LOCK": str(up_lock.path),
            "TESSERA_MODEL_REGISTRY": registry,
            "TESSERA_SECRETS_LISTEN": chosen.secrets,
            "TESSERA_SERVING_LISTEN": chosen.serving,
            "TESSERA_GATEWAY_LISTEN": chosen.gateway,
            "TESSERA_PUBLIC_URL": public_url,
        }
        services = {
            name: ServiceProcess(name, command, environment, ServiceLog(run / f"{name}.log"), tell)
            for name, command in config.commands.items()
        }
        lives = [asyncio.create_task(service.run()) for service in services.values()]
        rotation = asyncio.create_task(_rotated([service.log for service in services.values()]))
        try:
            await _until_ready(services, chosen, configured.sockets, lives, tell)
            yield Platform(
                data_dir=configured.data_dir,
                addresses=chosen,
                public_url=public_url,
                registry_uri=registry,
                isolation=_isolation(configured.data_dir),
                lives=lives,
            )
        finally:
            up_lock.say("stopping")
            await _to_the_end(_stopped(services, lives, configured.sockets, hurry, tell), hurry)
            rotation.cancel()


def _isolation(data_dir: Path) -> str:
    with contextlib.suppress(OSError):
        return (data_dir / "serving" / "isolation.txt").read_text().strip()
    return "unknown"


async def _first_end(lives: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(lives, return_when=asyncio.FIRST_COMPLETED)
    for life in lives:
        if life.done():
            life.result()


async def _rotated(logs: Sequence[ServiceLog]) -> None:
    while True:
        await asyncio.sleep(_ROTATE_SECONDS)
        for log in logs:
            log.rotate()


async def _to_the_end(work: Coroutine[Any, Any, None], hurry: asyncio.Event) -> None:
    """Does `work` even when we are cancelled meanwhile; that only hurries it."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        hurry.set()
        await task
        raise


async def _end_of_predecessor(run: Path) -> None:
    """Waits for the services of an `up` that was killed; they end by themselves within seconds and hold our ports."""
    pid_files = [run / f"{name}.pid" for name in COMMANDS]
    await _until(lambda: not any(map(_is_alive, pid_files)), timeout=_PREDECESSOR_SECONDS)


def _is_alive(pid_file: Path) -> bool:
    # The number may meanwhile be somebody else's; we only ever wait for it, and not for long.
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(pid_file.read_text()), 0)
        return True
    return False


async def _until_ready(
    services: Mapping[str, ServiceProcess],
    chosen: Addresses,
    directory: Path,
    lives: Sequence[asyncio.Task[None]],
    tell: Tell,
) -> None:
    began = time.monotonic()

    async def ready(name: str, probe: Coroutine[Any, Any, None]) -> None:
        await probe
        services[name].was_ready = True
        tell(f"  ✓ {name:8} ready after {time.monotonic() - began:.1f} s")

    async def all_ready() -> None:
        async with asyncio.TaskGroup() as group:
            for name in ("secrets", "serving"):
                # Every listener of a service tells the same, and this one needs no certificate.
                address = sockets.socket_address(directory, callee=name, caller="gateway")
                group.create_task(ready(name, readiness.until_grpc_is_ready(address)))
            group.create_task(ready("gateway", readiness.until_http_is_ready(chosen.gateway, has_tls=chosen.has_tls)))

    probes = asyncio.create_task(all_ready())
    waits = asyncio.create_task(_waits_told(services, tell))
    try:
        await asyncio.wait([probes, *lives], timeout=_READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for work in (probes, *lives):
            if work.done():
                work.result()
                return
        late = [_late(service) for service in services.values() if not service.was_ready]
        raise StartError(f"not ready after {_READY_SECONDS:.0f} s: {', '.join(late)}")
    finally:
        for task in (probes, waits):
            task.cancel()
        await asyncio.wait([probes, waits])


async def _waits_told(services: Mapping[str, ServiceProcess], tell: Tell) -> None:
    """Tells what services that run and are not ready say that they wait for, each cause once."""
    told: set[tuple[str, str]] = set()
    await asyncio.sleep(_SILENT_SECONDS)
    while True:
        for name, service in services.items():
            cause = "" if service.was_ready or service.has_ended() else service.log.waits_for()
            if cause and (name, cause) not in told:
                told.add((name, cause))
                tell(f"  … {name:8} is not ready yet: {cause}")
        await asyncio.sleep(1.0)


def _late(service: ServiceProcess) -> str:
    cause = service.log.waits_for()
    return f"{service.name} ({f'{cause} Its' if cause else 'its'} log: {service.log.path})"


async def _stopped(
    services: Mapping[str, ServiceProcess],
    lives: Sequence[asyncio.Task[None]],
    sockets: Path,
    hurry: asyncio.Event,
    tell: Tell,
) -> None:
    tell("Stopping")
    asking = asyncio.create_task(_asked(services, lives, sockets))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait([asking, hurrying], timeout=_ASKED_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    asking.cancel()
    hurrying.cancel()
    for service in services.values():
        service.kill()
    await asyncio.gather(*lives, return_exceptions=True)
    # The shim last: it ends what its model left behind.
    for shim in (False, True):
        for directory in replicas.living(sockets):
            replicas.kill(directory, shim=shim)
        await _until(lambda: not replicas.living(sockets), timeout=_KILLED_SECONDS / 2)
    for directory in replicas.living(sockets):
        tell(f"replica {directory.name} did not end; its lock and its sockets are in {directory}")


async def _asked(services: Mapping[str, ServiceProcess], lives: Sequence[asyncio.Task[None]], sockets: Path) -> None:
    """Ends services and replicas. Callers first: the gateway takes no more requests, Secrets is there to the last."""
    services["gateway"].stop()
    # Serving is not to see its replicas end and start them again, so it does not wait for requests that take long.
    await _until(services["gateway"].has_ended, timeout=0.3)
    services["serving"].stop()
    await _until(services["serving"].has_ended, timeout=3.0)
    services["secrets"].stop()
    await asyncio.wait(lives)
    await _until(lambda: not replicas.living(sockets), timeout=_ASKED_SECONDS)


async def _until(condition: Callable[[], bool], *, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110 (nobody tells when a process or lock is gone)
        await asyncio.sleep(0.02)
