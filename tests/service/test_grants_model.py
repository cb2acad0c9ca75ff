"""Whatever order rights, configurations and launches come in: a launch gets a value when, and only when, the rules say
so (security standard, section 4). The rules are written once more here, as a model that knows no database."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.identity.v1 import identity_pb2
from tessera.identity.v1 import permissions_pb2 as permissions
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import Caller, RunningSecrets, running_secrets

PEOPLE = ("ann", "ben", "eve")
SCOPES = ("one", "two")
GROUP = "readers"
DIGESTS = tuple(letter.encode() * 32 for letter in "xy")
VERSIONS = (1, 2, 3)

people, scopes = st.sampled_from(PEOPLE), st.sampled_from(SCOPES)
authors = st.sampled_from(("ann", "ann", "ben", "ben", "eve"))
configures = st.tuples(
    st.just("configure"), authors, st.sampled_from(VERSIONS), st.sampled_from(DIGESTS), st.sets(scopes, min_size=1)
)
STEPS = st.lists(
    st.one_of(
        configures,
        configures,
        configures,
        st.tuples(st.just("acl"), st.sampled_from((*PEOPLE, GROUP)), scopes, st.booleans()),
        st.tuples(st.just("member"), people, st.booleans()),
        st.tuples(st.just("active"), people, st.sampled_from((True, True, False))),
        st.tuples(st.just("drop"), st.sampled_from(VERSIONS)),
        st.tuples(st.just("launch"), st.sampled_from(VERSIONS), st.sampled_from(DIGESTS), st.sets(scopes, min_size=1)),
        st.tuples(st.just("recreate"), scopes),
    ),
    min_size=10,
    max_size=30,
)
BEGINNING: list[tuple[Any, ...]] = [("manager", "ben"), ("acl", "ben", "one", True)]
"""ben may change the endpoint and read one of the scopes; eve may never do anything."""


@dataclass
class Model:
    """What the rules say. ann creates the endpoint; everybody else may change it once it was told so."""

    readers: set[tuple[str, str]] = field(default_factory=lambda: {("ann", scope) for scope in SCOPES})
    members: set[str] = field(default_factory=set)
    inactive: set[str] = field(default_factory=set)
    managers: set[str] = field(default_factory=lambda: {"ann"})
    granted: dict[int, tuple[bytes, frozenset[str]]] = field(default_factory=dict)

    def may_read(self, who: str, scope: str) -> bool:
        return (who, scope) in self.readers or (who in self.members and (GROUP, scope) in self.readers)

    def configure(self, author: str, version: int, digest: bytes, wanted: frozenset[str]) -> bool:
        """Whether a configuration is granted: c and d for the creator, a and b for the author."""
        if author in self.inactive or author not in self.managers or "ann" in self.inactive:
            return False
        before = [each for number, each in self.granted.items() if number != version]
        is_vouched = any(known == digest and wanted <= refs for known, refs in before)
        readers = {"ann"} if is_vouched else {"ann", author}
        if not all(self.may_read(who, scope) for who in readers for scope in wanted):
            return False
        self.granted[version] = (digest, wanted)
        return True

    def launch(self, version: int, digest: bytes, wanted: frozenset[str]) -> bool:
        """Whether a launch gets its values: what was granted (e), while the creator is active (d) and may read (h)."""
        known, refs = self.granted.get(version, (b"", frozenset()))
        return (
            known == digest
            and wanted <= refs
            and "ann" not in self.inactive
            and all(self.may_read("ann", scope) for scope in wanted)
        )


class World:
    """The real thing, for one sequence: people, scopes and an endpoint of its own."""

    def __init__(self, service: RunningSecrets, number: int) -> None:
        self._service = service
        self._prefix = f"n{number}-"
        self._people: dict[str, tuple[str, Caller]] = {}
        self._group = ""
        self._endpoint = ""

    async def begin(self) -> World:
        admin = self._service.admin
        for name in PEOPLE:
            made = await admin.create_user(self._prefix + name)
            token = await self._service.token_for(self._prefix + name)
            self._people[name] = (made.id, self._service.public(token))
        group = identity_pb2.CreateGroupRequest(display_name=self._prefix + GROUP)
        self._group = (await admin(admin.scim.CreateGroup, group)).id
        for scope in SCOPES:
            await self._scope(scope)
            await admin.grant(self._prefix + scope, self._prefix + "ann", pb.READ)
        self._endpoint, _ = await self._service.grant(self._people["ann"][1], version=0)
        return self

    async def _scope(self, scope: str) -> None:
        await self._service.admin.create_scope(self._prefix + scope)
        await self._service.admin.put(self._prefix + scope, "key", scope)

    async def acl(self, who: str, scope: str, is_granted: bool) -> None:
        admin = self._service.admin
        await admin.grant(self._prefix + scope, self._prefix + who, pb.READ)
        if not is_granted:
            request = pb.DeleteAclRequest(scope=self._prefix + scope, principal=self._prefix + who)
            await admin(admin.secrets.DeleteAcl, request)

    async def member(self, members: set[str]) -> None:
        admin = self._service.admin
        request = identity_pb2.ReplaceGroupRequest(
            id=self._group,
            display_name=self._prefix + GROUP,
            members=[identity_pb2.Member(value=self._people[name][0]) for name in members],
        )
        await admin(admin.scim.ReplaceGroup, request)

    async def active(self, who: str, is_active: bool) -> None:
        admin = self._service.admin
        change = identity_pb2.PatchOperation(op="replace", path="active")
        change.value.bool_value = is_active
        await admin(admin.scim.PatchUser, identity_pb2.PatchRequest(id=self._people[who][0], operations=[change]))

    async def manager(self, who: str) -> None:
        admin = self._service.admin
        entry = permissions.AccessControlRequest(user_name=self._prefix + who, permission_level=permissions.CAN_MANAGE)
        request = permissions.UpdatePermissionsRequest(serving_endpoint_id=self._endpoint, access_control_list=[entry])
        await admin(admin.permissions.UpdatePermissions, request)

    async def recreate(self, scope: str) -> None:
        admin = self._service.admin
        await admin(admin.secrets.DeleteScope, pb.DeleteScopeRequest(scope=self._prefix + scope))
        await self._scope(scope)

    async def configure(self, author: str, version: int, digest: bytes, wanted: frozenset[str]) -> bool:
        references = [(self._prefix + scope, "key") for scope in sorted(wanted)]
        try:
            _, granted = await self._service.grant(
                self._people[author][1], *references, endpoint_id=self._endpoint, version=version, digest=digest
            )
        except grpc.aio.AioRpcError as error:
            assert error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND)  # noqa: PT017
            return False
        return not granted.failures and not granted.creator_is_inactive

    async def drop(self, version: int) -> None:
        over = pb.ConfigVersions(endpoint_id=self._endpoint, versions=[version])
        await self._service.settle(dropped_configs=[over])

    async def launch(self, version: int, digest: bytes, wanted: frozenset[str]) -> bool:
        references = [(self._prefix + scope, "key") for scope in sorted(wanted)]
        answer = await self._service.resolve(
            self._endpoint, *references, version=version, digest=digest, replica_id=uuid.uuid4().hex
        )
        assert list(answer.values) in ([], [scope.encode() for scope in sorted(wanted)])
        assert bool(answer.values) != bool(answer.failures)
        return bool(answer.values)


async def _played(world: World, steps: list[tuple[Any, ...]]) -> None:
    model = Model()
    for number, (step, *arguments) in enumerate([*BEGINNING, *steps]):
        at = f"step {number}, {step} {arguments}"
        match step:
            case "acl":
                who, scope, is_granted = arguments
                await world.acl(who, scope, is_granted)
                (model.readers.add if is_granted else model.readers.discard)((who, scope))
            case "member":
                who, is_member = arguments
                (model.members.add if is_member else model.members.discard)(who)
                await world.member(model.members)
            case "active":
                who, is_active = arguments
                await world.active(who, is_active)
                (model.inactive.discard if is_active else model.inactive.add)(who)
            case "manager":
                await world.manager(*arguments)
                model.managers.add(arguments[0])
            case "recreate":
                await world.recreate(*arguments)
                model.readers = {each for each in model.readers if each[1] != arguments[0]}
            case "configure":
                author, version, digest, wanted = arguments
                done = await world.configure(author, version, digest, frozenset(wanted))
                assert done == model.configure(author, version, digest, frozenset(wanted)), at
            case "drop":
                await world.drop(*arguments)
                model.granted.pop(arguments[0], None)
            case "launch":
                version, digest, wanted = arguments
                done = await world.launch(version, digest, frozenset(wanted))
                assert done == model.launch(version, digest, frozenset(wanted)), at
        # After each step: what the model holds for launchable is, and nothing else.
        for version, digest in itertools.product(VERSIONS[:2], DIGESTS):
            wanted = model.granted.get(version, (b"", frozenset(SCOPES[:1])))[1]
            assert await world.launch(version, digest, wanted) == model.launch(version, digest, wanted), (
                f"after {at}: launch of {version}"
            )


class Played:
    """One service, and a world of its own on it for each sequence."""

    def __init__(self, runner: asyncio.Runner, service: RunningSecrets) -> None:
        self._runner = runner
        self._service = service
        self._numbers = itertools.count()

    def play(self, steps: list[tuple[Any, ...]]) -> None:
        async def play() -> None:
            await _played(await World(self._service, next(self._numbers)).begin(), steps)

        self._runner.run(play())


@pytest.fixture(scope="module")
def played() -> Iterator[Played]:
    with asyncio.Runner() as runner:
        running = running_secrets(tokens_per_minute=0)
        service = runner.run(running.__aenter__())
        try:
            yield Played(runner, service)
        finally:
            runner.run(running.__aexit__(None, None, None))


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_launches_get_what_the_rules_give_them(played: Played, steps: list[tuple[Any, ...]]) -> None:
    played.play(steps)


@pytest.mark.long
@settings(max_examples=600, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_launches_get_what_the_rules_give_them_in_many_more_orders(
    played: Played, steps: list[tuple[Any, ...]]
) -> None:
    played.play(steps)
