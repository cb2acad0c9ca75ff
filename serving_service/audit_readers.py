"""Who may read Serving's audit log."""

from __future__ import annotations

from servicekit.context import current_caller, current_decision
from servicekit.errors import PermissionDenied
from tessera import policy


class AdminsOnly(PermissionDenied):
    """Only members of `admins` may do this."""

    def __init__(self) -> None:
        super().__init__("Only admins may read the audit log. Ask a member of the group admins.")


async def require_admin() -> None:
    """Raises AdminsOnly unless the caller is an admin."""
    decision = current_decision(policy.ADMINS)
    if not current_caller().is_admin:
        raise AdminsOnly
    decision.allow()
