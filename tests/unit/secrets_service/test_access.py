"""The permission lattice: what SQL collects and `access` decides equals a model of a few lines."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secrets_service import access, directory_store, store
from secrets_service.model import Permission, Profile, Scope, Standing
from tests.support.stores import a_store

USERS = ["ann", "ben", "cat"]
GROUPS = ["admins", "users", "staff"]
SCOPES = ["one", "two"]

memberships = st.fixed_dictionaries({user: st.sets(st.sampled_from(GROUPS)) for user in USERS})
grants = st.lists(
    st.tuples(
        st.sampled_from(SCOPES),
        st.sampled_from(USERS + GROUPS),
        st.none() | st.sampled_from(Permission),  # None takes the permission away
    ),
    max_size=12,
)


@settings(max_examples=300)
@given(memberships, grants)
def test_effective_permission_is_the_strongest_of_user_and_groups_and_admins_manage(
    groups_of: dict[str, set[str]], changes: list[tuple[str, str, Permission | None]]
) -> None:
    model: dict[tuple[str, str], int] = {}
    with a_store() as connection:
        ids = {group: directory_store.insert_group(connection, group, folded=group) for group in GROUPS}
        for user in USERS:
            made = directory_store.insert_account(
                connection, Profile(name=user), folded=user, groups=sorted(groups_of[user])
            )
            ids[user] = made.id
        scopes: dict[str, Scope] = {
            name: store.insert_scope(connection, name, folded=name, uuid=name.encode()) for name in SCOPES
        }
        for scope, principal, permission in changes:
            if permission is None:
                store.delete_grant(connection, scopes[scope], principal)
                model.pop((scope, principal), None)
            else:
                store.put_grant(connection, scopes[scope], ids[principal], permission)
                model[scope, principal] = permission
        for scope in SCOPES:
            assert {grant.principal: grant.permission for grant in store.grants(connection, scopes[scope])} == {
                principal: held for (granted_on, principal), held in model.items() if granted_on == scope
            }
            for user in USERS:
                found = store.find_scope_and_standing(connection, scope, ids[user])
                assert found is not None
                _, standing = found
                level = max((model.get((scope, name), 0) for name in {user} | groups_of[user]), default=0)
                expected = 3 if "admins" in groups_of[user] else level
                assert (access.effective(standing) or 0) == expected
                assert [access.allows(standing, needed) for needed in Permission] == [
                    expected >= needed for needed in Permission
                ]


def test_nothing_granted_allows_nothing() -> None:
    assert access.effective(Standing(groups=frozenset({"users"}), granted=())) is None
    assert not any(access.allows(Standing(groups=frozenset(), granted=()), needed) for needed in Permission)


@pytest.mark.parametrize("held", Permission)
def test_a_level_includes_those_below_it(held: Permission) -> None:
    standing = Standing(groups=frozenset(), granted=(held,))
    assert [needed for needed in Permission if access.allows(standing, needed)] == list(Permission)[:held]
