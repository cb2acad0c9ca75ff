"""Serving is killed at every point of every change, and at any moment: its successor comes to the same end (R5).

Each change is made once without a kill, and the points that it passes are noted; then once for each of them, killed
there. A call that was cut off is repeated with its request id, as clients do. Then everything that can be seen from
outside must be as it was without the kill: what the endpoint says of itself, who runs and what it answers, and that at
no moment more ran than the change needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from servicekit import channels
from tessera.serving.v1 import serving_pb2 as pb
from tests.support import processes, tiny_runner
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.http import Answer
from tests.support.mortal_serving import MortalServing, mortal_serving
from tests.support.secrets import RunningSecrets, running_secrets
from tests.support.seed import seeded
from tests.support.serving import TINY, ServingCaller, no_replicas, serving_settings

WITHIN = 30.0
"""Seconds from the restart to the end. Ten are promised (R5); a machine that does much else is given more."""

PLATFORMS = 3
"""That work at once."""

SETTINGS = {"route_ack_seconds": 0.1}
"""For as long a successor waits for gateways before it stops anything; there are none here."""

LONGEST_SECONDS = 0.3
"""Most changes are over by then."""

AGAIN = 0.3
"""How often the successor is killed too."""

BY_THE_CLOCK = " write add_measures"
"""A step that belongs to no change."""

UNITS = 4
"""Of concurrency, in one replica."""

NAME = "demo"
CAUSE = "the weights are gone"

State = pb.EndpointState


@dataclass(frozen=True)
class Platform:
    """Secrets in this process, Serving in one that dies."""

    secrets: RunningSecrets
    serving: MortalServing
    url: str = ""
    """Of its gateway, where it has one."""
    queries: list[asyncio.Task[Answer]] = field(default_factory=list)
    """That are under way through it."""

    async def caller(self, request_id: str | None = None) -> ServingCaller:
        """The admin; with an id, everything that it changes is one request."""
        assertion = await self.secrets.assertion(self.secrets.admin_token)
        chosen = () if request_id is None else ((channels.REQUEST_ID, request_id), (channels.CHOSEN, "true"))
        return ServingCaller(self.serving.channel, (channels.ASSERTION, assertion), *chosen)

    @property
    def directory(self) -> Path:
        return self.secrets.settings.data_dir

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger"

    @property
    def gate(self) -> Path:
        """The file that models may wait for before they answer."""
        return self.directory / "gate"

    def version(self, says: str, **environment: str) -> pb.ServedEntityInput:
        """A served entity of a model that answers with `says`."""
        variables = {"SAYS": says, "LEDGER": str(self.ledger), "KEY": "{{secrets/scope/key}}", **environment}
        return an_input(TINY, version=says, name="entity", environment_vars=variables)

    def running(self) -> int:
        """How many models run."""
        return len(processes.of_program(self.directory, Path(tiny_runner.__file__).name))

    def folders(self) -> int:
        """How many replicas have a folder."""
        replicas = serving_settings(self.directory).sockets / "replicas"
        return len(list(replicas.iterdir())) if replicas.exists() else 0

    def rows(self) -> dict[str, int]:
        """What the services have recorded of endpoints: tables that are not empty."""
        secrets, serving = self.secrets.settings.database, self.directory / "serving" / "serving.db"
        tables = {secrets: ("launch_grants",), serving: ("endpoints", "configs", "replicas", "events", "users")}
        found = {}
        for database, names in tables.items():
            with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
                for name in names:
                    found[name] = int(connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0])
        return {name: count for name, count in found.items() if count}


Step = Callable[[Platform, ServingCaller], Awaitable[Any]]


async def _nothing(platform: Platform, caller: ServingCaller) -> None:
    pass


async def _create(platform: Platform, caller: ServingCaller) -> None:
    config = pb.EndpointCoreConfigInput(served_entities=[platform.version("1")])
    await caller(caller.stub.CreateServingEndpoint, pb.CreateServingEndpointRequest(name=NAME, config=config))


async def created(platform: Platform, caller: ServingCaller) -> None:
    await _create(platform, caller)
    await at_rest(platform)


async def _stopped(platform: Platform, caller: ServingCaller) -> None:
    await _stop(platform, caller)
    await at_rest(platform)


async def _update(platform: Platform, caller: ServingCaller) -> None:
    await caller.update(NAME, platform.version("2"))


async def _update_to_two_replicas(platform: Platform, caller: ServingCaller) -> None:
    entity = platform.version("2")
    entity.min_provisioned_concurrency = entity.max_provisioned_concurrency = 2 * UNITS
    await caller.update(NAME, entity)


async def _update_that_fails(platform: Platform, caller: ServingCaller) -> None:
    await caller.update(NAME, platform.version("2", FAILS=CAUSE))


async def _update_that_hangs(platform: Platform, caller: ServingCaller) -> None:
    await caller.update(NAME, platform.version("2", HANGS="yes"))
    await eventually(lambda: platform.running() == 2, what="both run")


async def _stop(platform: Platform, caller: ServingCaller) -> None:
    await caller.stop(NAME)


async def _start(platform: Platform, caller: ServingCaller) -> None:
    await caller.start(NAME)


async def _delete(platform: Platform, caller: ServingCaller) -> None:
    await caller.delete(NAME)


@dataclass(frozen=True)
class Change:
    """What is done to an endpoint, after what; how many models run in the end, and how many at one moment at most."""

    act: Step
    before: tuple[Step, ...] = ()
    running: int = 1
    folders: int = 1
    """How many replicas are there in the end, those too that are kept for their logs."""
    surge: int = 1
    settings: Mapping[str, float] = field(default_factory=dict)
    """Of Serving, beside those that all have."""
    later: Mapping[str, float] = field(default_factory=dict)
    """What of them is another one once it was killed."""
    is_quiet: bool = False
    """Whether it is not asked in the end, since that would change how many run."""
    then: Step = _nothing
    """What must go well after the end."""


CHANGES = {
    "create": Change(_create),
    "update": Change(_update, (created,), surge=2),
    "update to two replicas": Change(_update_to_two_replicas, (created,), running=2, folders=2, surge=3),
    "rollback": Change(_update_that_fails, (created,), folders=2, surge=2),
    "stop": Change(_stop, (created,), running=0),
    "start": Change(_start, (created, _stopped)),
    "delete": Change(_delete, (created,), running=0, folders=0),
    "delete during an update": Change(_delete, (created, _update_that_hangs), running=0, folders=0, surge=2),
    "restart": Change(_nothing, (created,)),
}
"""The last is no change: Serving is killed while it finds again what there is."""


@asynccontextmanager
async def running_platform() -> AsyncIterator[Platform]:
    async with AsyncExitStack() as stack:
        secrets = await stack.enter_async_context(running_secrets())
        await secrets.admin.create_scope("scope")
        await secrets.admin.put("scope", "key", "value")
        await stack.enter_async_context(no_replicas(secrets.settings.data_dir))
        yield Platform(secrets, await stack.enter_async_context(mortal_serving(secrets.settings.data_dir)))


@pytest.fixture(scope="module")
async def platforms() -> AsyncIterator[list[Platform]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running_platform()) for _ in range(PLATFORMS)]


async def _prepared(platform: Platform, change: Change) -> None:
    """Nothing but what the change is made to, at rest."""
    settings = {**SETTINGS, **change.settings}
    if platform.serving.settings != settings:
        await platform.serving.kill()
        platform.serving.settings = settings
    if platform.serving.ended.is_set():
        await platform.serving.start()
        await _recovered(platform)
    shutil.rmtree(platform.ledger, ignore_errors=True)
    platform.ledger.mkdir()
    platform.gate.unlink(missing_ok=True)
    for step in change.before:
        await step(platform, await platform.caller(uuid.uuid4().hex))
    if change.before:
        await eventually(lambda: _is_stored(platform), what="all that launches did is stored")


async def _is_stored(platform: Platform) -> bool:
    """Whether the launches so far have left nothing to be written, which would look like a step of what follows."""
    caller = await platform.caller()
    told = [each for name in await caller.names() for each in await caller.events(name)]
    return len([each for each in told if each.outcome != pb.LaunchEvent.RUNNING]) == platform.rows().get("events", 0)


async def _recovered(platform: Platform) -> None:
    """Serving has done all that it does by itself at its start."""

    async def is_so() -> bool:
        return {"after adopt", "after settle"} <= set(await platform.serving.passed())

    await eventually(is_so, what="Serving has recovered")


async def at_rest(platform: Platform) -> None:
    caller = await platform.caller()
    endpoint = await caller.settled(NAME)
    await eventually(
        lambda: platform.running() == (0 if endpoint.state.suspend == State.STOPPED else 1), what="it is at rest"
    )


async def _seen(platform: Platform, change: Change) -> dict[str, Any]:
    """What can be seen from outside, but for ids, times and the numbers of configurations."""
    caller = await platform.caller()
    seen: dict[str, Any] = {"running": platform.running(), "folders": platform.folders()}
    seen["records"] = platform.rows().get("replicas", 0)
    if NAME not in await caller.names():
        return seen
    endpoint = await caller.get(NAME)
    seen["state"] = str(endpoint.state)
    for which in ("config", "pending_config"):
        config = getattr(endpoint, which)
        seen[which] = [(entity.entity_version, str(entity.state)) for entity in config.served_entities]
        is_asked = endpoint.state.suspend != State.STOPPED and not change.is_quiet
        if which == "config" and config.served_entities and is_asked:
            with contextlib.suppress(grpc.aio.AioRpcError):
                seen["answer"] = (await caller.query(NAME))[1]
    if endpoint.state.config_update == State.UPDATE_FAILED:
        assert CAUSE in str(seen["pending_config"])
    return seen


async def _end_of(platform: Platform, change: Change) -> dict[str, Any]:
    """What is seen once the change has come to its end."""
    seen: list[dict[str, Any]] = []

    async def is_reached() -> bool:
        seen[:] = [await _seen(platform, change)]
        is_under_way = "IN_PROGRESS" in seen[0].get("state", "") or "Phase " in str(seen[0].get("config"))
        replicas = [seen[0][what] for what in ("running", "folders", "records")]
        return not is_under_way and replicas == [change.running, change.folders, change.folders]

    await eventually(is_reached, what="the end")
    return seen[0]


async def _cleared(platform: Platform) -> None:
    """Deletes the endpoint; nothing is left of it anywhere."""
    caller = await platform.caller()
    for name in await caller.names():
        await caller.delete(name)

    def is_clear() -> bool:
        return not platform.folders() and not platform.running() and not platform.rows()

    await eventually(is_clear, what="nothing is left")


async def points_of(platform: Platform, change: Change) -> tuple[list[str], dict[str, Any]]:
    """The points that a change passes, each once, and its end.

    Of two between which nothing happens, the end of one step and the beginning of the next, it is the first.
    """
    await _prepared(platform, change)
    if change.act is _nothing:
        await platform.serving.kill()
        await platform.serving.start()
        await _recovered(platform)
    else:
        await platform.serving.watch()
    await change.act(platform, await platform.caller(uuid.uuid4().hex))
    end = await _end_of(platform, change)
    points = await platform.serving.passed()
    assert tiny_runner.most_at_once(platform.ledger) <= change.surge
    await change.then(platform, await platform.caller())
    await _cleared(platform)
    points = [point for point in points if not point.endswith(BY_THE_CLOCK)]
    while points and points[0].startswith("after"):  # the end of a step that was under way before
        del points[0]
    is_new = [not (one.startswith("after") and next_.startswith("before")) for one, next_ in pairwise(points)]
    return list(dict.fromkeys(compress(points, [True, *is_new]))), end


@dataclass(frozen=True)
class Case:
    """One change that is cut short: at a point, or so many seconds after it began."""

    name: str
    change: Change
    point: str = ""
    seconds: tuple[float, ...] = ()
    """The second and later ones count from the start of the successor."""

    def __str__(self) -> str:
        return f"{self.name}, killed {self.point or 'after ' + ' and '.join(f'{each:.3f} s' for each in self.seconds)}"


async def _proved(platform: Platform, case: Case, end: dict[str, Any]) -> None:
    """Makes the change, kills Serving in it, starts it again, and looks at the end."""
    await _prepared(platform, case.change)
    platform.serving.settings = {**platform.serving.settings, **case.change.later}
    if case.change.act is _nothing:
        await platform.serving.kill()
        await platform.serving.start(deadly=case.point)
    else:
        await platform.serving.watch(case.point)
    killing = asyncio.create_task(_killed(platform, case))
    is_answered, request_id = False, uuid.uuid4().hex
    with contextlib.suppress(grpc.aio.AioRpcError):
        await case.change.act(platform, await platform.caller(request_id))
        is_answered = True
    await killing
    await platform.serving.start()
    if not is_answered:
        await case.change.act(platform, await platform.caller(request_id))
    await _ends_alike(platform, case, end)


async def _killed(platform: Platform, case: Case) -> None:
    if case.point:
        try:
            await eventually(platform.serving.ended.is_set)
        except AssertionError:
            raise AssertionError(f"it was not passed, but {await platform.serving.passed()}") from None
        return
    first, *later = case.seconds
    await asyncio.sleep(first)  # the moment is the case, nothing is waited for
    await platform.serving.kill()
    for seconds in later:
        starting = asyncio.create_task(platform.serving.start())
        await asyncio.sleep(seconds)
        await platform.serving.kill()
        await starting


async def _ends_alike(platform: Platform, case: Case, end: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []

    async def is_alike() -> bool:
        seen[:] = [{"running": platform.running(), "folders": platform.folders()}]
        if seen[0].items() <= end.items():
            seen[:] = [await _seen(platform, case.change)]
        return seen[0] == end

    try:
        await eventually(is_alike, within=WITHIN)
    except AssertionError:
        raise AssertionError(f"the end is {seen[0]} instead of {end}") from None
    most = tiny_runner.most_at_once(platform.ledger)
    assert most <= case.change.surge, f"{most} ran at once"
    await case.change.then(platform, await platform.caller())
    await _cleared(platform)


async def all_proved(platforms: Sequence[Platform], cases: Iterable[Case], ends: dict[str, dict[str, Any]]) -> None:
    """Proves the cases, on several platforms at once because most of the time is spent waiting."""
    waiting = iter(cases)

    async def work(platform: Platform) -> None:
        for case in waiting:
            try:
                await _proved(platform, case, ends[case.name])
            except Exception as error:
                raise AssertionError(str(case)) from error

    async with asyncio.TaskGroup() as workers:
        for platform in platforms:
            workers.create_task(work(platform))


@pytest.mark.parametrize(
    "name",
    # What the simple update passes, that to two replicas passes too.
    [pytest.param(name, marks=pytest.mark.long) if name == "update" else name for name in CHANGES],
)
async def test_a_kill_at_any_point_of_a_change_comes_to_the_same_end(platforms: list[Platform], name: str) -> None:
    points, end = await points_of(platforms[0], CHANGES[name])
    assert points
    await all_proved(platforms, (Case(name, CHANGES[name], point) for point in points), {name: end})


def drawn(changes: Mapping[str, Change], count: int, longest: float) -> list[Case]:
    """Changes that are cut short at moments within so many seconds, some of them twice."""
    chance = seeded()
    cases = []
    for _ in range(count):
        again = [chance.uniform(0, longest)] if chance.random() < AGAIN else []
        name = chance.choice(list(changes))
        cases.append(Case(name, changes[name], seconds=(chance.uniform(0, longest), *again)))
    return cases


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.long)])
async def test_a_kill_at_any_moment_of_a_change_comes_to_the_same_end(platforms: list[Platform], count: int) -> None:
    changes = {name: change for name, change in CHANGES.items() if name != "restart"}
    ends = {name: (await points_of(platforms[0], change))[1] for name, change in changes.items()}
    await all_proved(platforms, drawn(changes, count, LONGEST_SECONDS), ends)
