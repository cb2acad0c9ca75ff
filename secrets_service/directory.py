"""The use cases of the directory: users, service principals and groups.

Any caller may read it. A change is one transaction of three parts: the caller is an admin, the change is made, and the
workspace still has an active admin. Names are normalised here, once, before anything compares them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from secrets_service import callers, directory_store, names, scim_documents, scim_filter, scim_patch, store
from secrets_service.directory_store import Selection
from secrets_service.errors import (
    InvalidMember,
    LastAdmin,
    NotChangeable,
    PrincipalExists,
    PrincipalNotFound,
    TooManyPrincipals,
)
from secrets_service.memory import RememberingDatabase
from secrets_service.model import USERS, DetailedGroup, Email, GroupProfile, Kind, Page, Profile, User
from secrets_service.scim_patch import Operation
from servicekit import audit
from servicekit.context import ADMINS, Principal
from servicekit.errors import InvalidParameter
from servicekit.storage import Connection

MOST_ACCOUNTS = 20_000
"""Users and service principals together."""
MOST_GROUPS = 5_000
MOST_EMAILS = 10
MOST_VALUES = 100
"""Roles, or entitlements, of one principal."""
LARGEST_PAGE = 1_000
MOST_LISTED_MEMBERS = 20_000
"""Members of all groups on a page together; also keeps an answer within a gRPC message."""

FIRST_ENTITLEMENTS = ("workspace-access",)
"""What a new user or service principal may enter when nobody says otherwise."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A list as it was asked for: every part may be left out."""

    filter: str = ""
    sort_by: str = ""
    sort_order: str = ""
    start: int | None = None
    count: int | None = None


class Directory:
    """What its three parts share."""

    def __init__(self, database: RememberingDatabase) -> None:
        self._database = database

    async def read(self, find: Callable[[Connection], T]) -> T:
        """What `find` finds."""
        return await self._database.read(find)

    async def change(self, change: Callable[[Connection], T], *, caller: Principal, action: str) -> T:
        """Makes a change; raises AdminsOnly, LastAdmin, and whatever the change raises."""

        def transaction(connection: Connection) -> T:
            callers.require_admin(connection, caller, action)
            result = change(connection)
            if not directory_store.has_active_admin(connection):
                raise LastAdmin
            return result

        return await self._database.write(transaction)


class Accounts:
    """Users, or service principals: who can own tokens."""

    def __init__(self, directory: Directory, kind: Kind) -> None:
        self._directory = directory
        self._kind = kind
        self._action = f"change {kind.replace('_', ' ')}s"
        self._shape = scim_documents.USER if kind is Kind.USER else scim_documents.SERVICE_PRINCIPAL

    async def create(self, profile: Profile, *, caller: Principal) -> User:
        """Adds one, who belongs to the group `users`. The name of a service principal is made here."""
        if self._kind is Kind.SERVICE_PRINCIPAL:
            profile = replace(profile, name=str(uuid.uuid4()))
        entitlements = profile.entitlements or FIRST_ENTITLEMENTS
        profile = _checked_profile(replace(profile, entitlements=entitlements), self._kind)

        def create(connection: Connection) -> User:
            if directory_store.count_accounts(connection) >= MOST_ACCOUNTS:
                raise TooManyPrincipals("users and service principals", MOST_ACCOUNTS)
            folded = _free_name(connection, profile.name)
            made = directory_store.insert_account(connection, profile, folded=folded, groups=[USERS], kind=self._kind)
            audit.changed(principal=made.profile.name, principal_id=str(made.id), now="exists")
            return made

        return await self._directory.change(create, caller=caller, action=self._action)

    async def list_page(self, query: Query) -> Page[User]:
        """Some of them."""
        selection = _selection(query, self._kind)
        return await self._directory.read(
            lambda connection: directory_store.account_page(connection, self._kind, selection)
        )

    async def get(self, account_id: str) -> User:
        """The one of that id."""
        return await self._directory.read(lambda connection: self._found(connection, account_id))

    async def patch(self, account_id: str, operations: Sequence[Operation], *, caller: Principal) -> User:
        """Changes parts of one."""

        def patch(connection: Connection) -> User:
            user = self._found(connection, account_id)
            document = scim_patch.patched(scim_documents.of_account(user), operations, self._shape)
            return self._recorded(connection, user, scim_documents.account_profile(document))

        return await self._directory.change(patch, caller=caller, action=self._action)

    async def replace(self, account_id: str, profile: Profile, *, is_active: bool | None, caller: Principal) -> User:
        """Replaces all that can be changed about one; `is_active` None leaves that as it is."""

        def put(connection: Connection) -> User:
            user = self._found(connection, account_id)
            stays = user.profile.is_active if is_active is None else is_active
            return self._recorded(connection, user, replace(profile, is_active=stays))

        return await self._directory.change(put, caller=caller, action=self._action)

    async def delete(self, account_id: str, *, caller: Principal) -> None:
        """Deletes one, with its tokens, permissions and memberships."""

        def delete(connection: Connection) -> None:
            user = self._found(connection, account_id)
            if store.find_platform(connection).admin_id == user.id:
                raise NotChangeable("The first admin, whose token the operator renews, stays. Deactivate it instead.")
            directory_store.delete_principal(connection, user.id)
            audit.changed(principal=user.profile.name, principal_id=str(user.id), now="deleted")

        await self._directory.change(delete, caller=caller, action=self._action)

    def _found(self, connection: Connection, account_id: str) -> User:
        found = store.find_user(connection, int(account_id)) if names.is_id(account_id) else None
        if found is None or found.kind is not self._kind:
            raise PrincipalNotFound(self._kind, account_id[: names.LONGEST_TEXT])
        return found

    def _recorded(self, connection: Connection, user: User, profile: Profile) -> User:
        if self._kind is Kind.SERVICE_PRINCIPAL:
            profile = replace(profile, name=user.profile.name)
        profile = _checked_profile(profile, self._kind)
        folded = _free_name(connection, profile.name, unless=user.id)
        directory_store.update_account(connection, user.id, profile, folded=folded)
        self._tell(user, profile)
        return replace(user, profile=profile)

    def _tell(self, user: User, profile: Profile) -> None:
        about = {"principal": user.profile.name, "principal_id": str(user.id)}
        if profile.name != user.profile.name:
            audit.changed(**about, now="renamed", name=profile.name)
        if profile.is_active != user.profile.is_active:
            audit.changed(**about, now="active" if profile.is_active else "inactive")


