"""The API's description against the API: its examples do what they show, and requests made from it are answered as it
says, whatever is in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import hypothesis
import openapi_spec_validator
import pytest
import schemathesis
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.openapi.document import examples
from tests.support.api import ENDPOINTS, SECRETS, Answer, Api
from tests.support.registered_models import stack_environment
from tests.support.stack import running_stack

EVENTUALLY_SECONDS = 60.0
REQUESTS_PER_OPERATION = 12

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

OF_THE_PLATFORM = frozenset(
    (
        *("id", "$ref", "logs", "token_id", "token_value", "detail", "object_id", "applicationId", "secret"),
        *("secret_hash", "issuer", "authorization_endpoint", "token_endpoint", "create_time", "update_time"),
        "expire_time",
        *("creation_time", "expiry_time", "creation_timestamp", "last_updated_timestamp", "start_time"),
        *("replica_id", "duration_ms"),
    )
)
"""Fields whose values differ from platform to platform, and SCIM's words for people, which no document fixes."""


@pytest.fixture(scope="module")
def admin() -> Iterator[Api]:
    with running_stack(environment=stack_environment()) as stack:
        yield Api(stack.url, stack.token)


@pytest.fixture(scope="module")
def user(admin: Api) -> Api:
    return admin.new_user("anybody@example.com")


@pytest.fixture(scope="module")
def document(admin: Api) -> Any:
    return admin.call("GET", "/api/openapi.json")


def test_document_is_valid_openapi(document: Any) -> None:
    openapi_spec_validator.validate(document)


def test_document_needs_a_credential(admin: Api) -> None:
    status, reason, _ = Api(admin.url, None).refused("GET", "/api/openapi.json")
    assert (status, reason) == (401, "UNAUTHENTICATED")


def test_document_names_the_server_by_its_own_setting(admin: Api, document: Any) -> None:
    again = admin.send("GET", "/api/openapi.json", headers={"host": "evil.example.com"}).json()
    assert again["servers"] == document["servers"] == [{"url": admin.url}]


def test_every_example_is_answered_as_it_shows(admin: Api, document: Any) -> None:
    """In the order of the file: later examples use what earlier ones made."""
    operations = _operations(document)
    known: dict[str, str] = {}
    for example in examples():
        method, path, operation = operations[example["operation"]]
        parameters = _filled(example.get("parameters", {}), known)
        query = {}
        for parameter in operation.get("parameters", ()):
            name = parameter["name"]
            if name in parameters and parameter["in"] == "query":
                query[name] = parameters[name]
            elif parameter["in"] == "path":
                path = path.replace(f"{{{name}}}", quote(str(parameters[name]), safe=""))
        target = f"{path}?{urlencode(query)}" if query else path
        body = _filled(example["body"], known) if "body" in example else None
        is_repeatable = method == "GET" or example["operation"].startswith("Inference.")
        deadline = time.monotonic() + (EVENTUALLY_SECONDS if is_repeatable else 0)
        while wrong := _wrong(example, answer := admin.send(method, target, body)):
            assert time.monotonic() < deadline, f"{example['operation']}, {example['name']}: {wrong}\n{answer}"
            time.sleep(0.05)
        _learn(example["answer"], answer.json(), known)


def test_every_example_of_the_document_is_one_that_is_sent(document: Any) -> None:
    sent = {(example["operation"], example["name"]) for example in examples()}
    shown = {
        (identifier, name)
        for identifier, (*_, operation) in _operations(document).items()
        for name in _named(operation)
    }
    assert shown == sent


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
def test_no_request_meets_an_undocumented_answer(user: Api, document: Any, mode: GenerationMode) -> None:
    """No 5xx, and no status, type or shape that the document does not name; the same requests in every run."""
    names = _names()
    broken = []
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        # Some of it may have been deleted by the requests before.
        user.send("POST", f"{SECRETS}/scopes/create", {"scope": names["scope"]})
        user.send("POST", f"{SECRETS}/put", {"scope": names["scope"], "key": names["key"], "string_value": "v"})
        user.send("POST", ENDPOINTS, {"name": names["name"]})
        found_endpoint = user.send("GET", f"{ENDPOINTS}/{names['name']}").json()
        names["serving_endpoint_id"] = found_endpoint.get("id", names["serving_endpoint_id"])
        try:
            _fuzz(operation, mode, user, names)
        except Unsatisfiable:
            # Where everything is welcome, nothing does not fit.
            assert mode is GenerationMode.NEGATIVE, f"nothing fits {operation.label}"
        except (AssertionError, BaseExceptionGroup) as error:
            broken.append(f"{operation.label}: {error}")
    assert not broken, "\n".join(broken)


