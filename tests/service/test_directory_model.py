"""Any sequence of changes to users, service principals, groups, tokens and ACLs, against a model of the contract.

The model knows people by what was made, never by name, so whatever a namesake would inherit shows. After every step
everybody's standing is what the model says: whose token works, who may do what in the scope, who is in which group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tessera.identity.v1 import identity_pb2 as pb
from tessera.secrets.v1 import secrets_pb2
from tests.support.secrets import Caller, Refusal, RunningSecrets, refusal, running_secrets

T = TypeVar("T")

NAMES = ("ann", "ANN", "ben", "straße", "STRASSE", "crew", "Crew")
SCOPE = "shared"
READ, WRITE, MANAGE = secrets_pb2.READ, secrets_pb2.WRITE, secrets_pb2.MANAGE
LEVELS = st.sampled_from([READ, WRITE, MANAGE])


@dataclass(eq=False)
class Person:
    """A user or service principal that was made, and may be gone."""

    id: str
    name: str
    token: str
    kind: str = "User"
    is_active: bool = True


@dataclass(eq=False)
class Team:
    """A group that was made."""

    id: str
    name: str
    members: set[Person] = field(default_factory=set)


class Directory(RuleBasedStateMachine):
    """Rules make, change and remove; who acts is anybody, and the model says whether it works."""

    loop: asyncio.AbstractEventLoop
    """Runs the service; one for all runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = AsyncExitStack()
        self.people: list[Person] = []
        self.gone: list[Person] = []
        self.teams: list[Team] = []
        self.grants: dict[Person | Team, int] = {}

    def run(self, call: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(call, 30))

    @initialize()
    def start(self) -> None:
        self.service: RunningSecrets = self.run(self.stack.enter_async_context(running_secrets(tokens_per_minute=0)))
        admin = self.service.admin
        me = self.run(admin(admin.scim.GetMe, pb.GetMeRequest()))
        self.first = Person(me.id, me.user_name, self.service.admin_token)
        self.people.append(self.first)
        self.admins = Team(me.groups[0].value, "admins", {self.first})
        self.teams.append(self.admins)
        self.run(admin.create_scope(SCOPE))
        self.grants[self.first] = MANAGE
        self.run(admin.put(SCOPE, "key", "value"))

    def teardown(self) -> None:
        self.run(self.stack.aclose())

    # --- what the model says ---

    def is_admin(self, person: Person) -> bool:
        return person in self.admins.members

    def level(self, person: Person) -> int:
        if self.is_admin(person):
            return MANAGE
        held: list[Person | Team] = [person, *(team for team in self.teams if person in team.members)]
        return max((self.grants.get(each, 0) for each in held), default=0)

    def is_taken(self, name: str, unless: Person | Team | None = None) -> bool:
        known: list[Person | Team] = [*self.people, *self.teams]
        return name.casefold() in {each.name.casefold() for each in known if each is not unless}

    def leaves_admins(self, without: Person) -> bool:
        return any(each.is_active for each in self.admins.members if each is not without)

    # --- calls ---

    def anybody(self, data: st.DataObject) -> Person:
        return data.draw(st.sampled_from(self.people), label="person")

    def caller(self, person: Person) -> Caller:
        return self.service.public(person.token)

    def attempt(self, actor: Person, method: str, request: Any, *, expected: str = "") -> Any:
        """Calls Scim as somebody; `expected` is the SCIM type or reason that an admin would be refused with."""
        caller = self.caller(actor)
        call = caller(getattr(caller.scim, method), request)
        if not actor.is_active:
            expected = "Invalid access token."
        elif not self.is_admin(actor):
            expected = "PERMISSION_DENIED"
        if not expected:
            return self.run(call)
        refused: Refusal = self.run(refusal(call))
        assert expected in (refused.message, refused.facts.get("scim_type"), refused.reason), refused
        return None

    # --- changes ---

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def create_user(self, data: st.DataObject, name: str) -> None:
        expected = "uniqueness" if self.is_taken(name) else ""
        made = self.attempt(self.anybody(data), "CreateUser", pb.CreateUserRequest(user_name=name), expected=expected)
        if made is not None:
            self.people.append(Person(made.id, name, self.run(self.token_for(name))))

    @rule(data=st.data())
    def create_service_principal(self, data: st.DataObject) -> None:
        made = self.attempt(self.anybody(data), "CreateServicePrincipal", pb.CreateServicePrincipalRequest())
        if made is not None:
            token = self.run(self.token_for(made.application_id))
            self.people.append(Person(made.id, made.application_id, token, kind="ServicePrincipal"))

    async def token_for(self, name: str) -> str:
        admin = self.caller(next(each for each in self.admins.members if each.is_active))
        answer = await admin(admin.tokens.CreateOboToken, pb.CreateOboTokenRequest(application_id=name))
        return str(answer.token_value)

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def rename_user(self, data: st.DataObject, name: str) -> None:
        person = self.anybody(data)
        if person.kind == "User":
            expected = "uniqueness" if self.is_taken(name, unless=person) else ""
            request = pb.ReplaceUserRequest(id=person.id, user_name=name)
            if self.attempt(self.anybody(data), "ReplaceUser", request, expected=expected) is not None:
                person.name = name

    @rule(data=st.data(), is_active=st.booleans())
    def activate_or_deactivate(self, data: st.DataObject, is_active: bool) -> None:
        person = self.anybody(data)
        operation = pb.PatchOperation(op="replace", path="active")
        operation.value.bool_value = is_active
        expected = "" if is_active or self.leaves_admins(without=person) else "mutability"
        request = pb.PatchRequest(id=person.id, operations=[operation])
        if self.attempt(self.anybody(data), f"Patch{person.kind}", request, expected=expected) is not None:
            person.is_active = is_active

    @rule(data=st.data())
    def delete_person(self, data: st.DataObject) -> None:
        person = self.anybody(data)
        expected = "" if person is not self.first and self.leaves_admins(without=person) else "mutability"
        actor = self.anybody(data)
        if self.attempt(actor, f"Delete{person.kind}", pb.DeleteRequest(id=person.id), expected=expected) is not None:
            self.people.remove(person)
            self.gone.append(person)
            self.grants.pop(person, None)
            for team in self.teams:
                team.members.discard(person)

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def create_group(self, data: st.DataObject, name: str) -> None:
        expected = "uniqueness" if self.is_taken(name) else ""
        actor = self.anybody(data)
        made = self.attempt(actor, "CreateGroup", pb.CreateGroupRequest(display_name=name), expected=expected)
        if made is not None:
            self.teams.append(Team(made.id, name))

    @rule(data=st.data())
    def delete_group(self, data: st.DataObject) -> None:
        team = data.draw(st.sampled_from(self.teams), label="team")
        expected = "mutability" if team is self.admins else ""
        request = pb.DeleteRequest(id=team.id)
        if self.attempt(self.anybody(data), "DeleteGroup", request, expected=expected) is not None:
            self.teams.remove(team)
            self.grants.pop(team, None)

    @rule(data=st.data(), is_added=st.booleans())
    def change_members(self, data: st.DataObject, is_added: bool) -> None:
        team, person = data.draw(st.sampled_from(self.teams), label="team"), self.anybody(data)
        if is_added:
            operation = pb.PatchOperation(op="add", path="members")
            operation.value.list_value.values.add().struct_value.fields["value"].string_value = person.id
        else:
            operation = pb.PatchOperation(op="remove", path=f'members[value eq "{person.id}"]')
        stays = team is not self.admins or is_added or self.leaves_admins(without=person)
        request = pb.PatchRequest(id=team.id, operations=[operation])
        expected = "" if stays else "mutability"
        if self.attempt(self.anybody(data), "PatchGroup", request, expected=expected) is not None:
            (team.members.add if is_added else team.members.discard)(person)

    @rule(data=st.data(), level=LEVELS)
    def grant(self, data: st.DataObject, level: secrets_pb2.AclPermission.ValueType) -> None:
        actor = self.anybody(data)
        known: list[Person | Team] = [*self.people, *self.teams]
        to = data.draw(st.sampled_from(known), label="to")
        call = self.caller(actor).grant(SCOPE, to.name, level)
        if actor.is_active and self.level(actor) == MANAGE:
            self.run(call)
            self.grants[to] = level
        else:
            assert self.run(refusal(call)).code is grpc.StatusCode.PERMISSION_DENIED

    # --- what must hold ---

    @invariant()
    def everybody_stands_as_the_model_says(self) -> None:
        for person in self.people:
            me = self.caller(person)
            call = me(me.scim.GetMe, pb.GetMeRequest())
            if not person.is_active:
                assert self.run(refusal(call)).message == "Invalid access token."
                continue
            found = self.run(call)
            assert (found.id, found.user_name) == (person.id, person.name)
            expected = {team.id for team in self.teams if person in team.members}
            assert {group.value for group in found.groups if group.display != "users"} == expected
            calls: list[Awaitable[Any]] = [me.keys(SCOPE), me.put(SCOPE, "key", "v"), me.acls(SCOPE)]
            may = [self.run(self.succeeds(call)) for call in calls]
            assert may == [self.level(person) >= level for level in (READ, WRITE, MANAGE)]

    @invariant()
    def nobody_who_is_gone_is_known(self) -> None:
        for person in self.gone:
            me = self.caller(person)
            assert self.run(refusal(me(me.scim.GetMe, pb.GetMeRequest()))).message == "Invalid access token."

    async def succeeds(self, call: Awaitable[Any]) -> bool:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
                raise
            return False
        return True


def test_any_sequence_of_changes_gives_the_model_s_answer() -> None:
    with asyncio.Runner() as runner:
        Directory.loop = runner.get_loop()
        quick = settings(
            max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        )
        run_state_machine_as_test(Directory, settings=quick)
