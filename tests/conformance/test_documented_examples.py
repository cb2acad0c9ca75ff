"""The documented REST contract as data, sent to a live platform.

`cases/*.json` hold lists of cases; a case is a name and steps, each one request and what its answer must be:

  as          who sends it: admin (the default), alice, bob, nobody, `admin by Basic`, or a whole Authorization header
  method, path, and one of  body (JSON), raw (text), printed (a file with a body as the documentation prints it)
  send        further request headers
  status      200 when it is not given
  answer      what the body must hold (tests/support/matching.py); says: texts that its message must hold
  text        lines that the body must hold, which is plain text and no JSON; type: its media type, if not Prometheus's
  headers     what the answer's headers must hold
  eventually  true: the request is repeated until its answer is as expected
  keep        values of the answer to use in later steps, by path: {"id": "token_info.token_id"} makes `<id>`

In every text `<n>` is a number of the case's own, and what was kept stands as `<name>`. Large values are spelled
{"$repeat": [text, times]}, {"$list": [item, times]} and {"$numbered": [prefix, times]} (an object of numbered names).

Whatever is answered, wherever, must also keep the rules of `broken_rules`.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gateway.http_rules import bindings
from tessera.identity.v1 import identity_pb2, permissions_pb2
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2
from tests.conformance.conftest import Live
from tests.support.api import Answer, Api, until
from tests.support.matching import differences
from tests.support.registered_models import fingerprint

CASES = Path(__file__).parent / "cases"
EVENTUALLY_SECONDS = 60.0

RETRIED = re.compile(
    "Unexpected error|token bucket limit|Please try again later or try a faster|ClusterNotReady|worker env"
    "|Timed out after |deadline exceeded|UnknownWorkerEnvironment"
)
"""Phrases that make official clients repeat a request for minutes (contract 1.5)."""

STACK = re.compile(r"Traceback|\.py\b|line \d+, in ")
"""What a stack trace in a message would look like."""

_numbers = itertools.count(1)

Step = dict[str, Any]


def cases() -> list[tuple[str, list[Step]]]:
    return [
        (f"{file.stem}: {case['name']}", case["steps"])
        for file in sorted(CASES.glob("*.json"))
        for case in json.loads(file.read_text())
    ]


@pytest.mark.parametrize("steps", [pytest.param(steps, id=name) for name, steps in cases()])
def test_documented_example(live: Live, steps: list[Step]) -> None:
    number = str(next(_numbers))
    kept = {"n": number, "url": live.url, "workspace": live.workspace_id}
    for index, step in enumerate(steps):
        filled = _filled(step, kept)
        answer, wrong = _attempt(live, filled)
        if wrong and filled.get("eventually"):
            until(lambda step=filled: not _attempt(live, step)[1], within=EVENTUALLY_SECONDS, what=str(filled))  # type: ignore[misc]
            answer, wrong = _attempt(live, filled)
        assert not wrong, f"step {index + 1}, {filled['method']} {filled['path']}:\n" + "\n".join([*wrong, str(answer)])
        for name, path in step.get("keep", {}).items():
            kept[name] = _at(answer.json(), path)


def test_every_public_rpc_has_a_case_that_succeeds_and_one_that_is_refused() -> None:
    files = (identity_pb2.DESCRIPTOR, permissions_pb2.DESCRIPTOR, secrets_pb2.DESCRIPTOR, serving_pb2.DESCRIPTOR)
    table = bindings([service for file in files for service in file.services_by_name.values()])
    seen = set()
    for _, steps in cases():
        for step in steps:
            path = re.sub("<[a-z_]+>", "x", step["path"]).partition("?")[0]
            if found := table.match(step["method"], path):
                seen.add((found[0].method.full_name, step.get("status", 200) < 400))
    public = {binding.method.full_name for binding in table}
    assert public - {name for name, is_success in seen if is_success} == set()
    # These two have no parameter that could be wrong; what refuses them is the credential alone.
    unrefusable = {"tessera.identity.v1.Tokens.ListTokens", "tessera.serving.v1.ServingEndpoints.ListServingEndpoints"}
    assert public - {name for name, is_success in seen if not is_success} - unrefusable == set()


def test_bodies_are_those_of_the_documentation_page() -> None:
    """What the demo sends and what is sent here are the same text."""
    demo = Path(__file__).parents[2] / "tessera" / "cli" / "demo_bodies"
    printed = {file.name: file.read_text() for file in (CASES / "printed").glob("*.json")}
    assert printed == {file.name: file.read_text() for file in demo.glob("*.json")}
    used = {step["printed"] for _, steps in cases() for step in steps if "printed" in step}
    assert used == set(printed)


def _attempt(live: Live, step: Step) -> tuple[Answer, list[str]]:
    """One request and what is wrong with its answer."""
    answer = _sent(live, step)
    expected = step.get("status", 200)
    wrong = [] if answer.status == expected else [f"status: expected {expected}, found {answer.status}"]
    if "text" in step:
        lines = answer.body.decode().splitlines()
        wrong += [f"answer: has no line {line!r}" for line in step["text"] if line not in lines]
        media_type = step.get("type", "text/plain; version=0.0.4; charset=utf-8")
        return answer, wrong + broken_rules(live, answer, {}, "", content_type=media_type)
    try:
        document = answer.json()
    except ValueError:
        return answer, [*wrong, "answer: is no JSON"]
    wrong += differences(step.get("answer", {}), document)
    wrong += differences(step.get("headers", {}), answer.headers, "headers")
    message = str(document.get("message", document.get("detail", ""))) if isinstance(document, dict) else ""
    wrong += [f"message: does not say {text!r}" for text in step.get("says", ()) if text not in message]
    # Health is for machines that know no workspace.
    is_api = not step["path"].startswith("/health")
    return answer, wrong + (broken_rules(live, answer, document, message) if is_api else [])


def broken_rules(
    live: Live, answer: Answer, document: Any, message: str, *, content_type: str = "application/json"
) -> list[str]:
    """What no answer may be like, whatever was asked (contract 1.1 to 1.5)."""
    broken = []
    if answer.headers.get("content-type") != content_type:
        broken.append(f"content-type: {answer.headers.get('content-type')}")
    if answer.headers.get("x-databricks-org-id") != live.workspace_id:
        broken.append(f"x-databricks-org-id: {answer.headers.get('x-databricks-org-id')}")
    if not answer.headers.get("x-tessera-request-id"):
        broken.append("x-tessera-request-id: is missing")
    if not isinstance(document, dict):
        broken.append("answer: is no object")
    elif answer.status >= 400:
        envelopes: tuple[set[str], ...] = ({"error_code", "message"},)
        if "schemas" in document:
            envelopes = ({"schemas", "status", "detail"}, {"schemas", "status", "detail", "scimType"})
        if set(document) not in envelopes:
            broken.append(f"envelope: {sorted(document)}")
        if not message or STACK.search(message):
            broken.append(f"message: {message!r}")
        if RETRIED.search(message):
            broken.append("message: has a phrase that makes clients retry")
        is_limit = answer.status == 429 and document.get("error_code") == "REQUEST_LIMIT_EXCEEDED"
        if answer.status in (405, 415, 422, 429, 503) and not is_limit:
            broken.append(f"status: {answer.status} makes clients retry or is not documented")
    return broken


def _sent(live: Live, step: Step) -> Answer:
    who = step.get("as", "admin")
    headers = dict(step.get("send", {}))
    if who in live.people:
        api = live.people[who]
    else:
        api = Api(live.url, None)
        headers["authorization"] = _basic(live.admin) if who == "admin by Basic" else who
    raw = (CASES / "printed" / step["printed"]).read_text() if "printed" in step else step.get("raw", "")
    if "printed" in step:
        headers["content-type"] = "application/json"
    return api.send(step["method"], step["path"], step.get("body"), raw=raw.encode(), headers=headers)


def _basic(api: Api) -> str:
    return "Basic " + base64.b64encode(f"token:{api.token}".encode()).decode()


def _filled(value: Any, kept: dict[str, str]) -> Any:
    """A copy of a part of a case, with every placeholder filled in and every large value written out."""
    if isinstance(value, str):
        value = re.sub("<fingerprint of (.*?)>", lambda match: fingerprint(match[1]), value, flags=re.DOTALL)
        return re.sub("<([a-z_]+)>", lambda match: kept.get(match[1], match[0]), value)
    if isinstance(value, list):
        return [_filled(item, kept) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$repeat": [text, times]}:
            return text * times
        case {"$list": [item, times]}:
            return [_filled(item, kept)] * times
        case {"$numbered": [prefix, times]}:
            return {f"{prefix}{number}": "value" for number in range(times)}
    return {_filled(name, kept): _filled(item, kept) for name, item in value.items()}


def _at(document: Any, path: str) -> str:
    for name in path.split("."):
        document = document[name]
    assert isinstance(document, str)
    return document
