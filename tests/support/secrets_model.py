"""What the Secrets service promises, without a database: the one model that the real one is held to.

People are users and service principals, teams are groups. They are known by what was made, not by name, so whatever a
namesake would inherit shows; whoever is gone stays known, and keeps calling. Names are compared in one case. Every
method of `Model` is an operation by a caller: it returns what is answered, with the number of warnings, or raises
Refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

READ, WRITE, MANAGE = 1, 2, 3

MISSING = "RESOURCE_DOES_NOT_EXIST"
EXISTS = "RESOURCE_ALREADY_EXISTS"
CONFLICT = "RESOURCE_CONFLICT"
DENIED = "PERMISSION_DENIED"
INVALID = "INVALID_PARAMETER_VALUE"
TAKEN = "uniqueness"
BUILT_IN = "mutability"
NOBODY = "Invalid access token."


class Refused(Exception):
    """The operation is not done, for this reason."""


@dataclass(frozen=True)
class Secret:
    """Everything that was ever put under one key, as a value: what is done to it makes the secret that comes after."""

    name: str
    first: int = 1
    last: int = 0
    values: tuple[tuple[int, bytes], ...] = ()
    """Versions and their values, the newest first."""
    holds: frozenset[tuple[int, str]] = frozenset()
    """Versions and the replicas that hold them."""

    @property
    def current(self) -> int:
        """The version that is read; 0 when the key is deleted."""
        return self.last if self.last >= self.first else 0

    def value(self, version: int) -> bytes | None:
        """The value of a version that can be read or restored."""
        return dict(self.values).get(version) if version >= self.first else None

    def put(self, name: str, value: bytes, *, keep: int) -> Secret:
        version = self.last + 1
        values = ((version, value), *self.values)
        return replace(self, name=self.name if self.current else name, last=version, values=values)._pruned(keep)

    def deleted(self, *, keep: int) -> Secret:
        return replace(self, first=self.last + 1)._pruned(keep)

    def purged(self) -> Secret:
        return replace(self, first=self.last + 1, values=(), holds=frozenset())

    def held(self, replica: str) -> Secret:
        return replace(self, holds=self.holds | {(self.current, replica)})

    def released(self, replica: str, *, keep: int) -> Secret:
        return replace(self, holds=frozenset(hold for hold in self.holds if hold[1] != replica))._pruned(keep)

    def versions(self) -> list[tuple[int, bool, bool, bool]]:
        """Each version that is kept, the newest first: whether it is current, held, deleted."""
        held = {version for version, _ in self.holds}
        return [(each, each == self.current, each in held, each < self.first) for each, _ in self.values]

    def _pruned(self, keep: int) -> Secret:
        held = {version for version, _ in self.holds}
        oldest = max(self.first, self.last - keep + 1)
        return replace(self, values=tuple(each for each in self.values if each[0] >= oldest or each[0] in held))


@dataclass(eq=False)
class Person:
    """A user or a service principal."""

    name: str
    is_user: bool = True
    is_active: bool = True
    is_gone: bool = False


@dataclass(eq=False)
class Team:
    """A group."""

    name: str
    members: set[Person] = field(default_factory=set)
    is_gone: bool = False


Party = Person | Team
"""Whom something can be granted to."""


@dataclass
class Scope:
    """A scope with its secrets and what is granted on it."""

    name: str
    granted: dict[Party, int]
    secrets: dict[str, Secret] = field(default_factory=dict)

    def live(self) -> dict[str, Secret]:
        return {folded: secret for folded, secret in self.secrets.items() if secret.current}


class Model:
    """The service as it was founded; `keep` is how many versions of each secret are kept.

    People, teams and parties are named by their place among all that were ever made.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._scopes: dict[str, Scope] = {}
        self._first = Person("admin")
        self._users, self._admins = Team("users", {self._first}), Team("admins", {self._first})
        self.people = [self._first]
        self.teams = [self._users, self._admins]

    @property
    def parties(self) -> list[Party]:
        return [*self.people, *self.teams]

    # --- scopes ---

    def create_scope(self, caller: int, scope: str, manager: str) -> Any:
        person = self._caller(caller)
        if scope.lower() in self._scopes:
            raise Refused(EXISTS)
        self._scopes[scope.lower()] = Scope(scope, {self._users if manager else person: MANAGE})
        return None, 0

    def delete_scope(self, caller: int, scope: str) -> Any:
        self._permitted(caller, scope, MANAGE)
        del self._scopes[scope.lower()]
        return None, 0

    def list_scopes(self, caller: int) -> Any:
        self._caller(caller)
        return [self._scopes[folded].name for folded in sorted(self._scopes)], 0

    # --- secrets ---

    def put(self, caller: int, scope: str, key: str, value: bytes, if_version: int | None) -> Any:
        found = self._permitted(caller, scope, WRITE)
        secret = found.secrets.get(key.lower(), Secret(key))
        if if_version not in (None, secret.current):
            raise Refused(CONFLICT)
        found.secrets[key.lower()] = secret.put(key, value, keep=self._keep)
        return None, int(value.endswith(b"\n"))

    def delete(self, caller: int, scope: str, key: str) -> Any:
        found = self._permitted(caller, scope, WRITE)
        found.secrets[key.lower()] = self._secret(found, key).deleted(keep=self._keep)
        return None, 0

    def get(self, caller: int, scope: str, key: str) -> Any:
        secret = self._secret(self._permitted(caller, scope, READ), key)
        return (secret.name, secret.value(secret.current)), 0

    def list_secrets(self, caller: int, scope: str) -> Any:
        live = self._permitted(caller, scope, READ).live()
        return [live[folded].name for folded in sorted(live)], 0

    def list_versions(self, caller: int, scope: str, key: str) -> Any:
        secret = self._permitted(caller, scope, READ).secrets.get(key.lower())
        if secret is None or not secret.values:
            raise Refused(MISSING)
        return (secret.name, secret.versions()), 0

    def restore(self, caller: int, scope: str, key: str, version: int) -> Any:
        found = self._permitted(caller, scope, WRITE)
        secret = self._secret(found, key)
        if (value := secret.value(version)) is None:
            raise Refused(MISSING)
        found.secrets[key.lower()] = restored = secret.put(key, value, keep=self._keep)
        return restored.current, 0

    def purge(self, caller: int, scope: str, key: str) -> Any:
        found = self._permitted(caller, scope, WRITE)
        secret = found.secrets.get(key.lower())
        if secret is None or not secret.values:
            raise Refused(MISSING)
        found.secrets[key.lower()] = secret.purged()
        return None, 0

    # --- ACLs ---

    def put_acl(self, caller: int, scope: str, party: int, permission: int) -> Any:
        found = self._permitted(caller, scope, MANAGE)
        to = self._named(party)
        if to is None:
            raise Refused(INVALID)
        before = found.granted.get(to)
        found.granted[to] = permission
        return None, self._abandoned(found, before)

    def delete_acl(self, caller: int, scope: str, party: int) -> Any:
        found = self._permitted(caller, scope, MANAGE)
        to = self._named(party)
        if to is None or to not in found.granted:
            raise Refused(MISSING)
        return None, self._abandoned(found, found.granted.pop(to))

    def list_acls(self, caller: int, scope: str) -> Any:
        granted = self._permitted(caller, scope, MANAGE).granted
        return [(party.name, permission) for party, permission in granted.items()], 0

    # --- launches ---

    def launch(self, caller: int, scope: str, key: str, replica: str) -> Any:
        """What a replica of the caller's endpoint is started with; empty when it cannot be started."""
        try:
            found = self._permitted(caller, scope, READ)
            secret = self._secret(found, key)
        except Refused:
            return [], 0
        found.secrets[key.lower()] = secret.held(replica)
        return [secret.value(secret.current)], 0

    def end_launch(self, caller: int, replica: str) -> Any:
        for scope in self._scopes.values():
            for folded, secret in scope.secrets.items():
                scope.secrets[folded] = secret.released(replica, keep=self._keep)
        return None, 0

    # --- the directory ---

    def who_am_i(self, caller: int) -> Any:
        person = self._caller(caller)
        return (person.name, {team.name for team in self.teams if person in team.members}), 0

    def create_user(self, caller: int, name: str) -> Any:
        self._administrator(caller)
        self._free(name)
        return self._made(Person(name))

    def create_service_principal(self, caller: int) -> Any:
        self._administrator(caller)
        return self._made(Person(f"application {len(self.people)}", is_user=False))

    def rename_user(self, caller: int, person: int, name: str) -> Any:
        self._administrator(caller)
        found = self._person(person)
        if not found.is_user:
            raise Refused(MISSING)
        self._free(name, unless=found)
        found.name = name
        return None, 0

    def activate(self, caller: int, person: int, is_active: bool) -> Any:
        self._administrator(caller)
        found = self._person(person)
        if not is_active:
            self._require_admin_besides(found)
        found.is_active = is_active
        return None, 0

    def delete_person(self, caller: int, person: int) -> Any:
        self._administrator(caller)
        found = self._person(person)
        if found is self._first:
            raise Refused(BUILT_IN)
        self._require_admin_besides(found)
        for team in self.teams:
            team.members.discard(found)
        self._forget(found)
        return None, 0

    def create_group(self, caller: int, name: str) -> Any:
        self._administrator(caller)
        self._free(name)
        self.teams.append(Team(name))
        return None, 0

    def rename_group(self, caller: int, team: int, name: str) -> Any:
        self._administrator(caller)
        found = self._team(team)
        if found in (self._users, self._admins):
            raise Refused(BUILT_IN)
        self._free(name, unless=found)
        found.name = name
        return None, 0

    def delete_group(self, caller: int, team: int) -> Any:
        self._administrator(caller)
        found = self._team(team)
        if found in (self._users, self._admins):
            raise Refused(BUILT_IN)
        found.members.clear()
        self._forget(found)
        return None, 0

    def add_member(self, caller: int, team: int, person: int) -> Any:
        self._administrator(caller)
        found, member = self._team(team), self.people[person]
        if found is self._users:
            raise Refused(BUILT_IN)
        if member.is_gone:
            raise Refused(INVALID)
        found.members.add(member)
        return None, 0

    def remove_member(self, caller: int, team: int, person: int) -> Any:
        self._administrator(caller)
        found, member = self._team(team), self.people[person]
        if found is self._users:
            raise Refused(BUILT_IN)
        if found is self._admins:
            self._require_admin_besides(member)
        found.members.discard(member)
        return None, 0

    # --- who may ---

    def _caller(self, caller: int) -> Person:
        person = self.people[caller]
        if person.is_gone or not person.is_active:
            raise Refused(NOBODY)
        return person

    def _administrator(self, caller: int) -> None:
        if self._caller(caller) not in self._admins.members:
            raise Refused(DENIED)

    def _permitted(self, caller: int, scope: str, needed: int) -> Scope:
        person = self._caller(caller)
        found = self._scopes.get(scope.lower())
        if found is None:
            raise Refused(MISSING)
        who: set[Party] = {person, *(team for team in self.teams if person in team.members)}
        if self._admins not in who and max(found.granted.get(each, 0) for each in who) < needed:
            raise Refused(DENIED)
        return found

    def _require_admin_besides(self, person: Person) -> None:
        if not any(each.is_active for each in self._admins.members if each is not person):
            raise Refused(BUILT_IN)

    def _abandoned(self, scope: Scope, before: int | None) -> int:
        return int(before == MANAGE and MANAGE not in scope.granted.values())

    # --- what there is ---

    def _secret(self, scope: Scope, key: str) -> Secret:
        secret = scope.live().get(key.lower())
        if secret is None:
            raise Refused(MISSING)
        return secret

    def _existing(self) -> Iterator[Party]:
        return (each for each in self.parties if not each.is_gone)

    def _named(self, party: int) -> Party | None:
        """Who has the name of a party now: itself, unless it is gone; then its namesake, if there is one."""
        name = self.parties[party].name.casefold()
        return next((each for each in self._existing() if each.name.casefold() == name), None)

    def _free(self, name: str, *, unless: Party | None = None) -> None:
        if any(each.name.casefold() == name.casefold() for each in self._existing() if each is not unless):
            raise Refused(TAKEN)

    def _person(self, person: int) -> Person:
        if self.people[person].is_gone:
            raise Refused(MISSING)
        return self.people[person]

    def _team(self, team: int) -> Team:
        if self.teams[team].is_gone:
            raise Refused(MISSING)
        return self.teams[team]

    def _made(self, person: Person) -> Any:
        self.people.append(person)
        self._users.members.add(person)
        return None, 0

    def _forget(self, party: Party) -> None:
        party.is_gone = True
        for scope in self._scopes.values():
            scope.granted.pop(party, None)
