"""The description of an endpoint, read and followed by clients that know nothing else of its model."""

from __future__ import annotations

from typing import Any

import openapi_spec_validator
import pytest
from jsonschema import Draft202012Validator

from tests.conformance.conftest import DESCRIBED, Live
from tests.support.api import ENDPOINTS
from tests.support.json_bodies import bodies


@pytest.fixture(scope="module")
def document(live: Live) -> Any:
    return live.admin.call("GET", f"{ENDPOINTS}/{DESCRIBED}/openapi")


def test_the_description_is_valid(live: Live, document: Any) -> None:
    openapi_spec_validator.validate(document)
    assert document["info"]["title"] == DESCRIBED
    assert document["servers"] == [{"url": f"{live.url}/serving-endpoints/{DESCRIBED}"}]


def test_every_body_that_it_shows_is_answered_as_it_shows(live: Live, document: Any) -> None:
    ((path, item),) = document["paths"].items()
    at = document["servers"][0]["url"].removeprefix(live.url) + path
    content = item["post"]["requestBody"]["content"]["application/json"]["schema"]
    answered = item["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    made = bodies(content)
    assert {next(iter(body)) for body in made} == {"dataframe_split", "dataframe_records"}
    for body in made:
        answer = live.admin.send("POST", at, body)
        assert answer.status == 200, (body, answer)
        Draft202012Validator(answered).validate(answer.json())


def test_a_body_that_it_rules_out_is_refused_as_it_says(live: Live, document: Any) -> None:
    path, item = next(iter(document["paths"].items()))
    at = document["servers"][0]["url"].removeprefix(live.url) + path
    schema = item["post"]["requestBody"]["content"]["application/json"]["schema"]
    row = {"size": 1.5, "since": "2026-01-02T03:04:05", "counts": [1]}
    Draft202012Validator(schema).validate({"dataframe_records": [row]})
    for wrong in ({"since": "2026-01-02T03:04:05Z"}, {"size": "large"}, {"counts": 1}):
        body = {"dataframe_records": [row | wrong]}
        assert not Draft202012Validator(schema).is_valid(body)
        answer = live.admin.send("POST", at, body)
        assert answer.status == 400
        Draft202012Validator(document["components"]["schemas"]["Error"]).validate(answer.json())
