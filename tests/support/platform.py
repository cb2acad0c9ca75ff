"""All three services in this process, and the people who use them; models are the tiny programs of model_servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from tessera.identity.v1 import identity_pb2
from tests.support.http import Answer, fetch
from tests.support.secrets import DRAIN_SECONDS, RunningSecrets, data_directory, running_secrets
from tests.support.serving import RunningServing, ServingCaller, no_replicas, running_serving


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The services and the tokens of those who were introduced."""

    secrets: RunningSecrets
    serving: RunningServing
    url: str
    stop_secrets: Callable[[], Awaitable[None]]
    """Stops Secrets, for good."""
    tokens: dict[str, str] = field(default_factory=dict, repr=False)

    async def introduce(self, *names: str) -> None:
        """Makes users, and a token for each."""
        for name in names:
            await self.secrets.admin.create_user(name)
            self.tokens[name] = await self.secrets.token_for(name)

    def endpoints_of(self, name: str) -> ServingCaller:
        """Serving, as somebody calls it."""
        return self.serving.public(self.tokens[name])

    async def fetch(
        self, method: str, path: str, *, token: str | None = None, body: bytes = b"", headers: Any = None
    ) -> Answer:
        """One request to the gateway."""
        return await fetch(self.url, method, path, token=token, body=body, headers=headers)


@asynccontextmanager
async def running_pair(directory: Path, **changes: Any) -> AsyncIterator[tuple[RunningSecrets, RunningServing]]:
    """Secrets and Serving on a data directory, without replicas afterwards; `changes` are settings of Serving.

    Gateways that do not follow are waited for only briefly.
    """
    async with (
        no_replicas(directory),
        running_secrets(directory) as secrets,
        running_serving(directory, **{"route_ack_seconds": 0.3, **changes}) as serving,
    ):
        yield secrets, serving


@asynccontextmanager
async def running_platform(**changes: Any) -> AsyncIterator[Platform]:
    """The platform on a directory of its own; `changes` are settings of Secrets."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(data_directory())
        await stack.enter_async_context(no_replicas(directory))
        own = await stack.enter_async_context(AsyncExitStack())
        secrets = await own.enter_async_context(running_secrets(directory, **changes))
        serving = await stack.enter_async_context(running_serving(directory))
        settings = GatewaySettings(
            data_dir=directory, listen="127.0.0.1:0", failed_logins=0, drain_seconds=DRAIN_SECONDS
        )
        url = await stack.enter_async_context(gateway_app.running(settings))
        made = await secrets.admin(secrets.admin.tokens.CreateToken, identity_pb2.CreateTokenRequest(comment="second"))
        # Not the operator's own, which a renewal takes away.
        yield Platform(
            secrets=secrets,
            serving=serving,
            url=url,
            tokens={"admin": made.token_value},
            stop_secrets=own.aclose,
        )
