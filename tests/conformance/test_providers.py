"""Models that ask a provider of models, with a key from a secret: what most endpoints with secrets are for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.conftest import Live
from tests.support.api import Api
from tests.support.provider import WORDS, Provider, running_provider
from tests.support.registered_models import ASKING_MODEL, FLAVOURED_MODEL, entity

pytestmark = [
    # The client leaves its connections to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed.*socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*ResourceWarning.*unclosed.*:pytest.PytestUnraisableExceptionWarning"),
]

KEY = "sk-of-the-provider-5c1e7f"


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with running_provider(KEY) as running:
        yield running


@pytest.fixture(scope="module")
def alice(live: Live, provider: Provider) -> Iterator[Api]:
    """Has an endpoint for each of the models, and one whose key is wrong."""
    alice = live.people["alice"]
    alice.create_scope("provider")
    alice.put_secret("provider", "key", KEY)
    alice.put_secret("provider", "other", "sk-somebody-elses")
    endpoints = {
        "flavoured": (FLAVOURED_MODEL, "key"),
        "asking": (ASKING_MODEL, "key"),
        "shut-out": (ASKING_MODEL, "other"),
    }
    for name, (model, key) in endpoints.items():
        variables = {"OPENAI_API_KEY": f"{{{{secrets/provider/{key}}}}}", "OPENAI_BASE_URL": provider.url}
        alice.create_endpoint(name, entity("1", model=model, **variables))
    for name in endpoints:
        alice.deployed(name)
    yield alice
    for name in endpoints:
        alice.delete_endpoint(name)


@pytest.fixture
def openai(alice: Api) -> Iterator[Any]:
    """OpenAI's client, for whom an endpoint is a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import openai
    with openai.OpenAI(base_url=f"{alice.url}/serving-endpoints", api_key=alice.token or "", max_retries=0) as client:
        yield client


def test_the_openai_flavour_asks_with_the_key_of_the_secret(alice: Api, provider: Provider) -> None:
    provider.asked.clear()
    answer = alice.call("POST", "/serving-endpoints/flavoured/invocations", {"dataframe_split": {"data": [["Hi"]]}})
    assert answer == {"predictions": ["".join(WORDS)]}
    ((authorization, body),) = provider.asked
    assert authorization == f"Bearer {KEY}"
    assert [message["content"] for message in body["messages"]] == ["Be brief.", "Hi"]


def test_the_openai_client_is_answered_through_the_platform(openai: Any, provider: Provider) -> None:
    provider.asked.clear()
    said = [{"role": "user", "content": "Hi"}]
    answer = openai.chat.completions.create(model="asking", messages=said)
    assert answer.choices[0].message.content == "".join(WORDS)
    ((authorization, body),) = provider.asked
    assert (authorization, body["messages"]) == (f"Bearer {KEY}", said)


def test_the_openai_client_streams_through_the_platform(openai: Any, provider: Provider) -> None:
    provider.asked.clear()
    said = [{"role": "user", "content": "Hi"}]
    chunks = openai.chat.completions.create(model="asking", messages=said, stream=True)
    assert tuple(chunk.choices[0].delta.content for chunk in chunks) == WORDS
    ((authorization, body),) = provider.asked
    assert (authorization, body["stream"]) == (f"Bearer {KEY}", True)


def test_a_provider_that_refuses_the_key_is_an_error_without_it(alice: Api, openai: Any) -> None:
    with pytest.raises(Exception, match="Encountered an unexpected error while evaluating the model") as caught:
        openai.chat.completions.create(model="shut-out", messages=[{"role": "user", "content": "Hi"}])
    assert getattr(caught.value, "status_code", None) == 400
    logs = "".join(
        alice.logs(name, alice.endpoint(name)["config"]["served_entities"][0]["name"])
        for name in ("shut-out", "asking")
    )
    for text in (str(caught.value), logs):
        assert KEY not in text
        assert "sk-somebody-elses" not in text
