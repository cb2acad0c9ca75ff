"""A platform is backed up under load and restored elsewhere, as an operator does it, and looked at over REST."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tessera.cli.__main__ import main
from tests.support.api import ENDPOINTS, SECRETS, Api, until
from tests.support.canaries import Canary, found_in_files
from tests.support.registered_models import GOOD, entity, fingerprint, stack_environment
from tests.support.stack import clean_environment, running_stack

SCIM = "/api/2.0/preview/scim/v2"


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def back_up(data: Path, target: Path) -> str:
    """What `tessera backup` says, in a process of its own."""
    command = [sys.executable, "-P", "-m", "tessera.cli", "backup", str(target), "--data-dir", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tessera(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command says, which succeeds or `fails`."""

    def run(*words: object, fails: bool = False) -> str:
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        assert (status != 0) == fails, said
        return said.out + said.err

    return run


class Writes:
    """Changes of every kind without a pause, of which none may fail; what was answered is remembered."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._enough = threading.Event()
        self.answered = 0
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._enough.is_set() and not self.failures:
            number = self.answered + 1
            scope = f"load-{number}"
            for path, body in (
                ("scopes/create", {"scope": scope}),
                ("acls/put", {"scope": scope, "principal": "users", "permission": "READ"}),
                ("put", {"scope": scope, "key": "key", "string_value": str(number)}),
            ):
                answer = self._api.send("POST", f"{SECRETS}/{path}", body)
                if answer.status != 200:
                    self.failures.append(f"{path}: {answer}")
            answer = self._api.send("PATCH", f"{ENDPOINTS}/quiet/tags", {"add_tags": [{"key": "n", "value": scope}]})
            if answer.status != 200:
                self.failures.append(f"tags: {answer}")
            self.answered = number

    def more(self) -> None:
        wanted = self.answered + 3
        until(lambda: self.answered >= wanted or bool(self.failures), within=120, what="more writes")

    @contextmanager
    def going_on(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run, name="writes")
        thread.start()
        try:
            self.more()
            yield
            self.more()
        finally:
            self._enough.set()
            thread.join()
        assert self.failures == []


def state(api: Api) -> dict[str, Any]:
    """What an admin sees of everything but the load."""
    endpoint = api.endpoint("asking")
    scopes = [each["name"] for each in api.call("GET", f"{SECRETS}/scopes/list")["scopes"]]
    return {
        "scopes": [name for name in scopes if not name.startswith("load-")],
        "keys": api.call("GET", f"{SECRETS}/list?scope=shop"),
        "value": api.call("GET", f"{SECRETS}/get?scope=shop&key=key"),
        "versions": api.call("GET", "/api/2.0/tessera/secrets/versions/list?scope=shop&key=key")["versions"],
        "acls": api.call("GET", f"{SECRETS}/acls/list?scope=shop"),
        "users": api.call("GET", f"{SCIM}/Users"),
        "groups": api.call("GET", f"{SCIM}/Groups"),
        "tokens": [each["token_id"] for each in api.call("GET", "/api/2.0/token-management/tokens")["token_infos"]],
        "endpoint": {name: endpoint[name] for name in ("id", "creator", "creation_timestamp", "config")},
        "permissions": api.call("GET", f"/api/2.0/permissions/serving-endpoints/{endpoint['id']}"),
        "endpoints": [each["name"] for each in api.call("GET", ENDPOINTS)["endpoints"]],
    }


def without_holds(seen: dict[str, Any]) -> dict[str, Any]:
    """Which versions replicas hold is another matter in a platform that has others."""
    return {**seen, "versions": [each["version"] for each in seen["versions"]]}


def test_operator_backs_up_a_busy_platform_and_restores_it_elsewhere(
    directory: Path, tessera: Callable[..., str]
) -> None:
    data, backup, restored = directory / "data", directory / "backup", directory / "restored"
    canary = Canary.new("a secret")
    with running_stack(data, environment=stack_environment()) as stack:
        admin = Api(stack.url, stack.token)
        admin.create_scope("shop")
        admin.put_secret("shop", "key", "before")
        admin.put_secret("shop", "key", canary.value)
        reader = admin.new_user("reader@example.com")
        admin.grant("shop", "reader@example.com", "READ")
        admin.create_endpoint("asking", entity(GOOD, OPENAI_API_KEY="{{secrets/shop/key}}"))
        admin.call("POST", ENDPOINTS, {"name": "quiet"})
        admin.deployed("asking")
        writes = Writes(admin)
        before = state(admin)
        with writes.going_on():
            acknowledged = writes.answered
            said = back_up(data, backup)
        reached = writes.answered
        admin.call("POST", f"{SECRETS}/scopes/delete", {"scope": "shop"})
        admin.delete_endpoint("asking")
    assert reader.token is not None
    tokens = [Canary.of("the admin's token", stack.token), Canary.of("a token", reader.token)]
    secret = [canary, *tokens, Canary.of("the root key", (data / "root.key").read_bytes())]
    assert found_in_files([backup], secret) == []

    key = directory / "escrow.key"
    shutil.copy(data / "root.key", key)
    wrong = directory / "wrong.key"
    wrong.touch(mode=0o600)
    wrong.write_bytes(os.urandom(32))
    shutil.rmtree(data)
    assert "Not looked at without the root key" in tessera("verify", backup)
    assert "was sealed under" in tessera("verify", backup, "--root-key", wrong, fails=True)
    assert "all rights and sealed values are whole" in tessera("verify", backup, "--root-key", key)
    to_restore = ("restore", backup, restored, "--root-key")
    assert "was sealed under" in tessera(*to_restore, wrong, fails=True)
    assert f"tessera up --data-dir {restored}" in tessera(*to_restore, key)
    assert said.partition("root key ")[2].split(",")[0] in tessera("verify", backup)

    (restored / "admin.token").touch(mode=0o600)  # for `running_stack`, which reads it
    (restored / "admin.token").write_text(stack.token)
    with running_stack(restored, environment=stack_environment()) as stack:
        admin = Api(stack.url, stack.token)
        admin.deployed("asking")
        assert without_holds(state(admin)) == without_holds(before)
        assert admin.ask("asking", "fingerprint:OPENAI_API_KEY") == [fingerprint(canary.value)]
        assert Api(stack.url, reader.token).send("GET", f"{SECRETS}/get?scope=shop&key=key").status == 200
        written = [name for name in scopes(admin) if name.startswith("load-")]
        assert acknowledged <= len(written) <= reached
        assert {*written} == {f"load-{number}" for number in range(1, len(written) + 1)}
        token = tessera("admin-token", "--data-dir", restored).split(" (")[0]
        assert "asking" in [
            each["name"] for each in Api(stack.url, Path(token).read_text().strip()).call("GET", ENDPOINTS)["endpoints"]
        ]


def scopes(api: Api) -> list[str]:
    return [each["name"] for each in api.call("GET", f"{SECRETS}/scopes/list")["scopes"]]
