"""A request that is retried under its id over REST: done once, whatever was killed before its answer came."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.api import SECRETS, Answer, Api, until
from tests.support.stack import Stack, running_stack

TOKENS = "/api/2.0/token"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        yield running


@pytest.fixture(scope="module")
def api(stack: Stack) -> Api:
    return Api(stack.url, stack.token)


def post(api: Api, path: str, request_id: str, body: Any) -> Answer:
    return api.send("POST", path, body, headers={"x-tessera-request-id": request_id})


def kill_secrets(stack: Stack) -> None:
    """Kills Secrets and returns when its successor runs."""
    before = stack.pids()["secrets"]
    os.kill(before, signal.SIGKILL)
    until(lambda: stack.pids().get("secrets", before) != before, within=20, what="a new Secrets")


def tokens(api: Api, comment: str) -> list[str]:
    listed = api.call("GET", f"{TOKENS}/list").get("token_infos", [])
    return [token["token_id"] for token in listed if token["comment"] == comment]


def retried(api: Api, path: str, request_id: str, body: Any) -> Answer:
    """The first answer that is neither an interruption nor a wish for a retry, as a client would get it."""
    answers: list[Answer] = []

    def is_answered() -> bool:
        try:
            answers.append(post(api, path, request_id, body))
        except (OSError, http.client.HTTPException):
            return False
        return answers[-1].status not in (503, 504)

    until(is_answered, within=30, what=f"an answer to {path}")
    return answers[-1]


def test_retry_over_rest_has_one_effect_and_the_same_body(api: Api) -> None:
    created = [post(api, f"{SECRETS}/scopes/create", "create-1", {"scope": "shop"}) for _ in range(2)]
    assert [(answer.status, answer.body) for answer in created] == [(200, b"{}")] * 2
    assert {answer.headers["x-tessera-request-id"] for answer in created} == {"create-1"}
    again = post(api, f"{SECRETS}/scopes/create", "create-2", {"scope": "shop"})
    assert (again.status, again.json()["error_code"]) == (400, "RESOURCE_ALREADY_EXISTS")
    other = post(api, f"{SECRETS}/scopes/create", "create-1", {"scope": "other"})
    assert (other.status, other.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert "X-Tessera-Request-Id" in other.json()["message"]

    user = {"userName": "retried@example.com"}
    people = [post(api, "/api/2.0/preview/scim/v2/Users", "user-1", user) for _ in range(2)]
    assert [answer.status for answer in people] == [201, 201]
    assert people[0].body == people[1].body

    put = {"scope": "shop", "key": "key", "string_value": "ends with white space "}
    warned = [post(api, f"{SECRETS}/put", "put-1", put).headers["x-tessera-warning"] for _ in range(2)]
    assert warned[0] == warned[1]


def test_retry_after_secrets_was_killed_gives_the_first_answer(stack: Stack, api: Api) -> None:
    body = {"comment": "before the kill"}
    first = post(api, f"{TOKENS}/create", "token-1", body)
    assert first.status == 200
    kill_secrets(stack)
    again = retried(api, f"{TOKENS}/create", "token-1", body)
    assert (again.status, again.body) == (200, first.body)
    assert tokens(api, body["comment"]) == [first.json()["token_info"]["token_id"]]


@pytest.mark.parametrize("seconds", [0.0, 0.002, 0.005, 0.01, 0.02])
def test_change_is_made_once_when_secrets_is_killed_at_any_moment_of_it(stack: Stack, api: Api, seconds: float) -> None:
    body = {"comment": f"killed after {seconds} s"}
    request_id = f"killed-{seconds}"
    sending = threading.Thread(target=retried, args=(api, f"{TOKENS}/create", request_id, body))
    sending.start()
    time.sleep(seconds)  # the moment is the case, nothing is waited for
    kill_secrets(stack)
    sending.join(60)
    assert not sending.is_alive()
    made = retried(api, f"{TOKENS}/create", request_id, body)
    assert made.status == 200
    assert tokens(api, body["comment"]) == [made.json()["token_info"]["token_id"]]
