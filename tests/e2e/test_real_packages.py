"""Models that were logged with packages from the real index, deployed as their authors would: built once, and a chain
of LangChain with a key from a secret. Takes minutes and the network, and prints how long each deployment took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest

from tests.support.api import Api, until
from tests.support.author import (
    CHAIN_MODEL,
    PANDAS,
    VERSIONED_MODEL,
    Author,
    IndexAwayError,
    author,
    index_variables,
)
from tests.support.provider import WORDS, Provider, running_provider
from tests.support.registered_models import entity
from tests.support.sockets import short_directory
from tests.support.stack import Stack, running_stack
from tests.support.wheels import variables_file

pytestmark = pytest.mark.long

KEY = "sk-of-the-provider-8d20aa"
DEPLOY_SECONDS = 900.0


@pytest.fixture(scope="module")
def made() -> Iterator[Author]:
    with short_directory() as folder:
        try:
            yield author(folder)
        except IndexAwayError as error:
            pytest.skip(f"needs the package index: {error}")


@pytest.fixture(scope="module")
def stack(made: Author) -> Iterator[Stack]:
    file = variables_file(made.folder / "helpers.env", index_variables())
    variables = {"TESSERA_MODEL_REGISTRY": made.registry_uri, "TESSERA_REGISTRY_ENV_FILE": str(file)}
    with running_stack(environment=variables) as running:
        yield running


@pytest.fixture(scope="module")
def api(stack: Stack) -> Api:
    api = Api(stack.url, stack.token)
    api.create_scope("provider")
    api.put_secret("provider", "key", KEY)
    return api


def timed(what: str, step: Callable[[], Any]) -> None:
    """Takes a step, and prints how long that took."""
    began = time.monotonic()
    step()
    sys.stdout.write(f"\n{what}: {time.monotonic() - began:.2f} s")


def environments(stack: Stack) -> dict[str, int]:
    """The environments of a platform, and when each came about."""
    folder = stack.data_dir / "serving" / "environments"
    return {path.name: path.lstat().st_ctime_ns for path in folder.iterdir()}


def answers(api: Api, name: str, *rows: dict[str, str]) -> Any:
    """What a model predicts."""
    path = f"/serving-endpoints/{name}/invocations"
    return api.call("POST", path, {"dataframe_records": list(rows)})["predictions"]


def test_a_model_runs_with_the_pandas_it_was_logged_with_which_is_fetched_once(stack: Stack, api: Api) -> None:
    assert pd.__version__ != PANDAS
    served = entity("1", name="one", model=VERSIONED_MODEL)
    began = time.monotonic()
    api.create_endpoint("first", served)
    read: list[str] = []

    def is_being_built() -> bool:
        read.append(api.build_logs("first", "one"))
        return "Resolving" in read[-1] and "Built environment" not in read[-1]

    until(is_being_built, within=60, what="the build log is read while the environment is built")
    assert api.endpoint("first")["state"]["config_update"] == "IN_PROGRESS"
    api.deployed("first", within=DEPLOY_SECONDS)
    sys.stdout.write(f"\ncreate to READY, packages from the index: {time.monotonic() - began:.2f} s")
    whole = api.build_logs("first", "one")
    assert whole.startswith(read[-1].rstrip("\n"))
    assert f"+ pandas=={PANDAS}" in whole
    assert answers(api, "first", {"a": "1"}) == [PANDAS]

    before = environments(stack)
    assert len(before) == 1

    def another() -> None:
        api.create_endpoint("second", served)
        api.deployed("second", within=DEPLOY_SECONDS)

    timed("create to READY, environment in the cache", another)
    assert "was built before" in api.build_logs("second", "one")
    assert answers(api, "second", {"a": "1"}) == [PANDAS]

    def with_variable() -> None:
        api.update_endpoint("first", {**served, "environment_vars": {"ANSWER": "changed"}})
        api.deployed("first", within=DEPLOY_SECONDS)

    timed("change of a variable to READY", with_variable)
    assert answers(api, "first", {"a": "1"}) == [f"{PANDAS} changed"]
    assert environments(stack) == before
    for name in ("first", "second"):
        api.delete_endpoint(name)


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with running_provider(KEY) as running:
        yield running


@pytest.fixture(scope="module")
def chain(api: Api, provider: Provider) -> Iterator[str]:
    """An endpoint for the chain."""
    variables = {"OPENAI_API_KEY": "{{secrets/provider/key}}", "OPENAI_BASE_URL": provider.url}

    def deployed() -> None:
        api.create_endpoint("chain", entity("1", name="one", model=CHAIN_MODEL, **variables))
        api.deployed("chain", within=DEPLOY_SECONDS)

    timed("create to READY, LangChain from the index", deployed)
    yield "chain"
    api.delete_endpoint("chain")


def test_the_langchain_flavour_asks_with_the_key_of_the_secret(api: Api, chain: str, provider: Provider) -> None:
    provider.asked.clear()
    assert answers(api, chain, {"question": "Hi"}) == ["".join(WORDS)]
    ((authorization, body),) = provider.asked
    assert authorization == f"Bearer {KEY}"
    assert [message["content"] for message in body["messages"]] == ["Be brief.", "Hi"]
    assert KEY not in api.logs(chain, "one") + api.build_logs(chain, "one")


def test_the_langchain_flavour_streams(api: Api, chain: str, provider: Provider) -> None:
    provider.asked.clear()
    body = {"dataframe_records": [{"question": "Hi"}], "stream": True}
    answer = api.persist("POST", f"/serving-endpoints/{chain}/invocations", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in answer.body.decode().split("\n\n") if event]
    assert "".join(event.strip('"') for event in events if event != "[DONE]") == "".join(WORDS)
    assert len(events) > len(WORDS)
    ((authorization, asked),) = provider.asked
    assert (authorization, asked["stream"]) == (f"Bearer {KEY}", True)
