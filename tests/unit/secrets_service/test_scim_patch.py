"""PatchOp on documents: every form of operation that clients send, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from secrets_service.errors import InvalidFilter, InvalidPath, NoTarget, NotChangeable
from secrets_service.scim_documents import GROUP, SERVICE_PRINCIPAL, USER, account_profile
from secrets_service.scim_patch import Operation, patched
from servicekit.errors import InvalidParameter

WORK = {"type": "work", "value": "ada@work", "primary": True}
HOME = {"type": "home", "value": "ada@home", "primary": False}
ADA = {
    "userName": "ada",
    "displayName": "Ada",
    "active": True,
    "externalId": "",
    "name": {"givenName": "Ada", "familyName": "L"},
    "emails": [WORK, HOME],
    "roles": [],
    "entitlements": [{"value": "workspace-access"}],
}
TEAM = {"displayName": "team", "externalId": "", "members": [{"value": "1"}, {"value": "2"}], "roles": []}


def change(document: dict[str, Any], op: str, path: str = "", value: Any = None) -> dict[str, Any]:
    """What differs after one operation."""
    shape = GROUP if document is TEAM else USER
    after = patched(document, [Operation(op, path, value)], shape)
    return {name: after.get(name) for name in {*after, *document} if after.get(name) != document.get(name)}


@pytest.mark.parametrize(
    ("op", "path", "value", "expected"),
    [
        ("replace", "displayName", "Countess", {"displayName": "Countess"}),
        ("Replace", "DISPLAYNAME", "Countess", {"displayName": "Countess"}),
        ("add", "displayName", "Countess", {"displayName": "Countess"}),
        ("remove", "displayName", None, {"displayName": None}),
        ("replace", "active", False, {"active": False}),
        ("replace", "name.givenName", "A", {"name": {"givenName": "A", "familyName": "L"}}),
        ("remove", "name.givenName", None, {"name": {"familyName": "L"}}),
        ("replace", "name", {"familyName": "K"}, {"name": {"givenName": "Ada", "familyName": "K"}}),
        ("remove", "name", None, {"name": None}),
        ("", "", {}, None),
        ("replace", "", {"name.givenName": "A"}, {"name": {"givenName": "A", "familyName": "L"}}),
        ("replace", "", {"active": False, "displayName": "A"}, {"active": False, "displayName": "A"}),
        ("add", "", {"id": "9", "schemas": [], "groups": [{"value": "1"}], "nickName": "x"}, {}),
        ("add", "entitlements", [{"value": "b"}], {"entitlements": [{"value": "workspace-access"}, {"value": "b"}]}),
        ("add", "entitlements", {"value": "workspace-access"}, {}),
        ("add", "entitlements", "b", {"entitlements": [{"value": "workspace-access"}, {"value": "b"}]}),
        ("replace", "entitlements", [{"value": "b", "display": "ignored"}], {"entitlements": [{"value": "b"}]}),
        ("replace", "entitlements", None, {"entitlements": []}),
        ("remove", "entitlements", None, {"entitlements": []}),
        ("remove", "entitlements", [{"value": "workspace-access"}], {"entitlements": []}),
        ("remove", 'entitlements[value eq "workspace-access"]', None, {"entitlements": []}),
        ("remove", 'entitlements[value eq "absent"]', None, {}),
        ("replace", 'emails[type eq "home"].value', "x@y", {"emails": [WORK, {**HOME, "value": "x@y"}]}),
        ("replace", 'emails[primary eq "true"]', {"value": "x@y"}, {"emails": [{**WORK, "value": "x@y"}, HOME]}),
        ("remove", 'emails[value sw "ada@"]', None, {"emails": []}),
    ],
)  # fmt: skip
def test_operation_changes_what_it_names_and_nothing_else(
    op: str, path: str, value: Any, expected: dict[str, Any] | None
) -> None:
    if expected is None:
        with pytest.raises(InvalidParameter, match=r"Operations\.op"):
            change(ADA, op, path, value)
    else:
        assert change(ADA, op, path, value) == expected


@pytest.mark.parametrize(
    ("op", "path", "value", "expected"),
    [
        ("add", "members", [{"value": "3"}, {"value": "1"}], ["2", "3", "1"]),
        ("add", "members", [{"value": 3.0}], ["1", "2", "3"]),
        ("add", "", {"members": [{"value": "3"}]}, ["1", "2", "3"]),
        ("replace", "members", [{"value": "3", "display": "x", "$ref": "y"}], ["3"]),
        ("replace", "members", [], []),
        ("remove", "members", None, []),
        ("remove", "members", [{"value": "1"}], ["2"]),
        ("remove", 'members[value eq "1"]', None, ["2"]),
        ("remove", 'members[value eq "1" or value eq "2"]', None, []),
        ("remove", 'members[value eq "3"]', None, ["1", "2"]),
    ],
)
def test_members_are_added_replaced_and_removed(op: str, path: str, value: Any, expected: list[str]) -> None:
    after = patched(TEAM, [Operation(op, path, value)], GROUP)
    assert [member["value"] for member in after["members"]] == expected


@pytest.mark.parametrize(
    ("op", "path", "value", "error"),
    [
        ("replace", "nickName", "x", InvalidPath),
        ("replace", "members", [], InvalidPath),
        ("replace", "name.middleName", "x", InvalidPath),
        ("replace", "displayName.x", "x", InvalidPath),
        ("replace", "emails.value", "x", InvalidPath),
        ("replace", 'displayName[value eq "x"]', "x", InvalidPath),
        ("replace", "emails[", "x", InvalidPath),
        ("replace", "", {"name.middleName": "x"}, InvalidPath),
        ("replace", 'emails[kind eq "x"].value', "x", InvalidFilter),
        ("replace", "emails[].value", "x", InvalidFilter),
        ("replace", 'emails[type eq "absent"].value', "x", NoTarget),
        ("remove", "", None, NoTarget),
        ("replace", "id", "9", NotChangeable),
        ("add", "groups", [], NotChangeable),
        ("replace", "applicationId", "x", NotChangeable),
        ("replace", "name", "x", InvalidParameter),
        ("replace", "emails", [{"type": "work"}], InvalidParameter),
        ("replace", "emails", [3], InvalidParameter),
        ("replace", "", "x", InvalidParameter),
        ("move", "displayName", "x", InvalidParameter),
    ],
)
def test_operation_that_cannot_be_done_is_refused(op: str, path: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        patched(ADA, [Operation(op, path, value)], USER)
    assert type(caught.value) is error


def test_document_that_was_given_stays_as_it_was() -> None:
    before = repr(ADA)
    patched(ADA, [Operation("replace", 'emails[type eq "work"].value', "x"), Operation("remove", "name", None)], USER)
    assert repr(ADA) == before


def test_service_principal_has_no_name_of_a_person() -> None:
    with pytest.raises(InvalidPath):
        patched(ADA, [Operation("replace", "userName", "x")], SERVICE_PRINCIPAL)


def test_number_of_operations_is_limited() -> None:
    for number in (0, 101):
        with pytest.raises(InvalidParameter, match="Operations: 1 to 100"):
            patched(ADA, [Operation("replace", "displayName", "x")] * number, USER)
    patched(ADA, [Operation("replace", "displayName", "x")] * 100, USER)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("displayName", {"displayName": 3}),
        ("active", {"active": "perhaps"}),
        ("active", {"active": None}),
        ("name.givenName", {"name": {"givenName": []}}),
        ("emails.value", {"emails": [{"value": 3}]}),
        ("emails.primary", {"emails": [{"value": "x", "primary": 1}]}),
        ("roles.value", {"roles": [{"value": True}]}),
    ],
)
def test_value_of_the_wrong_type_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=f"^{field}: "):
        account_profile({**ADA, **changes})


def test_active_without_a_value_is_false_because_clients_leave_a_false_out() -> None:
    assert not account_profile(patched(ADA, [Operation("replace", "active", None)], USER)).is_active


def test_flag_may_be_written_as_a_text() -> None:
    assert not account_profile({**ADA, "active": "False"}).is_active
