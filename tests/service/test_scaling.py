"""How many replicas a served entity has: between its bounds, as its compute fields and its load ask for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.service.test_lifecycle import READY, Platform, running_platform
from tests.support.builders import an_input
from tests.support.secrets import refusal


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    async with running_platform() as running:
        yield running


async def test_an_entity_has_its_fewest_replicas_from_the_start_and_keeps_them(platform: Platform) -> None:
    await platform.admin.create("demo", None)
    await platform.admin.update("demo", an_input("ready", workload_size="Medium"))
    demo = await platform.admin.settled("demo")
    assert demo.config.served_entities[0].state.deployment == READY
    first = await platform.serving.replicas()
    assert len(first) == 2, "it is ready when both are"

    await platform.start()
    await platform.until_replicas(2)
    assert await platform.serving.replicas() == first

    await platform.admin.update("demo", an_input("ready", min_provisioned_concurrency=12))
    await platform.admin.settled("demo")
    await platform.until_replicas(3)
    assert not first.keys() & (await platform.serving.replicas()).keys()


async def test_concurrency_beyond_the_quota_is_refused_and_leaves_nothing_behind(platform: Platform) -> None:
    admin = platform.admin
    wide = an_input("ready", min_provisioned_concurrency=0, max_provisioned_concurrency=1024)
    await admin.create("wide", None)
    await admin.update("wide", wide)
    await admin.settled("wide")
    wide = an_input("slow", min_provisioned_concurrency=0, max_provisioned_concurrency=1024)
    await admin.update("wide", wide)
    await admin.create("narrow", None)
    refused = await refusal(admin.update("narrow", an_input("slow", workload_size="Small")))
    assert refused.reason == "RESOURCE_LIMIT_EXCEEDED"
    assert "model 'slow' would have 1028 of at most 1024" in refused.message
    found = await admin.get("narrow")
    assert not found.HasField("pending_config")
    assert found.state.config_update == found.state.NOT_UPDATING