def _fuzz(operation: Any, mode: GenerationMode, user: Api, names: dict[str, str]) -> None:
    """Sends bounded numbers of requests, every other one about things that exist."""

    @hypothesis.settings(
        max_examples=REQUESTS_PER_OPERATION,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), is_about_known_things=st.booleans())
    def send(case: Any, is_about_known_things: bool) -> None:
        if is_about_known_things:
            for place in (case.path_parameters, case.query, case.body):
                if isinstance(place, dict):
                    place.update({name: names[name] for name in place.keys() & names.keys()})
        response = case.call(base_url=user.url, headers={"Authorization": f"Bearer {user.token}"})
        case.validate_response(response, checks=CHECKS)
        assert "x-tessera-request-id" in response.headers

    send()


def _names() -> dict[str, str]:
    """The text that the examples first give for each parameter and for each field of a body."""
    names: dict[str, str] = {}
    for example in examples():
        for name, value in {**example.get("parameters", {}), **example.get("body", {})}.items():
            if isinstance(value, str):
                names.setdefault(name, value)
    return names


def _operations(document: Any) -> dict[str, tuple[str, str, Any]]:
    """Method, path and operation by operation id."""
    return {
        operation["operationId"]: (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def _named(node: Any) -> set[str]:
    """The names of all examples below a node of the document."""
    if isinstance(node, list):
        return set().union(*map(_named, node))
    if not isinstance(node, dict):
        return set()
    own = set(node["examples"]) if isinstance(node.get("examples"), dict) else set()
    return own.union(*(_named(child) for name, child in node.items() if name != "examples"))


def _filled(value: Any, known: dict[str, str]) -> Any:
    """A value of an example with what this platform has in place of it."""
    match value:
        case dict():
            return {name: _filled(item, known) for name, item in value.items()}
        case list():
            return [_filled(item, known) for item in value]
        case str():
            return known.get(value, value)
        case _:
            return value


def _wrong(example: dict[str, Any], answer: Answer) -> str:
    """What of an answer is not as the example shows it; more may be there than is shown."""
    if answer.status != example.get("status", 200):
        return f"status {answer.status}"
    return _difference(example["answer"], answer.json(), "answer")


def _difference(shown: Any, found: Any, at: str) -> str:
    if type(shown) is not type(found):
        return f"{at} is {found!r}"
    if isinstance(shown, dict):
        if missing := shown.keys() - found.keys():
            return f"{at} lacks {missing}"
        inner = [(shown[name], found[name], f"{at}.{name}") for name in shown if name not in OF_THE_PLATFORM]
        return next(filter(None, (_difference(*one) for one in inner)), "")
    if isinstance(shown, list):
        if len(shown) != len(found):
            return f"{at} has {len(found)} items"
        return next(filter(None, (_difference(*one, f"{at}[]") for one in zip(shown, found, strict=True))), "")
    return "" if shown == found else f"{at} is {found!r}"


def _learn(shown: Any, found: Any, known: dict[str, str]) -> None:
    """Notes which value of this platform stands for which of the examples."""
    if isinstance(shown, dict):
        for name in shown:
            _learn(shown[name], found[name], known)
    elif isinstance(shown, list):
        for one, other in zip(shown, found, strict=True):
            _learn(one, other, known)
    elif isinstance(shown, str):
        known[shown] = found