class Groups:
    """Groups of users and service principals."""

    _action = "change groups"

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def create(self, profile: GroupProfile, *, caller: Principal) -> DetailedGroup:
        """Adds a group."""
        profile = _checked_group(profile)

        def create(connection: Connection) -> DetailedGroup:
            if directory_store.count_groups(connection) >= MOST_GROUPS:
                raise TooManyPrincipals("groups", MOST_GROUPS)
            folded = _free_name(connection, profile.name)
            group_id = directory_store.insert_group(connection, profile.name, folded=folded)
            audit.changed(group=profile.name, group_id=str(group_id), now="exists")
            return self._recorded(connection, group_id, profile, folded)

        return await self._directory.change(create, caller=caller, action=self._action)

    async def list_page(self, query: Query, *, with_members: bool) -> Page[DetailedGroup]:
        """Some groups; fewer than asked for where their members are many."""
        selection = _selection(query, Kind.GROUP)
        return await self._directory.read(
            lambda connection: directory_store.group_page(
                connection, selection, with_members=with_members, most_members=MOST_LISTED_MEMBERS
            )
        )

    async def get(self, group_id: str, *, with_members: bool) -> DetailedGroup:
        """The group of that id."""
        return await self._directory.read(
            lambda connection: self._found(connection, group_id, with_members=with_members)
        )

    async def patch(self, group_id: str, operations: Sequence[Operation], *, caller: Principal) -> DetailedGroup:
        """Changes parts of a group."""

        def patch(connection: Connection) -> DetailedGroup:
            group = self._found(connection, group_id)
            document = scim_patch.patched(scim_documents.of_group(group), operations, scim_documents.GROUP)
            return self._replaced(connection, group, scim_documents.group_profile(document))

        return await self._directory.change(patch, caller=caller, action=self._action)

    async def replace(self, group_id: str, profile: GroupProfile, *, caller: Principal) -> DetailedGroup:
        """Replaces all that can be changed about a group."""
        return await self._directory.change(
            lambda connection: self._replaced(connection, self._found(connection, group_id), profile),
            caller=caller,
            action=self._action,
        )

    async def delete(self, group_id: str, *, caller: Principal) -> None:
        """Deletes a group, with what was granted to it."""

        def delete(connection: Connection) -> None:
            group = self._found(connection, group_id, with_members=False)
            if group.name in (USERS, ADMINS):
                raise NotChangeable(f"The group {group.name} is built in and cannot be deleted.")
            directory_store.delete_principal(connection, group.id)
            audit.changed(group=group.name, group_id=str(group.id), now="deleted")

        await self._directory.change(delete, caller=caller, action=self._action)

    def _found(self, connection: Connection, group_id: str, *, with_members: bool = True) -> DetailedGroup:
        found = None
        if names.is_id(group_id):
            found = directory_store.find_group(connection, int(group_id), with_members=with_members)
        if found is None:
            raise PrincipalNotFound(Kind.GROUP, group_id[: names.LONGEST_TEXT])
        return found

    def _replaced(self, connection: Connection, group: DetailedGroup, profile: GroupProfile) -> DetailedGroup:
        profile = _checked_group(profile)
        if group.name == USERS:
            raise NotChangeable(f"The group {USERS} holds everybody and cannot be changed.")
        if group.name == ADMINS and profile.name != ADMINS:
            raise NotChangeable(f"The group {ADMINS} is built in and keeps its name.")
        folded = _free_name(connection, profile.name, unless=group.id)
        if profile.name != group.name:
            audit.changed(group=group.name, group_id=str(group.id), now="renamed", name=profile.name)
        return self._recorded(connection, group.id, profile, folded)

    def _recorded(self, connection: Connection, group_id: int, profile: GroupProfile, folded: str) -> DetailedGroup:
        before = directory_store.members_of(connection, group_id)
        after = {int(each) if names.is_id(each) else -1: each for each in profile.members}
        added, removed = after.keys() - before, before - after.keys()
        known = directory_store.kinds_and_names_of(connection, added | removed)
        for member, spelled in after.items():
            if member in added and (member not in known or known[member][0] is Kind.GROUP):
                raise InvalidMember(spelled[: names.LONGEST_TEXT], is_group=member in known)
        directory_store.update_group(connection, group_id, profile, folded=folded)
        directory_store.change_members(connection, group_id, added=added, removed=removed)
        for member, (_, name) in sorted(known.items()):
            now = "member" if member in added else "no member"
            audit.changed(principal=name, principal_id=str(member), now=now, group=profile.name)
        recorded = directory_store.find_group(connection, group_id)
        assert recorded is not None  # it was just written
        return recorded


