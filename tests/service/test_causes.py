"""Whatever a launch fails at, its cause is one: the phase, the offending thing and what helps, wherever one looks.

Each fault is induced between the request, which is good, and the launch: what is wrong beforehand is refused at once.
Models are real where the fault is the model's: MLflow loads them, or a tiny program takes their place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from servicekit import database
from serving_service import registry as registry_module
from serving_service.app import MIGRATIONS
from serving_service.caches import FolderCache
from serving_service.helper_variables import HelperVariables
from serving_service.launcher import Launch, LocalLauncher, LocalReplica
from serving_service.model import ModelVersion
from serving_service.registry import MODEL_FOLDER, MlflowRegistry
from tessera.identity.v1 import identity_pb2
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2 as pb
from tests.support import faulty_models, model_servers
from tests.support.builders import a_config_input, an_input
from tests.support.command_line import login, tessera
from tests.support.eventually import eventually
from tests.support.faulty_models import FaultyRegistry
from tests.support.platform import running_pair
from tests.support.secrets import RunningSecrets, data_directory
from tests.support.serving import RunningServing, ServingCaller, serving_settings

CANARY = "canary-0123456789-value"
SECONDS_TO_LOAD = 60.0
"""What an import of mlflow may take on a machine that does much besides."""


async def nothing_used() -> frozenset[str]:
    """Nothing that would have to stay."""
    return frozenset()


class GatedRegistry(MlflowRegistry):
    """The real registry, of which nothing is fetched while the gate is closed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = asyncio.Event()

    async def fetch(self, model: ModelVersion) -> Path:
        await self.gate.wait()
        return await super().fetch(model)


class FaultyLauncher(LocalLauncher):
    """The real launcher; where a model names the manner of a tiny program, that runs in place of our model server."""

    async def start(self, launch: Launch) -> LocalReplica:
        manner = launch.model_path / "manner"
        if manner.exists():
            launch = dataclasses.replace(launch, command=model_servers.command(manner.read_text()))
        return await super().start(launch)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Both services, the registry and the models in it."""

    secrets: RunningSecrets
    serving: RunningServing
    registry: FaultyRegistry
    gated: GatedRegistry
    models: dict[str, Path]
    url: str
    """Of the gateway, which the command line asks."""
    replicas: Path
    """Where the launcher makes the directories of its replicas."""


@dataclass(kw_only=True)
class Scene:
    """One endpoint whose launch is going to fail."""

    stack: Stack
    name: str
    """Of the endpoint, of its scope and of its creator."""
    maker_id: str
    version: str
    undo: list[Callable[[], object]] = field(default_factory=list)
    """What puts right what others need too."""


Induce = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, and what must be said about it; `{name}` stands for the scope, `{version}` for the model's."""

    phase: str
    thing: str
    help: str
    model: str = "ready"
    value: str | bytes = CANARY
    keys: int = 1
    value_later: str | bytes | None = None
    """What is put under the first key before the launch; what cannot be used at all is refused with the request."""
    induce: Induce | None = None
    passes: bool = False
    """Whether time may cure it, so that the launch is tried again."""
    impatient: bool = False
    """Whether it is a matter of deadlines, which are short then."""


async def lose_scope(scene: Scene) -> None:
    owner = scene.stack.secrets.admin
    await owner(owner.secrets.DeleteScope, secrets_pb2.DeleteScopeRequest(scope=scene.name))


async def lose_key(scene: Scene) -> None:
    await scene.stack.secrets.admin.delete(scene.name, "key0")


async def lose_right(scene: Scene) -> None:
    owner = scene.stack.secrets.admin
    await owner(owner.secrets.DeleteAcl, secrets_pb2.DeleteAclRequest(scope=scene.name, principal=scene.name))


async def deactivate_maker(scene: Scene) -> None:
    change = identity_pb2.PatchOperation(op="replace", path="active")
    change.value.bool_value = False
    owner = scene.stack.secrets.admin
    await owner(owner.scim.PatchUser, identity_pb2.PatchRequest(id=scene.maker_id, operations=[change]))


