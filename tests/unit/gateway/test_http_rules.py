"""Routes: which request means which RPC, and which annotations are refused at the start."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.http_rules import RouteTable, bindings
from tests.support.descriptors import ProtoFile, service


def table(*rules: dict[str, str] | list[dict[str, str]], **options: Any) -> RouteTable:
    """A table of RPCs R0, R1, ... with one rule (or list of rules) each."""
    file = ProtoFile()
    file.message("Inner", "string text")
    file.message("Request", "string name", "string other", "Inner inner", "repeated string words")
    for number, rule in enumerate(rules):
        http = rule if isinstance(rule, list) else [rule]
        file.rpc("Service", f"R{number}", "Request", "Inner", http=http, **options)
    return bindings([file.build().services_by_name["Service"]])


def found(routes: RouteTable, verb: str, path: str) -> tuple[str, dict[str, str]] | None:
    match = routes.match(verb, path)
    return None if match is None else (match[0].method.name, match[1])


@pytest.fixture(scope="module")
def routes() -> RouteTable:
    return table(
        {"get": "/api/endpoints/{name}"},
        {"post": "/api/endpoints/pt", "body": "*"},
        {"put": "/api/endpoints/{name}/config", "body": "*"},
        {"put": "/api/endpoints/pt/{name}/config", "body": "*"},
        {"post": "/api/endpoints/{name}/config:stop"},
        {"post": "/api/endpoints/{name}:undelete"},
        {"post": "/api/endpoints/{name}"},
        [{"patch": "/api/a/{name}"}, {"put": "/api/a/{name}", "body": "inner"}, {"delete": "/api/b/{other}/{name}"}],
        {"get": "/api/endpoints"},
    )


@pytest.mark.parametrize(
    ("verb", "path", "expected"),
    [
        ("GET", "/api/endpoints", ("R8", {})),
        ("GET", "/api/endpoints/", ("R8", {})),
        ("GET", "/api/endpoints/x", ("R0", {"name": "x"})),
        ("GET", "/api/endpoints/x/", ("R0", {"name": "x"})),
        ("GET", "/api/endpoints/pt", ("R0", {"name": "pt"})),
        ("POST", "/api/endpoints/pt", ("R1", {})),
        ("PUT", "/api/endpoints/x/config", ("R2", {"name": "x"})),
        ("PUT", "/api/endpoints/pt/config", ("R2", {"name": "pt"})),
        ("PUT", "/api/endpoints/pt/x/config", ("R3", {"name": "x"})),
        ("POST", "/api/endpoints/x/config:stop", ("R4", {"name": "x"})),
        ("POST", "/api/endpoints/x:undelete", ("R5", {"name": "x"})),
        ("POST", "/api/endpoints/x:y:undelete", ("R5", {"name": "x:y"})),
        ("POST", "/api/endpoints/:undelete", ("R6", {"name": ":undelete"})),
        ("POST", "/api/endpoints/a:b", ("R6", {"name": "a:b"})),
        ("GET", "/api/endpoints/a%3Ab", ("R0", {"name": "a:b"})),
        ("GET", "/api/endpoints/gr%C3%BCn%20%25", ("R0", {"name": "grün %"})),
        ("GET", "/api/%65ndpoints/x", ("R0", {"name": "x"})),
        ("PATCH", "/api/a/1", ("R7", {"name": "1"})),
        ("PUT", "/api/a/1", ("R7", {"name": "1"})),
        ("DELETE", "/api/b/1/2", ("R7", {"other": "1", "name": "2"})),
    ],
)
def test_request_finds_its_rpc(routes: RouteTable, verb: str, path: str, expected: tuple[str, dict[str, str]]) -> None:
    assert found(routes, verb, path) == expected


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("GET", "/"),
        ("GET", ""),
        ("GET", "api/endpoints"),
        ("GET", "/api/endpoints//"),
        ("GET", "//api/endpoints"),
        ("GET", "/api//endpoints"),
        ("GET", "/api/endpoints/."),
        ("GET", "/api/endpoints/%2e%2E"),
        ("GET", "/api/endpoints/../endpoints"),
        ("GET", "/api/endpoints%2Fx"),
        ("GET", "/api/endpoints/x%2fy"),
        ("GET", "/api/endpoints/%ff"),
        ("GET", "/api/endpoints/\xe9"),
        ("GET", "/api/endpoints/x/y"),
        ("GET", "/API/endpoints"),
        ("HEAD", "/api/endpoints"),
        ("get", "/api/endpoints"),
        ("DELETE", "/api/endpoints/x"),
    ],
)
def test_request_without_a_canonical_route_finds_nothing(routes: RouteTable, verb: str, path: str) -> None:
    assert found(routes, verb, path) is None


def test_literals_win_whatever_the_order_of_declaration() -> None:
    rules = [{"get": "/{name}/{other}"}, {"get": "/{name}/b"}, {"get": "/a/{other}"}, {"get": "/a/b"}]
    for order in (rules, rules[::-1]):
        routes = table(*order)
        winners = [routes.match("GET", path) for path in ("/a/b", "/a/x", "/x/b", "/x/x")]
        assert [match[0].template for match in winners if match] == [
            "/a/b",
            "/a/{other}",
            "/{name}/b",
            "/{name}/{other}",
        ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"get": "/a/b"}, {"get": "/a/b"}),
        ({"get": "/a/{name}"}, {"get": "/a/{other}"}),
        ({"get": "/a/{name}:stop"}, {"get": "/a/{other}:stop"}),
    ],
)
def test_two_rpcs_with_one_route_are_refused_with_both_names(first: dict[str, str], second: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"\.Service\.R0 and .*\.Service\.R1 both claim GET /a/"):
        table(first, second)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"get": "/a/{missing}"}, "names missing, which is no single value"),
        ({"get": "/a/{words}"}, "names words, which is no single value"),
        ({"get": "/a/{inner}"}, "names inner, which is no single value"),
        ({"get": "/a/{inner.text}"}, "is neither a literal nor a {field}"),
        ({"get": "/a/{name=**}"}, "is neither a literal nor a {field}"),
        ({"get": "/a/*"}, "is neither a literal nor a {field}"),
        ({"get": "/a//b"}, "is neither a literal nor a {field}"),
        ({"get": "/a/"}, "must begin with a slash and not end with one"),
        ({"get": "a"}, "must begin with a slash and not end with one"),
        ({"put": "/a", "body": "missing"}, "the body missing is no message field"),
        ({"put": "/a", "body": "words"}, "the body words is no message field"),
        ({"put": "/a", "body": "name"}, "the body name is no message field"),
        ({"put": "/{name}/{name}"}, "fills one field twice"),
        ({"body": "*"}, "needs one of get, put, post, delete and patch"),
        ({"get": "/a", "response_body": "text"}, "and no response_body"),
    ],
)
def test_rule_that_cannot_work_is_refused_by_rpc_name(rule: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=r"RPC tessera\.testing\.v\d+\.Service\.R0") as caught:
        table(rule)
    assert words in str(caught.value)


def test_stream_of_messages_with_a_route_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only answers that are pieces of google\.api\.HttpBody have a REST form"):
        table({"get": "/a"}, streaming=True)


def test_what_an_answer_of_bytes_is_must_be_said_and_of_no_other() -> None:
    with pytest.raises(ValueError, match=r"HttpBody and the option answers_with belong together"):
        table({"get": "/a"}, answers_with="text/plain")
    assert [binding.media_type for binding in table({"get": "/a"})] == [""]


def test_rpc_that_does_not_say_who_may_reach_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"R0 needs exactly one of"):
        table([])


def test_only_rest_rpcs_have_routes_and_only_scim_creations_answer_201() -> None:
    routes = bindings([service("Library"), service("People")])
    statuses = {binding.method.name: binding.success_status for binding in routes}
    assert statuses == {"Create": 200, "Get": 200, "Put": 200, "PutItem": 200, "Delete": 200, "Print": 200} | {
        "CreatePerson": 201,
        "GetPerson": 200,
    }