def _free_name(connection: Connection, name: str, *, unless: int | None = None) -> str:
    """The folded form of a name that no other principal has; raises PrincipalExists."""
    folded = names.folded_principal(name)
    if store.find_principal(connection, folded) not in (None, unless):
        raise PrincipalExists(name)
    return folded


def _selection(query: Query, kind: Kind) -> Selection:
    """The query, checked. `start` and `count` are brought into their range, as RFC 7644 asks, rather than refused."""
    wanted = scim_filter.parse(query.filter, directory_store.FILTERED[kind]) if query.filter.strip() else None
    known = {name.lower(): name for name in directory_store.SORTED[kind]}
    sort_by = known.get(query.sort_by.lower(), "")
    if query.sort_by and not sort_by:
        raise InvalidParameter(f"sortBy: one of {', '.join(known.values())}.")
    order = query.sort_order.lower()
    if order not in ("", "ascending", "descending"):
        raise InvalidParameter("sortOrder: ascending or descending.")
    return Selection(
        filter=wanted,
        sort_by=sort_by,
        is_descending=order == "descending",
        start=max(1, 1 if query.start is None else query.start),
        count=min(max(0, LARGEST_PAGE if query.count is None else query.count), LARGEST_PAGE),
    )


def _checked_profile(profile: Profile, kind: Kind) -> Profile:
    """The profile as it is kept: everything in NFC, with a display name, and a user with at least one address."""
    name = names.principal_name("userName", profile.name)
    emails = profile.emails
    if kind is Kind.USER and not emails:
        emails = (Email("work", name, is_primary=True),)
    if len(emails) > MOST_EMAILS:
        raise InvalidParameter(f"emails: at most {MOST_EMAILS}.")
    return replace(
        profile,
        name=name,
        display_name=names.label("displayName", profile.display_name) or name,
        given_name=names.label("name.givenName", profile.given_name),
        family_name=names.label("name.familyName", profile.family_name),
        emails=tuple(
            Email(names.label("emails.type", each.type), names.label("emails.value", each.value), each.is_primary)
            for each in emails
        ),
        roles=_labels("roles", profile.roles),
        entitlements=_labels("entitlements", profile.entitlements),
        external_id=names.label("externalId", profile.external_id),
    )


def _checked_group(profile: GroupProfile) -> GroupProfile:
    return replace(
        profile,
        name=names.principal_name("displayName", profile.name),
        roles=_labels("roles", profile.roles),
        entitlements=_labels("entitlements", profile.entitlements),
        external_id=names.label("externalId", profile.external_id),
    )


def _labels(field: str, values: Sequence[str]) -> tuple[str, ...]:
    """Roles or entitlements, each once."""
    kept = tuple(dict.fromkeys(names.label(f"{field}.value", value) for value in values))
    if len(kept) > MOST_VALUES:
        raise InvalidParameter(f"{field}: at most {MOST_VALUES}.")
    return kept