async def remove_maker(scene: Scene) -> None:
    owner = scene.stack.secrets.admin
    await owner(owner.scim.DeleteUser, identity_pb2.DeleteRequest(id=scene.maker_id))


async def break_registry(scene: Scene) -> None:
    scene.stack.registry.break_down()
    scene.undo.append(scene.stack.registry.mend)


async def delete_version(scene: Scene) -> None:
    scene.stack.registry.delete(scene.version)


async def register_anew(scene: Scene) -> None:
    scene.stack.registry.register_anew(scene.version)


async def remove_description(scene: Scene) -> None:
    description = scene.stack.models[FAULTS["folder without MLmodel"].model] / "MLmodel"
    text = description.read_text()
    description.unlink()
    scene.undo.append(lambda: description.write_text(text))


async def spoil_directory(scene: Scene) -> None:
    replicas = scene.stack.replicas
    aside = replicas.with_name("aside")
    replicas.mkdir(exist_ok=True)
    replicas.rename(aside)
    replicas.touch()
    scene.undo += [replicas.unlink, lambda: aside.rename(replicas)]


MEND = "Mend the model or its variables, then update the endpoint."

FAULTS = {
    # Phase reference: what is referred to.
    "scope deleted": Fault(
        phase="reference", thing="Scope {name} does not exist", help="Create the scope.", induce=lose_scope
    ),
    "key deleted": Fault(
        phase="reference", thing="Scope {name} has no key key0", help="Put the secret.", induce=lose_key
    ),
    "value too long for a variable": Fault(
        phase="reference",
        thing="Environment variable KEY",
        help="Use a shorter value.",
        value=CANARY.ljust(131_072, "x"),
    ),
    "values too long together": Fault(
        phase="reference",
        thing="secret values for this launch",
        help="Use shorter values, or fewer.",
        value=CANARY.ljust(131_000, "x"),
        keys=9,
    ),
    "value with NUL": Fault(
        phase="reference", thing="key key0 in scope {name}", help="Put it as text.", value_later=f"{CANARY}\0".encode()
    ),
    "value that is no text": Fault(
        phase="reference",
        thing="key key0 in scope {name}",
        help="Put it as text.",
        value_later=CANARY.encode() + b"\xff",
    ),
    # Phase permission: who may read it.
    "READ taken away": Fault(
        phase="permission",
        thing="User {name} does not have READ permission on scope {name}",
        help="READ",
        induce=lose_right,
    ),
    "creator deactivated": Fault(
        phase="permission", thing="User {name}", help="Create the endpoint anew.", induce=deactivate_maker
    ),
    "creator removed": Fault(
        phase="permission", thing="as whom the endpoint runs", help="Create the endpoint anew.", induce=remove_maker
    ),
    # Phase model download.
    "registry out of order": Fault(
        phase="model download",
        thing="The model registry cannot be reached",
        help="Try again.",
        induce=break_registry,
        passes=True,
    ),
    "model version deleted": Fault(phase="model download", thing="'faulty'", help="Register", induce=delete_version),
    "model version registered anew": Fault(
        phase="model download",
        thing="Version {version} of model 'faulty'",
        help="Update the endpoint's configuration",
        induce=register_anew,
    ),
    "folder without MLmodel": Fault(
        phase="model download",
        thing="Version {version} of model 'faulty'",
        help="without an MLmodel file. Register the model again",
        model="fine",
        induce=remove_description,
    ),
    "download too slow": Fault(
        phase="model download",
        thing="longer than the 0.3 s",
        help="TESSERA_DOWNLOAD_DEADLINE_SECONDS allows. Make the model smaller, or allow more.",
        impatient=True,
    ),
    # Phase start.
    "directory of replicas unusable": Fault(
        phase="start",
        thing="The replica's files cannot be made",
        help="tried again",
        induce=spoil_directory,
        passes=True,
    ),
    # Phase load.
    "MLmodel cut off": Fault(phase="load", thing="MLmodel cannot be read", help=MEND, model="truncated"),
    "no python_function": Fault(phase="load", thing="python_function", help=MEND, model="flavour"),
    "import fails": Fault(phase="load", thing="No module named 'nothing_of_this_name'", help=MEND, model="import"),
    "load raises, with a secret": Fault(phase="load", thing="ValueError: no weights for", help=MEND, model="load"),
    "weights missing": Fault(phase="load", thing="weights.bin", help=MEND, model="data"),
    "not enough memory": Fault(phase="load", thing="MemoryError", help=MEND, model="memory"),
    "load exits": Fault(phase="load", thing="exited with status 3", help=MEND, model="exit"),
    "load ends the program": Fault(phase="load", thing="SystemExit: no license", help=MEND, model="system exit"),
    "load is killed": Fault(phase="load", thing="SIGKILL", help=MEND, model="kill"),
    "model server crashes": Fault(phase="load", thing="SIGABRT", help=MEND, model="crashing"),
    "model server prints without end, and dies": Fault(
        phase="load", thing="exited with status 4", help=MEND, model="flooding"
    ),
    "model server closes its report": Fault(phase="load", thing="report", help=MEND, model="silent"),
    "load too slow": Fault(
        phase="load", thing="longer than the 0.3 s", help="TESSERA_LOAD_DEADLINE_SECONDS", model="slow", impatient=True
    ),
}


