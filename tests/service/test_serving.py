"""Serving over real gRPC, beside the real Secrets service, with tiny real programs as model servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Value
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import channels, context, database
from servicekit.errors import StartError
from serving_service import store
from serving_service.app import MIGRATIONS
from serving_service.environment import SecretReferences
from serving_service.launcher import ReplicaHandle
from serving_service.model import ModelVersion
from serving_service.scaling import REPLICA_CONCURRENCY
from tessera.identity.v1 import permissions_pb2
from tessera.identity.v1.identity_pb2 import (
    CreateServicePrincipalRequest,
    DeleteRequest,
    ListRequest,
    PatchOperation,
    PatchRequest,
)
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import a_config_input, an_input
from tests.support.eventually import eventually
from tests.support.exhaustion import out_of_descriptors
from tests.support.secrets import STREAM_TIMEOUT, RunningSecrets, data_directory, refusal, running_secrets
from tests.support.serving import (
    MannerLauncher,
    MannerRegistry,
    RunningServing,
    SecretsSwitch,
    ServingCaller,
    no_replicas,
    running_serving,
    serving_settings,
)

State = pb.EndpointState
Entity = pb.ServedEntityState
CANARY = "canary-0b5e55ed-value"
SECRET = "{{secrets/Team/Api.Key}}"


@dataclass(frozen=True)
class Platform:
    """Both services, and the people who use them."""

    secrets: RunningSecrets
    serving: RunningServing

    @property
    def admin(self) -> ServingCaller:
        return self.serving.public(self.secrets.admin_token)

    async def user(self, name: str) -> ServingCaller:
        await self.secrets.admin.create_user(name)
        return self.serving.public(await self.secrets.token_for(name))

    async def put(self, value: str | bytes = CANARY) -> None:
        """The secret that SECRET refers to, in a scope of the admin's."""
        await self.secrets.admin.create_scope("team")
        await self.secrets.admin.put("team", "api.key", value)

    async def share(self, name: str) -> None:
        """Lets a user read the secret."""
        await self.secrets.admin.grant("team", name, secrets_pb2.READ)


@asynccontextmanager
async def running_platform(**changes: Any) -> AsyncIterator[Platform]:
    with data_directory() as directory:
        async with switched_platform(directory, **changes) as (platform, _):
            yield platform


@asynccontextmanager
async def switched_platform(
    directory: Path | None = None, **changes: Any
) -> AsyncIterator[tuple[Platform, SecretsSwitch]]:
    """A platform whose Secrets service can be stopped and started."""
    async with AsyncExitStack() as stack:
        if directory is None:
            directory = stack.enter_context(data_directory())
        await stack.enter_async_context(no_replicas(directory))
        switch = SecretsSwitch(directory)
        stack.push_async_callback(switch.stop)
        secrets = await switch.start()
        yield Platform(secrets, await stack.enter_async_context(running_serving(directory, **changes))), switch


class Gate(MannerRegistry):
    """A registry whose downloads wait."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.is_reached, self.may_pass = asyncio.Event(), asyncio.Event()

    async def fetch(self, model: ModelVersion) -> Path:
        self.is_reached.set()
        await self.may_pass.wait()
        return await super().fetch(model)


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    # Gateways, of which most tests have none, get little time, so that nobody waits for them after the start.
    async with running_platform(route_ack_seconds=0.3) as running:
        yield running


@pytest.fixture
async def patient() -> AsyncIterator[Platform]:
    """A platform that gives gateways the usual time."""
    async with running_platform() as running:
        yield running


def entity_states(config: pb.EndpointCoreConfigOutput) -> dict[str, tuple[str, str]]:
    return {
        each.name: (Entity.Deployment.Name(each.state.deployment), each.state.deployment_state_message)
        for each in config.served_entities
    }


async def environment_of(caller: ServingCaller, name: str) -> dict[str, str]:
    """The variables that the endpoint's model has, but for those that every model has."""
    _, body = await caller.query(name)
    own = ("PATH", "HOME", "TMPDIR", "PYTHONUNBUFFERED", "LANG", "LC_CTYPE")
    return {name: value for name, value in json.loads(body)["environment"].items() if name not in own}


# Life of an endpoint


async def test_second_service_on_the_same_data_is_refused_before_it_does_anything() -> None:
    with data_directory() as directory:

        def files() -> dict[Path, int]:
            return {path: path.lstat().st_mtime_ns for path in directory.rglob("*") if not path.is_dir()}

        async with database.opened(directory / "serving" / "serving.db", MIGRATIONS):
            before = files()
            with pytest.raises(StartError, match="in use by another process"):
                async with running_serving(directory):
                    pass
            assert files() == before


async def test_an_endpoint_is_created_pending_and_becomes_ready(platform: Platform) -> None:
    created = await platform.admin.create(
        "demo", environment={"A": "b"}, description="words", tags=[pb.EndpointTag(key="k", value="v")]
    )
    assert (created.state.ready, created.state.config_update) == (State.NOT_READY, State.IN_PROGRESS)
    assert not created.HasField("config")
    assert created.pending_config.config_version == 1
    assert created.pending_config.start_time == created.creation_timestamp
    assert entity_states(created.pending_config)["ready-1"][0] == "DEPLOYMENT_CREATING"
    assert (created.creator, created.permission_level) == ("admin", permissions_pb2.CAN_MANAGE)
    assert (created.description, [(tag.key, tag.value) for tag in created.tags]) == ("words", [("k", "v")])
    assert len(created.id) == 32
    ready = await platform.admin.settled("demo")
    assert (ready.state.ready, ready.state.config_update) == (State.READY, State.NOT_UPDATING)
    assert not ready.HasField("pending_config")
    assert entity_states(ready.config) == {"ready-1": ("DEPLOYMENT_READY", "")}
    assert not ready.config.HasField("start_time")
    (model,) = ready.config.served_models
    assert (model.name, model.model_name, model.model_version) == ("ready-1", "ready", "1")
    assert (model.workload_size, dict(model.environment_vars)) == ("Small", {"A": "b"})
    (route,) = ready.config.traffic_config.routes
    assert (route.served_entity_name, route.served_model_name, route.traffic_percentage) == ("ready-1", "ready-1", 100)
    assert await environment_of(platform.admin, "demo") == {"A": "b"}


