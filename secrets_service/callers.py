"""Whether a caller may do what concerns the directory: the one place where that is decided.

An assertion may be some seconds old, so both are read from the database, in the transaction of what is to be done. What
needs an admin at all is said by the policy: asking here under a row that says something else is a bug, and fails.
"""

from __future__ import annotations

from secrets_service import store
from secrets_service.errors import AdminsOnly
from secrets_service.model import User
from servicekit.context import Principal, current_decision
from servicekit.identity import InvalidToken
from servicekit.storage import Connection
from tessera import policy


def require_active(connection: Connection, caller: Principal) -> User:
    """The caller; raises InvalidToken when it was removed or deactivated since it was told who it is."""
    user = store.find_user(connection, int(caller.id))
    if user is None or not user.profile.is_active:
        raise InvalidToken
    return user


def require_admin(connection: Connection, caller: Principal, action: str) -> None:
    """Raises AdminsOnly, which names the action, for everybody but admins."""
    decision = current_decision(policy.ADMINS)
    if not require_active(connection, caller).is_admin:
        raise AdminsOnly(action)
    decision.allow()
