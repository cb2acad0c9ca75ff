"""Filters: what parses, and that database and plain Python agree about whom a filter means."""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from secrets_service import directory_store, names, scim_filter
from secrets_service.directory_store import FILTERED, SORTED, Selection
from secrets_service.errors import InvalidFilter
from secrets_service.model import Email, Kind, Profile
from secrets_service.scim_filter import AllOf, AnyOf, Comparison, Operator
from servicekit.storage import Connection
from tests.support.stores import a_store

ATTRIBUTES = FILTERED[Kind.USER]

Tree = tuple[str, Any, Any]
"""("and" or "or", left, right), or (operator, attribute, text)."""


def page(connection: Connection, **wanted: Any) -> list[int]:
    defaults: dict[str, Any] = {"filter": None, "sort_by": "", "is_descending": False, "start": 1, "count": 1000}
    found = directory_store.account_page(connection, Kind.USER, Selection(**{**defaults, **wanted}))
    return [user.id for user in found.items]


# --- a model that shares nothing with the code but the fold of a name ---


def plain(profile: Profile, user_id: int, attribute: str) -> list[str]:
    return {
        "id": [str(user_id)],
        "userName": [profile.name],
        "displayName": [profile.display_name],
        "externalId": [profile.external_id],
        "active": ["true" if profile.is_active else "false"],
        "name.givenName": [profile.given_name],
        "name.familyName": [profile.family_name],
        "emails.value": [email.value for email in profile.emails],
    }[attribute]


def fold(text: str) -> str:
    return unicodedata.normalize("NFC", text.casefold())


def is_meant(tree: Tree, profile: Profile, user_id: int) -> bool:
    word, left, right = tree
    if word == "and":
        return is_meant(left, profile, user_id) and is_meant(right, profile, user_id)
    if word == "or":
        return is_meant(left, profile, user_id) or is_meant(right, profile, user_id)
    values, sought = [fold(value) for value in plain(profile, user_id, left)], fold(right)
    if word == "eq":
        return sought in values
    if word == "ne":
        return sought not in values
    return any(sought in value if word == "co" else value[: len(sought)] == sought for value in values)


def spelled(tree: Tree, *, inside: str = "") -> str:
    """The tree as a filter, with no more parentheses than it needs."""
    word, left, right = tree
    if word in ("and", "or"):
        text = f"{spelled(left, inside=word)} {word} {spelled(right, inside=word)}"
        return f"({text})" if word == "or" and inside == "and" else text
    return f"{left} {word} {json.dumps(right)}"


TEXTS = st.text(alphabet="aAbB%_'\"\\ ßẞſſkKéÉ\u0301", max_size=4)
PROFILES = st.builds(
    Profile,
    name=TEXTS,
    display_name=TEXTS,
    given_name=TEXTS,
    family_name=TEXTS,
    external_id=TEXTS,
    is_active=st.booleans(),
    emails=st.lists(st.builds(Email, st.just("work"), TEXTS, st.booleans()), max_size=2).map(tuple),
)
COMPARISONS = st.one_of(
    st.tuples(
        st.sampled_from(["eq", "ne", "co", "sw"]), st.sampled_from([a for a in ATTRIBUTES if a != "active"]), TEXTS
    ),
    st.tuples(st.sampled_from(["eq", "ne"]), st.just("active"), st.sampled_from(["true", "FALSE"])),
)
TREES: st.SearchStrategy[Tree] = st.recursive(
    COMPARISONS, lambda tree: st.tuples(st.sampled_from(["and", "or"]), tree, tree), max_leaves=6
)


@given(profiles=st.lists(PROFILES, min_size=1, max_size=6, unique_by=lambda profile: fold(profile.name)), tree=TREES)
@example(profiles=[Profile(name="a")], tree=("co", "emails.value", ""))
@example(profiles=[Profile(name="100%"), Profile(name="100x")], tree=("sw", "userName", "100%"))
def test_database_finds_exactly_whom_the_filter_means(profiles: Sequence[Profile], tree: Tree) -> None:
    with a_store() as connection:
        users = [
            directory_store.insert_account(connection, each, folded=names.folded_principal(each.name), groups=[])
            for each in profiles
        ]
        parsed = scim_filter.parse(spelled(tree), ATTRIBUTES)
        expected = [user.id for user in users if is_meant(tree, user.profile, user.id)]
        assert page(connection, filter=parsed) == expected
        alone = [
            user.id
            for user in users
            if scim_filter.matches(parsed, lambda name, u=user: plain(u.profile, u.id, name))  # type: ignore[misc]
        ]
        assert alone == expected


@given(
    profiles=st.lists(PROFILES, min_size=1, max_size=6, unique_by=lambda profile: fold(profile.name)), data=st.data()
)
def test_pages_are_the_sorted_whole_cut_into_pieces(profiles: Sequence[Profile], data: st.DataObject) -> None:
    attribute = data.draw(st.sampled_from(SORTED[Kind.USER]))
    is_descending = data.draw(st.booleans())
    count = data.draw(st.integers(1, 4))
    with a_store() as connection:
        users = [
            directory_store.insert_account(connection, each, folded=names.folded_principal(each.name), groups=[])
            for each in profiles
        ]
        whole = sorted(
            users, key=lambda user: fold(plain(user.profile, user.id, attribute)[0]).encode(), reverse=is_descending
        )
        if is_descending:  # equals stay in the order of their creation
            whole = sorted(users, key=lambda user: user.id)
            whole.sort(key=lambda user: fold(plain(user.profile, user.id, attribute)[0]).encode(), reverse=True)
        pieces = [
            each
            for start in range(1, len(users) + 2, count)
            for each in page(connection, sort_by=attribute, is_descending=is_descending, start=start, count=count)
        ]
        assert pieces == [user.id for user in whole]


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused_as_a_filter(text: str) -> None:
    with contextlib.suppress(InvalidFilter):
        scim_filter.parse(text, ATTRIBUTES)


@given(st.lists(st.sampled_from(["(", ")", "and", "or", "id", "eq", '"1"', "true", "active", " "]), max_size=12))
def test_any_words_parse_or_are_refused_as_a_filter(words: list[str]) -> None:
    with contextlib.suppress(InvalidFilter):
        scim_filter.parse(" ".join(words), ATTRIBUTES)


def a_comparison(text: str) -> Comparison:
    return Comparison("id", Operator.EQ, text)


def test_and_binds_closer_than_or_and_parentheses_closest() -> None:
    one, two, three = map(a_comparison, "123")
    assert scim_filter.parse('id eq "1" or id eq "2" and id eq "3"', ["id"]) == AnyOf((one, AllOf((two, three))))
    assert scim_filter.parse('(id eq "1" OR ID EQ "2") AND id eq "3"', ["id"]) == AllOf((AnyOf((one, two)), three))


def test_filter_at_its_bounds_is_taken_and_one_step_further_refused() -> None:
    one = 'id eq "1"'
    for within, beyond in (
        (" or ".join([one] * 50), " or ".join([one] * 51)),
        ("(" * 10 + one + ")" * 10, "(" * 11 + one + ")" * 11),
        (f'id eq "{"x" * (4096 - 8)}"', f'id eq "{"x" * (4096 - 7)}"'),
    ):
        scim_filter.parse(within, ["id"])
        with pytest.raises(InvalidFilter):
            scim_filter.parse(beyond, ["id"])


def test_parentheses_beside_each_other_are_not_deep() -> None:
    scim_filter.parse(" or ".join(['(id eq "1")'] * 50), ["id"])
