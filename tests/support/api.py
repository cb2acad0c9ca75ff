"""The REST API as a user of a live platform calls it, blocking, with one token; and what tests often do with it.

A new connection for every request: a call may come from any thread, and none is spoiled by a service that is killed.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ENDPOINTS = "/api/2.0/serving-endpoints"
SECRETS = "/api/2.0/secrets"
REQUEST_SECONDS = 60.0
DEPLOY_SECONDS = 90.0


@dataclass(frozen=True)
class Answer:
    """A whole answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"{self.status}: {self.body[:1000].decode('utf-8', 'replace')}"


@dataclass(frozen=True)
class Api:
    """One platform, called with one token (none at all when it is None)."""

    url: str
    token: str | None = field(repr=False)

    def send(
        self, method: str, path: str, body: Any = None, *, raw: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request; `body` travels as JSON, `raw` as it is."""
        sent = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        if body is not None:
            raw = json.dumps(body).encode()
            sent["content-type"] = "application/json"
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, raw or None, {**sent, **(headers or {})})
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def persist(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        """As `send`, but again for as long as the answer asks for a retry, which official clients grant it."""
        deadline = time.monotonic() + REQUEST_SECONDS
        while (answer := self.send(method, path, body, **more)).status == 503 and "retry-after" in answer.headers:
            assert time.monotonic() < deadline, f"{method} {path} is still answered {answer}"
            time.sleep(int(answer.headers["retry-after"]))
        return answer

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request that must succeed; returns the JSON answered."""
        answer = self.persist(method, path, body)
        assert answer.status in (200, 201), f"{method} {path} was answered {answer}"
        return answer.json()

    def refused(self, method: str, path: str, body: Any = None) -> tuple[int, str, str]:
        """One request that must fail; returns status, code and message."""
        answer = self.persist(method, path, body)
        assert answer.status >= 400, f"{method} {path} was answered {answer}"
        document = answer.json()
        return answer.status, document["error_code"], document["message"]

    # --- people and secrets ---

    def new_user(self, name: str) -> Api:
        """A new ordinary user's view of the platform; for admins."""
        self.call("POST", "/api/2.0/preview/scim/v2/Users", {"userName": name})
        token = self.call("POST", "/api/2.0/token-management/on-behalf-of/tokens", {"application_id": name})
        return Api(self.url, token["token_value"])

    def create_scope(self, scope: str) -> None:
        self.call("POST", f"{SECRETS}/scopes/create", {"scope": scope})

    def put_secret(self, scope: str, key: str, value: str) -> None:
        self.call("POST", f"{SECRETS}/put", {"scope": scope, "key": key, "string_value": value})

    def grant(self, scope: str, principal: str, permission: str) -> None:
        self.call("POST", f"{SECRETS}/acls/put", {"scope": scope, "principal": principal, "permission": permission})

    def withdraw(self, scope: str, principal: str) -> None:
        self.call("POST", f"{SECRETS}/acls/delete", {"scope": scope, "principal": principal})

    # --- endpoints ---

    def create_endpoint(self, name: str, *entities: dict[str, Any]) -> Any:
        return self.call("POST", ENDPOINTS, {"name": name, "config": {"served_entities": list(entities)}})

    def update_endpoint(self, name: str, *entities: dict[str, Any]) -> Any:
        return self.call("PUT", f"{ENDPOINTS}/{name}/config", {"served_entities": list(entities)})

    def endpoint(self, name: str) -> Any:
        return self.call("GET", f"{ENDPOINTS}/{name}")

    def delete_endpoint(self, name: str) -> None:
        self.call("DELETE", f"{ENDPOINTS}/{name}")

    def logs(self, name: str, entity_name: str) -> str:
        answer = self.call("GET", f"{ENDPOINTS}/{name}/served-models/{entity_name}/logs")
        return str(answer["logs"])

    def build_logs(self, name: str, entity_name: str, **parameters: int) -> str:
        query = "".join(f"?{key}={value}" for key, value in parameters.items())
        answer = self.call("GET", f"{ENDPOINTS}/{name}/served-models/{entity_name}/build-logs{query}")
        return str(answer["logs"])

    def deployed(self, name: str, *, within: float = DEPLOY_SECONDS) -> Any:
        """The endpoint once it is ready and no update is under way; fails when its update did."""

        def is_deployed() -> bool:
            endpoint = self.endpoint(name)
            state = endpoint["state"]
            assert state["config_update"] != "UPDATE_FAILED", f"the update failed: {endpoint}"
            return bool(state["ready"] == "READY" and state["config_update"] == "NOT_UPDATING")

        until(is_deployed, within=within, what=f"{name} is deployed")
        return self.endpoint(name)

    def failed(self, name: str, *, within: float = DEPLOY_SECONDS) -> Any:
        """The endpoint once its update has failed."""

        def has_failed() -> bool:
            return bool(self.endpoint(name)["state"]["config_update"] == "UPDATE_FAILED")

        until(has_failed, within=within, what=f"the update of {name} has failed")
        return self.endpoint(name)

    def ask(self, name: str, *questions: str) -> list[str]:
        """What the model of `tests.support.registered_models` behind an endpoint answers to each question."""
        answer = self.call("POST", f"/serving-endpoints/{name}/invocations", _asked(questions))
        return list(answer["predictions"])

    @contextmanager
    def querying(self, name: str, *questions: str) -> Iterator[Queries]:
        """Asks without a pause, in a thread, until left; leaving fails unless every query was answered well."""
        queries = Queries()
        thread = threading.Thread(target=queries.run, args=(self, name, questions), name="queries")
        thread.start()
        try:
            queries.more()
            yield queries
            queries.more()
        finally:
            queries.enough.set()
            thread.join()
        assert not queries.failures, f"{len(queries.failures)} queries failed, the first: {queries.failures[0]}"


class Queries:
    """Queries that are being sent, and what came of them."""

    def __init__(self) -> None:
        self.enough = threading.Event()
        self.answers: list[list[str]] = []
        self.failures: list[str] = []
        self.seconds: list[float] = []
        """How long each of them took."""

    def run(self, api: Api, name: str, questions: tuple[str, ...]) -> None:
        path = f"/serving-endpoints/{name}/invocations"
        while not self.enough.is_set():
            began = time.monotonic()
            try:
                answer = api.send("POST", path, _asked(questions))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                continue
            finally:
                self.seconds.append(time.monotonic() - began)
            if answer.status == 200:
                self.answers.append(answer.json()["predictions"])
            else:
                self.failures.append(str(answer))

    def more(self, number: int = 20) -> None:
        """Returns when so many more have been answered."""
        wanted = len(self.answers) + number
        until(lambda: len(self.answers) >= wanted or bool(self.failures), within=30, what=f"{number} more answers")


def _asked(questions: tuple[str, ...]) -> Any:
    return {"dataframe_records": [{"ask": question} for question in questions]}


def until(claim: Callable[[], bool], *, within: float, what: str) -> None:
    """Returns once `claim()` holds; fails, naming `what`, when it does not within so many seconds."""
    deadline = time.monotonic() + within
    while not claim():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(0.05)
