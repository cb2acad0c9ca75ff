"""The services' own metrics: counted by names of ours alone, and told where a setting says so and nowhere else."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.settings import GatewaySettings
from servicekit.errors import StartError
from servicekit.metrics import ServiceMetrics, listening
from servicekit.settings import SettingsError, load
from tests.support.eventually import eventually
from tests.support.gateway import platform, routes
from tests.support.http import fetch
from tests.support.secrets import data_directory, refusal, running_secrets
from tests.support.serving import no_replicas, running_serving
from tests.support.sockets import short_directory

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def raw(path: Path, request: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(request)
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()


async def told(path: Path, *, accept: str = "text/plain") -> Samples:
    """Everything that a service tells on its socket."""
    answer = await raw(path, f"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def one(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def test_secrets_and_serving_tell_what_they_answered() -> None:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(data_directory())
        sockets = {name: stack.enter_context(short_directory()) / f"{name}.sock" for name in ("secrets", "serving")}
        await stack.enter_async_context(no_replicas(directory))
        secrets = await stack.enter_async_context(
            running_secrets(directory, metrics_listen=f"unix:{sockets['secrets']}")
        )
        serving = await stack.enter_async_context(
            running_serving(directory, metrics_listen=f"unix:{sockets['serving']}", route_ack_seconds=0.3)
        )
        admin = serving.public(secrets.admin_token)
        await admin.create("demo")
        await admin.settled("demo")
        await admin.create("broken", "failing")
        await admin.settled("broken")
        await refusal(admin.get("canary-of-a-name"))
        found = await told(sockets["serving"])
        get = "tessera.serving.v1.ServingEndpoints/GetServingEndpoint"
        assert one(found, "tessera_rpc_calls_total", method=get, code="NOT_FOUND") == 1
        assert one(found, "tessera_rpc_calls_total", method=get, code="OK") >= 2
        assert one(found, "tessera_rpc_calls_seconds_count", method=get) >= 3
        assert one(found, "tessera_endpoints") == 2
        assert one(found, "tessera_replicas", state="ready") == 1
        assert one(found, "tessera_launches_total", outcome="SUCCEEDED") == 1
        assert one(found, "tessera_launches_total", outcome="FAILED") == 1
        assert one(found, "tessera_launch_phase_seconds_count", phase="load", outcome="FAILED") == 1
        assert one(found, "process_resident_memory_bytes") > 1e6
        asked = await told(sockets["secrets"], accept="application/openmetrics-text")
        exchange = "tessera.identity.v1.Authority/ExchangeToken"
        assert one(asked, "tessera_rpc_calls_total", method=exchange, code="OK") >= 1
        assert one(asked, "tessera_access_followers") == 1
        for samples in (found, asked):
            assert "canary" not in str(samples)
            assert secrets.admin_token not in str(samples)


async def replica(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def test_gateway_tells_routes_and_no_paths() -> None:
    with short_directory() as directory:
        path = directory / "metrics.sock"
        async with platform(metrics_listen=f"unix:{path}") as running:
            address = await running.add_replica(replica)
            await running.publish(routes("canary-endpoint", ("m-1", 100, [("r1", address)])))
            for method, target in (
                ("POST", "/serving-endpoints/canary-endpoint/invocations"),
                ("GET", "/canary-path"),
                ("GET", "/health"),
                ("GET", "/api/2.0/serving-endpoints/canary-endpoint"),
            ):
                await fetch(running.url, method, target, token="owner-token")
            route = "POST /serving-endpoints/{name}/invocations"
            # It is counted when it has ended, which is a moment after the answer.
            samples: Samples = {}

            async def is_counted() -> bool:
                samples.update(await told(path))
                return any(dict(labels).get("route", "").startswith("GET /api/2.0") for _, labels in samples)

            await eventually(is_counted)
    assert one(samples, "tessera_http_requests_total", route=route, status="418") == 1
    assert one(samples, "tessera_http_requests_seconds_count", route=route) == 1
    assert one(samples, "tessera_http_requests_total", route="(none)", status="404") == 1
    assert one(samples, "tessera_http_requests_total", route="GET /health", status="200") == 1
    assert one(samples, "tessera_endpoints") == 1
    assert one(samples, "tessera_identities") == 1
    assert "canary" not in str(samples)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"\r\n\r\n", b"404 Not Found"),
        (b"\xff\x00 \r\n\r\n", b"404 Not Found"),
    ],
)
async def test_only_metrics_are_told(request_: bytes, status: bytes) -> None:
    with short_directory() as directory:
        path = directory / "m.sock"
        async with listening(f"unix:{path}", ServiceMetrics()):
            answer = await raw(path, request_)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert (b"process_cpu_seconds_total" in answer) is (status == b"200 OK")


async def test_request_without_an_end_is_dropped() -> None:
    with short_directory() as directory:
        path = directory / "m.sock"
        async with listening(f"unix:{path}", ServiceMetrics()):
            assert await raw(path, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000) == b""
            assert (await raw(path, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")


async def test_address_that_cannot_be_listened_on_is_named_at_the_start() -> None:
    with pytest.raises(StartError, match="no-such-folder"):
        async with listening("unix:/no-such-folder/m.sock", ServiceMetrics()):
            pass


@pytest.mark.parametrize("listen", ["0.0.0.0:9100", "192.0.2.1:9100", "[::]:9100"])
def test_metrics_are_told_to_other_machines_only_where_that_is_allowed(listen: str) -> None:
    environment = {"TESSERA_DATA_DIR": "/d", "TESSERA_GATEWAY_METRICS_LISTEN": listen}
    with pytest.raises(SettingsError, match="TESSERA_METRICS_BEYOND_LOOPBACK"):
        load(GatewaySettings, environment)
    assert load(GatewaySettings, {**environment, "TESSERA_METRICS_BEYOND_LOOPBACK": "true"}).metrics_listen == listen


@pytest.mark.parametrize("listen", ["", "127.0.0.1:9100", "unix:/run/metrics.sock"])
def test_metrics_may_be_told_on_this_machine(listen: str) -> None:
    environment = {"TESSERA_DATA_DIR": "/d", "TESSERA_GATEWAY_METRICS_LISTEN": listen}
    assert load(GatewaySettings, environment).metrics_listen == listen