@asynccontextmanager
async def running_stack(**settings: Any) -> AsyncIterator[Stack]:
    async with AsyncExitStack() as around:
        directory = around.enter_context(data_directory())
        # Of the registry's own: that of Serving is open only once Serving runs.
        recorded = await around.enter_async_context(database.opened(directory / "fetched.db", MIGRATIONS))
        models = faulty_models.written(directory / "written")
        registry = FaultyRegistry(directory / "registry.db")
        cache = FolderCache(directory / "fetched", content=MODEL_FOLDER, bound=1 << 30, used=nothing_used)
        variables = HelperVariables(None, service_environment=os.environ)
        gated = GatedRegistry(registry.uri, cache, variables, recorded, closed=())
        replicas = serving_settings(directory).sockets / "replicas"
        launcher = FaultyLauncher(replicas, None, service_environment={"PATH": os.defpath})
        async with (
            running_pair(directory, launcher=launcher, registry=gated, **settings) as (secrets, serving),
            gateway_app.running(GatewaySettings(data_dir=directory, listen="127.0.0.1:0")) as url,
        ):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(registry_module, "DESCRIBE_SECONDS", SECONDS_TO_LOAD)
                await gated.describe(faulty_models.NAME, registry.register(models["fine"]))  # so that mlflow is there
            yield Stack(
                secrets=secrets,
                serving=serving,
                registry=registry,
                gated=gated,
                models=models,
                url=url,
                replicas=replicas,
            )


@pytest.fixture(scope="module")
async def patient() -> AsyncIterator[Stack]:
    async with running_stack(load_deadline=SECONDS_TO_LOAD) as stack:
        yield stack


@pytest.fixture(scope="module")
async def impatient() -> AsyncIterator[Stack]:
    """A stack whose deadlines are over at once."""
    async with running_stack(load_deadline=0.3, download_deadline=0.3) as stack:
        yield stack


async def created(stack: Stack, fault: Fault, name: str) -> Scene:
    """An endpoint whose launch waits at the gate."""
    owner = stack.secrets.admin
    maker = await owner.create_user(name)
    await owner.create_scope(name)
    keys = [f"key{number}" for number in range(fault.keys)]
    for key in keys:
        await owner.put(name, key, fault.value)
    await owner.grant(name, name, secrets_pb2.READ)
    version = stack.registry.register(stack.models[fault.model])
    scene = Scene(stack=stack, name=name, maker_id=maker.id, version=version)
    caller = stack.serving.public(await stack.secrets.token_for(name))
    environment = {"MEBIBYTES": "20"} | {
        f"KEY{number or ''}": f"{{{{secrets/{name}/{key}}}}}" for number, key in enumerate(keys)
    }
    entity = an_input(faulty_models.NAME, version=version, name="one", environment_vars=environment)
    request = pb.CreateServingEndpointRequest(name=name, config=a_config_input(entity))
    stack.gated.gate.clear()
    await caller(caller.stub.CreateServingEndpoint, request)
    return scene


