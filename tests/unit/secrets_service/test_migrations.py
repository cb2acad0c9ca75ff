"""A database of the first schema, brought up to date: nobody loses anything."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from secrets_service import directory_store, first_format, store
from secrets_service.app import MIGRATIONS
from secrets_service.model import Email, Kind, Profile
from tests.support.stores import opened_store

BEFORE = """
INSERT INTO principals (id, kind, name, folded) VALUES (1, 'group', 'users', 'users'), (2, 'user', 'Ada', 'ada');
INSERT INTO users VALUES (2, 'Ada L', 'Ada', 'L', '[["work", "a@b", true]]', 1, 'x');
INSERT INTO memberships VALUES (2, 1);
INSERT INTO tokens VALUES ('t', 2, x'00', 'mine', 1, 2);
INSERT INTO scopes (id, uuid, name, folded) VALUES (1, x'01', 's', 's');
INSERT INTO acls (scope_id, principal_id, permission) VALUES (1, 2, 3);
PRAGMA user_version = 1;
"""


async def test_users_keep_what_they_had_when_service_principals_come(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "secrets.db")) as old:
        old.executescript((MIGRATIONS / "0001_initial.sql").read_text() + BEFORE)
    async with opened_store(tmp_path / "secrets.db") as opened:
        await opened.write(first_format.authenticate_rights)
        user = await opened.read(store.find_user, 2)
        assert user is not None
        assert (user.kind, [group.name for group in user.groups]) == (Kind.USER, ["users"])
        assert user.profile == Profile(
            name="Ada",
            display_name="Ada L",
            given_name="Ada",
            family_name="L",
            emails=(Email("work", "a@b", is_primary=True),),
            entitlements=("workspace-access",),
            external_id="x",
        )
        scope = await opened.read(store.find_scope, "s")
        assert scope is not None
        assert [grant.principal for grant in await opened.read(store.grants, scope)] == ["Ada"]
        token = await opened.read(store.find_managed_token, "t", now_ms=1)
        assert token is not None
        assert (token.owner_id, token.creator_id, token.creator_name) == (2, 2, "Ada")
        group = await opened.read(directory_store.find_group, 1)
        assert group is not None
        assert [member.id for member in group.members] == [2]
        await opened.write(directory_store.delete_principal, 2)
        assert await opened.read(store.grants, scope) == []