async def test_an_endpoint_without_configuration_exists_and_serves_nothing(platform: Platform) -> None:
    created = await platform.admin.create("bare", None)
    assert (created.state.ready, created.state.config_update) == (State.NOT_READY, State.NOT_UPDATING)
    assert not created.HasField("config")
    assert not created.HasField("pending_config")
    refused = await refusal(platform.admin.query("bare"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "ENDPOINT_NOT_FOUND")
    updated = await platform.admin.update("bare", an_input("ready"))
    assert updated.pending_config.config_version == 1
    assert (await platform.admin.settled("bare")).state.ready == State.READY


async def test_an_update_takes_over_and_the_old_replica_ends(platform: Platform) -> None:
    await platform.admin.create("demo", environment={"VERSION": "one"})
    await platform.admin.settled("demo")
    (old,) = await platform.serving.replicas()
    updated = await platform.admin.update("demo", an_input("ready", version="2", environment_vars={"VERSION": "two"}))
    assert (updated.state.ready, updated.state.config_update) == (State.READY, State.IN_PROGRESS)
    assert (updated.config.config_version, updated.pending_config.config_version) == (1, 2)
    settled = await platform.admin.settled("demo")
    assert (settled.state.ready, settled.config.config_version) == (State.READY, 2)
    assert await environment_of(platform.admin, "demo") == {"VERSION": "two"}

    await eventually(lambda: _has_replicas(platform, 1))
    assert old not in await platform.serving.replicas()


async def test_a_failed_update_leaves_the_old_configuration_serving_and_says_why(platform: Platform) -> None:
    await platform.admin.create("demo", environment={"VERSION": "one"})
    await platform.admin.settled("demo")
    failing = an_input("failing", environment_vars={"SAID": "the weights are missing"})
    await platform.admin.update("demo", failing, an_input("slow"), routes=[("failing-1", 50), ("slow-1", 50)])
    failed = await platform.admin.settled("demo")
    assert (failed.state.ready, failed.state.config_update) == (State.READY, State.UPDATE_FAILED)
    assert failed.config.config_version == 1
    states = entity_states(failed.pending_config)
    assert states["failing-1"][0] == "DEPLOYMENT_FAILED"
    assert states["failing-1"][1].startswith("Phase load failed: KeyError: the weights are missing. Its log says more.")
    assert states["slow-1"][0] == "DEPLOYMENT_ABORTED"
    assert "failing-1" in states["slow-1"][1]
    assert await environment_of(platform.admin, "demo") == {"VERSION": "one"}

    async def only_the_old_one_runs() -> bool:
        return len(await platform.serving.replicas()) == 1

    await eventually(only_the_old_one_runs)
    await platform.admin.update("demo", an_input("ready", environment_vars={"VERSION": "three"}))
    settled = await platform.admin.settled("demo")
    assert (settled.state.config_update, settled.config.config_version) == (State.NOT_UPDATING, 3)
    assert not settled.HasField("pending_config")


async def test_a_model_server_that_dies_before_it_is_ready_fails_the_update_and_keeps_its_log(
    platform: Platform,
) -> None:
    await platform.admin.create("demo", "dying")
    failed = await platform.admin.settled("demo")
    assert (failed.state.ready, failed.state.config_update) == (State.NOT_READY, State.UPDATE_FAILED)
    assert not failed.HasField("config")
    deployment, message = entity_states(failed.pending_config)["dying-1"]
    assert deployment == "DEPLOYMENT_FAILED"
    assert "status 3" in message
    assert await platform.admin.logs("demo", "dying-1") == "about to die\n"
    # It is not tried again and again.
    assert len(await platform.serving.launcher.adopt()) == 1


async def test_an_update_that_is_not_ready_in_time_fails() -> None:
    async with running_platform(deploy_deadline=0.5) as platform:
        await platform.admin.create("demo", "slow")
        failed = await platform.admin.settled("demo")
        assert failed.state.config_update == State.UPDATE_FAILED
        assert "not ready in time" in entity_states(failed.pending_config)["slow-1"][1]


async def test_a_second_update_is_refused_while_one_is_under_way(platform: Platform) -> None:
    await platform.admin.create("demo", "slow")
    for model in ("ready", "unknown-model"):
        refused = await refusal(platform.admin.update("demo", an_input(model)))
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "RESOURCE_CONFLICT")
        assert "demo" in refused.message


