"""The real Serving service in this process, beside the real Secrets service, with real processes as replicas.

Only the model server and the registry are replaced: a model's name is the manner of the tiny program that runs in its
place (`tests/support/model_servers.py`), and there are as many versions of each as one likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from servicekit import channels, sockets
from serving_service import app
from serving_service.errors import ModelNotFound
from serving_service.launcher import Launch, LocalLauncher, LocalReplica, ReplicaGoneError
from serving_service.model import ModelVersion
from serving_service.settings import ServingSettings
from tessera.serving.v1 import serving_pb2 as pb
from tessera.serving.v1 import serving_pb2_grpc as rpc
from tests.support import model_servers, tiny_runner
from tests.support.builders import a_config_input, an_input
from tests.support.eventually import eventually
from tests.support.secrets import DRAIN_SECONDS, RunningSecrets, running_secrets

TINY = "tiny"
"""The manner that is quickest to start."""

MANNERS = (TINY, "ready", "dying", "failing", "slow", "mute", "stubborn", "speaking", "gated", "talking", "endless")
TIMEOUT = 10.0

IN_PROGRESS = pb.EndpointState.IN_PROGRESS


MLMODEL = """\
signature:
  inputs: '[{"type": "long", "name": "a", "required": true}]'
  outputs: null
  params: null
"""
"""What each of the models says of itself."""


class MannerRegistry:
    """A registry whose models are manners; a model's folder says which."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def describe(self, name: str, version: str) -> ModelVersion:
        if name not in MANNERS:
            raise ModelNotFound(name, version)
        return ModelVersion(name=name, version=version, source="manner", created_at=1)

    async def fetch(self, model: ModelVersion) -> Path:
        folder = self._directory / "manners" / model.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "MLmodel").write_text(MLMODEL)
        return folder


class MannerLauncher(LocalLauncher):
    """The real launcher; in place of our model server it runs the program that the model's folder names."""

    async def start(self, launch: Launch) -> LocalReplica:
        manner = launch.model_path.name
        command = tiny_runner.command() if manner == TINY else model_servers.command(manner)
        return await super().start(dataclasses.replace(launch, command=command))


