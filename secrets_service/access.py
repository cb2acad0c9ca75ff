"""Who may do what in a scope: pure functions over what was granted.

The rule: a principal has the strongest of what is granted to it and to its groups; admins have MANAGE everywhere.
Nothing granted is no permission.
"""

from __future__ import annotations

from secrets_service.model import Permission, Standing
from servicekit.context import ADMINS


def effective(standing: Standing) -> Permission | None:
    """The permission that a principal has in a scope; None when it has none."""
    if ADMINS in standing.groups:
        return Permission.MANAGE
    return max(standing.granted, default=None)


def allows(standing: Standing, needed: Permission) -> bool:
    """Whether a principal may do what needs a permission."""
    held = effective(standing)
    return held is not None and held >= needed