class MeetingPlace(MannerRegistry):
    """A registry that answers nobody until two have asked."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._meeting = asyncio.Barrier(2)

    async def describe(self, name: str, version: str) -> ModelVersion:
        await self._meeting.wait()
        return await super().describe(name, version)


async def test_of_two_updates_at_once_one_is_refused() -> None:
    with data_directory() as directory:
        async with switched_platform(directory, registry=MeetingPlace(directory)) as (platform, _):
            await platform.admin.create("demo", None)
            updates = (platform.admin.update("demo", an_input("ready", version=version)) for version in ("2", "3"))
            answers = await asyncio.gather(*updates, return_exceptions=True)
            (refused,) = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
            assert refused.code() is grpc.StatusCode.ABORTED
            assert (await platform.admin.settled("demo")).config.config_version == 1


async def test_an_endpoint_can_be_deleted_in_the_middle_of_an_update_and_its_name_used_again(
    platform: Platform,
) -> None:
    first = await platform.admin.create("demo", "slow")
    await eventually(lambda: _has_replicas(platform, 1))
    await platform.admin.delete("demo")
    refused = await refusal(platform.admin.get("demo"))
    assert (refused.reason, refused.message) == (
        "RESOURCE_DOES_NOT_EXIST",
        "Endpoint with name 'demo' does not exist.",
    )
    assert (await refusal(platform.admin.query("demo"))).reason == "ENDPOINT_NOT_FOUND"
    second = await platform.admin.create("demo")
    assert second.id != first.id
    await platform.admin.settled("demo")
    await eventually(lambda: _has_replicas(platform, 1))
    await platform.admin.query("demo")
    await platform.admin.delete("demo")
    await eventually(lambda: _has_replicas(platform, 0))
    assert (await refusal(platform.admin.delete("demo"))).reason == "RESOURCE_DOES_NOT_EXIST"


async def _has_replicas(platform: Platform, count: int) -> bool:
    """Whether there are so many, those included that have ended and are kept for their logs."""
    return len(await platform.serving.launcher.adopt()) == count


async def test_a_replica_that_dies_is_started_again(platform: Platform) -> None:
    await platform.admin.create("demo")
    await platform.admin.settled("demo")
    ((replica_id, pid),) = (await platform.serving.replicas()).items()
    os.kill(pid, signal.SIGKILL)

    async def is_another_one() -> bool:
        return set(await platform.serving.launcher.adopt()) - {replica_id} != set()

    await eventually(is_another_one)
    ready = await platform.admin.until("demo", lambda endpoint: endpoint.state.ready == State.READY)
    assert ready.state.config_update == State.NOT_UPDATING
    await platform.admin.query("demo")
    await eventually(lambda: _has_replicas(platform, 1))


# Who may do what


async def test_to_others_an_endpoint_does_not_exist(platform: Platform) -> None:
    maker, other = await platform.user("maker@example.com"), await platform.user("other@example.com")
    await maker.create("demo")
    await maker.settled("demo")
    calls: list[Callable[[], Any]] = [
        lambda: other.get("demo"),
        lambda: other.update("demo", an_input("ready")),
        lambda: other.delete("demo"),
        lambda: other.logs("demo", "ready-1"),
    ]
    for call in calls:
        assert (await refusal(call())).message == "Endpoint with name 'demo' does not exist."
    assert (await refusal(other.query("demo"))).reason == "ENDPOINT_NOT_FOUND"
    assert await other.names() == []
    taken = await refusal(other.create("demo"))
    assert (taken.code, taken.reason) == (grpc.StatusCode.ALREADY_EXISTS, "RESOURCE_ALREADY_EXISTS")


async def test_a_list_reads_nothing_of_endpoints_that_the_caller_may_not_see(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, other = await platform.user("maker@example.com"), await platform.user("other@example.com")
    await maker.create("hidden", None)
    shown = await other.create("shown", None)
    read: list[str] = []
    original = store._configs

    def recorded(connection: Any, endpoint_id: str) -> Any:
        if context.current() is not None:  # the workers of endpoints read them too, for nobody
            read.append(endpoint_id)
        return original(connection, endpoint_id)

    monkeypatch.setattr(store, "_configs", recorded)
    assert (await other.names(), read) == (["shown"], [shown.id])


async def test_creator_and_admins_may_do_everything(platform: Platform) -> None:
    maker = await platform.user("maker@example.com")
    await maker.create("demo")
    assert (await platform.admin.settled("demo")).creator == "maker@example.com"
    assert (await maker.names(), await platform.admin.names()) == (["demo"], ["demo"])
    await maker.query("demo")
    await platform.admin.query("demo")
    await platform.admin.delete("demo")
    assert await maker.names() == []


async def test_nobody_gets_in_without_a_token_and_internal_calls_do_not_exist_outside(platform: Platform) -> None:
    anonymous = platform.serving.public(None)
    assert (await refusal(anonymous.names())).code is grpc.StatusCode.UNAUTHENTICATED
    assert (await refusal(anonymous.query("demo"))).code is grpc.StatusCode.UNAUTHENTICATED
    watch: Any = platform.serving.public_channel.stream_stream("/tessera.serving.v1.Routes/Watch")
    call = watch(iter(()), metadata=(("authorization", f"Bearer {platform.secrets.admin_token}"),), timeout=20)
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


# What is refused


async def test_nothing_is_there_after_a_refused_create(platform: Platform) -> None:
    refusals = [
        await refusal(platform.admin.create("bad name")),
        await refusal(platform.admin.create("demo", "unknown-model")),
        await refusal(platform.admin.create("demo", environment={"LD_PRELOAD": "x"})),
        await refusal(platform.admin.create("demo", environment={"A": "{{secrets/no/where}}"})),
        await refusal(platform.admin.create("demo", route_optimized=True)),
        await refusal(platform.admin.create("demo", rate_limits=[pb.RateLimit(calls=1)])),
    ]
    assert [refused.reason for refused in refusals] == [
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
        "INVALID_PARAMETER_VALUE",
        "INVALID_PARAMETER_VALUE",
        "FEATURE_DISABLED",
        "INVALID_PARAMETER_VALUE",
    ]
    assert "unknown-model" in refusals[1].message
    assert await platform.admin.names() == []
    assert await platform.serving.launcher.adopt() == {}


async def test_a_refused_update_changes_nothing(platform: Platform) -> None:
    await platform.admin.create("demo")
    before = await platform.admin.settled("demo")
    for bad in (an_input("unknown-model"), an_input("ready", workload_size="Huge"), an_input("")):
        await refusal(platform.admin.update("demo", bad))
    assert await platform.admin.get("demo") == before


async def test_a_workspace_holds_so_many_endpoints(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_ENDPOINTS", 2)
    await platform.admin.create("one", None)
    await platform.admin.create("two", None)
    refused = await refusal(platform.admin.create("three", None))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RESOURCE_LIMIT_EXCEEDED")
    await platform.admin.delete("one")
    await platform.admin.create("three", None)


async def test_endpoints_are_made_and_changed_so_often_and_no_more() -> None:
    async with running_platform(endpoint_changes=2) as platform:
        await platform.admin.create("one", None)
        await platform.admin.create("two", None)
        for change in (
            platform.admin.create("three", None),
            platform.admin.update("one", an_input("ready")),
        ):
            refused = await refusal(change)
            assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_LIMIT_EXCEEDED")
        assert await platform.admin.names() == ["one", "two"]
        await platform.admin.delete("one")


async def test_changes_that_are_refused_keep_nobody_from_those_that_are_not() -> None:
    async with running_platform(endpoint_changes=2) as platform:
        await platform.put()
        maker = await platform.user("maker@example.com")
        await maker.create("one", None)
        for refused in (
            maker.create("two", "no-such-model"),
            maker.create("two", "ready", environment={"A": SECRET}),
            maker.create("two", "ready", environment={"1": "no name"}),
            maker.create("one", "ready"),
            maker.update("one", an_input("no-such-model")),
            maker.update("one", an_input("ready", environment_vars={"A": SECRET})),
            maker.update("one"),
        ):
            assert (await refusal(refused)).code is not grpc.StatusCode.RESOURCE_EXHAUSTED
        await platform.admin.create("two", None)
        assert (await refusal(platform.admin.create("three", None))).code is grpc.StatusCode.RESOURCE_EXHAUSTED


# Secrets


async def test_a_reference_is_filled_in_and_shown_as_a_reference(platform: Platform) -> None:
    await platform.put(f"{CANARY}\n")
    given = {"KEY": SECRET, "SAME": "{{secrets/team/API.KEY}}", "TEXT": f"Bearer {SECRET}", "EMPTY": ""}
    created = await platform.admin.create("demo", environment=given)
    assert created.pending_config.served_entities[0].environment_vars == given
    ready = await platform.admin.settled("demo")
    assert ready.config.served_entities[0].environment_vars == given
    assert ready.config.served_models[0].environment_vars == given
    assert await environment_of(platform.admin, "demo") == {
        "KEY": f"{CANARY}\n",
        "SAME": f"{CANARY}\n",
        "TEXT": f"Bearer {SECRET}",
        "EMPTY": "",
    }


async def test_every_reference_that_fails_is_named_at_once(platform: Platform) -> None:
    await platform.put()
    given = {"A": "{{secrets/nowhere/k}}", "B": "{{secrets/team/missing}}", "C": SECRET}
    refused = await refusal(platform.admin.create("demo", environment=given))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER_VALUE")
    assert refused.message.startswith("Invalid secret provided")
    for part in ("{{secrets/nowhere/k}}", "variable A ", "{{secrets/team/missing}}", "variable B ", "'ready-1'"):
        assert part in refused.message
    assert "Api.Key" not in refused.message


async def test_without_read_a_create_is_refused_and_with_it_the_same_create_succeeds(platform: Platform) -> None:
    await platform.put()
    maker = await platform.user("maker@example.com")
    given = {"A": SECRET, "B": "{{secrets/nowhere/k}}"}
    refused = await refusal(maker.create("demo", environment=given))
    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert "User maker@example.com does not have READ permission on scope" in refused.message
    assert SECRET in refused.message
    assert "{{secrets/nowhere/k}}" in refused.message
    await platform.share("maker@example.com")
    await maker.create("demo", environment={"A": SECRET})
    await maker.settled("demo")
    assert await environment_of(maker, "demo") == {"A": CANARY}


async def test_the_author_of_an_update_needs_read_on_what_it_brings_in_and_the_creator_on_all(
    platform: Platform,
) -> None:
    await platform.put()
    await platform.secrets.admin.put("team", "other", "x")
    maker = await platform.user("maker@example.com")
    await platform.share("maker@example.com")
    await maker.create("demo", environment={"A": SECRET})
    await maker.settled("demo")
    # The admin may read everything; it is the creator whose right is missing.
    await platform.secrets.admin.create_scope("private")
    await platform.secrets.admin.put("private", "k", "x")
    for_private = an_input("ready", environment_vars={"A": "{{secrets/private/k}}"})
    refused = await refusal(platform.admin.update("demo", for_private))
    assert "User maker@example.com does not have READ permission on scope private" in refused.message
    await platform.admin.update("demo", an_input("ready", environment_vars={"A": "{{secrets/team/other}}"}))
    assert (await maker.settled("demo")).config.config_version == 2


@pytest.mark.parametrize("how", ["deactivated", "deleted"])
async def test_endpoint_whose_creator_is_gone_goes_on_and_is_not_updated(platform: Platform, how: str) -> None:
    admin = platform.secrets.admin
    maker = await platform.user("maker@example.com")
    await maker.create("demo")
    await maker.settled("demo")
    [user] = (await admin(admin.scim.ListUsers, ListRequest(filter='userName sw "maker"'))).resources
    if how == "deleted":
        await admin(admin.scim.DeleteUser, DeleteRequest(id=user.id))
    else:
        off = PatchOperation(op="replace", path="active", value=Value(bool_value=False))
        await admin(admin.scim.PatchUser, PatchRequest(id=user.id, operations=[off]))
    refused = await refusal(platform.admin.update("demo", an_input("ready")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert "Create the endpoint anew" in refused.message
    assert (await platform.admin.query("demo"))[0].status == 200
    assert (await platform.admin.get("demo")).config.config_version == 1
    if how == "deleted":  # somebody else of that name has nothing to do with it
        namesake = await platform.user("maker@example.com")
        assert (await refusal(namesake.get("demo"))).reason == "RESOURCE_DOES_NOT_EXIST"
        assert await namesake.names() == []
    else:
        on = PatchOperation(op="replace", path="active", value=Value(bool_value=True))
        await admin(admin.scim.PatchUser, PatchRequest(id=user.id, operations=[on]))
        await platform.admin.update("demo", an_input("ready"))


async def test_endpoint_of_a_service_principal_says_so_and_runs_as_it(platform: Platform) -> None:
    await platform.put()
    admin = platform.secrets.admin
    request = CreateServicePrincipalRequest(display_name="robot")
    robot = await admin(admin.scim.CreateServicePrincipal, request)
    caller = platform.serving.public(await platform.secrets.token_for(robot.application_id))
    refused = await refusal(caller.create("demo", environment={"A": SECRET}))
    assert f"User {robot.application_id} does not have READ permission on scope" in refused.message
    await platform.share(robot.application_id)
    await caller.create("demo", environment={"A": SECRET})
    made = await caller.settled("demo")
    assert (made.creator, made.creator_kind) == (robot.application_id, "ServicePrincipal")
    assert await environment_of(caller, "demo") == {"A": CANARY}


async def test_values_are_read_on_nobody_s_behalf(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    # The proof of who sent the create expires within a minute; restarts come for months.
    callers: list[context.RequestContext | None] = []
    call = channels.call

    async def recording(method: Any, message: Any, **options: Any) -> Any:
        if isinstance(message, secrets_pb2.ResolveRequest):
            callers.append(context.current())
        return await call(method, message, **options)

    monkeypatch.setattr(channels, "call", recording)
    await platform.put()
    await platform.admin.create("demo", environment={"A": SECRET})
    await platform.admin.settled("demo")
    assert callers == [None]


async def test_an_endpoint_without_references_launches_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    async with switched_platform() as (platform, secrets):
        await platform.admin.create("plain")
        await platform.admin.settled("plain")
        (pid,) = (await platform.serving.replicas()).values()
        await secrets.stop()
        os.kill(pid, signal.SIGKILL)

        async def is_back() -> bool:
            return pid not in (found := (await platform.serving.replicas()).values()) and len(found) == 1

        await eventually(is_back, what="another replica runs")


async def test_while_secrets_is_gone_nothing_is_created_and_no_name_is_taken() -> None:
    async with switched_platform() as (platform, secrets):
        await platform.admin.names()  # the caller is known from here on
        await secrets.stop()
        for environment in ({"A": SECRET}, {}):
            refused = await refusal(platform.admin.create("demo", environment=environment))
            assert refused.reason == "TEMPORARILY_UNAVAILABLE"
        await secrets.start()

        async def answers() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return await platform.admin.names() == []
            return False

        await eventually(answers, what="Serving has found Secrets again")
        await platform.admin.create("demo")


async def test_a_launch_waits_for_secrets_and_goes_on_when_it_is_back() -> None:
    with data_directory() as directory:
        gate = Gate(directory)
        async with switched_platform(directory, registry=gate) as (platform, secrets):
            await platform.put()
            await platform.admin.create("demo", environment={"A": SECRET})
            await gate.is_reached.wait()
            await secrets.stop()
            gate.may_pass.set()
            waiting = await platform.admin.until(
                "demo",
                lambda endpoint: "Secrets service" in entity_states(endpoint.pending_config)["ready-1"][1],
            )
            assert waiting.state.config_update == State.IN_PROGRESS
            await secrets.start()
            assert (await platform.admin.settled("demo")).state.ready == State.READY
            assert await environment_of(platform.admin, "demo") == {"A": CANARY}


async def held(platform: Platform) -> list[int]:
    """The versions of the secret that replicas hold, the newest first."""
    versions = await platform.secrets.admin.versions("team", "api.key")
    return [version.version for version in versions if version.held]


async def test_a_replica_holds_the_versions_it_was_started_with_until_it_has_ended(platform: Platform) -> None:
    await platform.put()
    await platform.admin.create("demo", environment={"A": SECRET})
    await platform.admin.settled("demo")
    assert await held(platform) == [1]
    await platform.secrets.admin.put("team", "api.key", "newer")
    assert await held(platform) == [1]
    (pid,) = (await platform.serving.replicas()).values()
    os.kill(pid, signal.SIGKILL)

    async def holds(*versions: int) -> bool:
        return await held(platform) == list(versions)

    await eventually(lambda: holds(2), what="its successor holds the newer version, and it holds nothing")
    await platform.admin.settled("demo")
    await platform.admin.delete("demo")
    await eventually(holds, what="nothing is held")


@pytest.mark.parametrize(("manner", "value"), [("failing", CANARY), ("ready", "x" * 131_072)])
async def test_a_launch_that_fails_for_good_holds_nothing(platform: Platform, manner: str, value: str) -> None:
    # Either the model fails with its environment, or the value is longer than a process may have it.
    await platform.put(value)
    await platform.admin.create("demo", manner, environment={"A": SECRET})
    assert (await platform.admin.settled("demo")).state.config_update == State.UPDATE_FAILED

    async def holds_nothing() -> bool:
        return await held(platform) == []

    await eventually(holds_nothing, what="nothing is held")


async def test_a_launch_that_is_given_up_half_way_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = SecretReferences.resolve

    async def endless(self: SecretReferences, *arguments: Any, **names: Any) -> Any:
        await resolve(self, *arguments, **names)
        await asyncio.Event().wait()

    monkeypatch.setattr(SecretReferences, "resolve", endless)
    async with running_platform(deploy_deadline=1.0) as platform:
        await platform.put()
        await platform.admin.create("demo", environment={"A": SECRET})

        async def holds(*versions: int) -> bool:
            return await held(platform) == list(versions)

        await eventually(lambda: holds(1), what="the launch has its values")
        assert (await platform.admin.settled("demo")).state.config_update == State.UPDATE_FAILED
        await eventually(holds, what="nothing is held")


async def test_an_end_that_secrets_did_not_hear_of_is_told_when_it_is_back() -> None:
    with data_directory() as directory:
        async with switched_platform(directory) as (platform, secrets):
            await platform.put()
            await platform.admin.create("demo", environment={"A": SECRET})
            await platform.admin.settled("demo")
            await secrets.stop()
            await platform.admin.delete("demo")

            async def is_gone() -> bool:
                return not await platform.serving.replicas()

            await eventually(is_gone, what="the replica has ended")
            platform = Platform(await secrets.start(), platform.serving)

            async def holds_nothing() -> bool:
                return await held(platform) == []

            await eventually(holds_nothing, what="nothing is held")


async def test_what_a_predecessor_left_is_released_at_the_start_and_what_lives_is_not() -> None:
    with data_directory() as directory:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(no_replicas(directory))
            secrets = await stack.enter_async_context(running_secrets(directory))
            async with running_serving(directory) as serving:
                platform = Platform(secrets, serving)
                await platform.put()
                await platform.admin.create("demo", environment={"A": SECRET})
                await platform.admin.settled("demo")
            await secrets.admin.put("team", "api.key", "newer")
            another, _ = await secrets.grant(secrets.admin, ("team", "api.key"))
            await secrets.resolve(another, ("team", "api.key"), replica_id="left-behind")
            assert await held(platform) == [2, 1]
            async with running_serving(directory) as serving:
                platform = Platform(secrets, serving)

                async def holds_one() -> bool:
                    return await held(platform) == [1]

                await eventually(holds_one, what="only the live replica holds its version")


async def test_what_a_secret_lacks_at_a_restart_is_said_without_its_value(platform: Platform) -> None:
    await platform.put()
    await platform.admin.create("demo", environment={"A": SECRET})
    await platform.admin.settled("demo")
    await platform.secrets.admin.put("team", "api.key", CANARY.encode() + b"\xff")
    (pid,) = (await platform.serving.replicas()).values()
    os.kill(pid, signal.SIGKILL)
    waiting = await platform.admin.until(
        "demo", lambda endpoint: "UTF-8" in entity_states(endpoint.config)["ready-1"][1]
    )
    deployment, message = entity_states(waiting.config)["ready-1"]
    assert (waiting.state.ready, deployment) == (State.NOT_READY, "DEPLOYMENT_RECOVERING")
    assert "key Api.Key in scope Team" in message
    assert CANARY not in message


async def test_a_right_that_was_lost_before_the_launch_fails_it() -> None:
    with data_directory() as directory:
        gate = Gate(directory)
        async with switched_platform(directory, registry=gate) as (platform, _):
            await platform.put()
            maker = await platform.user("maker@example.com")
            await platform.share("maker@example.com")
            await maker.create("demo", environment={"A": SECRET})
            await gate.is_reached.wait()
            await platform.secrets.admin(
                platform.secrets.admin.secrets.DeleteAcl,
                secrets_pb2.DeleteAclRequest(scope="team", principal="maker@example.com"),
            )
            gate.may_pass.set()
            failed = await maker.settled("demo")
            assert failed.state.config_update == State.UPDATE_FAILED
            message = entity_states(failed.pending_config)["ready-1"][1]
            assert "User maker@example.com does not have READ permission on scope" in message
            assert SECRET in message


async def test_a_secret_value_is_kept_nowhere(platform: Platform, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await platform.put()
    given = {"SAID": SECRET, "PIECES": json.dumps([f"it is {CANARY[:10]}", f"{CANARY[10:]}\n"]), "KEY": SECRET}
    for name, model in (("good", "speaking"), ("bad", "failing")):
        await platform.admin.create(name, model, environment=given)
    good, bad = await platform.admin.settled("good"), await platform.admin.settled("bad")
    assert (good.state.ready, bad.state.config_update) == (State.READY, State.UPDATE_FAILED)
    logs = await platform.admin.logs("good", "speaking-1")
    assert logs.startswith("it is ")
    pieces_are_no_secret = good.config.served_entities[0].environment_vars["PIECES"]
    assert CANARY not in logs
    assert CANARY not in str(bad)
    assert CANARY not in str(good).replace(pieces_are_no_secret, "")
    assert CANARY not in caplog.text
    assert all(CANARY not in str(vars(record)) for record in caplog.records)
    directory = platform.secrets.settings.data_dir
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any(path.name == "serving.db-wal" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


# Logs


async def test_logs_are_the_pending_configuration_s_when_there_is_one(platform: Platform) -> None:
    def speaking(words: str) -> pb.ServedEntityInput:
        return an_input("speaking", name="m", environment_vars={"PIECES": json.dumps([f"{words}\n"])})

    request = pb.CreateServingEndpointRequest(name="demo", config=a_config_input(speaking("first")))
    await platform.admin(platform.admin.stub.CreateServingEndpoint, request)
    await platform.admin.settled("demo")
    assert await platform.admin.logs("demo", "m") == "first\n"
    await platform.admin.update("demo", an_input("slow", name="m"))
    assert await platform.admin.logs("demo", "m") == ""
    refused = await refusal(platform.admin.logs("demo", "nobody"))
    assert refused.reason == "RESOURCE_DOES_NOT_EXIST"
    assert "nobody" in refused.message


async def test_a_log_that_cannot_be_asked_for_just_now_is_asked_for_again(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"PIECES": json.dumps(["words\n"])}
    await platform.admin.create("demo", "speaking", environment=environment)
    await platform.admin.settled("demo")
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "open_unix_connection", out_of_descriptors)
        refused = await refusal(platform.admin.logs("demo", "speaking-1"))
    assert (refused.code, refused.facts["retry_after"]) == (grpc.StatusCode.UNAVAILABLE, "1")
    assert "Try again" in refused.message
    assert await platform.admin.logs("demo", "speaking-1") == "words\n"


async def test_build_logs_say_that_nothing_was_built_for_the_version_asked_for(platform: Platform) -> None:
    await platform.admin.create("demo")
    await platform.admin.settled("demo")

    async def build_logs(entity: str, version: int | None) -> str:
        request = pb.GetServedModelBuildLogsRequest(name="demo", served_model_name=entity, config_version=version)
        return str((await platform.admin(platform.admin.stub.GetServedModelBuildLogs, request)).logs)

    assert "nothing is built" in await build_logs("ready-1", 1)
    assert await build_logs("ready-1", None) == await build_logs("ready-1", 1)
    for entity, version in (("ready-1", 2), ("nobody", None)):
        assert (await refusal(build_logs(entity, version))).reason == "RESOURCE_DOES_NOT_EXIST"


# Queries


async def test_queries_are_split_by_percentage_and_an_entity_can_be_named(platform: Platform) -> None:
    entities = [an_input("ready", name=name) for name in ("a", "b", "c")]
    request = pb.CreateServingEndpointRequest(
        name="demo", config=a_config_input(*entities, routes=[("a", 50), ("b", 50), ("c", 0)])
    )
    await platform.admin(platform.admin.stub.CreateServingEndpoint, request)
    await platform.admin.settled("demo")
    answered = Counter([(await platform.admin.query("demo"))[0].served_entity_name for _ in range(40)])
    assert set(answered) == {"a", "b"}
    head, _ = await platform.admin.query("demo", "c")
    assert (head.status, head.served_entity_name) == (200, "c")
    assert (await refusal(platform.admin.query("demo", "d"))).reason == "ENDPOINT_NOT_FOUND"


async def test_an_endpoint_whose_model_is_down_answers_400_and_never_503(platform: Platform) -> None:
    await platform.put()
    await platform.admin.create("demo", environment={"A": SECRET})
    await platform.admin.settled("demo")
    await platform.secrets.admin.delete("team", "api.key")
    (pid,) = (await platform.serving.replicas()).values()
    os.kill(pid, signal.SIGKILL)
    await platform.admin.until("demo", lambda endpoint: endpoint.state.ready == State.NOT_READY)
    refused = await refusal(platform.admin.query("demo"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BAD_REQUEST")
    assert "'ready-1'" in refused.message


async def test_a_body_beyond_the_limit_is_refused_with_the_limit(platform: Platform) -> None:
    await platform.admin.create("demo")
    await platform.admin.settled("demo")
    refused = await refusal(platform.admin.query("demo", path=b"x" * (16 * 2**20 + 1)))
    assert (refused.reason, "16777216" in refused.message) == ("BAD_REQUEST", True)


async def test_a_content_type_that_cannot_be_sent_is_refused(platform: Platform) -> None:
    await platform.admin.create("demo")
    await platform.admin.settled("demo")
    request = pb.QueryRequest(name="demo")
    request.body.content_type = "text/csv\r\nx-other: 1"
    call = platform.admin.stub.Query(request, metadata=platform.admin._metadata)
    refused = await refusal(_first_of(call))
    assert (refused.reason, "content type" in refused.message) == ("BAD_REQUEST", True)


async def test_who_does_not_read_keeps_no_place_beyond_the_deadline() -> None:
    async with running_platform(route_ack_seconds=0.3, inference_deadline=2, queue_seconds=1) as platform:
        admin = platform.admin
        await admin.create("demo", "endless")
        await admin.settled("demo")

        async def begun() -> Any:
            """A query that has its head, for which its caller gave no deadline, and of which nothing more is read."""
            call = admin.stub.Query(pb.QueryRequest(name="demo"), metadata=admin._metadata)
            await _first_of(call)
            return call

        unread = [await begun() for _ in range(REPLICA_CONCURRENCY)]

        async def has_room() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                unread.append(await begun())
            return len(unread) > REPLICA_CONCURRENCY

        await eventually(has_room)
        for call in unread:
            call.cancel()


async def _first_of(call: Any) -> Any:
    return await anext(aiter(call))


# Gateways


async def test_an_update_waits_for_the_gateway_and_the_old_replica_for_its_requests(patient: Platform) -> None:
    platform = patient
    await platform.admin.create("demo")
    await platform.admin.settled("demo")
    (old,) = await platform.serving.replicas()
    gateway = platform.serving.routes.Watch(timeout=STREAM_TIMEOUT)
    whole = await gateway.read()
    assert whole.complete
    assert whole.endpoints[0].entities[0].replicas[0].replica_id == old
    await gateway.write(pb.RouteReport(acknowledged_revision=whole.revision))
    await platform.admin.update("demo", an_input("ready", version="2"))
    change = await gateway.read()
    (new,) = change.endpoints[0].entities[0].replicas
    assert new.replica_id != old
    for _ in range(20):
        assert (await platform.admin.get("demo")).state.config_update == State.IN_PROGRESS
    busy = pb.RouteReport(acknowledged_revision=change.revision, retired=[pb.ReplicaLoad(replica_id=old, in_flight=1)])
    await gateway.write(busy)
    assert (await platform.admin.settled("demo")).config.config_version == 2
    assert old in await platform.serving.replicas()
    await gateway.write(pb.RouteReport(acknowledged_revision=change.revision))

    await eventually(lambda: _has_replicas(platform, 1))
    assert old not in await platform.serving.replicas()
    gateway.cancel()


async def test_a_replica_that_dies_while_gateways_are_told_is_not_switched_to(patient: Platform) -> None:
    await patient.admin.create("demo")
    await patient.admin.settled("demo")
    (old,) = await patient.serving.replicas()
    gateway = patient.serving.routes.Watch(timeout=STREAM_TIMEOUT)
    await gateway.write(pb.RouteReport(acknowledged_revision=(await gateway.read()).revision))
    await patient.admin.update("demo", an_input("ready", version="2"))
    change = await gateway.read()
    new = change.endpoints[0].entities[0].replicas[0].replica_id
    os.kill((await patient.serving.replicas())[new], signal.SIGKILL)
    await patient.admin.until(
        "demo", lambda endpoint: entity_states(endpoint.pending_config)["ready-2"][0] == "DEPLOYMENT_CREATING"
    )
    told: list[str] = []
    while "ready" not in told[-1:]:
        await gateway.write(pb.RouteReport(acknowledged_revision=change.revision))
        change = await gateway.read()
        replicas = [replica.replica_id for replica in change.endpoints[0].entities[0].replicas]
        assert replicas, "a table without any replica was published"
        told.append("ready" if replicas not in ([old], [new]) else "old")
    await gateway.write(pb.RouteReport(acknowledged_revision=change.revision))
    assert (await patient.admin.settled("demo")).config.config_version == 2
    assert told == ["old", "ready"]
    gateway.cancel()


async def test_a_gateway_that_never_follows_is_cut_off_and_holds_nothing_up() -> None:
    async with running_platform(route_ack_seconds=0.2) as platform:
        gateway = platform.serving.routes.Watch(timeout=STREAM_TIMEOUT)
        assert (await gateway.read()).complete
        await platform.admin.create("demo")
        assert (await platform.admin.settled("demo")).state.ready == State.READY
        while (table := await gateway.read()) is not grpc.aio.EOF:
            assert not table.complete


async def test_a_deleted_endpoint_leaves_the_table_at_once(platform: Platform) -> None:
    created = await platform.admin.create("demo", None)
    gateway = platform.serving.routes.Watch(timeout=STREAM_TIMEOUT)
    while not [each.name for each in (await gateway.read()).endpoints]:
        pass
    await platform.admin.delete("demo")
    assert list((await gateway.read()).removed_endpoint_ids) == [created.id]
    gateway.cancel()


# The service itself


class SlowToAdopt(MannerLauncher):
    """A launcher that finds replicas only when it may."""

    may_find: asyncio.Event

    async def adopt(self) -> dict[str, ReplicaHandle]:
        await self.may_find.wait()
        return await super().adopt()


async def test_a_gateway_that_comes_while_replicas_are_being_found_gets_the_whole_table() -> None:
    with data_directory() as directory:
        async with no_replicas(directory), running_secrets(directory) as secrets:
            async with running_serving(directory) as before:
                await before.public(secrets.admin_token).create("demo")
                await before.public(secrets.admin_token).settled("demo")
                (replica_id,) = await before.replicas()
            settings = serving_settings(directory)
            launcher = SlowToAdopt(settings.sockets / "replicas", None, service_environment={})
            launcher.may_find = asyncio.Event()
            async with running_serving(directory, launcher=launcher) as serving:
                gateway = serving.routes.Watch(timeout=STREAM_TIMEOUT)
                await gateway.write(pb.RouteReport())
                # Over the same connection, so that the stream has been met when this is answered.
                await health_pb2_grpc.HealthStub(serving.peer_channels["gateway"]).Check(
                    health_pb2.HealthCheckRequest()
                )
                launcher.may_find.set()
                table = await gateway.read()
                assert [each.replica_id for each in table.endpoints[0].entities[0].replicas] == [replica_id]
                gateway.cancel()


async def test_the_service_is_ready_without_secrets() -> None:
    with data_directory() as directory:
        async with running_serving(directory) as serving:
            health = health_pb2_grpc.HealthStub(serving.public_channel)

            async def is_ready() -> bool:
                answer = await health.Check(health_pb2.HealthCheckRequest())
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            await eventually(is_ready)
