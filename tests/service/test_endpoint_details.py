"""What is said of an endpoint beside its configuration, over real gRPC: changed in one step, once, and kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from servicekit import channels
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import an_input
from tests.support.platform import running_pair
from tests.support.secrets import TIMEOUT, data_directory, refusal
from tests.support.serving import ServingCaller

URL = "https://tessera.example.com"


@asynccontextmanager
async def running_admin(directory: Path, **changes: Any) -> AsyncIterator[ServingCaller]:
    async with running_pair(directory, **changes) as (secrets, serving):
        yield serving.public(secrets.admin_token)


@pytest.fixture
async def admin() -> AsyncIterator[ServingCaller]:
    with data_directory() as directory:
        async with running_admin(directory, public_url=URL) as caller:
            yield caller


def added(*tags: tuple[str, str], name: str = "demo") -> pb.PatchServingEndpointTagsRequest:
    return pb.PatchServingEndpointTagsRequest(
        name=name, add_tags=[pb.EndpointTag(key=key, value=value) for key, value in tags]
    )


async def warnings_of(call: Any) -> tuple[Any, list[str]]:
    answer = await call
    trailers = await call.trailing_metadata()
    return answer, [value for key, value in trailers if key == channels.WARNING]


async def test_changes_at_once_are_all_made(admin: ServingCaller) -> None:
    created = await admin.create("demo", None)
    patches = [admin(admin.stub.PatchServingEndpointTags, added((f"k{number}", "v"))) for number in range(8)]
    gateway = pb.AiGatewayConfig(usage_tracking_config=pb.UsageTrackingConfig(enabled=False))
    put = pb.PutServingEndpointAiGatewayRequest(name="demo", ai_gateway=gateway)
    await asyncio.gather(*patches, admin(admin.stub.PutServingEndpointAiGateway, put))
    found = await admin.get("demo")
    assert {tag.key for tag in found.tags} == {f"k{number}" for number in range(8)}
    assert found.ai_gateway == gateway
    assert found.last_updated_timestamp >= created.last_updated_timestamp


async def test_nothing_makes_an_endpoint_too_long_for_the_list(admin: ServingCaller) -> None:
    long = "x" * 15_000
    await admin.create("demo", None, description=long)
    config = pb.UpdateServingEndpointConfigRequest(
        name="demo", served_entities=[an_input("ready", name=f"{number}{'n' * 200}") for number in range(9)]
    )
    config.traffic_config.routes.extend(
        pb.RouteInput(served_entity_name=each.name, traffic_percentage=0 if index else 100)
        for index, each in enumerate(config.served_entities)
    )
    gateway = pb.AiGatewayConfig(inference_table_config=pb.AiGatewayInferenceTableConfig(schema_name="x" * 2_000))
    refused = [
        admin.create("other", None, description=long, tags=[pb.EndpointTag(key="k", value="x" * 2_000)]),
        admin(admin.stub.PatchServingEndpointTags, added(("k", "x" * 2_000))),
        admin(
            admin.stub.PutServingEndpointAiGateway,
            pb.PutServingEndpointAiGatewayRequest(name="demo", ai_gateway=gateway),
        ),
        admin(admin.stub.UpdateServingEndpointConfig, config),
    ]
    for call in refused:
        error = await refusal(call)
        assert (error.reason, "more than the limit of 16384" in error.message) == ("INVALID_PARAMETER_VALUE", True)
    assert (await admin.get("demo")).state.config_update == pb.EndpointState.NOT_UPDATING


async def test_what_is_said_takes_no_new_version_and_no_update(admin: ServingCaller) -> None:
    await admin.create("demo")
    before = await admin.settled("demo")
    await admin(admin.stub.PatchServingEndpointTags, added(("k", "v")))
    after = await admin.get("demo")
    assert (after.config, after.state) == (before.config, before.state)


async def test_a_retry_of_a_change_gets_the_first_answer_and_its_warning(admin: ServingCaller) -> None:
    await admin.create("demo", None)
    told = pb.EmailNotifications(on_update_failure=["ada@example.com"])
    request = pb.UpdateServingEndpointNotificationsRequest(name="demo", email_notifications=told)
    metadata = (*admin._metadata, (channels.REQUEST_ID, "first"))
    send = admin.stub.UpdateServingEndpointNotifications
    first, warnings = await warnings_of(send(request, metadata=metadata, timeout=TIMEOUT))
    assert len(warnings) == 1
    assert "no mail server or webhook" in warnings[0]
    none = pb.UpdateServingEndpointNotificationsRequest(name="demo", email_notifications=pb.EmailNotifications())
    assert (await warnings_of(send(none, metadata=admin._metadata, timeout=TIMEOUT)))[1] == []
    again = await warnings_of(send(request, metadata=metadata, timeout=TIMEOUT))
    assert again == (first, warnings)
    assert (await admin.get("demo")).email_notifications == pb.EmailNotifications()


async def test_all_of_it_is_there_after_a_restart() -> None:
    with data_directory() as directory:
        said: dict[str, Any] = {
            "route_optimized": True,
            "budget_policy_id": "b",
            "ai_gateway": pb.AiGatewayConfig(fallback_config=pb.FallbackConfig(enabled=False)),
            "email_notifications": pb.EmailNotifications(on_update_success=["ada@example.com"]),
        }
        async with running_admin(directory, public_url=URL) as admin:
            await admin.create("demo", None, tags=[pb.EndpointTag(key="k", value="")], **said)
            before = await admin.get("demo")
        async with running_admin(directory, public_url=URL) as admin:
            assert await admin.get("demo") == before
    assert before.tags[0].HasField("value")
    assert before.email_notifications == said["email_notifications"]
    assert before.effective_budget_policy_id == "b"
    assert before.endpoint_url == f"{URL}/serving-endpoints/demo/invocations"


async def test_without_a_public_address_no_endpoint_can_be_route_optimized() -> None:
    with data_directory() as directory:
        async with running_admin(directory) as admin:
            refused = await refusal(admin.create("demo", None, route_optimized=True))
            assert refused.reason == "FEATURE_DISABLED"
            assert "TESSERA_PUBLIC_URL" in refused.message
            plain = await admin.create("demo", None)
            assert not plain.HasField("data_plane_info")
            assert not plain.endpoint_url


async def test_telemetry_is_not_changed_during_an_update(admin: ServingCaller) -> None:
    await admin.create("demo", "slow")
    request = pb.PatchServingEndpointTelemetryConfigRequest(name="demo", telemetry_config=pb.TelemetryConfig())
    assert (await refusal(admin(admin.stub.PatchServingEndpointTelemetryConfig, request))).reason == "RESOURCE_CONFLICT"
    await admin.delete("demo")


@pytest.mark.parametrize("is_off", [False, True])
async def test_inference_tables_come_back_with_their_configuration_only(admin: ServingCaller, is_off: bool) -> None:
    capture = pb.AutoCaptureConfig(catalog_name="main", enabled=False)
    await admin.create("demo")
    await admin.settled("demo")
    update = pb.UpdateServingEndpointConfigRequest(
        name="demo", served_entities=[an_input("ready", version="2")], auto_capture_config=capture if is_off else None
    )
    updating: Awaitable[Any] = admin(admin.stub.UpdateServingEndpointConfig, update)
    updated = await updating
    assert updated.pending_config.HasField("auto_capture_config") == is_off
    assert not updated.config.HasField("auto_capture_config")
    settled = await admin.settled("demo")
    assert settled.config.HasField("auto_capture_config") == is_off
    if is_off:
        assert settled.config.auto_capture_config == capture
