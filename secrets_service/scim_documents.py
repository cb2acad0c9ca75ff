"""Principals as documents that a PatchOp can change, and back; the types of what comes back are checked here.

What the values may be is checked where they are recorded, as for every other request.
"""

from __future__ import annotations

from typing import Any

from secrets_service.model import DetailedGroup, Email, GroupProfile, Profile, User
from secrets_service.scim_patch import Document, Shape
from servicekit.errors import InvalidParameter

_VALUE = frozenset({"value"})

USER = Shape(
    single=frozenset({"userName", "displayName", "active", "externalId"}),
    complex={"name": frozenset({"givenName", "familyName"})},
    multiple={"emails": frozenset({"type", "value", "primary"}), "roles": _VALUE, "entitlements": _VALUE},
)
SERVICE_PRINCIPAL = Shape(
    single=frozenset({"displayName", "active", "externalId"}),
    complex={},
    multiple={"roles": _VALUE, "entitlements": _VALUE},
)
GROUP = Shape(
    single=frozenset({"displayName", "externalId"}),
    complex={},
    multiple={"members": _VALUE, "roles": _VALUE, "entitlements": _VALUE},
)


def of_account(user: User) -> Document:
    """What can be changed about a user or service principal, and its name."""
    profile = user.profile
    return {
        "userName": profile.name,
        "displayName": profile.display_name,
        "active": profile.is_active,
        "externalId": profile.external_id,
        "name": {"givenName": profile.given_name, "familyName": profile.family_name},
        "emails": [{"type": each.type, "value": each.value, "primary": each.is_primary} for each in profile.emails],
        "roles": _objects(profile.roles),
        "entitlements": _objects(profile.entitlements),
    }


def account_profile(document: Document) -> Profile:
    """The profile in a document; raises InvalidParameter that names what has the wrong type."""
    name = document.get("name", {})
    return Profile(
        name=_text("userName", document.get("userName")),
        display_name=_text("displayName", document.get("displayName")),
        given_name=_text("name.givenName", name.get("givenName")),
        family_name=_text("name.familyName", name.get("familyName")),
        emails=tuple(
            Email(
                _text("emails.type", each.get("type")),
                _text("emails.value", each.get("value")),
                _flag("emails.primary", each.get("primary", False)),
            )
            for each in document.get("emails", [])
        ),
        # Widely used clients leave a false value out, so an operation on `active` without one means false.
        is_active=_flag("active", document.get("active", False)),
        roles=_values("roles", document),
        entitlements=_values("entitlements", document),
        external_id=_text("externalId", document.get("externalId")),
    )


def of_group(group: DetailedGroup) -> Document:
    """What can be changed about a group."""
    return {
        "displayName": group.name,
        "externalId": group.external_id,
        "members": _objects(tuple(str(member.id) for member in group.members)),
        "roles": _objects(group.roles),
        "entitlements": _objects(group.entitlements),
    }


def group_profile(document: Document) -> GroupProfile:
    """The profile in a document; raises InvalidParameter that names what has the wrong type."""
    return GroupProfile(
        name=_text("displayName", document.get("displayName")),
        members=_values("members", document),
        roles=_values("roles", document),
        entitlements=_values("entitlements", document),
        external_id=_text("externalId", document.get("externalId")),
    )


def _objects(values: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"value": value} for value in values]


def _values(name: str, document: Document) -> tuple[str, ...]:
    return tuple(_text(f"{name}.value", each.get("value")) for each in document.get(name, []))


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidParameter(f"{name}: expected a text.")
    return value


def _flag(name: str, value: Any) -> bool:
    """A boolean, which some clients write as a text."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise InvalidParameter(f"{name}: expected true or false.")
    return value
