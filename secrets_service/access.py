"""Who may do what in a scope and with an endpoint: pure functions over what was granted.

The rule: a principal has the strongest of what is granted to it and to its groups; admins have the highest everywhere.
Nothing granted is no permission.
"""

from __future__ import annotations

from collections.abc import Iterable

from secrets_service.model import Permission, Standing, User
from servicekit.context import ADMINS, Level


def effective(standing: Standing) -> Permission | None:
    """The permission that a principal has in a scope; None when it has none."""
    if ADMINS in standing.groups:
        return Permission.MANAGE
    return max(standing.granted, default=None)


def allows(standing: Standing, needed: Permission) -> bool:
    """Whether a principal may do what needs a permission."""
    held = effective(standing)
    return held is not None and held >= needed


def endpoint_level(user: User, granted: Iterable[Level]) -> Level | None:
    """The level that a user or service principal has on an endpoint; None when it has none."""
    return Level.CAN_MANAGE if user.is_admin else max(granted, default=None)
