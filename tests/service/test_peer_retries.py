"""What a gateway asks again of a service that does not answer just now: what only reads, a few times, and not for long.

And the streams by which it follows others outlive their connections.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import Any

import pytest

from servicekit import channels, grpc_server
from servicekit.context import Level, current_decision
from servicekit.errors import Unavailable
from tessera import policy
from tessera.serving.v1 import serving_pb2 as pb
from tests.service.test_gateway import Echo
from tests.support.eventually import eventually
from tests.support.gateway import OWNER, Platform, ScriptedServing, platform, routes
from tests.support.http import Answer, fetch

ENDPOINTS = "/api/2.0/serving-endpoints"


class Failing:
    """How Serving answers: `failures` times not at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 0
        self.asked: Counter[str] = Counter()
        for name, message in (
            ("ListServingEndpoints", pb.ListServingEndpointsResponse()),
            ("DeleteServingEndpoint", pb.DeleteServingEndpointResponse()),
        ):
            monkeypatch.setattr(ScriptedServing, name, self._answering(name, message), raising=False)

    def _answering(self, name: str, message: Any) -> Any:
        async def answer(_: ScriptedServing, request: Any, rpc: Any) -> Any:
            self.asked[name] += 1
            if self.failures:
                self.failures -= 1
                raise Unavailable("gone", retry_after=1)
            current_decision(policy.ENDPOINT).allow()
            return message

        return answer


async def asked(gateway: Platform, method: str, path: str = ENDPOINTS) -> Answer:
    return await fetch(gateway.url, method, path, token="owner-token")


async def test_a_read_is_asked_three_times_and_a_change_once(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Failing(monkeypatch)
    async with platform() as gateway:
        serving.failures = 1
        assert (await asked(gateway, "DELETE", f"{ENDPOINTS}/demo")).status == 503
        assert serving.asked.pop("DeleteServingEndpoint") == 1
        assert (await asked(gateway, "DELETE", f"{ENDPOINTS}/demo")).status == 200
        assert serving.asked.pop("DeleteServingEndpoint") == 1
        serving.failures = channels.ATTEMPTS - 1
        assert (await asked(gateway, "GET")).status == 200
        assert serving.asked == {"ListServingEndpoints": 3}
        serving.failures = channels.ATTEMPTS
        assert (await asked(gateway, "GET")).status == 503
        assert serving.asked == {"ListServingEndpoints": 6}


async def test_a_service_that_is_out_is_not_asked_three_times_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """R15, without the time: what counts is how often it fails."""
    serving = Failing(monkeypatch)
    async with platform() as gateway:
        serving.failures = 10_000
        for _ in range(100):
            assert (await asked(gateway, "GET")).status == 503
        assert serving.asked["ListServingEndpoints"] <= 120
        serving.failures = 0
        assert (await asked(gateway, "GET")).status == 200


async def test_what_is_followed_goes_on_over_one_connection_after_the_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grpc_server, "CONNECTION_AGE_SECONDS", 0.3)
    monkeypatch.setattr(grpc_server, "CallLimits", partial(grpc_server.CallLimits, longest=0.3))

    def ended(stream: str) -> int:
        return sum(
            record.message == "stream ended" and getattr(record, "stream", "") == stream for record in caplog.records
        )

    with caplog.at_level(logging.INFO, logger="servicekit.followed"):
        async with platform() as gateway:
            first = routes("churn", ("m-1", 100, [("r1", await gateway.add_replica(Echo()))]))
            await gateway.publish(first)

            async def has_gone_on() -> bool:
                answer = await fetch(
                    gateway.url, "POST", "/serving-endpoints/churn/invocations", token="owner-token", body=b"{}"
                )
                assert answer.status == 200
                return ended("routes") >= 3 and ended("access") >= 3

            await eventually(has_gone_on, within=60)
            # What changes is heard of, whichever connection it is.
            gateway.serving.endpoints["id-later"] = routes(
                "later", ("m-1", 100, [("r2", first.entities[0].replicas[0].address)])
            )
            gateway.access.granted["id-later"] = {OWNER.id: Level.CAN_MANAGE}

            async def is_known() -> bool:
                answer = await fetch(
                    gateway.url, "POST", "/serving-endpoints/later/invocations", token="owner-token", body=b"{}"
                )
                return answer.status == 200

            await eventually(is_known, within=60)
