"""Links between the services, and from clients to the gateway, that fail: nothing hangs and nothing is left over (R14).

Each service has a directory of sockets of its own, and in it links that lead to the others and fail as they are told.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from servicekit import channels, sockets
from servicekit.http_client import HttpError
from serving_service import environment
from tessera.identity.v1 import identity_pb2
from tests.support.eventually import eventually
from tests.support.faulty_link import FAULTS, FaultyLink, faulty
from tests.support.http import fetch
from tests.support.secrets import RunningSecrets, data_directory, running_secrets
from tests.support.serving import ServingCaller, no_replicas, running_serving
from tests.support.sockets import short_directory

DEADLINE = 1.5
"""Seconds for a control-plane request, instead of a minute; less for the calls and the pauses within it."""

LONGEST = 30.0
"""No call takes longer, whatever its link does: its own deadline, and as much as a slow machine may add."""

LINKS = ("client to gateway", "gateway to secrets", "gateway to serving", "serving to secrets")
STREAMS = Counter({"AccessFeed._read": 2, "RouteTable._read": 1})
"""The calls that never end: gateway and Serving hear of rights, and the gateway of routes."""

HARMLESS = ("delay", "slice")
"""Faults of links on which everything still arrives, if late."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The services, the links between them, and what was under way before anything failed."""

    links: dict[str, FaultyLink]
    secrets: RunningSecrets
    serving: ServingCaller
    url: str
    token: str = field(repr=False)
    patience: float = LONGEST
    """Seconds that a client waits for an answer."""
    calm: Counter[str] = field(default_factory=Counter)
    """What is under way while nobody asks for anything and every link works."""

    async def asked(self, method: str, path: str, body: bytes = b"") -> str:
        """The status that a client gets, or `none`."""
        try:
            answer = await fetch(self.url, method, path, token=self.token, body=body, timeout=self.patience)
            return str(answer.status)
        except (HttpError, OSError):
            return "none"

    def calls(self) -> list[Callable[[], Awaitable[str]]]:
        """Calls over all links, each by itself."""
        return [
            lambda: self.asked("GET", "/api/2.0/secrets/scopes/list"),
            lambda: self.asked("POST", "/api/2.0/secrets/put", b'{"scope": "team", "key": "k", "string_value": "v"}'),
            lambda: self.asked("GET", "/api/2.0/serving-endpoints"),
            lambda: self.asked("POST", "/serving-endpoints/demo/invocations", b"{}"),
            self._updated,
        ]

    async def _updated(self) -> str:
        """What takes a call from Serving to Secrets."""
        path = "/api/2.0/serving-endpoints"
        body = (
            b'{"name": "bare", "config": {"served_entities": [{"entity_name": "tiny", "entity_version": "1",'
            b' "workload_size": "Small", "environment_vars": {"A": "{{secrets/team/none}}"}}]}}'
        )
        return await self.asked("POST", path, body)


@pytest.fixture(scope="module")
async def platform() -> AsyncIterator[Platform]:
    patch = pytest.MonkeyPatch()
    patch.setattr(gateway_app, "CONTROL_DEADLINE", DEADLINE)
    patch.setattr(environment, "GRANT_SECONDS", DEADLINE / 2)
    patch.setattr(channels, "RESTART_SECONDS", DEADLINE / 5)
    async with AsyncExitStack() as stack:
        stack.callback(patch.undo)
        directory = stack.enter_context(data_directory())
        of = {name: stack.enter_context(short_directory()) for name in ("secrets", "serving", "gateway")}
        await stack.enter_async_context(no_replicas(directory, socket_dir=of["serving"]))
        secrets = await stack.enter_async_context(running_secrets(directory, socket_dir=of["secrets"]))
        links = {}

        async def link(caller: str, callee: str) -> None:
            target = sockets.socket_address(of[callee], callee=callee, caller=caller)
            at = sockets.socket_path(of[caller], callee=callee, caller=caller)
            links[f"{caller} to {callee}"] = await stack.enter_async_context(faulty(target, at=Path(at)))

        await link("serving", "secrets")
        serving = await stack.enter_async_context(
            running_serving(directory, socket_dir=of["serving"], route_ack_seconds=0.3)
        )
        await link("gateway", "secrets")
        await link("gateway", "serving")
        settings = GatewaySettings(data_dir=directory, socket_dir=of["gateway"], listen="127.0.0.1:0", failed_logins=0)
        url = await stack.enter_async_context(gateway_app.running(settings))
        links["client to gateway"] = await stack.enter_async_context(faulty(url.removeprefix("http://")))
        made = await secrets.admin(secrets.admin.tokens.CreateToken, identity_pb2.CreateTokenRequest(comment="second"))
        await secrets.admin.create_scope("team")
        caller = serving.public(made.token_value)
        await caller.create("demo", "tiny")
        await caller.settled("demo")
        platform = Platform(
            links=links,
            secrets=secrets,
            serving=caller,
            url=f"http://{links['client to gateway'].address}",
            token=made.token_value,
        )
        await eventually(lambda: is_well(platform), within=60, what="everything is answered")
        # A stream that is made anew only after this was counted would look like something left over.
        await eventually(lambda: tasks() >= STREAMS, what="the services follow each other")
        yield replace(platform, calm=tasks())


def tasks() -> Counter[str]:
    """What is under way, by what it does, but for the test itself and connections of clients that are kept."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    found = Counter(getattr(task.get_coro(), "__qualname__", "") for task in others)
    return Counter({name: count for name, count in found.items() if "FaultyLink" not in name})


def left(platform: Platform) -> Counter[str]:
    """What is under way and was not while all was calm."""
    return tasks() - platform.calm


async def is_well(platform: Platform) -> bool:
    answers = await asyncio.gather(*(call() for call in platform.calls()))
    return answers[:4] == ["200"] * 4 and answers[4] == "400"


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize("link", LINKS)
async def test_no_call_hangs_whatever_a_link_does_and_nothing_is_left(
    platform: Platform, link: str, rounds: int
) -> None:
    await eventually(lambda: is_well(platform), within=60, what="everything is answered")
    if link == LINKS[0]:  # nobody but the client itself notices that nothing comes
        platform = replace(platform, patience=DEADLINE)
    for name in rounds * list(FAULTS):
        FAULTS[name](platform.links[link])
        async with asyncio.timeout(LONGEST):
            answers = await asyncio.gather(*(call() for call in platform.calls()))
        allowed = {"200", "400", "503", "504"} | (set() if link != LINKS[0] else {"none"})
        assert set(answers) <= allowed, (name, answers)
        if link in ("gateway to serving", "serving to secrets") or name in HARMLESS:
            # Neither keeps a query from its model.
            assert answers[3] == "200", (name, answers)
        platform.links[link].heal()
        await eventually(lambda: is_well(platform), within=60, what=f"all is well after {name}")
    await eventually(lambda: tasks() >= STREAMS, within=60, what="the services follow each other again")
    await eventually(lambda: not left(platform), within=60, what=lambda: f"nothing is left over: {left(platform)}")
