"""What is measured of endpoints: counted once whoever restarts, and exported under the documented names."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_prometheus

from servicekit import database, measures
from servicekit.errors import InvalidParameter
from servicekit.measures import Key, Measured, Measures, Taken, UsageKey, Used
from servicekit.storage import StorageError
from servicekit.token_usage import MOST_SUMMED
from serving_service import meters as meters_module
from serving_service import store
from serving_service.app import MIGRATIONS
from serving_service.meters import Meters
from tessera.serving.v1 import serving_pb2 as pb
from tessera.serving.v1 import serving_pb2_grpc as rpc
from tests.support.builders import an_endpoint
from tests.support.eventually import eventually
from tests.support.gateway import Platform, platform, routes
from tests.support.http import fetch
from tests.support.secrets import data_directory, refusal, running_secrets
from tests.support.serving import RunningServing, ServingCaller, no_replicas, running_serving

GAUGES = {
    *("cpu_usage_percentage", "mem_usage_percentage", "provisioned_concurrent_requests_total"),
    *("request_count_total", "request_4xx_count_total", "request_5xx_count_total"),
}
HISTOGRAMS = {"request_latency_ms", "model_prediction_latency_ms", "model_queue_time_ms"}
START = 1_795_444_600.0
"""A time for clocks: 40 s after a full minute."""


def measured(requests: int = 1, *, refused: int = 0, failed: int = 0, milliseconds: float = 8) -> Measured:
    found = Measured()
    found.requests, found.refused, found.failed = requests, refused, failed
    for _ in range(requests):
        found.latency.add(milliseconds)
    return found


def report(
    sequence: int,
    *entities: tuple[Key, Measured],
    at: float = START,
    oldest: int = 1,
    usage: Mapping[UsageKey, Used] | None = None,
) -> pb.MeasuresReport:
    message = measures.report(Taken(dict(entities), dict(usage or {})))
    message.gateway_id, message.sequence, message.oldest_sequence = "g", sequence, oldest
    message.end_time = int(at * 1000)
    return message


class Clock:
    """Both clocks of the service."""

    def __init__(self) -> None:
        self.seconds = START

    def wall(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds - 1e9


KEY = Key("demo-id", "churn", "1")


@asynccontextmanager
async def running_meters(directory: Path, clock: Clock) -> AsyncIterator[Meters]:
    """Meters of a service that ends without storing anything, as one that is killed."""
    async with database.opened(directory / "serving.db", MIGRATIONS) as opened:
        if not await opened.read(store.all_ids):
            await opened.write(store.reserve_endpoint, an_endpoint())
            await opened.write(store.commit_endpoint, an_endpoint())
        meters = Meters(opened, Measures(), lambda key: 2, usage_days=30, now=clock.monotonic, wall=clock.wall)
        await meters.load()
        yield meters


async def minutes(meters: Meters) -> list[tuple[int, int]]:
    """Which minutes are stored, with their requests."""
    found = await meters._database.read(store.minutes_of, "demo-id", start=0, end=int(START), after=(), limit=10_000)
    return [(minute.minute - int(START // 60), minute.measured.requests) for minute in found]


async def test_report_is_counted_once_whatever_is_lost_or_killed(tmp_path: Path) -> None:
    clock = Clock()
    async with running_meters(tmp_path, clock) as meters:
        for sequence in (1, 2, 2, 1):
            meters.receive(report(sequence, (KEY, measured())))
        await meters.store()
        receipt = meters.receive(report(3, (KEY, measured())))
        assert (receipt.expected_sequence, receipt.stored_sequence) == (4, 2)
    async with running_meters(tmp_path, clock) as meters:
        receipt = meters.receive(report(4, (KEY, measured()), oldest=3))
        assert receipt.expected_sequence == 3
        assert await minutes(meters) == [(0, 2)]
        for sequence in (3, 4):
            meters.receive(report(sequence, (KEY, measured()), oldest=3))
        await meters.store()
        assert await minutes(meters) == [(0, 4)]


async def test_measures_belong_to_the_minute_in_which_they_were_made(tmp_path: Path) -> None:
    clock = Clock()
    async with running_meters(tmp_path, clock) as meters:
        clock.seconds += 120
        meters.receive(report(1, (KEY, measured(5)), at=START))  # it was late
        meters.receive(report(2, (KEY, measured(2)), at=START + 120))
        meters.receive(report(3, (KEY, measured(1)), at=START + 9999))  # its clock is ahead of ours
        assert meters.recent("demo-id")[KEY].requests == 3
        await meters.store()
        assert await minutes(meters) == [(0, 5), (2, 3)]
        clock.seconds += 60
        assert meters.recent("demo-id") == {}
        assert meters.total(KEY).requests == 8


async def test_a_day_is_kept_and_nothing_of_endpoints_that_are_gone(tmp_path: Path) -> None:
    clock = Clock()
    stranger = Key("another-id", "churn", "1")
    async with running_meters(tmp_path, clock) as meters:
        meters.receive(report(1, (KEY, measured()), (stranger, measured())))
        await meters.store()
        assert meters.total(stranger).requests == 0
        clock.seconds += 86_400 - 60
        meters.receive(report(2, (KEY, measured()), at=clock.seconds))
        await meters.store()
        assert [requests for _, requests in await minutes(meters)] == [1, 1]
        clock.seconds += 60
        meters.receive(report(3, (KEY, measured()), at=clock.seconds))
        await meters.store()
        assert [minute for minute, _ in await minutes(meters)] == [24 * 60 - 1, 24 * 60]
        await meters._database.write(store.mark_deleted, "demo-id")
        await meters._database.write(store.purge, "demo-id")
        assert await minutes(meters) == []


async def test_what_cannot_be_stored_is_stored_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageError("database or disk is full")

    clock = Clock()
    async with running_meters(tmp_path, clock) as meters:
        meters.receive(report(1, (KEY, measured())))
        with monkeypatch.context() as broken:
            broken.setattr(store, "add_measures", full)
            await meters.store()
        receipt = meters.receive(report(2, (KEY, measured(2))))
        assert receipt.stored_sequence == 0
        await meters.store()
        assert await minutes(meters) == [(0, 3)]
        assert meters.receive(pb.MeasuresReport(gateway_id="g", oldest_sequence=1)).stored_sequence == 2


async def test_what_cannot_be_stored_as_the_service_stops_is_stored_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_under_way, go_on, stores = asyncio.Event(), threading.Event(), 0
    loop, add_measures = asyncio.get_running_loop(), store.add_measures

    def full_at_first(*args: Any, **kwargs: Any) -> Any:
        nonlocal stores
        stores += 1
        if stores > 1:
            return add_measures(*args, **kwargs)
        loop.call_soon_threadsafe(is_under_way.set)
        go_on.wait()
        raise StorageError("database or disk is full")

    monkeypatch.setattr(store, "add_measures", full_at_first)
    monkeypatch.setattr(meters_module, "TAKE_SECONDS", 0.0)
    clock = Clock()
    async with running_meters(tmp_path, clock) as meters:
        job = asyncio.create_task(meters.run())
        meters.receive(report(1, (KEY, measured())))
        await asyncio.sleep(0)
        clock.seconds += 60
        await is_under_way.wait()
        job.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(job, return_exceptions=True)
        assert await minutes(meters) == [(0, 1)]
        assert meters.receive(report(1)).stored_sequence == 1


async def test_counts_between_other_bounds_are_refused_by_name(tmp_path: Path) -> None:
    odd = pb.EntityMeasures(endpoint_id="demo-id", requests=1, latency=pb.Distribution(counts=[1, 2]))
    async with running_meters(tmp_path, Clock()) as meters:
        with pytest.raises(InvalidParameter, match="same version"):
            meters.receive(pb.MeasuresReport(gateway_id="g", sequence=1, entities=[odd]))


def use(requests: int = 1, *, tokens: int = 0) -> Used:
    used = Used()
    used.requests, used.output_tokens = requests, tokens
    return used


async def test_what_no_database_can_hold_keeps_nothing_else_from_being_stored(tmp_path: Path) -> None:
    ada, bot = UsageKey("demo-id", "churn", "7", "ada"), UsageKey("demo-id", "churn", "8", "bot")
    async with running_meters(tmp_path, Clock()) as meters:
        for sequence in (1, 2):
            meters.receive(report(sequence, (KEY, measured()), usage={ada: use(2**63 - 1), bot: use(tokens=2**63 - 1)}))
        await meters.store()
        meters.receive(report(3, (KEY, measured()), usage={bot: use(tokens=2**63 - 1)}))
        await meters.store()
        found = await meters._database.read(store.usage_of, "demo-id", start=0, end=int(START), after=(), limit=10)
        assert [(each.key, each.used.requests, each.used.output_tokens) for each in found] == [(bot, 3, MOST_SUMMED)]
        assert await minutes(meters) == [(0, 3)]
        assert meters.receive(report(4)).stored_sequence == 3


async def test_use_is_kept_for_as_many_days_as_is_set(tmp_path: Path) -> None:
    async def users(meters: Meters) -> list[tuple[str, int, int]]:
        found = await meters._database.read(store.usage_of, "demo-id", start=0, end=int(START), after=(), limit=10_000)
        return [(each.key.requester, each.used.requests, each.used.output_tokens) for each in found]

    clock = Clock()
    ada, renamed = UsageKey("demo-id", "churn", "7", "ada"), UsageKey("demo-id", "churn", "7", "ada@example.com")
    async with running_meters(tmp_path, clock) as meters:
        meters.receive(report(1, usage={ada: use(2, tokens=10)}))
        await meters.store()
        meters.receive(report(2, usage={renamed: use(1, tokens=1)}))
        await meters.store()
        assert await users(meters) == [("ada@example.com", 3, 11)]
        clock.seconds += 30 * 86_400 - 60
        meters.receive(report(3, (KEY, measured()), at=clock.seconds))
        await meters.store()
        assert len(await users(meters)) == 1
        clock.seconds += 60
        meters.receive(report(4, (KEY, measured()), at=clock.seconds))
        await meters.store()
        assert await users(meters) == []


# What is exported


@pytest.fixture
async def serving(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[RunningServing, ServingCaller]]:
    monkeypatch.setattr("serving_service.meters.STORE_SECONDS", 0)
    monkeypatch.setattr("serving_service.meters.TAKE_SECONDS", 0.02)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(data_directory())
        await stack.enter_async_context(no_replicas(directory))
        secrets = await stack.enter_async_context(running_secrets(directory))
        running = await stack.enter_async_context(running_serving(directory, route_ack_seconds=0.3))
        yield running, running.public(secrets.admin_token)


async def exported(caller: ServingCaller, name: str) -> dict[str, Metric]:
    """The metrics of an endpoint by name, as both parsers read them."""
    answer = await caller(caller.stub.ExportServingEndpointMetrics, pb.ExportServingEndpointMetricsRequest(name=name))
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = list(read_openmetrics(answer.data.decode()))  # type: ignore[no-untyped-call]
    older = list(read_prometheus(answer.data.decode()))
    assert _samples(families) == _samples(older)
    return {family.name: family for family in families}


def _samples(families: Iterable[Metric]) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in families
        for sample in family.samples
    }


def value(family: Metric, entity: str = "ready-1", *, name: str = "", **labels: str) -> float:
    """The sample of an entity."""
    found = [
        sample.value
        for sample in family.samples
        if sample.name == (name or family.name)
        and sample.labels["served_model_name"] == entity
        and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, found
    return found[0]


async def test_metrics_have_the_documented_names_kinds_and_labels(
    serving: tuple[RunningServing, ServingCaller],
) -> None:
    running, admin = serving
    endpoint = await admin.create("demo")
    await admin.settled("demo")
    stub = rpc.MeteringStub(running.peer_channels["gateway"])
    key = Key(endpoint.id, "ready-1", "1")
    refused = (Key(endpoint.id), measured(1, refused=1))
    await stub.Report(report(1, (key, measured(7, refused=2, failed=1)), refused, at=START * 2))
    families = await exported(admin, "demo")
    assert {name for name, family in families.items() if family.type == "gauge"} == GAUGES
    assert {name for name, family in families.items() if family.type == "histogram"} == HISTOGRAMS
    assert value(families["request_count_total"]) == 7
    assert value(families["request_4xx_count_total"]) == 2
    assert value(families["request_5xx_count_total"]) == 1
    assert value(families["request_4xx_count_total"], "") == 1
    assert value(families["provisioned_concurrent_requests_total"]) == 4
    latency = families["request_latency_ms"]
    assert value(latency, name="request_latency_ms_count") == 7
    assert value(latency, name="request_latency_ms_sum") == pytest.approx(56)
    assert value(latency, name="request_latency_ms_bucket", le="7.0") == 0
    assert value(latency, name="request_latency_ms_bucket", le="10.0") == 7
    assert value(latency, name="request_latency_ms_bucket", le="+Inf") == 7
    labels = {"endpoint_name": "demo", "endpoint_id": endpoint.id}
    for family in families.values():
        for sample in family.samples:
            assert labels.items() <= sample.labels.items()
            assert sample.labels["served_model_version"] == ("1" if sample.labels["served_model_name"] else "")


async def test_queries_over_grpc_are_measured_too(serving: tuple[RunningServing, ServingCaller]) -> None:
    _, admin = serving
    await admin.create("demo")
    await admin.settled("demo")
    for _ in range(3):
        await admin.query("demo")
    with pytest.raises(grpc.aio.AioRpcError):
        await admin.query("demo", "nobody")
    families = await exported(admin, "demo")
    assert value(families["request_count_total"]) == 3
    assert value(families["model_prediction_latency_ms"], name="model_prediction_latency_ms_count") == 3
    assert value(families["request_4xx_count_total"], "") == 1


async def test_use_of_the_machine_is_that_of_running_replicas(serving: tuple[RunningServing, ServingCaller]) -> None:
    _, admin = serving
    await admin.create("idle", None)
    await admin.create("demo")
    await admin.settled("demo")
    await admin.stop("demo")

    async def used_nothing() -> bool:
        families = await exported(admin, "demo")
        return value(families["provisioned_concurrent_requests_total"]) == 0

    await eventually(used_nothing)
    families = await exported(admin, "demo")
    assert value(families["cpu_usage_percentage"]) == value(families["mem_usage_percentage"]) == 0
    assert not any(family.samples for family in (await exported(admin, "idle")).values())


async def test_metrics_of_an_endpoint_that_is_not_there_are_refused_as_any_other(
    serving: tuple[RunningServing, ServingCaller],
) -> None:
    _, admin = serving
    refused = await refusal(exported(admin, "nobody"))
    assert refused.reason == "RESOURCE_DOES_NOT_EXIST"


# What is kept


async def test_history_and_use_can_be_read_page_by_page(
    serving: tuple[RunningServing, ServingCaller],
) -> None:
    running, admin = serving
    endpoint = await admin.create("demo", None)
    stub = rpc.MeteringStub(running.peer_channels["gateway"])
    now = time.time()
    key = Key(endpoint.id, "one", "3")
    ada = UsageKey(endpoint.id, "one", "7", "ada@example.com")
    for number in range(5):
        minute = measured(10, refused=number, milliseconds=60)
        minute.busy = 30_000
        for _ in range(2):  # the others were answered without the model
            minute.prediction.add(40)
            minute.queue.add(6)
        await stub.Report(
            report(number + 1, (key, minute), at=now - 60 * (5 - number), usage={ada: use(number, tokens=7)})
        )

    async def history(**fields: Any) -> pb.ListServingEndpointMetricsHistoryResponse:
        request = pb.ListServingEndpointMetricsHistoryRequest(name="demo", **fields)
        answer: pb.ListServingEndpointMetricsHistoryResponse = await admin(
            admin.stub.ListServingEndpointMetricsHistory, request
        )
        return answer

    async def is_stored() -> bool:
        return len((await history()).points) == 5

    await eventually(is_stored)
    first = await history(page_size=3)
    second = await history(page_size=3, page_token=first.next_page_token)
    assert [each.request_4xx_count for each in (*first.points, *second.points)] == [0, 1, 2, 3, 4]
    assert second.next_page_token == ""
    point = first.points[0]
    assert (point.served_entity_name, point.entity_version, point.request_count) == ("one", "3", 10)
    assert point.start_time % 60_000 == 0
    assert 50 <= point.latency_p50_ms < point.latency_p99_ms <= 70
    assert point.mean_concurrency == pytest.approx(0.5)
    assert point.mean_prediction_ms == pytest.approx(40)
    assert point.mean_queue_ms == pytest.approx(6)
    middle = await history(start_time_ms=point.start_time + 60_000, end_time_ms=point.start_time + 180_000)
    assert [each.request_4xx_count for each in middle.points] == [1, 2]
    usage = await admin(
        admin.stub.ListServingEndpointUsage, pb.ListServingEndpointUsageRequest(name="demo", page_size=5)
    )
    assert [(each.requester, each.request_count, each.output_tokens) for each in usage.usage] == [
        ("ada@example.com", number, 7) for number in range(5)
    ]
    assert usage.next_page_token == ""
    for wrong in (
        {"start_time_ms": -1},
        {"end_time_ms": 1 << 62},
        {"start_time_ms": 2, "end_time_ms": 1},
        {"page_size": 0},
        {"page_size": 1_001},
        {"page_token": "x"},
        {"page_token": base64.b64encode(b'[true, "a", "b"]').decode()},
    ):
        refused = await refusal(history(**wrong))
        assert refused.reason == "INVALID_PARAMETER_VALUE"
        assert refused.message.startswith(next(reversed(wrong)))


async def test_tracking_is_switched_on_for_gateways_and_for_queries_over_grpc(
    serving: tuple[RunningServing, ServingCaller],
) -> None:
    running, admin = serving
    await admin.create("demo")
    await admin.settled("demo")
    await admin.query("demo")
    on = pb.AiGatewayConfig(usage_tracking_config=pb.UsageTrackingConfig(enabled=True))
    stream = running.routes.Watch()
    try:
        table = await stream.read()
        assert not table.endpoints[0].is_usage_tracked
        await stream.write(pb.RouteReport(acknowledged_revision=table.revision))
        put = pb.PutServingEndpointAiGatewayRequest(name="demo", ai_gateway=on)
        assert await admin(admin.stub.PutServingEndpointAiGateway, put) == on
        while not (table.endpoints and table.endpoints[0].is_usage_tracked):
            table = await stream.read()
    finally:
        stream.cancel()
    for _ in range(2):
        await admin.query("demo")

    async def used() -> list[tuple[str, int]]:
        answer = await admin(admin.stub.ListServingEndpointUsage, pb.ListServingEndpointUsageRequest(name="demo"))
        return [(each.requester, each.request_count) for each in answer.usage]

    async def is_told() -> bool:
        return sum(count for _, count in await used()) == 2

    await eventually(is_told)
    assert {requester for requester, _ in await used()} == {"admin"}


# What gateways report


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """A replica that says its times, and for how long the caller's body tells it to wait."""
    while (await receive()).get("more_body", False):
        pass
    headers = [(b"content-type", b"application/json"), (b"x-tessera-timing", b"2.5 30")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
async def gateway(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Platform]:
    monkeypatch.setattr("gateway.measures.REPORT_SECONDS", 0.02)
    async with platform() as running:
        yield running


async def invoke(gateway: Platform, path: str) -> Any:
    return await fetch(gateway.url, "POST", path, token="owner-token", body=b"{}")


async def test_gateway_reports_what_callers_were_answered_and_hides_how_it_knows(gateway: Platform) -> None:
    address = await gateway.add_replica(answering)
    await gateway.publish(routes("churn", ("m-1", 100, [("r1", address)]), ("m-2", 0, [])))
    answer = await invoke(gateway, "/serving-endpoints/churn/invocations")
    assert answer.status == 200
    assert "x-tessera-timing" not in answer.headers
    assert (await invoke(gateway, "/serving-endpoints/churn/served-models/none/invocations")).status == 404

    def reported() -> dict[str, pb.EntityMeasures]:
        return {one.served_entity_name: one for each in gateway.serving.measures for one in each.entities}

    await eventually(lambda: len(reported()) == 2)
    one, refused = reported()["m-1"], reported()[""]
    assert (one.endpoint_id, one.entity_version, one.requests, one.refused) == ("id-churn", "1", 1, 0)
    assert one.prediction.sum_ms == 30
    assert 2.5 <= one.queue.sum_ms <= 2.5 + one.latency.sum_ms
    assert one.busy_ms > 0
    assert (refused.endpoint_id, refused.requests, refused.refused) == ("id-churn", 1, 1)


async def chatting(scope: Any, receive: Any, send: Any) -> None:
    """A replica that says how many tokens it used."""
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    body = b'{"usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}'
    await send({"type": "http.response.body", "body": body})


async def test_gateway_reports_who_used_what_only_where_that_is_tracked(gateway: Platform) -> None:
    address = await gateway.add_replica(chatting)
    for name in ("open", "tracked"):
        endpoint = routes(name, ("m-1", 100, [("r1", address)]))
        endpoint.is_usage_tracked = name == "tracked"
        await gateway.publish(endpoint)
        assert (await invoke(gateway, f"/serving-endpoints/{name}/invocations")).status == 200
    await eventually(lambda: sum(len(each.entities) for each in gateway.serving.measures) >= 2)
    (use,) = [one for each in gateway.serving.measures for one in each.usage]
    assert (use.endpoint_id, use.served_entity_name, use.requester) == ("id-tracked", "m-1", "owner@example.com")
    assert (use.principal_id, use.requests, use.input_tokens, use.output_tokens) == ("11", 1, 9, 4)


async def test_gateway_that_stops_reports_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    async with platform() as running:
        address = await running.add_replica(answering)
        await running.publish(routes("churn", ("m-1", 100, [("r1", address)])))
        await asyncio.gather(*(invoke(running, "/serving-endpoints/churn/invocations") for _ in range(3)))
        serving = running.serving
    assert sum(one.requests for each in serving.measures for one in each.entities) == 3