async def failed_event(caller: ServingCaller, name: str) -> pb.LaunchEvent:
    """The phase that the launch failed at."""
    found: list[pb.LaunchEvent] = []

    async def is_there() -> bool:
        found[:] = [each for each in await caller.events(name) if each.outcome == pb.LaunchEvent.FAILED]
        return bool(found)

    await eventually(is_there, within=SECONDS_TO_LOAD, what="a failed phase")
    return found[0]


def logged(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Every cause that the service's log tells."""
    facts = [record.__dict__ for record in caplog.records]
    return {each["cause"] for each in facts if "cause" in each} | {
        cause for each in facts for cause in each.get("causes", {}).values()
    }


@pytest.mark.parametrize("fault", FAULTS)
async def test_cause_is_the_same_wherever_one_looks(
    patient: Stack, impatient: Stack, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    induced = FAULTS[fault]
    stack = impatient if induced.impatient else patient
    name = f"fault-{list(FAULTS).index(fault)}"
    with caplog.at_level(logging.INFO):
        scene = await created(stack, induced, name)
        admin = stack.serving.public(stack.secrets.admin_token)
        try:
            if induced.value_later is not None:
                await stack.secrets.admin.put(name, "key0", induced.value_later)
            if induced.induce is not None:
                await induced.induce(scene)
            if induced.model != "ready" or not induced.impatient:
                stack.gated.gate.set()
            event = await failed_event(admin, name)
            said = await admin.until(name, lambda each: says(each, event.message, induced.help))
            found = said if induced.passes else await admin.settled(name)
            events, log = await admin.events(name), await admin.logs(name, "one")
            shown = [await command(stack, "events", name), await command(stack, "endpoints", name)]
        finally:
            for undo in scene.undo:
                undo()
            await admin.delete(name)
    cause = event.message
    expected = {"name": name, "version": scene.version}
    assert cause.startswith(f"Phase {induced.phase} failed: ")
    assert pb.LaunchEvent.Phase.Name(event.phase) == induced.phase.replace(" ", "_").upper()
    assert induced.thing.format(**expected) in cause
    assert cause in logged(caplog)
    assert f"    {cause}\n" in shown[0]
    assert f"      {cause}\n" in shown[1] or (induced.passes and cause in shown[1])
    deployment = found.pending_config.served_entities[0].state.deployment
    if induced.passes:
        assert deployment == pb.ServedEntityState.DEPLOYMENT_CREATING
    else:
        assert (message_of(found), deployment) == (cause, pb.ServedEntityState.DEPLOYMENT_FAILED)
        assert found.state.config_update == pb.EndpointState.UPDATE_FAILED
    assert CANARY not in str((found, events, log, shown, [record.__dict__ for record in caplog.records]))


async def command(stack: Stack, *arguments: str) -> str:
    """What the command line prints."""
    ran = await tessera(login(stack.url, stack.secrets.admin_token), *arguments)
    assert (ran.status, ran.complained) == (0, "")
    return ran.said


def says(endpoint: pb.ServingEndpointDetailed, *sentences: str) -> bool:
    return all(each in message_of(endpoint) for each in sentences)


def message_of(endpoint: pb.ServingEndpointDetailed) -> str:
    return endpoint.pending_config.served_entities[0].state.deployment_state_message


def test_there_are_at_least_twenty_faults_of_every_phase() -> None:
    assert len(FAULTS) >= 20
    assert {fault.phase for fault in FAULTS.values()} == {"reference", "permission", "model download", "start", "load"}
