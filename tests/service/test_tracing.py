"""Traces, as a collector is told of them: all three services in this process, a model in one of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from servicekit import tracing
from servicekit.otlp import OtlpRecorder
from tests.support.collector import Collector, Told, running_collector
from tests.support.eventually import eventually
from tests.support.platform import Platform, running_platform

ROOT = Path(__file__).parents[2]
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY_CANARY, QUERY_CANARY, PATH_CANARY, VALUE_CANARY = (f"canary-{n}-3f9a1c5e7b2d4f60" for n in range(4))


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running, tracing.using(OtlpRecorder("tests", running.address, 1.0)):
        yield running


@pytest_asyncio.fixture(scope="module")
async def platform(collector: Collector) -> AsyncIterator[Platform]:
    async with running_platform() as running:
        await running.introduce("alice")
        await running.endpoints_of("alice").create("traced")
        await running.endpoints_of("alice").settled("traced")
        yield running


def a_traceparent(trace_id: str = TRACE, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{CALLER}-{flags}"}


async def told(collector: Collector, trace_id: str, *names: str) -> dict[str, Told]:
    """The spans of a trace by name, once those of these names have arrived."""
    await eventually(lambda: {*names} <= {span.name for span in collector.spans(trace_id)}, what=f"spans {names}")
    return {span.name: span for span in collector.spans(trace_id)}


async def invoke(platform: Platform, headers: dict[str, str]) -> Any:
    answer = await platform.fetch(
        "POST",
        "/serving-endpoints/traced/invocations",
        token=platform.tokens["alice"],
        body=json.dumps({"inputs": [BODY_CANARY]}).encode(),
        headers={"content-type": "application/json", **headers},
    )
    assert answer.status == 200, answer
    return dict(line.lower().split(": ", 1) for line in json.loads(answer.body)["headers"])


async def test_a_trace_goes_from_the_caller_through_the_gateway_to_the_model(
    platform: Platform, collector: Collector
) -> None:
    model = await invoke(platform, a_traceparent() | {"tracestate": "vendor=1"})
    route = "POST /serving-endpoints/{name}/invocations"
    spans = await told(collector, TRACE, route, "invocation")
    assert spans[route].parent_id == CALLER
    assert spans["invocation"].parent_id == spans[route].span_id
    assert model["traceparent"] == f"00-{TRACE}-{spans['invocation'].span_id}-01"
    assert model["tracestate"] == "vendor=1"
    assert spans["invocation"].facts == {"tessera.endpoint": "traced", "tessera.entity": "ready-1"}
    assert spans[route].facts["http.response.status_code"] == 200
    assert spans[route].facts["http.route"] == "/serving-endpoints/{name}/invocations"


async def test_a_trace_goes_on_in_every_service_that_is_asked(platform: Platform, collector: Collector) -> None:
    trace_id = "1" * 32
    await platform.introduce("bob")  # whom nobody knows yet
    path = "/api/2.0/serving-endpoints/traced"
    await platform.fetch("GET", path, token=platform.tokens["bob"], headers=a_traceparent(trace_id))
    rpc, exchange = (
        "tessera.serving.v1.ServingEndpoints/GetServingEndpoint",
        "tessera.identity.v1.Authority/ExchangeToken",
    )
    await told(collector, trace_id, "GET /api/2.0/serving-endpoints/{name}", rpc, exchange)
    spans = collector.spans(trace_id)
    by_id = {span.span_id: span for span in spans}
    for name in (rpc, exchange):
        client, server = sorted(
            (span for span in spans if span.name == name),
            key=lambda span: span.parent_id in by_id and by_id[span.parent_id].name == name,
        )
        assert server.parent_id == client.span_id
        assert by_id[client.parent_id].name == "GET /api/2.0/serving-endpoints/{name}"
    # What a caller may not see is an answer like any other, to who gives it.
    assert [(span.facts["rpc.grpc.status_code"], span.is_error) for span in (client, server)] == [(0, False)] * 2
    refused = {span.is_error for span in spans if span.name == rpc and span.facts["rpc.grpc.status_code"] == 5}
    assert refused == {True, False}


async def test_queries_over_grpc_are_traced_to_the_model_too(platform: Platform, collector: Collector) -> None:
    trace_id = "2" * 32
    caller = platform.endpoints_of("alice")
    caller._metadata = (*caller._metadata, *a_traceparent(trace_id).items())
    _, body = await caller.query("traced")
    name = "tessera.serving.v1.ServingEndpoints/Query"
    spans = await told(collector, trace_id, name, "invocation")
    assert spans[name].parent_id == CALLER
    assert f"traceparent: 00-{trace_id}-{spans['invocation'].span_id}-01" in json.loads(body)["headers"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"traceparent": "00-" + "0" * 32 + f"-{CALLER}-01"},
        {"traceparent": f"ff-{'3' * 32}-{CALLER}-01"},
        {"traceparent": f"00-{'3' * 32}-{CALLER}-01-more"},
        {"traceparent": "3" * 600},
        {"traceparent": f"00-{'3' * 32}-{CALLER}"},
        {"tracestate": "vendor=1"},
    ],
)
async def test_what_is_no_trace_context_is_not_passed_on(platform: Platform, given: dict[str, str]) -> None:
    model = await invoke(platform, given)
    version, trace_id, span_id, flags = model["traceparent"].split("-")
    assert (version, int(flags, 16) & 1) == ("00", 1)
    assert trace_id not in ("0" * 32, "3" * 32)
    assert span_id != CALLER
    assert "tracestate" not in model


async def test_what_a_caller_does_not_record_is_not_recorded_here(platform: Platform, collector: Collector) -> None:
    silent, loud = "4" * 32, "5" * 32
    model = await invoke(platform, a_traceparent(silent, "00"))
    assert model["traceparent"].startswith(f"00-{silent}-")
    assert model["traceparent"].endswith("-00")
    await invoke(platform, a_traceparent(loud))
    await told(collector, loud, "invocation")
    assert collector.spans(silent) == []


async def test_a_launch_is_a_trace_with_its_phases(platform: Platform, collector: Collector) -> None:
    await eventually(lambda: "launch" in {span.name for span in collector.spans()}, what="a launch")
    launch = next(span for span in collector.spans() if span.name == "launch")
    phases = [span for span in collector.spans(launch.trace_id) if span.parent_id == launch.span_id]
    names = [span.name for span in phases]
    assert names[0] == "model download"
    assert {"reference", "start", "load"} <= {*names}
    assert sum(span.seconds for span in phases) == pytest.approx(launch.seconds, abs=0.5)
    assert launch.parent_id == ""
    assert launch.facts["tessera.outcome"] == "SUCCEEDED"
    assert launch.facts["tessera.entity"] == "ready-1"


async def test_a_launch_that_fails_says_at_what(platform: Platform, collector: Collector) -> None:
    alice = platform.endpoints_of("alice")
    await alice.create("broken", "failing", environment={"SAID": VALUE_CANARY})
    await alice.settled("broken")

    def failed() -> list[Told]:
        return [span for span in collector.spans() if span.name == "launch" and span.is_error]

    await eventually(lambda: bool(failed()), what="a launch that failed")
    assert failed()[0].facts["error.type"] == "load"
    assert VALUE_CANARY.encode() not in collector.everything()


async def test_nothing_of_what_was_said_is_in_a_trace(platform: Platform, collector: Collector) -> None:
    token = platform.tokens["alice"]
    last = "6" * 32
    secret = json.dumps({"scope": "traced", "key": "k", "string_value": VALUE_CANARY}).encode()
    await platform.fetch("POST", "/api/2.0/secrets/scopes/create", token=token, body=b'{"scope": "traced"}')
    assert (await platform.fetch("POST", "/api/2.0/secrets/put", token=token, body=secret)).status == 200
    await platform.fetch("GET", f"/api/2.0/{PATH_CANARY}?q={QUERY_CANARY}", token=token)
    await platform.fetch("GET", "/api/2.0/secrets/scopes/list", token=f"{token}x")
    await platform.fetch("POST", "/api/2.0/secrets/put", token=token, body=VALUE_CANARY.encode())
    await invoke(platform, a_traceparent(last))
    await told(collector, last, "invocation")
    everything = collector.everything()
    assert b"tessera.secrets.v1.Secrets/PutSecret" in everything
    for canary in (BODY_CANARY, QUERY_CANARY, PATH_CANARY, VALUE_CANARY, token, *platform.tokens.values()):
        assert canary.encode() not in everything
    # Nor is a token among what the collector is told beside the spans.
    assert not any("authorization" in metadata for metadata in collector.metadata)


async def test_a_method_that_is_any_word_names_no_span(platform: Platform, collector: Collector) -> None:
    trace_id = "7" * 32
    await platform.fetch("PROPFIND", "/pot", token=platform.tokens["alice"], headers=a_traceparent(trace_id))
    spans = await told(collector, trace_id, "_OTHER")
    assert spans["_OTHER"].facts["http.request.method"] == "_OTHER"


async def test_a_collector_that_is_not_there_is_nobodys_trouble() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with tracing.using(OtlpRecorder("tests", address, 1.0)):
            for number in range(10_000):  # more than the queue holds
                with tracing.entered(f"span {number}", {}):
                    pass


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_ratio_is_for_traces_that_begin_here(ratio: float) -> None:
    with running_collector() as collector:
        with tracing.using(OtlpRecorder("tests", collector.address, ratio)):
            with tracing.entered("ours", {}):
                pass
            with tracing.entered("theirs", a_traceparent()):
                pass
        assert {span.name for span in collector.spans()} == ({"ours", "theirs"} if ratio else {"theirs"})


def test_an_exception_is_told_by_its_type_alone() -> None:
    def fail() -> None:
        raise RuntimeError(BODY_CANARY)

    with running_collector() as collector:
        recorder = OtlpRecorder("tests", collector.address, 1.0)
        with tracing.using(recorder), pytest.raises(RuntimeError), tracing.entered("fails", {}):
            fail()
        (span,) = collector.spans()
        assert (span.is_error, span.facts) == (True, {"error.type": "RuntimeError"})
        assert BODY_CANARY.encode() not in collector.everything()


def test_nothing_is_imported_for_traces_where_they_are_off() -> None:
    code = """
import sys
from gateway import app as gateway
from secrets_service import app as secrets
from serving_service import app as serving
from servicekit import process, tracing
with tracing.recording("x", None, 1.0), tracing.entered("y", {}), tracing.within("z"):
    assert not tracing.is_on()
sys.exit(any(name.partition(".")[0] == "opentelemetry" for name in sys.modules))
"""
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
