"""Whether a caller may do what concerns the directory: the one place where that is decided.

An assertion may be some seconds old, so both are read from the database, in the transaction of what is to be done.
"""

from __future__ import annotations

import sqlite3

from secrets_service import store
from secrets_service.errors import AdminsOnly
from secrets_service.model import User
from servicekit.context import Principal
from servicekit.identity import InvalidToken


def require_active(connection: sqlite3.Connection, caller: Principal) -> User:
    """The caller; raises InvalidToken when it was removed or deactivated since it was told who it is."""
    user = store.find_user(connection, int(caller.id))
    if user is None or not user.profile.is_active:
        raise InvalidToken
    return user


def require_admin(connection: sqlite3.Connection, caller: Principal, action: str) -> None:
    """Raises AdminsOnly, which names the action, for everybody but admins."""
    if not require_active(connection, caller).is_admin:
        raise AdminsOnly(action)