class ServingCaller:
    """Somebody who calls Serving with one credential."""

    def __init__(self, channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> None:
        self.stub = rpc.ServingEndpointsStub(channel)
        self._metadata = metadata

    async def __call__(self, method: Callable[..., Awaitable[Any]], message: Any) -> Any:
        return await method(message, metadata=self._metadata, timeout=TIMEOUT)

    async def create(
        self, name: str, model: str | None = "ready", *, environment: Mapping[str, str] | None = None, **fields: Any
    ) -> pb.ServingEndpointDetailed:
        request = pb.CreateServingEndpointRequest(name=name, **fields)
        if model is not None:
            request.config.CopyFrom(a_config_input(an_input(model, environment_vars=environment or {})))
        answer: pb.ServingEndpointDetailed = await self(self.stub.CreateServingEndpoint, request)
        return answer

    async def update(self, name: str, *entities: pb.ServedEntityInput, routes: Any = ()) -> pb.ServingEndpointDetailed:
        config = a_config_input(*entities, routes=routes)
        answer: pb.ServingEndpointDetailed = await self(
            self.stub.UpdateServingEndpointConfig,
            pb.UpdateServingEndpointConfigRequest(
                name=name, served_entities=config.served_entities, traffic_config=config.traffic_config
            ),
        )
        return answer

    async def get(self, name: str) -> pb.ServingEndpointDetailed:
        answer: pb.ServingEndpointDetailed = await self(
            self.stub.GetServingEndpoint, pb.GetServingEndpointRequest(name=name)
        )
        return answer

    async def names(self) -> list[str]:
        answer = await self(self.stub.ListServingEndpoints, pb.ListServingEndpointsRequest())
        return [endpoint.name for endpoint in answer.endpoints]

    async def delete(self, name: str) -> None:
        await self(self.stub.DeleteServingEndpoint, pb.DeleteServingEndpointRequest(name=name))

    async def stop(self, name: str) -> pb.ServingEndpointDetailed:
        answer: pb.ServingEndpointDetailed = await self(
            self.stub.StopServingEndpoint, pb.StopServingEndpointRequest(name=name)
        )
        return answer

    async def start(self, name: str) -> pb.ServingEndpointDetailed:
        answer: pb.ServingEndpointDetailed = await self(
            self.stub.StartServingEndpoint, pb.StartServingEndpointRequest(name=name)
        )
        return answer

    async def cancel(self, name: str) -> pb.ServingEndpointDetailed:
        answer: pb.ServingEndpointDetailed = await self(
            self.stub.CancelServingEndpointUpdate, pb.CancelServingEndpointUpdateRequest(name=name)
        )
        return answer

    async def events(self, name: str) -> list[pb.LaunchEvent]:
        """What the endpoint's launches did when, the oldest first."""
        request = pb.ListServingEndpointEventsRequest(name=name)
        return list((await self(self.stub.ListServingEndpointEvents, request)).events)

    async def logs(self, name: str, entity: str) -> str:
        request = pb.GetServedModelLogsRequest(name=name, served_model_name=entity)
        return str((await self(self.stub.GetServedModelLogs, request)).logs)

    async def query(
        self, name: str, entity: str = "", *, path: bytes = b"{}", timeout: float = TIMEOUT
    ) -> tuple[pb.QueryHead, bytes]:
        """Head and body of the model's answer."""
        request = pb.QueryRequest(name=name, served_entity_name=entity)
        request.body.data = path
        head, body = pb.QueryHead(), b""
        async for message in self.stub.Query(request, metadata=self._metadata, timeout=timeout):
            if message.extensions:
                assert message.extensions[0].Unpack(head)
            body += message.data
        return head, body

    async def until(
        self, name: str, claim: Callable[[pb.ServingEndpointDetailed], bool], *, what: str = ""
    ) -> pb.ServingEndpointDetailed:
        """The endpoint, once the claim about it holds."""
        found: list[pb.ServingEndpointDetailed] = []

        async def holds() -> bool:
            found[:] = [await self.get(name)]
            return claim(found[0])

        try:
            await eventually(holds, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}; the endpoint is {found}") from None
        return found[0]

    async def settled(self, name: str) -> pb.ServingEndpointDetailed:
        """The endpoint, once its update has ended in one way or the other."""
        return await self.until(name, lambda endpoint: endpoint.state.config_update != IN_PROGRESS)


@dataclass(frozen=True, kw_only=True)
class RunningServing:
    """The service, and ways to call it."""

    address: str
    public_channel: grpc.aio.Channel
    peer_channels: dict[str, grpc.aio.Channel]
    launcher: LocalLauncher

    def public(self, token: str | None) -> ServingCaller:
        """A caller of the public listener."""
        return ServingCaller(self.public_channel, *(() if token is None else (("authorization", f"Bearer {token}"),)))

    @property
    def routes(self) -> Any:
        """The table of routes, as gateways ask for it."""
        return rpc.RoutesStub(self.peer_channels["gateway"])

    async def replicas(self) -> dict[str, int]:
        """The process of each replica that runs, by replica id."""
        return await running_replicas(self.launcher)


async def running_replicas(launcher: LocalLauncher) -> dict[str, int]:
    """The process of each replica that runs, by replica id."""
    found: dict[str, int] = {}
    for replica_id, handle in (await launcher.adopt()).items():
        with contextlib.suppress(ReplicaGoneError):
            state = await handle.state()
            if state.pid is not None and state.exit_code is None:
                found[replica_id] = state.pid
    return found


def serving_settings(directory: Path, **changes: Any) -> ServingSettings:
    """Settings for a data directory, with a port that the system chooses."""
    free = {"failed_logins": 0, "changes": 0, "endpoint_changes": 0, "drain_seconds": DRAIN_SECONDS}
    return ServingSettings(**{"data_dir": directory, "listen": "127.0.0.1:0", **free, **changes})


@asynccontextmanager
async def running_serving(
    directory: Path, *, launcher: LocalLauncher | None = None, registry: Any = None, **changes: Any
) -> AsyncIterator[RunningServing]:
    """Runs the service on a data directory. Its replicas outlive it: end them with `no_replicas`."""
    settings = serving_settings(directory, **changes)
    launcher = launcher or a_launcher(settings)
    registry = registry or MannerRegistry(settings.data_dir)
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(app.running(settings, launcher=launcher, registry=registry))
        yield RunningServing(
            address=service.address,
            public_channel=await stack.enter_async_context(channels.opened(service.address)),
            peer_channels={
                peer: await stack.enter_async_context(
                    channels.opened(sockets.socket_address(settings.sockets, callee="serving", caller=peer))
                )
                for peer in app.PEERS
            },
            launcher=launcher,
        )


def a_launcher(settings: ServingSettings) -> MannerLauncher:
    """The launcher of a service with these settings."""
    return MannerLauncher(settings.sockets / "replicas", None, service_environment={"PATH": os.defpath})


class SecretsSwitch:
    """The Secrets service of a data directory, to be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = AsyncExitStack()

    async def start(self) -> RunningSecrets:
        return await self._stack.enter_async_context(running_secrets(self._directory))

    async def stop(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def no_replicas(directory: Path, **changes: Any) -> AsyncIterator[None]:
    """Ends every replica of a Serving with these settings when the test is over."""
    try:
        yield
    finally:
        handles = await a_launcher(serving_settings(directory, **changes)).adopt()
        await asyncio.gather(*(handle.stop(0) for handle in handles.values()))
