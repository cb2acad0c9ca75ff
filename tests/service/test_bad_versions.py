"""A version that cannot run never takes the place of one that does, says why, and is not tried for ever (R9)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving_service.model import ModelVersion
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.secrets import RunningSecrets, running_secrets
from tests.support.serving import TINY, MannerRegistry, RunningServing, ServingCaller, no_replicas, running_serving

DEPLOY_SECONDS = 3.0
"""What a version that never gets ready has."""

State = pb.EndpointState
FAILED = pb.ServedEntityState.DEPLOYMENT_FAILED


@dataclass(frozen=True)
class Platform:
    secrets: RunningSecrets
    serving: RunningServing

    @property
    def admin(self) -> ServingCaller:
        return self.serving.public(self.secrets.admin_token)


class ForgetfulRegistry(MannerRegistry):
    """While it hands out version `forgotten`, the secret is deleted."""

    def __init__(self, secrets: RunningSecrets) -> None:
        super().__init__(secrets.settings.data_dir)
        self._secrets = secrets

    async def fetch(self, model: ModelVersion) -> Path:
        if model.version == "forgotten":
            await self._secrets.admin.delete("scope", "key")
        return await super().fetch(model)


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    """With an endpoint `demo` whose version 1 serves."""
    async with AsyncExitStack() as stack:
        secrets = await stack.enter_async_context(running_secrets())
        await secrets.admin.create_scope("scope")
        await secrets.admin.put("scope", "key", "value")
        await stack.enter_async_context(no_replicas(secrets.settings.data_dir))
        serving = await stack.enter_async_context(
            running_serving(
                secrets.settings.data_dir, registry=ForgetfulRegistry(secrets), deploy_deadline=DEPLOY_SECONDS
            )
        )
        platform = Platform(secrets, serving)
        await platform.admin.create("demo", TINY, environment={"SAYS": "the good one"})
        await platform.admin.settled("demo")
        yield platform


BAD: dict[str, tuple[pb.ServedEntityInput, str]] = {
    "fails to load": (an_input(TINY, version="2", environment_vars={"FAILS": "no weights"}), "no weights"),
    "crashes": (an_input("dying", version="2"), "exited with status 3"),
    "never gets ready": (an_input(TINY, version="2", environment_vars={"HANGS": "yes"}), "not ready in time"),
    "lacks a secret": (
        an_input(TINY, version="forgotten", environment_vars={"KEY": "{{secrets/scope/key}}"}),
        "{{secrets/scope/key}}",
    ),
}
"""A version by what is wrong with it, and what must be said of it."""


@pytest.mark.parametrize("name", BAD)
async def test_a_version_that_cannot_run_leaves_the_one_that_does_and_says_why(platform: Platform, name: str) -> None:
    (before,) = (await platform.serving.replicas()).items()
    bad, cause = BAD[name]
    await platform.admin.update("demo", bad)
    settled = await platform.admin.settled("demo")
    assert (settled.state.ready, settled.state.config_update) == (State.READY, State.UPDATE_FAILED)
    assert settled.config.config_version == 1
    (entity,) = settled.pending_config.served_entities
    assert entity.state.deployment == FAILED
    assert cause in entity.state.deployment_state_message

    async def only_the_good_one_runs() -> bool:
        return await platform.serving.replicas() == dict([before])

    await eventually(only_the_good_one_runs)
    assert (await platform.admin.query("demo"))[1] == b"the good one"
    launches = {event.replica_id for event in await platform.admin.events("demo")} - {before[0]}
    assert len(launches) == 1, "it was tried again, though nothing had changed"
